"""`block_reads`: how much attention read each block. Sums of `reads`, without expanding it."""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_reads import block_reads  # brings Numba

    return block_reads(trace)


VIEW = View(
    "block_reads",
    "one row per block that a request read",
    (
        ENGINE,
        Column("block", "i32", "block", "the block's number in the engine"),
        Column("times", "i64", "times", "how often it was read, once for each step and request"),
        Column("requests", "i64", "requests", "how many requests read it"),
    ),
    ("read_spans",),
    """
SELECT {key}, block, sum(steps)::BIGINT AS times, count(DISTINCT request) AS requests
FROM read_spans GROUP BY {key}, block
""",
    fast=_fast,
)
