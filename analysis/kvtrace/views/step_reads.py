"""`step_reads`: what attention read in each step. Sums of `reads`, without expanding it."""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, STEP, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_reads import step_reads  # brings Numba

    return step_reads(trace)


VIEW = View(
    "step_reads",
    "one row per step in which a request read a block",
    (
        ENGINE,
        STEP,
        Column("blocks", "i64", "blocks", "blocks read, a shared one once for each request"),
        Column("tokens", "i64", "tokens", "tokens in them that were read"),
    ),
    ("reads",),
    "SELECT {key}, step, count(*) AS blocks, sum(tokens)::BIGINT AS tokens FROM reads GROUP BY {key}, step",
    fast=_fast,
)
