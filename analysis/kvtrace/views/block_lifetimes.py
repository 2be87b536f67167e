"""`block_lifetimes`: from a block's fill to the moment when its identity is forgotten."""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, EVENTS, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame:
    from kvtrace.views.fast_lifetimes import lifetimes  # brings Numba

    return lifetimes(trace)


VIEW = View(
    "block_lifetimes",
    "one row per stretch of time in which a block was cached, that is held an identity",
    (
        ENGINE,
        Column("block", "i32", "block", "the block's number in the engine"),
        Column("identity", "i32", "identity", "what it held"),
        Column("request", "i32", "request", "the request that filled it", True),
        Column("fill_step", "i32", "step", "the step in which it was filled; null: before a cut began", True),
        Column("fill_ns", "i64", "ns", "when it was filled", True),
        Column("uses", "i32", "times", "hits: requests that took it from the cache; in a cut, from its begin on"),
        Column("first_use_ns", "i64", "ns", "the first of them", True),
        Column("last_use_ns", "i64", "ns", "the last of them", True),
        Column("ended_by", "str", "", "`evict`, `reset` (everything was forgotten) or `fill` (overwritten)", True),
        Column(
            "evicted_by", "i32", "request", "the request that it was evicted for; null unless it was, and told", True
        ),
        Column("evict_step", "i32", "step", "the step in which its identity was forgotten", True),
        Column("evict_ns", "i64", "ns", "when that was; null: still cached at the end of the trace", True),
        Column("lifetime_ns", "i64", "ns", "from fill to that", True),
        Column("idle_ns", "i64", "ns", "from the last request's letting go to that; null if one still held it", True),
    ),
    ("block_events", "carried_blocks"),
    f"""
WITH {EVENTS},
numbered AS (  -- a life is known by its fill
  SELECT *, last_value(CASE WHEN kind = 'fill' THEN n END IGNORE NULLS) OVER (
           PARTITION BY {{key}}, block ORDER BY n ROWS UNBOUNDED PRECEDING) AS fill_n
  FROM (
    SELECT {{key}}, n, step, time_ns, request, kind, block, identity, 1 AS holders FROM events
    UNION ALL SELECT {{key}}, 0, NULL, NULL, NULL, 'fill', block, identity, holders FROM carried_blocks)
  WHERE kind IN ('fill', 'hit', 'free', 'evict') AND identity IS NOT NULL),
lives AS (
  SELECT {{key}}, block, fill_n,
         min(step) FILTER (WHERE kind = 'fill') AS fill_step,
         min(time_ns) FILTER (WHERE kind = 'fill') AS fill_ns,
         min(identity) FILTER (WHERE kind = 'fill') AS identity,
         min(request) FILTER (WHERE kind = 'fill') AS request,
         min(holders) FILTER (WHERE kind = 'fill') AS holders,
         -- A connector holds a block while it copies it: a hit of no request, which is no use.
         count(*) FILTER (WHERE kind = 'hit') AS hits,
         count(*) FILTER (WHERE kind = 'hit' AND request IS NOT NULL)::INTEGER AS uses,
         min(time_ns) FILTER (WHERE kind = 'hit' AND request IS NOT NULL) AS first_use_ns,
         max(time_ns) FILTER (WHERE kind = 'hit' AND request IS NOT NULL) AS last_use_ns,
         count(*) FILTER (WHERE kind = 'free') AS frees,
         max(time_ns) FILTER (WHERE kind = 'free') AS last_free_ns,
         min(n) FILTER (WHERE kind = 'evict') AS evict_n,
         arg_min(request, n) FILTER (WHERE kind = 'evict' AND request IS NOT NULL) AS evictor,
         min(step) FILTER (WHERE kind = 'evict') AS evict_step,
         min(time_ns) FILTER (WHERE kind = 'evict') AS evict_ns
  FROM numbered WHERE fill_n IS NOT NULL GROUP BY {{key}}, block, fill_n),
followed AS (
  SELECT *, lead(fill_n) OVER w AS next_n, lead(fill_step) OVER w AS next_step, lead(fill_ns) OVER w AS next_ns
  FROM lives WINDOW w AS (PARTITION BY {{key}}, block ORDER BY fill_n)),
resets AS (
  SELECT {{key}}, n AS reset_n, step AS reset_step, time_ns AS reset_ns FROM events WHERE kind = 'reset'),
ends AS (
  SELECT f.*, CASE WHEN reset_n < coalesce(evict_n, next_n, reset_n + 1) THEN 'reset'
                   WHEN evict_n IS NOT NULL THEN 'evict'
                   WHEN next_n IS NOT NULL THEN 'fill' END AS ended_by,
         reset_step, reset_ns
  FROM followed f ASOF LEFT JOIN resets r ON {{f=r}} AND f.fill_n <= r.reset_n),
dated AS (
  SELECT * EXCLUDE (evict_step, evict_ns),
         CASE ended_by WHEN 'reset' THEN reset_step WHEN 'fill' THEN next_step ELSE evict_step END AS evict_step,
         CASE ended_by WHEN 'reset' THEN reset_ns WHEN 'fill' THEN next_ns ELSE evict_ns END AS evict_ns
  FROM ends)
SELECT {{key}}, block, identity, request, fill_step, fill_ns, uses, first_use_ns, last_use_ns, ended_by,
       CASE WHEN ended_by = 'evict' THEN evictor END AS evicted_by, evict_step, evict_ns,
       evict_ns - fill_ns AS lifetime_ns,
       CASE WHEN frees = hits + holders THEN evict_ns - last_free_ns END AS idle_ns
FROM dated
""",
    fast=_fast,
)
