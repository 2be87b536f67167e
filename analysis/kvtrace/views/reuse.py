"""`reuse`: how long ago, in blocks and in time, was a block last used?

Requests use all blocks of their chains, output included, one request after the other: recorded ones in the order in
which they were first admitted, imports in the order of the file. Distances come from a compiled kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from kvtrace.views.declare import ENGINE, IDENTITY, REQUEST, View
from kvtrace_traces.schema import Column


def _distances(uses: pl.DataFrame) -> pl.DataFrame:
    """The rows of the view from those of its SQL."""
    from kvtrace_replay.reuse import reuse_distances

    keys = [name for name in ("trace", "engine_index") if name in uses.columns]
    parts = []
    for engine in uses.partition_by(keys, maintain_order=True) or [uses]:
        identities = engine["identity"].to_numpy()
        distance, previous = reuse_distances(identities, int(identities.max()) + 1 if identities.size else 0)
        known = pl.Series(distance >= 0)
        before = np.maximum(previous, 0)
        parts.append(
            engine.select(
                *keys, "request", "position", "identity", "time_ns",
                nth_use=pl.col("identity").cum_count().over("identity").cast(pl.Int32),
                previous_request=pl.when(known).then(engine["request"].gather(before)),
                distance_blocks=pl.when(known).then(pl.Series(distance)),
                reuse_ns=pl.when(known).then(pl.col("time_ns") - engine["time_ns"].gather(before)),
            )
        )  # fmt: skip
    return pl.concat(parts)


def _fast(trace: Any) -> pl.DataFrame:
    from kvtrace.views.fast_chains import reuse  # brings Numba

    return reuse(trace)


VIEW = View(
    "reuse",
    "one row per request and block of its chain, in order of use",
    (
        ENGINE,
        REQUEST,
        Column("position", "i32", "blocks", "0-based place of the block in the request"),
        IDENTITY,
        Column("time_ns", "i64", "ns", "when the request's first step began; imports: its arrival, if known", True),
        Column("nth_use", "i32", "times", "how often the block has been used up to here, this use included"),
        Column("previous_request", "i32", "request", "the one that used the block before; null for a first use", True),
        Column("distance_blocks", "i32", "blocks", "distinct other blocks used since", True),
        Column("reuse_ns", "i64", "ns", "time since", True),
    ),
    ("request_blocks", "requests", "engines", "steps", "lookups"),
    """
WITH looked AS (
  SELECT {key}, request, step AS first_step, min(n) AS nth
  FROM (SELECT row_number() OVER () AS n, {key}, request, step FROM lookups) GROUP BY {key}, request, step),
timed AS (
  SELECT {key}, request, first_step, source = 'import' AS imported,
         CASE WHEN max(arrival_ns) OVER (PARTITION BY {key}) > 0 THEN arrival_ns END AS arrival_ns
  FROM requests JOIN engines USING ({key})
  WHERE source = 'import' OR first_step IS NOT NULL),
used AS (
  SELECT {key}, request, first_step, nth, CASE WHEN imported THEN arrival_ns ELSE start_ns END AS time_ns
  FROM timed
  LEFT JOIN (SELECT {key}, step AS first_step, start_ns FROM steps) USING ({key}, first_step)
  LEFT JOIN looked USING ({key}, request, first_step))
SELECT {key}, request, position, identity, time_ns
FROM request_blocks JOIN used USING ({key}, request)
ORDER BY {key}, coalesce(first_step, 0), nth NULLS LAST, request, position
""",
    _distances,
    _fast,
)
