"""`occupancy`: what the blocks were doing after each step was scheduled.

The engine counts free blocks when it has scheduled; what was logged up to the step's begin had happened by then. A
block is idle when it is cached and nobody holds it. Token slots: every request that holds blocks has so many tokens
computed, or scheduled in this step; shared blocks are full, so what all requests hold in slots less what they hold in
tokens is what is wasted, each block counted once.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, EVENTS, STEP, View, column
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame:
    from kvtrace.views.fast_occupancy import occupancy  # brings Numba

    return occupancy(trace)


_BEFORE = f"({-(2**62)})::BIGINT"  # ns: where a cut begins

VIEW = View(
    "occupancy",
    "one row per step of an engine whose cache is of known size; used, cached_idle and free add up to it",
    (
        ENGINE,
        STEP,
        column("steps", "start_ns"),
        Column("used", "i64", "blocks", "held by requests"),
        Column("cached_idle", "i64", "blocks", "held by none, but still cached"),
        Column("free", "i64", "blocks", "with nothing in them"),
        Column("holds", "i64", "blocks", "block table entries of all requests: shared blocks count several times"),
        Column("used_tokens", "i64", "tokens", "token slots of used blocks that hold keys and values, or will after "
               "the step; null where the tracer could not follow the engine exactly", True),
        Column("wasted_slots", "i64", "tokens", "the other token slots of used blocks; null as above", True),
    ),
    (
        "block_events", "steps", "step_spans", "logged_preemptions", "requests", "engines", "carried_requests",
        "carried_blocks",
    ),
    f"""
WITH {EVENTS},
blocks AS (
  SELECT {{key}}, block, 0 AS n, {_BEFORE} AS time_ns, holders AS change, identity IS NOT NULL AS cached
  FROM carried_blocks
  UNION ALL
  SELECT {{key}}, block, n, time_ns,
         CASE kind WHEN 'allocate' THEN 1 WHEN 'hit' THEN 1 WHEN 'free' THEN -1 ELSE 0 END AS change,
         kind IN ('fill', 'hit', 'free') AND identity IS NOT NULL AS cached
  FROM events
  WHERE kind IN ('allocate', 'hit', 'free', 'evict') OR (kind = 'fill' AND identity IS NOT NULL)
  UNION ALL  -- a reset is told once, and concerns all blocks
  SELECT {{key}}, b.block, r.n, r.time_ns, 0, false
  FROM (SELECT * FROM events WHERE kind = 'reset') r
  JOIN (SELECT {{key}}, block FROM events WHERE block IS NOT NULL
        UNION SELECT {{key}}, block FROM carried_blocks) b USING ({{key}})),
held AS (
  SELECT *, cached AND 0 >= sum(change) OVER (
           PARTITION BY {{key}}, block ORDER BY n ROWS UNBOUNDED PRECEDING) AS idle
  FROM blocks),
turned AS (
  SELECT {{key}}, time_ns, change,
         idle::INTEGER - coalesce(lag(idle) OVER (PARTITION BY {{key}}, block ORDER BY n), false)::INTEGER AS idled
  FROM held),
acts AS (
  SELECT {{key}}, request, first_step AS step, 1 AS is_span, computed_before, start_ns AS time_ns,
         computed_before + steps * tokens AS computed
  FROM step_spans JOIN (SELECT {{key}}, step AS first_step, start_ns FROM steps) USING ({{key}}, first_step)
  UNION ALL
  SELECT {{key}}, request, step, 0, 0, time_ns, 0 FROM logged_preemptions
  UNION ALL
  SELECT {{key}}, request, -1, 1, computed_tokens, {_BEFORE}, computed_tokens FROM carried_requests),
chained AS (
  SELECT *, coalesce(lag(computed) OVER (PARTITION BY {{key}}, request ORDER BY step, is_span), 0) AS computed_until
  FROM acts),
changes AS (
  SELECT {{key}}, time_ns, change, idled, 0 AS tokens FROM turned
  UNION ALL
  SELECT {{key}}, start_ns, 0, 0, tokens FROM steps
  UNION ALL  -- found in the cache, or lost by a preemption
  SELECT {{key}}, time_ns, 0, 0, computed_before - computed_until FROM chained
  UNION ALL
  SELECT {{key}}, finish_ns, 0, 0, -computed
  FROM requests JOIN (
    SELECT {{key}}, request, max_by(computed, 2::BIGINT * step + is_span) AS computed
    FROM chained GROUP BY {{key}}, request)
    USING ({{key}}, request)
  WHERE finish_ns IS NOT NULL),
sums AS (
  SELECT {{key}}, time_ns, sum(change) OVER w AS holds, sum(idled) OVER w AS idle, sum(tokens) OVER w AS tokens
  FROM (SELECT {{key}}, time_ns, sum(change) AS change, sum(idled) AS idled, sum(tokens) AS tokens
        FROM changes GROUP BY {{key}}, time_ns)
  WINDOW w AS (PARTITION BY {{key}} ORDER BY time_ns ROWS UNBOUNDED PRECEDING)),
counted AS (
  SELECT s.*, holds, coalesce(idle, 0) AS idle, tokens AS held_tokens
  FROM (SELECT {{key}}, step, start_ns, free_blocks FROM steps) s
  ASOF LEFT JOIN sums c ON {{s=c}} AND s.start_ns >= c.time_ns),
known AS (
  SELECT {{key}}, step, start_ns, (capacity_blocks - free_blocks)::BIGINT AS used, block_size, exact,
         least(idle, free_blocks)::BIGINT AS cached_idle, (free_blocks - least(idle, free_blocks))::BIGINT AS free,
         holds::BIGINT AS holds, (holds * block_size - held_tokens)::BIGINT AS wasted
  FROM counted JOIN engines USING ({{key}}) WHERE capacity_blocks IS NOT NULL)
SELECT {{key}}, step, start_ns, used, cached_idle, free, holds,
       CASE WHEN exact AND wasted BETWEEN 0 AND used * block_size THEN used * block_size - wasted END AS used_tokens,
       CASE WHEN exact AND wasted BETWEEN 0 AND used * block_size THEN wasted END AS wasted_slots
FROM known
""",
    fast=_fast,
)  # fmt: skip
