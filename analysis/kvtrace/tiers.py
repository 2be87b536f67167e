"""Open-loop replays of whole traces through a cache in several tiers, as one frame."""

from __future__ import annotations

import os
from collections.abc import Sequence

import polars as pl

from kvtrace.api import Trace, open_as_it_is
from kvtrace.replays import several
from kvtrace_replay import of_trace
from kvtrace_replay.tiers import Tier, parse_tier
from kvtrace_replay.tiers import replay_tiers as replay_workload


def replay_tiers(
    trace: str | os.PathLike[str] | Trace,
    tier: str | Tier | Sequence[str | Tier],
    policy: str = "lru",
    block_size: int | Sequence[int | None] | None = None,
    semantics: str | Sequence[str] = "prefix",
    warmup: float = 0.0,
    bytes_per_token: float | None = None,
    prefill_tokens_per_s: float | None = None,
) -> pl.DataFrame:
    """Replay a trace's lookups through a cache in tiers: a row per tier, the top first, and one for all together.

    `tier` lists 1 to 4 tiers, each a `Tier` or a text as on the command line (`dram:20k:write=demote`); `policy` is
    that of a tier which names none. `block_size` and `semantics` ("object", "prefix") take one value or several.
    `bytes_per_token` is for traces that do not know it, `prefill_tokens_per_s` the speed at which tokens would be
    recomputed. docs/tiers.md has the rules and the columns; a trace of several engines has engine_index in front.

    Raises UsageError for tiers that cannot be, and for whatever `replay` raises it.
    """
    tiers = [parse_tier(text, policy) if isinstance(text, str) else text for text in several(tier)]
    opened = trace if isinstance(trace, Trace) else open_as_it_is(trace)[0]
    frames = []
    for header in opened.engines:
        for size in several(block_size):
            workload = of_trace(opened.reader, block_size=size, engine_index=header["engine_index"])
            for kind in several(semantics):
                rows = replay_workload(
                    workload,
                    tiers,
                    kind,
                    warmup=warmup,
                    bytes_per_token=bytes_per_token,
                    prefill_tokens_per_s=prefill_tokens_per_s,
                )
                frame = pl.DataFrame(rows, infer_schema_length=None)
                if len(opened.engines) > 1:
                    index = pl.lit(header["engine_index"], dtype=pl.Int16).alias("engine_index")
                    frame = frame.select(index, pl.all())
                frames.append(frame)
    return pl.concat(frames, how="diagonal_relaxed")
