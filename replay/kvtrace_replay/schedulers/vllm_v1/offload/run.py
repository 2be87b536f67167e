"""Runs the compiled scheduler with a connector: `simulate_offload`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.capacity import parse_amount
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import NATIVE, Settings
from kvtrace_replay.schedulers.vllm_v1 import layout as base
from kvtrace_replay.schedulers.vllm_v1.offload import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload import loop
from kvtrace_replay.schedulers.vllm_v1.offload.arrays import state as arrays
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Connector
from kvtrace_replay.schedulers.vllm_v1.run import Clock
from kvtrace_replay.timing.costs import StepCosts, TransferCosts
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
_FIRST_ROOM = 1 << 12
run_compiled: Any = loop.run
#: Kinds of a log's rows, their names, and how many values they have.
LOGS = (
    (at.LOG_EVENT, "events", 5), (at.LOG_ROW, "rows", 4), (at.LOG_STEP, "steps", 6), (at.LOG_LOOKUP, "lookups", 5),
    (at.LOG_PREEMPTION, "preemptions", 4), (at.LOG_MOVED, "moved", 1), (at.LOG_TIER, "tier", 2),
    (at.LOG_HOST, "host", 3),
)  # fmt: skip


@dataclass(eq=False)
class OffloadRun:
    """What a simulated run with a tier did.

    Attributes:
        settings, offload: at which.
        steps: scheduler calls with tokens. preemptions, evictions: counts, of the engine's own cache.
        hit_tokens, lookup_tokens: in the engine's own cache, of all admissions.
        loaded_tokens: beyond these, from the tier.
        stored_blocks, loaded_blocks, stored_bytes, loaded_bytes: what was copied; bytes None where a block's are not
            known.
        tier_evictions: chunks dropped from the tier (of SimpleOffload: blocks, of which others may hold the same).
        refused: offers for which the tier had no room.
        finished: requests that ended.
        requests: int32[n, 7]: first and last step, step of its end, cached tokens (hit and loaded at its first
            admission), reason, blocks stored and loaded for it; -1 where there is none. preempted: int32[n]. tokens:
            int32[n], prompt and output at the end.
        transfers: int64[m, 6]: step, whether a load, request (-1: what was stored on eviction is nobody's), blocks,
            tokens (of a load), the last step begun at its end (-1 for none); in order of begin.
        transfer_ns: int64[m, 4], where calls have costs: when its call was made, its copy begun and ended, and the
            scheduler heard of it, -1 for never; else empty.
        rows: int64[steps, 13], `layout.S_*`, where asked for; else empty. Without costs their times are 0.
        clock: when all this happened, where calls have costs; else None. Its `steps` are there with `rows`.
        logs: with `events=True`, what happened one by one, int32 rows by the names of LOGS, see `layout`; else empty.
            log: the same in order, int32[., 7].
        seconds: what the kernel took.
    """

    settings: Settings
    offload: Connector
    steps: int
    preemptions: int
    evictions: int
    hit_tokens: int
    lookup_tokens: int
    loaded_tokens: int
    stored_blocks: int
    loaded_blocks: int
    stored_bytes: int | None
    loaded_bytes: int | None
    tier_evictions: int
    refused: int
    finished: int
    requests: I32
    preempted: I32
    tokens: I32
    transfers: I64
    transfer_ns: I64
    rows: I64
    clock: Clock | None
    logs: dict[str, I32]
    log: I32
    seconds: float


def simulate_offload(
    recorded: Recorded,
    settings: Settings,
    offload: Connector,
    *,
    arrivals: str = "step",
    costs: StepCosts | None = None,
    copies: TransferCosts | None = None,
    step_rows: bool = False,
    events: bool = False,
) -> OffloadRun:
    """Run `recorded` at `settings` with a tier `offload`.

    Args:
        arrivals: a name of `recorded.ARRIVALS`; "time" needs `costs`.
        costs: what a call takes; without, nothing is timed. copies: what transfers take beside the calls; needed with
            `costs`.
        step_rows: keep a row per step.
        events: keep what happened one by one, in `OffloadRun.logs`.

    Raises UsageError for settings that are not simulated with a tier, and where a request can never be served.
    """
    _check(recorded, settings, offload, arrivals, costs, copies)
    timed = costs is not None
    room = {"log": _FIRST_ROOM * events, "moves": _FIRST_ROOM, "gaps": _FIRST_ROOM * timed,
            "rows": _FIRST_ROOM * step_rows}  # fmt: skip
    begin = time.perf_counter()
    while True:
        state = arrays(recorded, settings, offload, arrivals, costs, copies, room)
        status = run_compiled(state)
        g = state.g
        used = {"log": g[at.G_LOG], "moves": g[at.N_MOVES], "gaps": g[base.G_GAPS], "rows": g[at.G_BEGUN] * step_rows}
        if status != at.DONE or all(used[name] <= room[name] for name in room):
            break
        # What there was no room for was counted: the run is the same again.
        room = {name: max(int(used[name]), room[name]) for name in room}
    seconds = time.perf_counter() - begin
    if status == at.STUCK:
        raise UsageError(
            f"at step {int(state.g[at.G_BEGUN])} nothing can be scheduled, and nobody is due to come or go"
        )
    if status == at.LIVELOCK:
        raise UsageError(f"up to step {int(state.g[at.G_BEGUN])} requests preempt one another, and none gets anywhere")
    return _run(recorded, settings, offload, state, {"timed": timed, "rows": step_rows, "events": events}, seconds)


def tier_blocks(amount: str | int, recorded: Recorded, block_size: int) -> int:
    """Blocks of `block_size` tokens that `amount` has room for: a number, or `10k`, `65536tok`, `40GiB`.

    Raises UsageError for what is none of these, for bytes where the trace does not know those of a block, and for less
    than one block.
    """
    return parse_amount(amount, block_size, block_bytes(recorded, block_size), "--cpu-offload")


def block_bytes(recorded: Recorded, block_size: int) -> int | None:
    """Bytes of a block of `block_size` tokens; None where the trace does not know."""
    own = recorded.header.get("bytes_per_block")
    return None if own is None else int(own) * block_size // int(recorded.header["block_size"])


def _check(
    recorded: Recorded,
    settings: Settings,
    offload: Connector,
    arrivals: str,
    costs: StepCosts | None,
    copies: TransferCosts | None,
) -> None:
    offload.check()
    settings.check()
    if arrivals == "time" and costs is None:
        raise UsageError("--arrivals time needs to know what a step costs: name a profile with --timing")
    if costs is not None and copies is None:
        raise UsageError("a timed run with --preemption offload needs to know what a copy costs: name a --link")
    if settings.policy != NATIVE:
        raise UsageError(f"--preemption offload evicts by the engine's own rule: leave out --policy {settings.policy}")
    if getattr(settings, "victim", NATIVE) != NATIVE:
        raise UsageError(
            f"--preemption offload preempts by the engine's own rule: leave out --victim {settings.victim}"
        )
    if settings.max_num_active_seqs is not None:
        raise UsageError("--preemption offload is not simulated with a limit on active sequences")
    need = int((-(-np.maximum(recorded.stop - 1, recorded.prompt) // settings.block_size)).max(initial=0))
    if need > settings.num_blocks - 1:
        raise UsageError(
            f"{settings.num_blocks} blocks of {settings.block_size} tokens can never serve the longest request, which "
            f"needs {need} beside the null block: --num-blocks {need + 1} or more"
        )


def _run(
    recorded: Recorded, settings: Settings, offload: Connector, state: at.State, kept: dict[str, bool], seconds: float
) -> OffloadRun:
    g, n = state.g, recorded.n_requests
    moves, rows = state.moves[: g[at.N_MOVES]], state.rows[: g[at.G_BEGUN]].copy()
    clock = None
    if kept["timed"]:
        clock = Clock(
            duration_ns=int(g[at.G_LAST]),
            times=state.times,
            gaps=state.gaps[: g[base.G_GAPS]].copy(),
            steps=rows[:, [at.S_BEGIN, at.S_END]],
        )
    size = block_bytes(recorded, settings.block_size)
    stored, loaded = int(g[at.G_STORED_BLOCKS]), int(g[at.G_LOADED_BLOCKS])
    return OffloadRun(
        settings=settings,
        offload=offload,
        steps=int(g[at.G_BEGUN]),
        preemptions=int(g[at.G_PREEMPTIONS]),
        evictions=int(g[base.G_EVICTIONS]),
        hit_tokens=int(g[at.G_HIT_TOKENS]),
        lookup_tokens=int(g[at.G_LOOKUP_TOKENS]),
        loaded_tokens=int(g[at.G_LOADED_TOKENS]),
        stored_blocks=stored,
        loaded_blocks=loaded,
        stored_bytes=None if size is None else stored * size,
        loaded_bytes=None if size is None else loaded * size,
        tier_evictions=int(g[at.G_TIER_EVICTIONS]),
        refused=int(g[at.G_REFUSED]),
        finished=int((state.req[:n, at.R_STATUS] == at.FINISHED).sum()),
        requests=state.req[:n, at.O_FIRST : at.O_LOADED + 1].copy(),
        preempted=state.req[:n, at.R_PREEMPTIONS].copy(),
        tokens=state.req[:n, at.R_TOKENS].copy(),
        transfers=moves[:, : at.M_PLANNED].copy(),
        transfer_ns=moves[:, at.M_PLANNED :].copy() if kept["timed"] else np.zeros((0, 4), np.int64),
        rows=rows,
        clock=clock,
        logs=_logs(state) if kept["events"] else {},
        log=state.log[: g[at.G_LOG]],
        seconds=seconds,
    )


def _logs(state: at.State) -> dict[str, I32]:
    """The rows of the log by their kind."""
    rows = state.log[: state.g[at.G_LOG]]
    return {name: rows[rows[:, 0] == kind, 1 : 1 + values] for kind, name, values in LOGS}
