"""How far apart the uses of a block are, and how long a cached one lives."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.memory import LIFETIMES, SPREAD
from kvtrace.metrics.reuse import BY_TURN, DISTANCES, REUSE, TIMES
from kvtrace.people import Style, percent, seconds
from kvtrace.reports.charts import bars, marked_place
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.words import share


@section(
    "reuse",
    title="Reuse, and the lives of blocks",
    label="Reuse and lifetimes",
    order=60,
    plots={
        "reuse-distance": "Uses of a block used before, by the distinct blocks used in between.",
        "reuse-time": "The same, by the time in between.",
        "reuse-by-turn": "Share of blocks used before, by turn, where an import tells turns.",
        "lifetimes": "How long cached blocks lived until their eviction, and how long nobody had held them.",
    },
)
def reuse(run: Run) -> Iterator[Panel]:
    """Distances and times between uses; lifetimes and idle times of cached blocks."""
    yield _distances(run)
    yield _times(run)
    yield from _turns(run)
    yield _lifetimes(run)


def _distances(run: Run) -> Panel:
    name, title = "reuse-distance", "Reuse distance"
    try:
        frame = run.rows(DISTANCES).drop("engine_index").rename({"at": "distance"})
    except Untold as reason:
        return Panel(name, title=title, why=f"Not known: {reason}.")
    whole = run.figures(REUSE)
    if not frame.height:
        return Panel(name, title=title, why="No block was used twice.")
    prose = (
        f"{share(whole['reused_block_ratio'])} of {whole['block_uses']:,} uses were of a block used before, half "
        f"of them after {whole['reuse_distance_p50_blocks']:,.0f} or fewer other blocks. "
        f"{share(whole['single_use_block_ratio'])} of {whole['unique_blocks']:,} distinct blocks were used once."
    )
    figure = bars(
        frame, "distance", [("uses", "reuses_at_distance", "$hit")], "distinct blocks used in between", "uses",
        label="Uses of a block used before, by reuse distance",
    )  # fmt: skip
    if run.capacity is not None:
        lows = [int(text.split("-")[0]) for text in frame["distance"].to_list()]
        figure["layout"] |= marked_place(
            sum(low <= run.capacity for low in lows) - 0.5, f"capacity, {run.capacity:,} blocks", last=len(lows) - 0.5
        )
        prose += " Left of the mark reuse fits into the cache, right of it LRU has lost the block."
    return Panel(
        name, prose, figure, frame, Style(cells={"reuses_up_to_distance_ratio": percent}), title=title, height=19
    )


def _times(run: Run) -> Panel:
    name, title = "reuse-time", "Reuse time"
    try:
        frame = run.rows(TIMES).drop("engine_index").rename({"at": "time"})
    except Untold as reason:
        return Panel(name, title=title, why=f"Not known: {reason}.")
    if not run.timed:
        return Panel(name, title=title, why="The run has no clock.")
    if not frame.height:
        return Panel(name, title=title, why="No block was used twice, or the trace has no times.")
    whole = run.figures(REUSE)
    prose = (
        f"Half of the reuses came within {seconds(whole['reuse_time_p50_s'])}, 99% within "
        f"{seconds(whole['reuse_time_p99_s'])}."
    )
    figure = bars(
        frame, "time", [("uses", "reuses_after_time", "$hit")], "time in between, by its decade", "uses",
        label="Uses of a block used before, by reuse time",
    )  # fmt: skip
    return Panel(
        name, prose, figure, frame, Style(cells={"reuses_up_to_time_ratio": percent}), title=title, height=19
    )  # fmt: skip


def _turns(run: Run) -> Iterator[Panel]:
    try:
        frame = run.rows(BY_TURN).drop("engine_index").rename({"at": "turn"})
    except Untold:
        return  # recorded runs have their turns among the hits
    if frame.height:
        figure = bars(
            frame, "turn", [("used before", "reused_block_ratio_at_turn", "$hit")], "turn, as the file counts",
            "blocks used before", label="Share of blocks used before, by turn", format=".0%",
        )  # fmt: skip
        yield Panel("reuse-by-turn", "What an endless cache finds, turn by turn.", figure, frame,
                    Style(cells={"reused_block_ratio_at_turn": percent}), title="Reuse by turn", height=17)  # fmt: skip


def _lifetimes(run: Run) -> Panel:
    name, title = "lifetimes", "Lifetimes of cached blocks"
    try:
        frame = run.rows(SPREAD).drop("engine_index").rename({"at": "time"})
    except Untold as reason:
        return Panel(name, title=title, why=f"Not known: {reason}.")
    if not run.timed:
        return Panel(name, title=title, why="The run has no clock.")
    whole = run.figures(LIFETIMES)
    if not frame.height:
        return Panel(name, title=title, why=f"None of {whole['fills']:,} cached blocks was evicted.")
    frame = frame.with_columns(pl.col("lifetimes_of_time", "idle_of_time").cast(pl.Int64))
    prose = (
        f"{whole['fills']:,} times a block became cached, {share(whole['unused_fill_ratio'])} of them for nobody: "
        f"it was never hit. {whole['evictions']:,} were evicted, at the median "
        f"{seconds(whole['lifetime_p50_s'])} after they were filled and {seconds(whole['idle_p50_s'])} after the last "
        "request had let go of them."
    )
    figure = bars(
        frame, "time",
        [("from fill to eviction", "lifetimes_of_time", "$used"), ("idle before it", "idle_of_time", "$idle")],
        "time, by its decade", "evicted blocks", label="Lifetimes and idle times of evicted blocks", mode="group",
    )  # fmt: skip
    return Panel(name, prose, figure, frame, title=title, height=19)
