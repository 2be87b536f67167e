"""Open-loop replays of whole traces: every engine and block size that was asked for, as one frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from kvtrace import metrics
from kvtrace.api import Trace, open_as_it_is
from kvtrace_replay import Workload, of_trace, requests_of
from kvtrace_replay import replay as replay_workload
from kvtrace_traces.errors import UsageError

Capacity = int | float | str


def replay(
    trace: str | os.PathLike[str] | Trace,
    policy: str | Sequence[str] = "lru",
    capacity: Capacity | Sequence[Capacity] | None = None,
    block_size: int | Sequence[int | None] | None = None,
    semantics: str | Sequence[str] = "prefix",
    warmup: float = 0.0,
    tier: str | Sequence[str] | None = None,
    bytes_per_token: float | None = None,
    prefill_tokens_per_s: float | None = None,
    per_request: list[pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """Replay a trace's lookups through caches that were never run: one row per cell of the grid.

    `trace` is an open trace or a path: of a `.kvt` file, of a folder of them, or of a Mooncake file (JSON lines), which
    is read as it is. Every argument after it takes one value or several. `capacity` is in blocks, or a text as on the
    command line (`10k`, `50%`, `65536tok`, `8GiB`, `inf`); None is the run's own capacity, where the trace knows it,
    and `inf`. `block_size` must be a multiple of the trace's granule; None is the trace's own. Of the first
    `warmup` of the requests (a share) nothing is counted.

    Columns: policy, capacity_blocks (null is `inf`), block_size, semantics, requests, block_lookups,
    block_hits, block_hit_ratio, token_lookups, token_hits, token_hit_ratio, evictions, seconds (the kernel
    alone), pin_overflow_requests (requests of which a block found no place, since all others were in use),
    expired_blocks and bypassed_blocks (dropped for their age, not admitted), warmup, why, and of the block
    size: empty_slots (token slots in the requests' last blocks that stay empty, summed at their ends) and
    fragmentation (their share of all slots the requests take); a trace of several engines has engine_index in
    front. A cell that cannot be run has nulls, and says why. Raises UsageError for an unknown policy or
    semantics, or a capacity or block size that cannot be.

    A list given as `per_request` gets a frame for each cell that was run, warm-up included: policy,
    capacity_blocks, block_size, semantics, engine_index, request, block_lookups, block_hits, token_lookups,
    token_hits, pin_overflow (a block of it found no place, since all others were in use).

    With `tier`, one or several texts such as `dram:20k:write=demote`, the cache is one in tiers: see
    `kvtrace.tiers.replay_tiers`, which takes the last three arguments and gives other rows. `capacity` and
    several policies exclude it.
    """
    if tier is not None:
        from kvtrace.tiers import replay_tiers

        (one, *others) = several(policy)
        if capacity is not None or others:
            raise UsageError("with tiers, each tier has its own capacity and policy: tier='dram:20k:policy=fifo'")
        return replay_tiers(trace, tier, one, block_size, semantics, warmup, bytes_per_token, prefill_tokens_per_s)
    opened = trace if isinstance(trace, Trace) else open_as_it_is(trace)[0]
    frames = []
    for header in opened.engines:
        for size in several(block_size):
            rows = replay_engine(opened, header, policy, capacity, size, semantics, warmup, per_request)
            frame = pl.DataFrame(rows, infer_schema_length=None)
            if len(opened.engines) > 1:
                index = pl.lit(header["engine_index"], dtype=pl.Int16).alias("engine_index")
                frame = frame.select(index, pl.all())
            frames.append(frame)
    return pl.concat(frames, how="diagonal_relaxed")


def replay_engine(
    trace: Trace,
    header: dict[str, Any],
    policy: str | Sequence[str] = "lru",
    capacity: Capacity | Sequence[Capacity] | None = None,
    block_size: int | None = None,
    semantics: str | Sequence[str] = "prefix",
    warmup: float = 0.0,
    per_request: list[pl.DataFrame] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one engine of a trace (`header` is one of `trace.engines`) at one block size."""
    workload = of_trace(trace.reader, block_size=block_size, engine_index=header["engine_index"])
    wanted = default_capacities(header) if capacity is None else several(capacity)
    tell = None
    if per_request is not None:
        numbers = requests_of(trace.reader, header["engine_index"])

        def tell(row: dict[str, Any], hits: Any, overflowed: Any) -> None:
            per_request.append(_of_requests(workload, header["engine_index"], numbers, row, hits, overflowed))

    rows = replay_workload(
        workload,
        policy=several(policy),
        capacity=wanted,
        semantics=several(semantics),
        warmup=warmup,
        per_cell=tell,
    )
    slots = workload.empty_slots()
    waste = {
        "empty_slots": None if slots is None else slots[0],
        "fragmentation": slots[0] / slots[1] if slots and slots[1] else None,
    }
    return [{**{k: v for k, v in row.items() if k != "why"}, **waste, "why": row["why"]} for row in rows]


def _of_requests(
    workload: Workload, engine_index: int, numbers: pl.Series, row: dict[str, Any], hits: Any, overflowed: Any
) -> pl.DataFrame:
    whole = row["semantics"] == "object"
    own = slice(workload.carried, None)  # what a cut carries in are no requests of it
    lengths = np.diff(workload.indptr)[own]
    full = hits * workload.block_size
    short = np.where((hits > 0) & (hits == lengths), workload.block_size - workload.last_tokens[own], 0)
    shared = ("policy", "capacity_blocks", "block_size", "semantics")
    return pl.DataFrame(
        {
            "engine_index": pl.repeat(engine_index, numbers.len(), dtype=pl.Int16, eager=True),
            "request": numbers,
            "block_lookups": lengths if whole else workload.prompt_blocks[own].astype(np.int64),
            "block_hits": hits,
            "token_lookups": (workload.token_counts() if whole else workload.prompt_tokens)[own],
            # Which of its blocks a request hits is known only where they are a prefix.
            "token_hits": pl.repeat(None, numbers.len(), dtype=pl.Int64, eager=True) if whole else full - short,
            "pin_overflow": overflowed > 0,
        }
    ).select(*(pl.lit(row[name]).alias(name) for name in shared), pl.all())


def default_capacities(header: dict[str, Any]) -> list[Capacity]:
    """The run's own capacity, where it is known, and an unbounded cache."""
    own = metrics.capacity_blocks(header)
    return ["inf"] if own is None else [own, "inf"]


def several(value: Any) -> list[Any]:
    """The value as a list; a text is one value."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]
