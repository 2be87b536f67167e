"""Queues, blocks, and what becomes of a request in the scheduler with a connector."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.blocks import (
    give_back,
    remember,
    take_block,
)
from kvtrace_replay.schedulers.vllm_v1.layout import (
    B_IDENTITY,
    B_NEXT,
    GUESSED,
    NO_IDENTITY,
)
from kvtrace_replay.schedulers.vllm_v1.offload.connector import (
    fence,
    flush,
    leave_slot,
)
from kvtrace_replay.schedulers.vllm_v1.offload.events import ALLOCATE, EVICT, FILL, FREE, emit
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    B_HAND,
    FINISHED,
    G_BEGUN,
    G_CALL_PREEMPTED,
    G_CALLED,
    G_DEFER_HEAD,
    G_DEFERRED,
    G_DONE,
    G_GONE,
    G_GUESSED,
    G_HOLDING,
    G_IDLE,
    G_LEFT,
    G_PREEMPTED,
    G_PREEMPTIONS,
    G_RUNNING,
    G_WAITING,
    HOLDS,
    INNER,
    K_LOADED,
    K_STORED,
    L_PROMPT,
    L_RANK,
    LEAVING,
    LOADING,
    LOG_FINISH,
    LOG_PREEMPTION,
    NOWHERE,
    O_FINISH,
    O_REASON,
    P_ASYNC,
    P_BLOCK_SIZE,
    P_CACHING,
    P_PRIORITY,
    P_SIMPLE,
    P_UNCACHED_FIRST,
    R_BLOCKS,
    R_CACHED,
    R_COMPUTED,
    R_HOLDERS,
    R_LAST_STEP,
    R_NEXT,
    R_PREEMPTIONS,
    R_PREFILLING,
    R_PREV,
    R_QUEUE,
    R_SLOT,
    R_STATUS,
    R_TOKENS,
    WAITING,
    WAITS,
)
from kvtrace_replay.schedulers.vllm_v1.offload.simple import end_request
from kvtrace_replay.schedulers.vllm_v1.offload.tier import write
from kvtrace_traces.compile import njit


@njit(cache=False, **INNER)
def end_of(s, queue):
    return s.req.shape[0] - 3 + queue


@njit(cache=False, **INNER)
def count_of(queue):
    return G_WAITING if queue == WAITS else G_HOLDING if queue == HOLDS else G_RUNNING


@njit(cache=False, **INNER)
def link(s, queue, before, request):
    req = s.req
    after = req[before, R_NEXT]
    req[request, R_PREV], req[request, R_NEXT] = before, after
    req[before, R_NEXT], req[after, R_PREV] = request, request
    req[request, R_QUEUE] = queue
    s.g[count_of(queue)] += 1


@njit(cache=False, **INNER)
def unlink(s, request):
    req = s.req
    before, after = req[request, R_PREV], req[request, R_NEXT]
    req[before, R_NEXT], req[after, R_PREV] = after, before
    s.g[count_of(req[request, R_QUEUE])] -= 1
    req[request, R_QUEUE] = NOWHERE


@njit(cache=False, **INNER)
def enqueue(s, queue, request, at_front):
    """Waiting requests stand in order of rank where priorities rule."""
    end = end_of(s, queue)
    before = end if at_front else np.int64(s.req[end, R_PREV])
    if s.p[P_PRIORITY]:
        before = np.int64(s.req[end, R_PREV])
        while before != end and s.req[before, L_RANK] > s.req[request, L_RANK]:
            before = np.int64(s.req[before, R_PREV])
    link(s, queue, before, request)


# ---------------------------------------------------------------- blocks


@njit(cache=False, **INNER)
def blocks_of(s, tokens):
    return (tokens + s.p[P_BLOCK_SIZE] - 1) // s.p[P_BLOCK_SIZE]


@njit(cache=False, **INNER)
def take(s, request, n):
    """`n` more blocks for a request."""
    slot, have = s.req[request, R_SLOT], s.req[request, R_BLOCKS]
    for i in range(have, have + n):
        front = s.blk[s.blk.shape[0] - 1, B_NEXT]
        held = s.blk[front, B_IDENTITY]
        block = take_block(s.blk, s.first, s.g)
        if held != NO_IDENTITY:
            emit(s, EVICT, request, block, held)
        emit(s, ALLOCATE, request, block, -1)
        if s.p[P_SIMPLE]:
            s.blk[block, B_HAND] = 0
        s.table[slot, i] = block
    s.req[request, R_BLOCKS] = have + n


@njit(cache=False, **INNER)
def cache_up_to(s, request, tokens):
    if not s.p[P_CACHING]:
        return
    have, full = s.req[request, R_CACHED], tokens // s.p[P_BLOCK_SIZE]
    start, known = s.chain_at[request], s.chain_at[request + 1] - s.chain_at[request]
    slot = s.req[request, R_SLOT]
    for i in range(have, min(full, s.req[request, R_BLOCKS])):
        identity = np.int64(s.chain[start + i]) if i < known else np.int64(GUESSED)
        s.g[G_GUESSED] += i >= known
        remember(s.blk, s.first, s.table[slot, i], identity)
        emit(s, FILL, request, s.table[slot, i], identity)
        s.req[request, R_CACHED] = i + 1


@njit(cache=False, **INNER)
def free_table(s, request, slot, blocks):
    for i in range(blocks - 1, -1, -1):
        block = s.table[slot, i]
        emit(s, FREE, request, block, s.blk[block, B_IDENTITY])
    give_back(s.blk, s.g, s.table[slot], blocks, s.p[P_UNCACHED_FIRST] != 0)


@njit(cache=False, **INNER)
def may_free(s, request):
    return not s.p[P_ASYNC] or s.req[request, R_LAST_STEP] <= s.g[G_DONE]


@njit(cache=False, **INNER)
def release(s, request):
    """`Scheduler._free_request_blocks`."""
    slot, blocks = s.req[request, R_SLOT], s.req[request, R_BLOCKS]
    s.req[request, R_BLOCKS], s.req[request, R_CACHED] = 0, 0
    if slot < 0:
        return
    if may_free(s, request):
        free_table(s, request, slot, blocks)
        leave_slot(s, request)
    else:
        at = (s.g[G_DEFER_HEAD] + s.g[G_DEFERRED]) % s.defer.shape[0]
        row = s.defer[at]
        row[0], row[1], row[2], row[3] = s.g[G_CALLED], slot, blocks, request
        s.g[G_DEFERRED] += 1


@njit(cache=False, **INNER)
def free_deferred(s):
    while s.g[G_DEFERRED] > 0:
        row = s.defer[s.g[G_DEFER_HEAD]]
        if row[0] > s.g[G_DONE]:
            break
        free_table(s, row[3], row[1], row[2])
        leave_slot(s, row[3])
        s.g[G_DEFER_HEAD] = (s.g[G_DEFER_HEAD] + 1) % s.defer.shape[0]
        s.g[G_DEFERRED] -= 1


@njit(cache=False, **INNER)
def preempt(s, request):
    g, req = s.g, s.req
    write(s, LOG_PREEMPTION, g[G_BEGUN], request, req[request, R_BLOCKS], req[request, R_COMPUTED], 0, 0)
    unlink(s, request)
    if s.p[P_SIMPLE]:
        req[request, K_STORED] = 0
    else:
        flush(s, request)
    release(s, request)
    req[request, R_STATUS], req[request, R_COMPUTED] = WAITING, 0
    req[request, R_HOLDERS], req[request, R_PREFILLING] = 0, 0
    req[request, R_PREEMPTIONS] += 1
    g[G_PREEMPTIONS] += 1
    g[G_PREEMPTED] += 1
    g[G_CALL_PREEMPTED] += 1
    enqueue(s, WAITS, request, True)


@njit(cache=False, **INNER)
def finish(s, request, reason):
    """`Scheduler._free_request`. One that is being loaded keeps its blocks until that has ended."""
    g, req = s.g, s.req
    unlink(s, request)
    leaving = req[request, R_STATUS] == LOADING and not req[request, K_LOADED]
    if s.p[P_SIMPLE]:
        end_request(s, request)
    else:
        fence(s, request)
    req[request, R_PREFILLING] = 0
    req[request, R_STATUS] = FINISHED
    req[request, O_FINISH], req[request, O_REASON] = max(g[G_BEGUN] - 1, 0), reason
    if req[request, R_SLOT] >= 0:
        s.slots[req[request, R_SLOT], 1] += 1  # what it stores is planned with the next call
    write(s, LOG_FINISH, request, reason, req[request, R_TOKENS] - req[request, L_PROMPT], 0, 0, 0)
    s.gone[g[G_GONE]] = request
    g[G_GONE] += 1
    if leaving:
        req[request, R_STATUS] = LEAVING
        g[G_LEFT] += 1
    else:
        release(s, request)
    g[G_IDLE] = 0
