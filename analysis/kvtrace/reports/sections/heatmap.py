"""Which blocks were read when."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import polars as pl

from kvtrace.reports.charts import heat
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold, clock
from kvtrace.views.event_arrays import block_count
from kvtrace.views.fast_taken import taken as taken_in

ROWS, COLUMNS = 48, 100
TAKEN = 500_000  # blocks taken by requests, up to which all their reads are followed


@section(
    "accesses",
    title="Accesses, block by block",
    label="Access heat map",
    order=90,
    plots={"accesses": "How often each block was read over the run, as a heat map."},
)
def accesses(run: Run) -> Iterator[Panel]:
    """Reads of the engine's blocks (of a large trace: how often they were taken); for an import, uses of its distinct
    blocks."""
    if run.imported:
        yield _uses(run)
        return
    run.require("steps")
    yield _reads(run)


def _reads(run: Run) -> Panel:
    steps = run.sql("SELECT max(step) + 1 FROM steps WHERE engine_index = {engine}").item()
    blocks = block_count(run.trace.reader, run.header)
    width, tall = ceil(steps / COLUMNS), ceil(blocks / ROWS)
    squares = taken_in(run.trace.reader, run.header, tall, width, blocks, steps)
    taken = int(squares.sum())
    if not taken:
        raise Untold("no block was ever taken by a request")
    followed = taken <= TAKEN
    if followed:
        # A stretch of steps counts in every column that it touches, with the steps that lie there.
        counted = run.sql(f"""
            WITH spans AS (
              SELECT block // {tall} AS row, first_step, first_step + steps AS past_step
              FROM read_spans WHERE engine_index = {{engine}}),
            cut AS (
              SELECT *, unnest(range(first_step // {width}, (past_step - 1) // {width} + 1)) AS "column" FROM spans)
            SELECT row, "column",
                   sum(least(past_step, ("column" + 1) * {width}) - greatest(first_step, "column" * {width}))
                     AS accesses
            FROM cut GROUP BY row, "column" ORDER BY row, "column" """)
    else:
        row, column = squares.nonzero()
        counted = pl.DataFrame({"row": row, "column": column, "accesses": squares[row, column]})
    name, per = ("reads", "reads_per_block_and_step") if followed else ("taken", "taken_per_block")
    from_block, from_step = pl.col("row") * tall, pl.col("column") * width
    cells = pl.min_horizontal(from_block + tall, pl.lit(blocks)) - from_block
    if followed:
        cells = cells * (pl.min_horizontal(from_step + width, pl.lit(steps)) - from_step)
    frame = counted.select(
        from_block.alias("from_block"), from_step.alias("from_step"), pl.col("accesses").alias(name),
        (pl.col("accesses") / cells).round(4).alias(per),
    )  # fmt: skip
    several = f"for {_many(tall, 'block')} by {_many(width, 'step')} at a time"
    if followed:
        prose = (
            "A request reads all its blocks in every step that it runs. The colour is the mean number of requests that "
            f"read a block in a step, {several}. Pale stretches lie idle; dark ones are prefixes that many read at "
            "once."
        )
    else:
        prose = (
            f"How often a request took a block, freshly or out of the cache, {several}. With {taken:,} blocks taken, "
            "the reads in between are not followed one by one."
        )
    figure = heat(
        frame, "from_step", "from_block", per, "scheduler step", "block of the cache",
        "requests reading a block in a step" if followed else "times that a block was taken", (width, tall),
        (steps, blocks), label="Reads of blocks" if followed else "How often blocks were taken",
    )  # fmt: skip
    return Panel("accesses", prose, figure, frame, height=26)


def _uses(run: Run) -> Panel:
    run.require("chains")
    first, last, identities = run.sql(
        "SELECT min(time_ns), max(time_ns), max(identity) + 1 FROM reuse WHERE engine_index = {engine}"
    ).row(0)
    timed = first is not None and last > first
    if timed:
        axis = clock("time_ns", first, last + 1, "since the first arrival")
        place, extent, name, title = axis.slice(COLUMNS), axis.extent, axis.name, axis.title
        width: float = extent / COLUMNS
    else:
        width = ceil(run.requests / COLUMNS)
        place, extent, name, title = f"request // {width}", run.requests, "request", "request"
    tall = ceil(identities / ROWS)
    frame = run.sql(f"""
        SELECT identity // {tall} AS row, {place} AS "column", count(*) AS uses
        FROM reuse WHERE engine_index = {{engine}} GROUP BY row, "column" ORDER BY row, "column" """)
    frame = frame.select(
        (pl.col("row") * tall).alias("from_block"), (pl.col("column") * width).round(6).alias(name), pl.col("uses")
    )
    prose = (
        "An import knows no cache, so these are the distinct blocks of its requests, numbered in the order of their "
        f"first use, {_many(tall, 'block')} at a time: new ones along the edge, and below it those that came back."
    )
    figure = heat(
        frame, name, "from_block", "uses", title, "distinct block, by first use", "uses by requests", (width, tall),
        (extent, identities), label="Uses of distinct blocks over time",
    )  # fmt: skip
    return Panel("accesses", prose, figure, frame, height=26)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
