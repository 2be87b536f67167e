"""`read_spans`: the run-length form of `reads`, from which counts and sums cost little.

In a span of steps with `tokens` each, a request has computed `computed_before + (i + 1) * tokens` at the end of the
i-th; the block at a place is read from the first step on whose end lies behind the block's begin.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, REQUEST, View, column
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_reads import read_spans  # brings Numba

    return read_spans(trace)


VIEW = View(
    "read_spans",
    "one row per stretch of consecutive steps in which a request read a block; sum(steps) is the number of reads",
    (
        ENGINE,
        REQUEST,
        column("block_events", "group"),
        Column("position", "i32", "blocks", "0-based place of the block in the request"),
        Column("block", "i32", "block", "the block's number in the engine"),
        Column("first_step", "i32", "step", "first step of the stretch"),
        Column("steps", "i32", "steps", "its length"),
        Column("tokens", "i32", "tokens", "tokens scheduled for the request in each of them"),
        Column("computed_before", "i32", "tokens", "tokens of the request computed before the first of them"),
    ),
    ("step_spans", "block_tables", "engines"),
    """
WITH pairs AS (
  SELECT {key}, request, "group", position, block, s.first_step AS span_step, s.tokens, s.computed_before,
         greatest(s.first_step + greatest(position * block_size - s.computed_before, 0) // s.tokens, b.step)
           AS first_step,
         least(s.first_step + s.steps - 1, coalesce(b.free_step, 2147483647)) AS last_step
  FROM step_spans s JOIN block_tables b USING ({key}, request) JOIN engines USING ({key})
  WHERE s.tokens > 0)
SELECT {key}, request, "group", position, block, first_step::INTEGER AS first_step,
       (last_step - first_step + 1)::INTEGER AS steps, tokens,
       (computed_before + (first_step - span_step) * tokens)::INTEGER AS computed_before
FROM pairs WHERE first_step <= last_step
""",
    fast=_fast,
)
