"""What becomes of one request: blocks are allocated for it, cached, and given back; it is preempted, it ends."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v1.choice import give_back, remember, remember_run, take_run
from kvtrace_replay.schedulers.vllm_v1.layout import (
    FINISHED,
    FLAG_STEADY,
    G_FILLED,
    G_FINISHED,
    G_FINISHED_IDS,
    G_GUESSED,
    G_LIVE,
    G_PREEMPTED,
    G_PREEMPTIONS,
    G_SLOTS,
    G_STEP,
    GUESSED,
    L_GRANULES,
    L_PROMPT,
    L_STOP,
    O_FINISH,
    O_REASON,
    P_BLOCK_SIZE,
    P_CACHING,
    P_LOG,
    P_STRIDE,
    PREEMPTED,
    R_BLOCKS,
    R_CACHED,
    R_COMPUTED,
    R_FLAGS,
    R_FLIGHT,
    R_HOLDERS,
    R_PREEMPTIONS,
    R_SLOT,
    R_STALE,
    R_STATUS,
    R_TOKENS,
    RUNNING,
    ST_FREE,
)
from kvtrace_replay.schedulers.vllm_v1.queues import enqueue, remove_running, withdraw
from kvtrace_replay.schedulers.vllm_v1.steady import leave
from kvtrace_replay.schedulers.vllm_v1.words import leave_set, log_alloc, log_fill, log_finish, log_guess, log_preempt
from kvtrace_traces.compile import njit


@njit(cache=False)
def blocks_of(tokens, block_size):
    return (tokens + block_size - 1) // block_size


@njit(cache=False)
def cache_up_to(tag, pol, p, g, req, blk, first, table, chain, chain_at, log, request, tokens):
    """Cache the full blocks of the first `tokens` tokens: `SingleTypeKVCacheManager.cache_blocks`."""
    if not p[P_CACHING]:
        return
    have, full = req[request, R_CACHED], tokens // p[P_BLOCK_SIZE]
    if have >= full:
        return
    start, known = chain_at[request], chain_at[request + 1] - chain_at[request]
    slot = req[request, R_SLOT]
    told = min(max(known, have), full)
    remember_run(tag, pol, p, blk, first, g, table, slot, chain, start, have, told, log)
    for i in range(told, full):
        g[G_GUESSED] += 1
        if p[P_LOG]:
            for nth in range(max(req[request, L_GRANULES], i * p[P_STRIDE]), (i + 1) * p[P_STRIDE]):
                log_guess(log, g, request, nth)
            req[request, L_GRANULES] = max(req[request, L_GRANULES], (i + 1) * p[P_STRIDE])
        remember(tag, pol, p, blk, first, g, table[slot, i], GUESSED, log)
    req[request, R_CACHED] = full
    g[G_FILLED] += full - have
    if p[P_LOG]:
        log_fill(log, g, request, full - have)


@njit(cache=False)
def extend(tag, pol, p, g, req, blk, first, table, chain, chain_at, owners, log, request, n):
    """`n` more blocks for a running request: `SingleTypeKVCacheManager.allocate_new_blocks`."""
    slot, have = req[request, R_SLOT], req[request, R_BLOCKS]
    start = chain_at[request]
    take_run(tag, pol, blk, first, g, chain, start, chain_at[request + 1] - start, table, slot, have, have + n)
    if p[P_LOG]:
        for i in range(have, have + n):
            log_alloc(log, g, owners, request, table[slot, i])
    req[request, R_BLOCKS] = have + n


@njit(cache=False)
def release(tag, pol, p, g, req, blk, first, table, log, st, request):
    """All blocks of a request go back: `KVCacheManager.free`."""
    slot = req[request, R_SLOT]
    if slot >= 0:
        give_back(tag, pol, p, blk, first, g, table[slot], req[request, R_BLOCKS], log)
        st[g[G_SLOTS], ST_FREE] = slot
        g[G_SLOTS] += 1
    req[request, R_SLOT] = -1
    req[request, R_BLOCKS] = 0
    req[request, R_CACHED] = 0


@njit(cache=False)
def preempt(tag, pol, p, g, req, blk, first, table, order, log, st, request):
    """`Scheduler._preempt_request`: the request starts anew, at the head of the waiting queue."""
    if p[P_LOG]:
        leave_set(req, g, request)
        log_preempt(log, g, request, req[request, R_COMPUTED], req[request, R_BLOCKS])
    remove_running(req, g, request)
    release(tag, pol, p, g, req, blk, first, table, log, st, request)
    req[request, R_STATUS] = PREEMPTED
    req[request, R_COMPUTED] = 0
    req[request, R_STALE] = req[request, R_FLIGHT]
    req[request, R_HOLDERS] = 0
    req[request, R_PREEMPTIONS] += 1
    g[G_PREEMPTIONS] += 1
    g[G_PREEMPTED] += 1
    enqueue(p, g, req, order, request, True)


@njit(cache=False)
def finish(tag, pol, p, g, req, blk, first, table, order, log, st, phases, ends, times, request, reason):
    """The request ends and gives its blocks back: `Scheduler._free_request`."""
    if req[request, R_FLAGS] & FLAG_STEADY:
        leave(p, g, req, st, phases, ends, times, request)
    if p[P_LOG]:
        leave_set(req, g, request)
        log_finish(log, g, request, reason, req[request, R_TOKENS] - req[request, L_PROMPT], req[request, R_BLOCKS])
    if req[request, R_STATUS] == RUNNING:
        remove_running(req, g, request)
    else:
        withdraw(p, g, req, order, request)
    release(tag, pol, p, g, req, blk, first, table, log, st, request)
    req[request, R_STATUS] = FINISHED
    req[request, O_FINISH] = max(g[G_STEP] - 1, 0)
    req[request, O_REASON] = reason
    g[G_FINISHED_IDS] = 1
    g[G_FINISHED] += 1
    g[G_LIVE] -= req[request, L_STOP]
