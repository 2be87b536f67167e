"""What caches of other sizes and policies would have missed."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace import metrics
from kvtrace.reports.charts import by_capacity, with_own_cache
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.words import share

SHOWN = ("policy", "capacity_blocks", "token_miss_ratio", "token_hit_ratio", "block_hit_ratio", "token_hits",
         "block_hits", "method")  # fmt: skip


@section(
    "curves",
    title="What another cache would have missed",
    label="Miss-ratio curves",
    order=50,
    plots={"miss-ratio": "Miss ratio against cache capacity, by policy, with the optimum and the run's own cache."},
)
def curves(run: Run) -> Iterator[Panel]:
    """One chart, a line for each policy."""
    frame = miss_ratios(run)
    if not frame.height:
        raise Untold("no cache of the sizes tried holds even the largest request")
    own = metrics.own_hits(run.trace.reader, run.header)
    ratio = own["token_hit_ratio"] if own else None
    prose = "Share of prompt tokens that a cache of so many blocks would have missed, replayed from the requests. "
    if ratio is not None:
        prose += (
            f"The diamond is what the engine itself missed, {share(1 - ratio)}; it may differ from lru, since its "
            "batches, preemptions and half-computed prompts are its own. "
        )
    prose += (
        "The dotted line is Belady's rule (opt), which knows the future: with prefixes a strong reference, not a bound."
    )
    most = frame["capacity_blocks"].max()
    assert isinstance(most, int)
    figure = by_capacity(
        frame, "policy", "capacity_blocks", "token_miss_ratio", "prompt tokens missed", most,
        label="Miss ratio against cache capacity, by policy",
    )  # fmt: skip
    figure = with_own_cache(figure, run.capacity, None if ratio is None else 1 - ratio, most)
    yield Panel("miss-ratio", prose, figure, frame)


def miss_ratios(run: Run) -> pl.DataFrame:
    """The rows of the run's curve that have a ratio, with what is missed."""
    rows = run.curve.filter(pl.col("token_hit_ratio").is_not_null())
    rows = rows.with_columns(token_miss_ratio=1 - pl.col("token_hit_ratio"))
    return rows.select(SHOWN)
