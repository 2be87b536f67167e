"""Simulated runs with vLLM's offloading connector, as frames and as traces. See `simulations`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from kvtrace_replay.schedulers.latencies import request_times
from kvtrace_replay.schedulers.sweep import Cell
from kvtrace_replay.schedulers.vllm_v1.offload import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload.cells import costs_of, offload_of
from kvtrace_replay.schedulers.vllm_v1.offload.log import write_offload_run
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun, block_bytes
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.schema import FINISH_REASONS

TOLD = ("first_step", "last_step", "finish_step", "cached_tokens", "reason", "stored_blocks", "loaded_blocks")
ROWS = (
    "requests", "tokens", "running", "waiting", "free_blocks", "preempted", "empty_calls", "prefill_requests",
    "evictions",
)  # fmt: skip


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
