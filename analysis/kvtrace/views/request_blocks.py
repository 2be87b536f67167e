"""`request_blocks`: the chains at the engine's block size.

A recorded request counts with its full blocks, as far as they were computed: the last output token is sampled and
never computed (vLLM 0.32.0, `KVCacheManager.allocate_slots`). An import counts with its ids as they stand, a partial
last block included. The same rows as a `kvtrace_replay.Workload` at the trace's own block size.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, IDENTITY, REQUEST, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame:
    from kvtrace.views.fast_chains import request_blocks  # brings Numba

    return request_blocks(trace)


VIEW = View(
    "request_blocks",
    "one row per request and block of its chain: what it can look up, and what it leaves behind",
    (
        ENGINE,
        REQUEST,
        Column("position", "i32", "blocks", "0-based place of the block in the request"),
        IDENTITY,
        Column("tokens", "i32", "tokens", "tokens in it; fewer than a block only at the end of imported requests"),
        Column("in_prompt", "bool", "", "it lies in the prompt as a whole; else output is in it"),
    ),
    ("chains", "requests", "engines"),
    """
WITH entries AS (
  SELECT *, block_size // granule_tokens AS stride, source = 'import' AS imported,
         CASE WHEN output_tokens IS NOT NULL AND source <> 'import'
              THEN (prompt_tokens + output_tokens - (output_tokens > 0)::INTEGER) // block_size END AS full_blocks
  FROM chains
  JOIN (SELECT {key}, source, block_size, granule AS granule_tokens FROM engines) USING ({key})
  JOIN (SELECT {key}, request, prompt_tokens, output_tokens, chain_granules FROM requests) USING ({key}, request))
SELECT {key}, request, (granule // stride)::INTEGER AS position, identity,
       CASE WHEN imported AND granule = chain_granules - 1
            THEN greatest(1, least(block_size, prompt_tokens - granule // stride * block_size))
            ELSE block_size END::INTEGER AS tokens,
       imported OR granule // stride < prompt_tokens // block_size AS in_prompt
FROM entries
WHERE ((granule + 1) % stride = 0 OR (imported AND granule = chain_granules - 1))
  AND (full_blocks IS NULL OR granule // stride < full_blocks)
""",
    fast=_fast,
)
