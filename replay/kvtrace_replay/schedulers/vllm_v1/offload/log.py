"""Writes a simulated run with a tier as a trace, a `.kvt` file that every command reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.log import arrival_words, simulated_header
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1 import layout as base
from kvtrace_replay.schedulers.vllm_v1.offload import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload import words as to_words
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Connector, SimpleOffload
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun, block_bytes, simulate_offload
from kvtrace_traces import wire
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import OPS
from kvtrace_traces.writer import write_file

U32 = npt.NDArray[np.uint32]
ROWS_AT_ONCE = 1 << 16
encode: Any = to_words.encode


def write_offload_run(
    path: str | Path,
    recorded: Recorded,
    settings: Settings,
    offload: Connector,
    arrivals: str = "step",
    why: Sequence[str] = (),
    **options: Any,
) -> OffloadRun:
    """Simulate as `simulate_offload` and write the run to `path`, which must not exist. Nothing is left if it fails.

    As a recorded trace of an engine with the connector, it is marked inexact, `kv-connector`. `why`: names of
    `sweep.WHY` that hold, for the header.
    """
    run = simulate_offload(recorded, settings, offload, arrivals=arrivals, events=True, **options)
    commits, events = 1, 0

    def bodies() -> Iterator[tuple[int, bytes]]:
        nonlocal commits, events
        key = np.zeros(11, np.uint32)
        key[0] = OPS["KEY"].code
        yield wire.KEY, key.tobytes()
        for words, told in in_pieces(run, recorded, settings):
            commits, events = commits + 1, told
            yield 0, words.tobytes()

    def end() -> dict[str, Any]:
        return {"time_ns": 0, "commits": commits + 1, "events": events}

    header = simulated_header(recorded, settings, arrivals, why, run.clock is not None)
    header["inexact"] = [*header["inexact"], "kv-connector"]
    header["offload"] = told_of(offload, settings)
    try:
        write_file(str(path), header, bodies, end)
    except FileExistsError:
        raise UsageError(f"{path} exists: name another file, or remove it") from None
    except OSError as error:
        raise KvtraceError(f"cannot write {path}: {error.strerror or error}") from None
    return run


def told_of(offload: Connector, settings: Settings) -> dict[str, Any] | None:
    """What the header tells of a connector, as the tracer does."""
    told: dict[str, Any] = {
        "chunks": offload.chunks, "blocks_per_chunk": offload.blocks_per_chunk, "policy": offload.policy, "workers": 1,
    }  # fmt: skip
    if not isinstance(offload, SimpleOffload):
        manager = {"connector": "OffloadingConnector", "manager": "CPUOffloadingManager"}
        return manager | told | {"store_threshold": offload.store_threshold, "prompt_only": offload.prompt_only}
    if not settings.prefix_caching:
        return None
    lazy = offload.store == "eviction"
    cover = 2 * -(-settings.max_num_batched_tokens // settings.block_size)
    return {
        "connector": "SimpleCPUOffloadConnector", "manager": "SimpleCPUOffloadScheduler", **told, "store_threshold": 0,
        "prompt_only": False, "lazy_offload": lazy, "lazy_target_blocks": cover if lazy else None, "backend": "cpu",
    }  # fmt: skip


def in_pieces(run: OffloadRun, recorded: Recorded, settings: Settings) -> Iterator[tuple[U32, int]]:
    """The words of a run's log, cut between calls, each with the block events up to its end."""
    n, rows = recorded.n_requests, run.log
    words, word_at = arrival_words(recorded)
    stride = recorded.stride(settings.block_size)
    moves = np.full((len(run.transfers), at.M_FIELDS), -1, np.int64)
    moves[:, : at.M_PLANNED] = run.transfers
    if run.clock is not None:
        moves[:, at.M_PLANNED :] = run.transfer_ns
    p, g = np.zeros(base.P_FIELDS, np.int64), np.zeros(base.G_FIELDS, np.int64)
    p[base.P_TIMED] = run.clock is not None
    req = np.zeros((n + 1, base.R_FIELDS), np.int32)
    req[:, base.R_CALL] = -1
    widest = int(rows[rows[:, 0] == at.LOG_STEP, 1].max(initial=0))
    sch, st = np.zeros((widest + 1, 3), np.int32), np.zeros((1, base.ST_FIELDS), np.int64)
    known = np.zeros((n + 1, 3), np.int64)
    known[:n, to_words.GRANULES] = np.diff(recorded.chain_at)
    size = block_bytes(recorded, settings.block_size) or 0
    calls = np.flatnonzero(rows[:, 0] == at.LOG_CALL)
    after = np.unique(np.searchsorted(calls, np.arange(ROWS_AT_ONCE, len(rows), ROWS_AT_ONCE)))
    cuts = [0, *calls[after[after < len(calls)]].tolist(), len(rows)]
    for start, stop in itertools.pairwise(cuts):
        piece = rows[start:stop]
        came = piece[piece[:, 0] == at.LOG_CAME, 1]
        room = (to_words.ROW_WORDS + 4 * stride) * len(piece) + int((word_at[came + 1] - word_at[came]).sum())
        log, owners = np.zeros(room, np.uint32), np.zeros(len(piece) + 1, np.int32)
        encode(piece, moves, p, g, req, sch, owners, st, known, words, word_at, stride, size, log)
        if g[base.G_LOG]:
            yield log[: g[base.G_LOG]], int(g[base.G_EVENTS])
        g[base.G_LOG] = 0
