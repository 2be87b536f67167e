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
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
POLICIES = ("lru", "arc")
_FIRST_ROOM = 1 << 12
run_compiled: Any = loop.run
#: Names of the rows of a log, by their kind, and how many values they have.
LOGS = (("events", 5), ("rows", 4), ("steps", 6), ("lookups", 5), ("preemptions", 4), ("moved", 1), ("tier", 2))


@dataclass(frozen=True)
class Offload:
    """The tier of host memory, and its connector's settings (vLLM 0.32.0, `kv_connector_extra_config`).

    `blocks`: room, in blocks of the engine. `policy`: who is dropped, one of POLICIES (`eviction_policy`).
    `blocks_per_chunk`: blocks that are stored as one. `store_threshold`: a chunk is stored once it was on offer so
    often; below 2 at once. `prompt_only`: whether generated blocks are left out (`offload_prompt_only`). `steps`: a
    transfer is done at the end of so many calls after the one it was begun in; 0: of that one.
    """

    blocks: int
    policy: str = "lru"
    blocks_per_chunk: int = 1
    store_threshold: int = 0
    prompt_only: bool = True
    steps: int = 0

    def check(self) -> None:
        """Raises UsageError for what the connector does not take."""
        if self.policy not in POLICIES:
            raise UsageError(f"--offload-policy {self.policy} is none of {', '.join(POLICIES)}")
        for name, least in (("blocks", 1), ("blocks_per_chunk", 1), ("store_threshold", 0), ("steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise UsageError(f"offload: {name} {value!r} must be a whole number from {least} to {2**31 - 1}")
        if self.blocks < self.blocks_per_chunk:
            raise UsageError(f"offload: {self.blocks} blocks have no room for a chunk of {self.blocks_per_chunk}")


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
        tier_evictions: chunks dropped from the tier. refused: offers for which the tier had no room.
        finished: requests that ended.
        requests: int32[n, 7]: first and last step, step of its end, cached tokens (hit and loaded at its first
            admission), reason, blocks stored and loaded for it; -1 where there is none. preempted: int32[n].
        transfers: int32[m, 6]: step, whether a load, request, blocks, tokens (of a load), the last step begun at its
            end; in order of begin.
        logs: with `events=True`, what happened one by one, int32 rows by the names of LOGS, see `layout`; else empty.
        seconds: what the kernel took.
    """

    settings: Settings
    offload: Offload
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
    transfers: I32
    logs: dict[str, I32]
    seconds: float


def simulate_offload(
    recorded: Recorded, settings: Settings, offload: Offload, *, arrivals: str = "step", events: bool = False
) -> OffloadRun:
    """Run `recorded` at `settings` with a tier `offload`.

    Args:
        arrivals: "step" or "all", as `recorded.ARRIVALS` has it.
        events: keep what happened one by one, in `OffloadRun.logs`.

    Raises UsageError for settings that are not simulated with a tier, and where a request can never be served.
    """
    _check(recorded, settings, offload, arrivals)
    log_room, move_room = (_FIRST_ROOM if events else 0), _FIRST_ROOM
    begin = time.perf_counter()
    while True:
        state = _state(recorded, settings, offload, arrivals, log_room, move_room)
        status = run_compiled(state)
        rows, moves = int(state.g[at.G_LOG]), int(state.g[at.N_MOVES])
        if status != at.DONE or (rows <= log_room and moves <= move_room):
            break
        # What there was no room for was counted: the run is the same again.
        log_room, move_room = max(rows, log_room), max(moves, move_room)
    seconds = time.perf_counter() - begin
    if status == at.STUCK:
        raise UsageError(
            f"at step {int(state.g[at.G_BEGUN])} nothing can be scheduled, and nobody is due to come or go"
        )
    if status == at.LIVELOCK:
        raise UsageError(f"up to step {int(state.g[at.G_BEGUN])} requests preempt one another, and none gets anywhere")
    return _run(recorded, settings, offload, state, events, seconds)


def tier_blocks(amount: str | int, recorded: Recorded, block_size: int) -> int:
    """Blocks of `block_size` tokens that `amount` has room for: a number, or `10k`, `65536tok`, `40GiB`.

    Raises UsageError for what is none of these, for bytes where the trace does not know those of a block, and for less
    than one block.
    """
    return parse_amount(amount, block_size, _block_bytes(recorded, block_size), "--cpu-offload")


def _block_bytes(recorded: Recorded, block_size: int) -> int | None:
    own = recorded.header.get("bytes_per_block")
    return None if own is None else int(own) * block_size // int(recorded.header["block_size"])


def _check(recorded: Recorded, settings: Settings, offload: Offload, arrivals: str) -> None:
    offload.check()
    settings.check()
    if arrivals not in ("step", "all"):
        raise UsageError(f"--preemption offload runs with --arrivals step or all, not {arrivals}")
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


def _state(
    recorded: Recorded, settings: Settings, offload: Offload, arrivals: str, log_room: int, move_room: int
) -> at.State:
    n, blocks = recorded.n_requests, settings.num_blocks
    chain, chain_at = recorded.blocks(settings.block_size)
    identities = int(recorded.hashes.size)
    per, chunks = offload.blocks_per_chunk, offload.blocks // offload.blocks_per_chunk
    # More than the trace's identities can never be there at once.
    chunk_room = min(chunks, identities)
    jobs, running = chunk_room + min(blocks, n) + 2, min(settings.max_num_seqs, n)
    width = int(recorded.stop.max(initial=1)) // settings.block_size + 3
    slots = min(n, 2 * blocks + running) + 1
    blk = np.zeros((blocks + 1, base.B_FIELDS + 1), np.int32)
    blk[:, base.B_IDENTITY] = base.NO_IDENTITY
    queue = np.concatenate([[blocks], np.arange(1, blocks), [blocks]]).astype(np.int32)
    blk[queue[:-1], base.B_NEXT] = queue[1:]
    blk[queue[1:], base.B_PREV] = queue[:-1]
    slot_rows = np.zeros((slots + 1, 2), np.int32)
    slot_rows[:, 0] = np.arange(slots + 1)[::-1] - 1
    slot_rows[slots, 0] = slots
    g = np.zeros(at.G_FIELDS, np.int64)
    g[base.G_FREE], g[at.G_ROOM] = blocks - 1, chunks
    job_lists = np.zeros((at.JOB_LISTS, max(jobs, n + 1)), np.int32)
    job_lists[at.SPARE, :jobs] = np.arange(jobs)[::-1]
    g[at.G_JOBS_FREE] = jobs
    ids = np.zeros((identities + 1, at.I_FIELDS), np.int64)
    ids[:, at.I_READERS] = at.GONE
    nodes = max(chunk_room + 2 * blocks + 2, (chunk_room + 1) * per + 1)
    return at.State(
        p=_parameters(recorded, settings, offload, log_room > 0),
        g=g,
        req=_requests(recorded, settings),
        blk=blk,
        first=np.full(identities + 1, -1, np.int32),
        table=np.zeros((slots, width), np.int32),
        slots=slot_rows,
        chain=chain,
        chain_at=chain_at,
        flags=np.zeros(max(len(chain), 1), np.uint8),
        ids=ids,
        lists=np.array([[-1, -1, 0]] * 5, np.int64),
        target=np.zeros(1),
        job=np.zeros((jobs, at.J_FIELDS), np.int64),
        nodes=_spare(nodes),
        jobs=job_lists,
        flight=np.zeros((3, running + 1, 3), np.int32),
        defer=np.zeros((blocks + 2, 4), np.int64),
        gone=np.zeros(n + 1, np.int32),
        come=recorded.arrivals(arrivals),
        aborts=recorded.aborts(arrivals),
        log=np.zeros((log_room, at.LOG_FIELDS), np.int32),
        moves=np.zeros((move_room, at.M_FIELDS), np.int32),
    )


def _spare(n: int) -> I32:
    """int32[n, 4]: two free lists of nodes, each from node 0 on."""
    nodes = np.zeros((n, 4), np.int32)
    nodes[:, 1] = nodes[:, 3] = np.arange(1, n + 1)
    return nodes


def _requests(recorded: Recorded, settings: Settings) -> I32:
    n = recorded.n_requests
    req = np.zeros((n + 3, at.R_FIELDS), np.int32)
    req[:, at.R_SLOT] = -1
    for queue in (at.WAITS, at.HOLDS, at.RUNS):
        req[n + queue, [at.R_NEXT, at.R_PREV]] = n + queue
    for column, values in (
        (at.L_PROMPT, recorded.prompt), (at.L_STOP, recorded.stop), (at.L_MOST, recorded.most),
        (at.L_NO_READ, recorded.no_read), (at.L_REASON, recorded.reason),
    ):  # fmt: skip
        req[:n, column] = values
    if settings.scheduling_policy == "priority":
        req[:n, at.L_RANK], req[:n, at.L_VICTIM] = recorded.ranks()
    req[:, at.O_FIRST : at.O_REASON + 1] = -1
    return req


def _parameters(recorded: Recorded, settings: Settings, offload: Offload, logged: bool) -> Any:
    rules = settings.rules
    p = np.zeros(at.P_FIELDS, np.int64)
    for place, value in (
        (at.P_BLOCK_SIZE, settings.block_size),
        (at.P_MAX_SEQS, settings.max_num_seqs),
        (at.P_BUDGET, min(settings.max_num_scheduled_tokens or settings.max_num_batched_tokens,
                          settings.max_num_batched_tokens)),
        (at.P_MAX_BATCHED, settings.max_num_batched_tokens),
        (at.P_CACHING, settings.prefix_caching),
        (at.P_CHUNKED, settings.chunked_prefill),
        (at.P_LONG, settings.long_prefill_token_threshold),
        (at.P_ADAPTIVE, settings.long_prefill_token_threshold_adaptive),
        (at.P_PRIORITY, settings.scheduling_policy == "priority"),
        (at.P_ASYNC, settings.async_scheduling),
        (at.P_WATERMARK, settings.watermark_blocks),
        (at.P_GATE, settings.reserve_full_isl),
        (at.P_UNCACHED_FIRST,
         rules.uncached_first if settings.prefix_caching else rules.uncached_first_without_caching),
        (at.P_MAX_LEN, settings.max_model_len),
        (at.P_SKIPS_FINISHING, rules.async_skips_finishing),
        (at.P_CHUNK_BLOCKS, offload.blocks_per_chunk),
        (at.P_CHUNKS, offload.blocks // offload.blocks_per_chunk),
        (at.P_ARC, offload.policy == "arc"),
        (at.P_THRESHOLD, offload.store_threshold),
        (at.P_PROMPT_ONLY, offload.prompt_only),
        (at.P_POLLS, offload.steps),
        (at.P_PATIENCE, 100 + 2 * int(recorded.stop.sum(dtype=np.int64))),
        (at.P_LOG, logged),
    ):  # fmt: skip
        p[place] = int(value)
    return p


def _run(
    recorded: Recorded, settings: Settings, offload: Offload, state: at.State, events: bool, seconds: float
) -> OffloadRun:
    g, n = state.g, recorded.n_requests
    size = _block_bytes(recorded, settings.block_size)
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
        transfers=state.moves[: g[at.N_MOVES]].copy(),
        logs=_logs(state) if events else {},
        seconds=seconds,
    )


def _logs(state: at.State) -> dict[str, I32]:
    """The rows of the log by their kind."""
    rows = state.log[: state.g[at.G_LOG]]
    return {name: rows[rows[:, 0] == kind, 1 : 1 + values] for kind, (name, values) in enumerate(LOGS)}
