"""Simulated runs with one of vLLM's connectors to host memory: what is asked, as frames, and as traces. See
`simulations`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay.schedulers.latencies import request_times
from kvtrace_replay.schedulers.sweep import Cell, HostTier
from kvtrace_replay.schedulers.vllm_v1.offload import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload.cells import costs_of, offload_of
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import POLICIES, STORES
from kvtrace_replay.schedulers.vllm_v1.offload.log import write_offload_run
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun, block_bytes
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import FINISH_REASONS

OF_THE_TIER = ("preemption", "cpu_offload", "offload_policy", "offload_connector", "offload_store")
TOLD = ("first_step", "last_step", "finish_step", "cached_tokens", "reason", "stored_blocks", "loaded_blocks")
ROWS = (
    "requests", "tokens", "running", "waiting", "free_blocks", "preempted", "empty_calls", "prefill_requests",
    "evictions",
)  # fmt: skip


def host_tiers(settings: dict[str, Any]) -> list[HostTier | None]:
    """What the settings OF_THE_TIER (values or lists) ask for; None for no tier. Where connectors, stores and policies
    are lists, only those go together that a connector has.

    Raises UsageError for what is none of V1's ways, for a tier without a size, and for what no asked connector has.
    """
    kinds, rooms, policies, connectors, stores = (_listed(settings.get(name)) for name in OF_THE_TIER)
    for kind in kinds:
        if kind not in ("recompute", "offload"):
            raise UsageError(
                f"--preemption {kind}: vLLM V1 recomputes what it preempts, or has it in host memory (offload); "
                "--engine vllm-v0 also swaps"
            )
    if "offload" in kinds and not rooms:
        raise UsageError("--preemption offload needs --cpu-offload, the room in host memory (40GiB, 20k, 65536tok)")
    if (rooms or policies or connectors or stores) and "offload" not in kinds:
        raise UsageError("--cpu-offload and the --offload-... options are of --preemption offload")
    ways = _ways(connectors, stores, policies)
    found: list[HostTier | None] = []
    for kind in kinds or ["recompute"]:
        if kind == "recompute":
            found.append(None)
        else:
            found += [HostTier(room, *way) for room, way in itertools.product(rooms, ways)]
    return found


def _ways(connectors: list[Any], stores: list[Any], policies: list[Any]) -> list[tuple[str, str, str]]:
    """Policy, connector and store of each tier that is asked for; without a connector the one that stores so."""
    known_stores = tuple(dict.fromkeys(store for each in STORES.values() for store in each))
    for option, values, known in (
        ("connector", connectors, tuple(STORES)), ("store", stores, known_stores), ("policy", policies, POLICIES)
    ):  # fmt: skip
        for value in values:
            if value not in known:
                raise UsageError(f"--offload-{option} {value} is none of {', '.join(known)}")
    if not connectors:
        connectors = ["simple" if store == "eviction" else "offloading" for store in stores or ["fill"]]
    connectors = list(dict.fromkeys(connectors))
    stores, policies = stores or ["fill"], policies or ["lru"]
    ways = [
        (policy, connector, store)
        for connector, store, policy in itertools.product(connectors, stores, policies)
        if store in STORES[connector] and (connector == "offloading" or policy == "lru")
    ]
    if "eviction" in stores and "simple" not in connectors:
        raise UsageError("--offload-store eviction is of --offload-connector simple; offloading stores on fill")
    if "arc" in policies and "offloading" not in connectors:
        raise UsageError("--offload-policy arc is of --offload-connector offloading; simple drops by its free queue")
    for connector in connectors:
        if not any(connector == one for _, one, _ in ways):
            raise UsageError(
                f"--offload-connector {connector} does none of what is asked of it: --offload-store fill and "
                "--offload-policy lru are of both connectors"
            )
    return ways


def _listed(value: Any) -> list[Any]:
    """One value or several, as a list; none is an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def request_frame_offload(cell: Cell, run: OffloadRun) -> pl.DataFrame:
    """What became of each request in one run, with the blocks that were stored and loaded for it."""
    source = cell.recorded
    frame = pl.DataFrame({name: pl.Series(run.requests[:, i]) for i, name in enumerate(TOLD)}).with_columns(
        pl.when(pl.col(TOLD) >= 0).then(pl.col(TOLD))
    )
    reasons = pl.Series([*FINISH_REASONS], dtype=pl.String)
    frame = frame.select(
        request=pl.Series(range(source.n_requests), dtype=pl.Int32),
        request_id=source.request_id,
        cached_tokens="cached_tokens",
        preemptions=pl.Series(run.preempted),
        first_step="first_step",
        last_step="last_step",
        finish_step="finish_step",
        finish_reason=pl.lit(reasons).gather(pl.col("reason")),
        stored_blocks="stored_blocks",
        loaded_blocks="loaded_blocks",
        prompt_tokens=pl.Series(source.prompt),
        output_tokens=pl.Series(run.tokens - source.prompt),
    )
    if run.clock is None:
        return frame
    times = request_times(run.clock.times, run.tokens - source.prompt)
    return frame.with_columns(**{name: pl.Series(told).fill_nan(None) for name, told in times.items()})


