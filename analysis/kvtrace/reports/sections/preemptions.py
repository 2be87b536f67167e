"""Preemptions and what they cost; blocks copied to a slower tier and back."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.waiting import PREEMPTION
from kvtrace.people import Style, seconds, size
from kvtrace.reports.charts import Band, bars, over_time
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run
from kvtrace.reports.words import share

SLICES = 80
VICTIMS = 10
LOST: tuple[Band, ...] = (
    ("computed again", "tokens_recomputed", "$preempted"),
    ("lost, not computed again", "tokens_spared", "$cold"),
)


@section(
    "preemptions",
    title="Preemptions and offload traffic",
    label="Preemptions, offload",
    order=70,
    plots={
        "preemptions": "Tokens that preempted requests lost, and those computed again, over time.",
        "offload": "Blocks stored to a slower tier and loaded from it, over time.",
    },
)
def preemptions(run: Run) -> Iterator[Panel]:
    """Losses over time and the worst victims, then transfers over time."""
    yield from _preemptions(run)
    yield _offload(run)


def _preemptions(run: Run) -> Iterator[Panel]:
    title = "Preemptions"
    whole = run.figures(PREEMPTION)
    if not whole["preemptions"]:
        run.require("steps")
        yield Panel("preemptions", title=title, why="No request was preempted.")
        return
    axis = run.axis
    count = max(1, min(SLICES, run.steps // 4))
    frame = run.sql(f"""
        SELECT {axis.slice(count)} AS slice, count(*) AS preemptions, sum(tokens_lost) AS tokens_lost,
               sum(coalesce(tokens_recomputed, 0)) AS tokens_recomputed, sum(blocks_lost) AS blocks_lost
        FROM preemptions JOIN (SELECT engine_index, step, start_ns FROM steps) USING (engine_index, step)
        WHERE engine_index = {{engine}} GROUP BY slice ORDER BY slice""")
    frame = frame.with_columns(
        tokens_spared=(pl.col("tokens_lost") - pl.col("tokens_recomputed")).clip(lower_bound=0)
    ).select(axis.begin("slice", count), pl.exclude("slice"))
    prose = (
        f"{whole['preemptions']:,} preemptions hit {share(whole['preempted_request_ratio'])} of the requests and "
        f"took {whole['preempted_blocks']:,} blocks with {whole['preempted_tokens']:,} computed tokens. "
        f"{whole['recomputed_tokens']:,} tokens were computed again, {share(whole['recomputed_token_ratio'])} of "
        "all scheduled ones; the others were still in the cache, or never needed again."
    )
    if whole["preempted_p50_s"] is not None and run.timed:
        prose += f" Half of the victims ran again within {seconds(whole['preempted_p50_s'])}."
    figure = bars(
        frame, axis.name, LOST, axis.title, "tokens of victims", label="Tokens lost by preemptions over time"
    )  # fmt: skip
    over_time(figure, axis.extent, count)
    yield Panel("preemptions", prose, figure, frame, Style(cells=axis.cells), title=title, height=19)
    worst = run.sql(f"""
        SELECT request, count(*) AS times, sum(blocks_lost) AS blocks_lost, sum(tokens_lost) AS tokens_lost,
               sum(tokens_recomputed) AS tokens_recomputed, sum(readmit_ns - time_ns) / 1e9 AS away_s
        FROM preemptions WHERE engine_index = {{engine}} GROUP BY request
        ORDER BY tokens_recomputed DESC NULLS LAST, request LIMIT {VICTIMS}""")
    columns = [name for name in worst.columns if run.timed or name != "away_s"]
    yield Panel("victims", f"The {worst.height} requests that were made to compute most again.", None,
                worst.select(columns), title="Victims")  # fmt: skip


def _offload(run: Run) -> Panel:
    title = "Offload traffic"
    axis = run.axis
    count = max(1, min(SLICES, run.steps // 4))
    frame = run.sql(f"""
        SELECT {axis.slice(count)} AS slice,
               sum(CASE WHEN kind = 'store' THEN blocks ELSE 0 END) AS blocks_stored,
               sum(CASE WHEN kind = 'load' THEN blocks ELSE 0 END) AS blocks_loaded,
               sum(CASE WHEN kind = 'store' THEN bytes ELSE 0 END) AS bytes_stored,
               sum(CASE WHEN kind = 'load' THEN bytes ELSE 0 END) AS bytes_loaded
        FROM (SELECT engine_index, step, kind::VARCHAR AS kind, blocks, bytes FROM offloads)
        JOIN (SELECT engine_index, step, start_ns FROM steps) USING (engine_index, step)
        WHERE engine_index = {{engine}} GROUP BY slice ORDER BY slice""")
    if not frame.height:
        return Panel("offload", title=title, why="No block was copied to a slower tier or back.")
    sums = frame.sum().row(0, named=True)
    told = [
        f"{sums[f'blocks_{way}']:,} blocks" + (f" ({size(bytes_)})" if (bytes_ := sums[f"bytes_{way}"]) else "")
        for way in ("stored", "loaded")
    ]
    frame = frame.select(axis.begin("slice", count), pl.exclude("slice"))
    figure = bars(
        frame, axis.name, [("stored", "blocks_stored", "$idle"), ("loaded", "blocks_loaded", "$used")], axis.title,
        "blocks", label="Blocks copied to a slower tier and back, over time",
    )  # fmt: skip
    over_time(figure, axis.extent, count)
    return Panel(
        "offload", f"{told[0]} were stored to a slower tier, {told[1]} loaded from it.", figure, frame,
        Style(cells=axis.cells | {"bytes_stored": size, "bytes_loaded": size}),
        title=title, height=19,
    )  # fmt: skip
