"""The use of the cache's blocks over time, with the preemptions on top."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.memory import USE
from kvtrace.metrics.waiting import PREEMPTION
from kvtrace.people import Style
from kvtrace.reports.charts import OCCUPANCY, over_time, stack, with_preemptions
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.words import share

STEPS = 1200  # as many are drawn one by one; of more, means over SLICES
SLICES = 600


@section(
    "occupancy",
    title="What the blocks were doing",
    order=20,
    plots={"occupancy": "Blocks in use, cached but idle, and free, over time, with preemptions."},
)
def occupancy(run: Run) -> Iterator[Panel]:
    """One stacked chart."""
    if run.has("steps") and run.capacity is None:
        raise Untold("the trace does not know the size of the cache")
    frame = timeline(run)
    use, lost = run.figures(USE), run.figures(PREEMPTION)
    prose = (
        f"On average requests held {share(use['block_utilisation_mean'])} of the blocks, "
        f"{share(use['cached_idle_ratio'])} kept a prefix that nobody was using, and "
        f"{share(use['free_ratio'])} held nothing."
    )
    if use["slot_utilisation_mean"] is not None:
        prose += (
            f" Of all token slots {share(use['slot_utilisation_mean'])} really held keys and values of running "
            f"requests; {share(use['fragmentation_ratio'])} of the slots in used blocks stayed empty."
        )
    prose += f" Preemptions (marked on top): {lost['preemptions']:,}." if lost["preemptions"] else " No preemptions."
    axis = run.axis
    each = run.steps <= STEPS
    figure = stack(
        frame, axis.name, OCCUPANCY, axis.title, "blocks" + ("" if each else ", means"),
        label="Blocks in use, cached but idle and free, over time", shape="hv",
    )  # fmt: skip
    over_time(figure, axis.extent)
    marks = frame.filter(pl.col("preemptions") > 0)
    words = [f"{n:,} preemption{'s' if n > 1 else ''}" for n in marks["preemptions"].to_list()]
    assert run.capacity is not None
    yield Panel(
        "occupancy", prose, with_preemptions(figure, marks[axis.name].to_list(), words, run.capacity), frame,
        Style(cells=axis.cells),
    )  # fmt: skip


def timeline(run: Run) -> pl.DataFrame:
    """used, cached_idle, free (blocks) and preemptions, by step or as means over the steps of a slice of the time.

    A slice in which no step began has the values of the one before.
    """
    axis = run.axis
    count = run.steps
    if count <= STEPS:
        frame = run.sql(f"""
            SELECT {axis.column}, used, cached_idle, free, coalesce(preemptions, 0) AS preemptions
            FROM occupancy JOIN (SELECT engine_index, step FROM steps) USING (engine_index, step)
            LEFT JOIN (SELECT engine_index, step, count(*) AS preemptions FROM preemptions GROUP BY ALL)
              USING (engine_index, step)
            WHERE engine_index = {{engine}} ORDER BY step""")
        return frame.select(axis.shown(axis.column), "used", "cached_idle", "free", "preemptions")
    frame = run.sql(f"""
        SELECT {axis.slice(SLICES)} AS slice, avg(used) AS used, avg(cached_idle) AS cached_idle, avg(free) AS free,
               sum(coalesce(preemptions, 0)) AS preemptions
        FROM occupancy
        LEFT JOIN (SELECT engine_index, step, count(*) AS preemptions FROM preemptions GROUP BY ALL)
          USING (engine_index, step)
        WHERE engine_index = {{engine}} GROUP BY slice ORDER BY slice""")
    grid = pl.DataFrame({"slice": pl.int_range(SLICES, eager=True, dtype=pl.Int32)})
    return (
        grid.join(frame, on="slice", how="left", maintain_order="left")
        .with_columns(pl.col("used", "cached_idle", "free").round(2).forward_fill(), pl.col("preemptions").fill_null(0))
        .select(axis.begin("slice", SLICES), "used", "cached_idle", "free", "preemptions")
    )
