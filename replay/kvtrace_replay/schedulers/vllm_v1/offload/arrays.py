"""The arrays of a run with a tier: `state`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1 import layout as base
from kvtrace_replay.schedulers.vllm_v1.offload import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Connector, Offload, SimpleOffload
from kvtrace_replay.timing.costs import StepCosts, TransferCosts

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]


def state(
    recorded: Recorded,
    settings: Settings,
    offload: Connector,
    arrivals: str,
    costs: StepCosts | None,
    copies: TransferCosts | None,
    room: Mapping[str, int],
) -> at.State:
    """All arrays at the begin of a run; `room`: rows of `log`, `moves`, `gaps` and `rows` to keep."""
    n, blocks = recorded.n_requests, settings.num_blocks
    chain, chain_at = recorded.blocks(settings.block_size)
    identities = int(recorded.hashes.size)
    per, chunks = offload.blocks_per_chunk, offload.chunks
    running = min(settings.max_num_seqs, n)
    if isinstance(offload, SimpleOffload):  # each of its jobs holds a block that no other of its direction holds
        chunk_room, host, jobs = 0, offload.blocks, 2 * blocks + 2
    else:  # more than the trace's identities can never be there at once
        chunk_room = min(chunks, identities)
        host, jobs = 1, chunk_room + min(blocks, n) + 2
    width = int(recorded.stop.max(initial=1)) // settings.block_size + 3
    slots = min(n, 2 * blocks + running) + 1
    slot_rows = np.zeros((slots + 1, 2), np.int32)
    slot_rows[:, 0] = np.arange(slots + 1)[::-1] - 1
    slot_rows[slots, 0] = slots
    g = np.zeros(at.G_FIELDS, np.int64)
    g[base.G_FREE], g[at.G_ROOM] = blocks - 1, chunks
    host_g = np.zeros(base.G_FIELDS, np.int64)
    host_g[base.G_FREE] = host - 1
    job_lists = np.zeros((at.JOB_LISTS, max(jobs, n + 1)), np.int32)
    job_lists[at.SPARE, :jobs] = np.arange(jobs)[::-1]
    g[at.G_JOBS_FREE] = jobs
    ids = np.zeros((identities + 1, at.I_FIELDS), np.int64)
    ids[:, at.I_READERS] = at.GONE
    nodes = max(chunk_room + 2 * blocks + 2, (chunk_room + 1) * per + 1)
    return at.State(
        p=_parameters(recorded, settings, offload, costs is not None, arrivals == "time", room["log"] > 0),
        g=g,
        req=_requests(recorded, settings),
        blk=_pool(blocks),
        first=np.full(identities + 1, -1, np.int32),
        table=np.zeros((slots, width), np.int32),
        slots=slot_rows,
        chain=chain,
        chain_at=chain_at,
        flags=np.zeros(max(len(chain), 1), np.uint8),
        ids=ids,
        lists=np.array([[-1, -1, 0]] * 5, np.int64),
        real=_real(costs, copies),
        job=np.zeros((jobs, at.J_FIELDS), np.int64),
        nodes=_spare(nodes),
        jobs=job_lists,
        flight=np.zeros((3, running + 1, 3), np.int32),
        defer=np.zeros((blocks + 2, 4), np.int64),
        gone=np.zeros(n + 1, np.int32),
        come=recorded.arrivals(arrivals),
        aborts=recorded.aborts(arrivals),
        log=np.zeros((room["log"], at.LOG_FIELDS), np.int32),
        moves=np.zeros((room["moves"], at.M_FIELDS), np.int64),
        times=np.full((n if costs else 1, 4), -1, np.int64),
        gaps=np.zeros((room["gaps"], 2), np.int64),
        rows=np.zeros((room["rows"], at.S_FIELDS), np.int64),
        host=_pool(host),
        host_first=np.full(identities + 1, -1, np.int32),
        host_g=host_g,
    )


def _pool(blocks: int) -> I32:
    """A block pool, all free: int32[blocks + 1, B_FIELDS + 1]; block 0 is the null block, the last row the ends."""
    blk = np.zeros((blocks + 1, base.B_FIELDS + 1), np.int32)
    blk[:, base.B_IDENTITY] = base.NO_IDENTITY
    queue = np.concatenate([[blocks], np.arange(1, blocks), [blocks]]).astype(np.int32)
    blk[queue[:-1], base.B_NEXT] = queue[1:]
    blk[queue[1:], base.B_PREV] = queue[:-1]
    return blk


def _real(costs: StepCosts | None, copies: TransferCosts | None) -> F64:
    real = np.zeros(at.REALS)
    if costs is not None:
        real[at.F_CALL : at.F_OUT] = costs.array()
    if copies is not None:
        real[at.F_OUT :] = copies.array()
    return real


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


def _parameters(
    recorded: Recorded,
    settings: Settings,
    offload: Connector,
    timed: bool,
    by_time: bool,
    logged: bool,
) -> Any:
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
        (at.P_CHUNKS, offload.chunks),
        (at.P_ARC, offload.policy == "arc"),
        (at.P_POLLS, offload.steps),
        (at.P_PATIENCE, 100 + 2 * int(recorded.stop.sum(dtype=np.int64))),
        (at.P_LOG, logged),
        (at.P_TIMED, timed),
        (at.P_BY_TIME, by_time),
    ):  # fmt: skip
        p[place] = int(value)
    p[at.P_EMPTY] = 20 + 2 * offload.steps
    if isinstance(offload, Offload):
        p[at.P_THRESHOLD], p[at.P_PROMPT_ONLY] = offload.store_threshold, offload.prompt_only
        return p
    p[at.P_SIMPLE], p[at.P_LAZY], p[at.P_RUNNER] = 1, offload.store == "eviction", offload.runner
    p[at.P_COVER] = 2 * -(-settings.max_num_batched_tokens // settings.block_size)
    p[at.P_IDLE] = 10
    if by_time:  # many calls may be made at one moment, each of which stores a block at least
        p[at.P_IDLE], p[at.P_EMPTY] = 1000, p[at.P_EMPTY] + settings.num_blocks
    return p
