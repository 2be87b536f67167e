"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl

from kvtrace.metrics.hits import HITS, HITS_OVER_TIME
from kvtrace.metrics.memory import USE
from kvtrace.metrics.passes import THROUGHPUT
from kvtrace.metrics.reuse import REUSE
from kvtrace.metrics.waiting import ITL, LATENCY, PREEMPTION
from kvtrace.people import percent, seconds
from kvtrace.reports.charts import by_capacity, lines
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.sections.curves import miss_ratios

GROUPS = (THROUGHPUT, USE, HITS, PREEMPTION, LATENCY, ITL, REUSE)


def _count(value: float) -> str:
    return f"{value:,.0f}"


FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("usable blocks", "capacity_blocks", _count),
    ("steps", "steps", _count),
    ("duration", "duration_s", seconds),
    ("prefill tokens a second", "prefill_tokens_per_s", _count),
    ("decode tokens a second", "decode_tokens_per_s", _count),
    ("prompt tokens found", "token_hit_ratio", percent),
    ("missed: evicted", "capacity_miss_ratio", percent),
    ("missed: never cached", "cold_miss_ratio", percent),
    ("blocks in use, mean", "block_utilisation_mean", percent),
    ("preemptions", "preemptions", _count),
    ("work done again", "recomputed_token_ratio", percent),
    ("time to first token, median", "ttft_p50_s", seconds),
    ("time to first token, 99th percentile", "ttft_p99_s", seconds),
    ("inter-token latency, median", "itl_p50_s", seconds),
    ("inter-token latency, 99th percentile", "itl_p99_s", seconds),
    ("end to end, median", "e2e_p50_s", seconds),
    ("distinct blocks", "unique_blocks", _count),
    ("uses of a block used before", "reused_block_ratio", percent),
)
QUANTILES = [i / 100 for i in range(100)]


@section(
    "compare",
    title="Side by side",
    order=5,
    across=True,
    plots={
        "compare-miss-ratio": "Miss ratio of LRU against capacity, a line for each trace.",
        "compare-hits": "Hit ratio over the tenths of each trace's time.",
        "compare-ttft": "Distribution of the time to first token, a line for each trace.",
    },
)
def compare(runs: Sequence[Run]) -> Iterator[Panel]:
    """A table of figures, then curves, hits over time and latencies of all runs in one chart each."""
    yield Panel("compare", table=figures(runs))
    yield _curves(runs)
    yield _hits(runs)
    yield _latencies(runs)


def figures(runs: Sequence[Run]) -> pl.DataFrame:
    """A row for each figure that some run has, a column for each run, as text."""
    known = [{name: value for group in GROUPS for name, value in run.figures(group).items()} for run in runs]
    timeless = {name for _, name, _ in FIGURES if name.endswith("_s")}
    rows = [["requests", *(f"{run.requests:,}" for run in runs)]]
    for label, name, words in FIGURES:
        values = [
            None if name in timeless and not run.timed else found[name] for run, found in zip(runs, known, strict=True)
        ]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else words(value) for value in values)])
    return pl.DataFrame(rows, schema=["figure", *(run.name for run in runs)], orient="row")


def _curves(runs: Sequence[Run]) -> Panel:
    name, title = "compare-miss-ratio", "Miss ratio under LRU"
    parts = []
    for run in runs:
        try:
            rows = miss_ratios(run).filter(pl.col("policy") == "lru")
        except Untold:
            continue
        parts.append(rows.select(pl.lit(run.name).alias("run"), pl.exclude("policy")))
    frame = pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame()
    if not frame.height:
        return Panel(name, title=title, why="No request has a whole block.")
    most = frame["capacity_blocks"].max()
    assert isinstance(most, int)
    figure = by_capacity(
        frame, "run", "capacity_blocks", "token_miss_ratio", "prompt tokens missed", most,
        label="Miss ratio of LRU against cache capacity, by trace",
    )  # fmt: skip
    own = [
        (run, row["token_miss_ratio"][0])
        for run in runs
        for row in [frame.filter((pl.col("run") == run.name) & (pl.col("capacity_blocks") == run.capacity))]
        if row.height
    ]
    if own:
        figure["data"].append(
            {
                "type": "scatter", "mode": "markers", "name": "its own cache", "meta": "mark",
                "x": [run.capacity for run, _ in own], "y": [ratio for _, ratio in own],
                "text": [run.name for run, _ in own], "hovertemplate": "%{y:.2%}<extra>the cache of %{text}</extra>",
                "marker": {"symbol": "diamond", "size": 12, "color": "$mark", "line": {"color": "$paper", "width": 2}},
            }
        )  # fmt: skip
    sizes = {run.block_size for run in runs}
    prose = "Diamonds mark each run's own cache size."
    if len(sizes) > 1:
        prose += " The runs differ in their block sizes: a block is not the same number of tokens in each."
    return Panel(name, prose, figure, frame, title=title)


def _hits(runs: Sequence[Run]) -> Panel:
    name, title = "compare-hits", "Hits over time"
    parts = []
    for run in runs:
        try:
            rows = run.rows(HITS_OVER_TIME)
        except Untold:
            continue
        parts.append(rows.select(run=pl.lit(run.name), tenth=pl.col("at").cast(pl.Int32) + 1,
                                 token_hit_ratio=pl.col("token_hit_ratio_at_time")))  # fmt: skip
    frame = pl.concat(parts) if parts else pl.DataFrame()
    if not frame.height:
        return Panel(name, title=title, why="No engine looked anything up.")
    figure = lines(
        frame, "run", "tenth", "token_hit_ratio", "tenth of the run's time", "prompt tokens found",
        label="Hit ratio over the tenths of the time, by trace", format=".0%",
    )  # fmt: skip
    figure["layout"]["xaxis"] |= {"dtick": 1}
    return Panel(name, "Share of the prompt tokens that the engines themselves found.", figure, frame, title=title,
                 height=19)  # fmt: skip


def _latencies(runs: Sequence[Run]) -> Panel:
    name, title = "compare-ttft", "Time to first token"
    parts = []
    for run in runs:
        if not run.timed or not run.has("scheduled"):
            continue
        found = run.sql(f"""
            SELECT quantile_cont(ttft_ns / 1e9, {QUANTILES}) AS ttft_s FROM latencies
            WHERE engine_index = {{engine}} AND (finish_reason IS NULL OR finish_reason <> 'abort')""")["ttft_s"][0]
        if found is not None:
            parts.append(pl.DataFrame({"run": run.name, "quantile": QUANTILES, "ttft_s": found}))
    if not parts:
        return Panel(name, title=title, why="No trace has times of scheduled requests.")
    frame = pl.concat(parts)
    figure = lines(
        frame, "run", "ttft_s", "quantile", "time to first token, s", "requests that had it by then",
        label="Distribution of the time to first token, by trace", format=".0%", markers=False,
    )  # fmt: skip
    prose = "Left is faster. Requests that were aborted are left out."
    return Panel(name, prose, figure, frame, title=title, height=19)
