"""Which blocks were read when."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import polars as pl

from kvtrace.reports.charts import heat
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold, clock

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
    taken = int(
        run.sql(
            "SELECT count(*) FROM block_events WHERE engine_index = {engine} AND kind IN ('allocate', 'hit')"
        ).item()
    )
    if not taken:
        raise Untold("no block was ever taken by a request")
    steps = run.sql("SELECT max(step) + 1 FROM steps WHERE engine_index = {engine}").item()
    blocks = run.sql("SELECT max(block) + 1 FROM block_events WHERE engine_index = {engine}").item()
    blocks = max(blocks, int(run.header.get("num_blocks") or 0))
    width, tall = ceil(steps / COLUMNS), ceil(blocks / ROWS)
    followed = taken <= TAKEN
    if followed:
        # A stretch of steps counts in every column that it touches, with the steps that lie there.
        query = f"""
            WITH spans AS (
              SELECT block // {tall} AS row, first_step, first_step + steps AS past_step
              FROM read_spans WHERE engine_index = {{engine}}),
            cut AS (
              SELECT *, unnest(range(first_step // {width}, (past_step - 1) // {width} + 1)) AS "column" FROM spans)
            SELECT row, "column",
                   sum(least(past_step, ("column" + 1) * {width}) - greatest(first_step, "column" * {width}))
                     AS accesses
            FROM cut GROUP BY row, "column" ORDER BY row, "column" """
    else:
        query = f"""
            SELECT block // {tall} AS row, greatest(step, 0) // {width} AS "column", count(*) AS accesses
            FROM block_events WHERE engine_index = {{engine}} AND kind IN ('allocate', 'hit')
            GROUP BY row, "column" ORDER BY row, "column" """
    name, per = ("reads", "reads_per_block_and_step") if followed else ("taken", "taken_per_block")
    row, column = pl.col("row"), pl.col("column")
    cells = pl.min_horizontal((row + 1) * tall, pl.lit(blocks)) - row * tall
    if followed:
        cells = cells * (pl.min_horizontal((column + 1) * width, pl.lit(steps)) - column * width)
    frame = run.sql(query).select(
        (row * tall).alias("from_block"), (column * width).alias("from_step"), pl.col("accesses").alias(name),
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
