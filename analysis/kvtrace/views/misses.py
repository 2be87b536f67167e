"""`misses`: what a lookup did not find, and why.

The engine finds at most the full blocks before the last token (vLLM 0.32.0, `KVCacheManager.get_computed_blocks`), so
the tokens behind them are *short*: too few for a block, or the one that must be computed. Of the others, those that
the request had computed before it was preempted are due to the *preemption*; those whose block some request had
filled in an earlier step are due to *capacity* (they were cached, and are not any more, or lie behind a block that is
not); the rest is *cold*. A cut tells what was cached where it begins, and what preemptions had cost until then; of what
was evicted before nothing is known, and it counts as cold.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import View
from kvtrace_traces.schema import TABLES, Column


def _fast(trace: Any) -> pl.DataFrame:
    from kvtrace.views.fast_misses import misses  # brings Numba

    return misses(trace)


VIEW = View(
    "misses",
    "one row per lookup; tokens_hit and the five kinds of missed tokens add up to tokens_asked",
    (
        *TABLES["lookups"].columns,
        Column("cold_tokens", "i64", "tokens", "never cached before"),
        Column("capacity_tokens", "i64", "tokens", "cached before, but evicted"),
        Column("preemption_tokens", "i64", "tokens", "computed before by the request itself, and lost"),
        Column("short_tokens", "i64", "tokens", "behind the last block that could be found"),
        Column("unread_tokens", "i64", "tokens", "not looked for: the request asked not to read the cache"),
    ),
    (
        "lookups",
        "logged_preemptions",
        "requests",
        "engines",
        "request_blocks",
        "block_events",
        "carried_requests",
        "carried_blocks",
    ),
    """
WITH lost AS (
  SELECT {key}, request, step, max(tokens_lost) OVER (PARTITION BY {key}, request ORDER BY n) AS highest
  FROM (
    SELECT row_number() OVER () AS n, {key}, request, step, tokens_lost FROM logged_preemptions
    UNION ALL SELECT 0, {key}, request, -1, tokens_lost FROM carried_requests WHERE tokens_lost > 0)),
asked AS (
  SELECT {key}, row_number() OVER () AS n, step, request, tokens_asked, tokens_hit, after_preemption FROM lookups),
told AS (
  SELECT a.*, CASE WHEN after_preemption THEN least(coalesce(highest, 0), tokens_asked) ELSE 0 END AS highest
  FROM asked a ASOF LEFT JOIN lost l ON {a=l} AND a.request = l.request AND a.step >= l.step),
known AS (
  SELECT told.*, no_cache_read, block_size, greatest(tokens_asked - 1, 0) // block_size * block_size AS findable
  FROM told JOIN (SELECT {key}, request, no_cache_read FROM requests) USING ({key}, request)
  JOIN (SELECT {key}, block_size FROM engines) USING ({key})),
filled AS (
  SELECT {key}, identity, min(step) AS fill_step
  FROM (SELECT {key}, identity, step FROM block_events WHERE kind = 'fill'
        UNION ALL SELECT {key}, identity, -1 FROM carried_blocks)
  WHERE identity IS NOT NULL GROUP BY {key}, identity),
missed AS MATERIALIZED (  -- else engines are joined with engines, and millions of rows with millions
  SELECT {key}, n, step, identity,
         (position + 1) * block_size - greatest(position * block_size, tokens_hit, highest) AS tokens
  FROM known JOIN request_blocks USING ({key}, request)
  WHERE position * block_size < findable AND (position + 1) * block_size > greatest(tokens_hit, highest)
    AND NOT no_cache_read),
evicted AS (
  SELECT {key}, n, sum(tokens) AS capacity_tokens
  FROM missed JOIN filled USING ({key}, identity) WHERE fill_step < step GROUP BY {key}, n),
split AS (
  SELECT {key}, n, step, request, tokens_asked, tokens_hit, after_preemption,
         coalesce(capacity_tokens, 0)::BIGINT AS capacity_tokens,
         greatest(0, highest - tokens_hit)::BIGINT AS preemption_tokens,
         greatest(0, tokens_asked - greatest(findable, tokens_hit, highest))::BIGINT AS short_tokens,
         CASE WHEN no_cache_read THEN greatest(0, findable - greatest(tokens_hit, highest)) ELSE 0 END::BIGINT
           AS unread_tokens
  FROM known LEFT JOIN evicted USING ({key}, n))
SELECT {key}, step, request, tokens_asked, tokens_hit, after_preemption,
       tokens_asked - tokens_hit - capacity_tokens - preemption_tokens - short_tokens - unread_tokens AS cold_tokens,
       capacity_tokens, preemption_tokens, short_tokens, unread_tokens
FROM split
""",
    fast=_fast,
)
