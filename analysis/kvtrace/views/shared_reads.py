"""`shared_reads`: how many requests read a block in the same step. Counts of `reads`, without expanding it."""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_reads import shared_reads  # brings Numba

    return shared_reads(trace)


VIEW = View(
    "shared_reads",
    "one row per number of requests that read a block in the same step",
    (
        ENGINE,
        Column("readers", "i64", "requests", "how many read it"),
        Column("blocks", "i64", "blocks", "blocks read by so many, summed over the steps"),
    ),
    ("reads",),
    """
SELECT {key}, readers, count(*) AS blocks
FROM (SELECT {key}, block, step, count(*) AS readers FROM reads GROUP BY {key}, block, step)
GROUP BY {key}, readers
""",
    fast=_fast,
)
