"""`prefixes`: the radix tree of the chains.

Equal identities mean equal whole prefixes, so blocks passed by the same requests, one after the other, are one
node of the tree, and the lowest of those requests together with their number tells nodes apart.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.views.declare import ENGINE, View
from kvtrace_traces.schema import Column


def _fast(trace: Any) -> pl.DataFrame | None:
    from kvtrace.views.fast_chains import prefixes  # brings Numba

    return prefixes(trace)


VIEW = View(
    "prefixes",
    "one row per node of the radix tree of all requests, prompt and output",
    (
        ENGINE,
        Column("node", "i32", "identity", "the identity of its last block, which stands for the prefix up to there"),
        Column("parent", "i32", "identity", "the node before it; null for a root", True),
        Column("depth", "i32", "blocks", "blocks before it"),
        Column("blocks", "i32", "blocks", "blocks in it"),
        Column("requests", "i64", "requests", "requests that go through it"),
        Column("first_request", "i32", "request", "the lowest of them"),
        Column("tokens", "i64", "tokens", "tokens in it"),
        Column("bytes", "i64", "bytes", "keys and values of its blocks, kept once", True),
    ),
    ("request_blocks", "engines"),
    """
WITH trie AS (
  SELECT {key}, identity, min(position) AS position, min(request) AS first_request, count(*) AS requests,
         max(tokens) AS tokens
  FROM request_blocks GROUP BY {key}, identity),
nodes AS (
  SELECT {key}, first_request, requests, max_by(identity, position) AS node, min(position) AS depth,
         count(*)::INTEGER AS blocks, sum(tokens)::BIGINT AS tokens
  FROM trie GROUP BY {key}, first_request, requests)
SELECT {key}, node, parent, depth, blocks, requests, first_request, tokens, blocks * bytes_per_block AS bytes
FROM nodes
JOIN engines USING ({key})
LEFT JOIN (SELECT {key}, request AS first_request, position + 1 AS depth, identity AS parent FROM request_blocks)
  USING ({key}, first_request, depth)
""",
    fast=_fast,
)
