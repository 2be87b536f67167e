"""`block_tables`: which blocks requests held, when, and at which place.

A request gives its blocks up all at once, so the place of a block that it takes is the number of those it holds.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, EVENTS, REQUEST, View, column
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_reads import block_tables  # brings Numba

    return block_tables(trace)


VIEW = View(
    "block_tables",
    "one row per block that a request held, from taking it to letting it go",
    (
        ENGINE,
        REQUEST,
        column("block_events", "group"),
        Column("position", "i32", "blocks", "0-based place of the block in the request"),
        Column("block", "i32", "block", "the block's number in the engine"),
        Column("taken_by", "str", "", "`allocate` or `hit`; `carried`: it was held where a cut begins"),
        Column("step", "i32", "step", "the step in which it was taken; -1 for carried ones"),
        Column("free_step", "i32", "step", "the last step begun when it was let go", True),
    ),
    ("block_events", "carried_tables"),
    f"""
WITH {EVENTS},
moves AS (
  SELECT *, sum(CASE kind WHEN 'free' THEN -1 ELSE 1 END) OVER (
           PARTITION BY {{key}}, request, "group" ORDER BY n ROWS UNBOUNDED PRECEDING) AS held
  FROM (
    SELECT {{key}}, n, step, request, kind, block, "group" FROM events
    UNION ALL SELECT {{key}}, position - (1::BIGINT << 31), -1, request, 'carried', block, 0 FROM carried_tables)
  WHERE kind IN ('allocate', 'hit', 'free', 'carried') AND request IS NOT NULL),
paired AS (
  SELECT *, lead(kind) OVER w AS next_kind, lead(step) OVER w AS next_step
  FROM moves WINDOW w AS (PARTITION BY {{key}}, request, "group", block ORDER BY n))
SELECT {{key}}, request, "group", (held - 1)::INTEGER AS position, block, kind AS taken_by, step,
       CASE WHEN next_kind = 'free' THEN next_step END AS free_step
FROM paired WHERE kind <> 'free' AND held > 0
""",
    fast=_fast,
)