def step_frame_offload(cell: Cell, run: OffloadRun) -> pl.DataFrame:
    """What each step of one run did, with the transfers planned since the step before; those planned after the last
    step count with it."""
    rows = run.rows
    n = len(rows)
    frame = pl.DataFrame(
        {"step": pl.Series(range(n), dtype=pl.Int32)}
        | {name: pl.Series(rows[:, i], dtype=pl.Int32) for i, name in enumerate(ROWS)}
    ).with_columns(
        prefill_tokens=pl.col("tokens") - (pl.col("requests") - pl.col("prefill_requests")),
        used_blocks=run.settings.num_blocks - 1 - pl.col("free_blocks"),
        loading=pl.Series(rows[:, at.S_LOADING], dtype=pl.Int32),
        tier_blocks=pl.Series(rows[:, at.S_TIER], dtype=pl.Int32),
    )
    size = block_bytes(cell.recorded, run.settings.block_size)
    for load, many, blocks, moved in ((0, "stores", "stored_blocks", "stored_bytes"),
                                      (1, "loads", "loaded_blocks", "loaded_bytes")):  # fmt: skip
        mine = run.transfers[run.transfers[:, at.M_LOAD] == load]
        step = np.minimum(mine[:, at.M_STEP], max(n - 1, 0))
        counts = np.bincount(step, minlength=n)[:n]
        weighed = np.bincount(step, weights=mine[:, at.M_BLOCKS], minlength=n)[:n].astype(np.int64)
        frame = frame.with_columns(
            pl.Series(many, counts, dtype=pl.Int32),
            pl.Series(blocks, weighed, dtype=pl.Int64),
            pl.lit(None, dtype=pl.Int64).alias(moved) if size is None else pl.Series(moved, weighed * size),
        )
    if run.clock is None:
        return frame
    return frame.with_columns(start_ns=pl.Series(run.clock.steps[:, 0]), end_ns=pl.Series(run.clock.steps[:, 1]))


def write_offload_trace(cell: Cell, timing: Profile | None, path: Path) -> None:
    """Write the run of `cell` as a trace to `path`, which must not exist. Raises KvtraceError where it did not run."""
    if cell.tier is None or not isinstance(cell.run, OffloadRun):
        raise KvtraceError(f"there is no run to write to {path}: {cell.failed}")
    costs, copies = costs_of(timing if cell.run.clock is not None else None, cell.settings.block_size)
    write_offload_run(
        path, cell.recorded, cell.settings, offload_of(cell.tier, cell.recorded, cell.settings), cell.arrivals,
        why=cell.why, costs=costs, copies=copies,
    )  # fmt: skip
