"""Who waits and starts: the second loop of `Scheduler.schedule`, with a connector that may load (0.32.0)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.blocks import (
    touch,
)
from kvtrace_replay.schedulers.vllm_v1.layout import (
    B_REFS,
    G_FREE,
)
from kvtrace_replay.schedulers.vllm_v1.offload.connector import (
    ASK_LATER,
    matched,
    plan_load,
    take_slot,
)
from kvtrace_replay.schedulers.vllm_v1.offload.events import HIT, emit
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    G_BEGUN,
    G_BUDGET,
    G_HIT_TOKENS,
    G_LOADING,
    G_LOOKUP_TOKENS,
    G_RUNNING,
    G_SCHEDULED,
    HOLDS,
    INNER,
    K_CACHED,
    K_LOADED,
    L_NO_READ,
    LOADING,
    LOADING_NOW,
    LOG_ASKED,
    LOG_LOOKUP,
    NOW,
    NOWHERE,
    O_CACHED,
    P_BLOCK_SIZE,
    P_CACHING,
    P_CHUNKED,
    P_GATE,
    P_MAX_LEN,
    P_MAX_SEQS,
    P_SIMPLE,
    P_WATERMARK,
    R_BLOCKS,
    R_CACHED,
    R_COMPUTED,
    R_NEXT,
    R_PREEMPTIONS,
    R_PREFILLING,
    R_PREV,
    R_SLOT,
    R_STATUS,
    R_TOKENS,
    RUNNING,
    RUNS,
    WAITING,
    WAITS,
)
from kvtrace_replay.schedulers.vllm_v1.offload.requests import (
    blocks_of,
    cache_up_to,
    end_of,
    enqueue,
    link,
    take,
    unlink,
)
from kvtrace_replay.schedulers.vllm_v1.offload.simple import find_on_host, load_from_host
from kvtrace_replay.schedulers.vllm_v1.offload.tier import (
    write,
)
from kvtrace_traces.compile import njit


@njit(cache=False, **INNER)
def put(s, request, tokens, admitted):
    n = s.g[G_SCHEDULED]
    s.flight[NOW, n, 0], s.flight[NOW, n, 1], s.flight[NOW, n, 2] = request, tokens, admitted
    s.g[G_SCHEDULED] = n + 1
    s.g[G_BUDGET] -= tokens


@njit(cache=False, **INNER)
def longest_hit(s, request):
    if not s.p[P_CACHING] or s.req[request, L_NO_READ]:
        return np.int64(0)
    start = s.chain_at[request]
    most = min((s.req[request, R_TOKENS] - 1) // s.p[P_BLOCK_SIZE], s.chain_at[request + 1] - start)
    hit = np.int64(0)
    while hit < most and s.first[s.chain[start + hit]] >= 0:
        hit += 1
    return hit


@njit(cache=False, **INNER)
def reserved(s):
    """Blocks that those who prefill or load still need: `_inflight_prefill_reserved_blocks`."""
    total = 0
    for queue in (RUNS, HOLDS):
        end = end_of(s, queue)
        request = np.int64(s.req[end, R_NEXT])
        while request != end:
            if s.req[request, R_PREFILLING]:
                whole = blocks_of(s, min(np.int64(s.req[request, R_TOKENS]), s.p[P_MAX_LEN]))
                total += max(whole - s.req[request, R_BLOCKS], 0)
            request = np.int64(s.req[request, R_NEXT])
    for i in range(s.g[G_LOADING]):
        request = np.int64(s.jobs[LOADING_NOW, i])
        whole = blocks_of(s, min(np.int64(s.req[request, R_TOKENS]), s.p[P_MAX_LEN]))
        total += max(whole - s.req[request, R_BLOCKS], 0)
    return total


@njit(cache=False, **INNER)
def give_slots(s, request, tokens, hit, computed, load, asked):
    """`KVCacheManager.allocate_slots` for a request that waits. Returns whether there was room. `asked`: tokens found
    by a lookup, -1 for none."""
    g, req = s.g, s.req
    idle, start = 0, s.chain_at[request]
    for i in range(hit):
        idle += s.blk[s.first[s.chain[start + i]], B_REFS] == 0
    have = req[request, R_BLOCKS] + hit
    spare = s.p[P_WATERMARK] if g[G_RUNNING] > 0 else 0
    if s.p[P_GATE]:
        whole = blocks_of(s, min(np.int64(req[request, R_TOKENS]), s.p[P_MAX_LEN]))
        if max(whole - have, 0) + idle + spare > g[G_FREE]:
            return False
    kept = reserved(s) if load else 0
    total = min(computed + tokens, s.p[P_MAX_LEN])
    need = max(blocks_of(s, total) - have, 0)
    if need + idle + spare > g[G_FREE] - kept:
        return False
    if req[request, R_SLOT] < 0:
        req[request, R_SLOT] = take_slot(s)
    slot = req[request, R_SLOT]
    if req[request, R_BLOCKS] == 0:
        write(s, LOG_ASKED, request, req[request, R_TOKENS], asked + 1, 0, 0, 0)
    for i in range(hit):
        block = s.first[s.chain[start + i]]
        touch(s.blk, g, block)
        s.table[slot, i] = block
        emit(s, HIT, request, block, s.chain[start + i])
    if hit > 0:
        req[request, R_BLOCKS], req[request, R_CACHED] = hit, hit
    take(s, request, need)
    if not load:
        cache_up_to(s, request, min(total, np.int64(req[request, R_TOKENS])))
    return True


@njit(cache=False, **INNER)
def has_loaded(s, request):
    """`_update_waiting_for_remote_kv`: what was loaded is cached; of a prompt that was loaded whole, the last token is
    computed again."""
    req = s.req
    cache_up_to(s, request, np.int64(req[request, R_COMPUTED]))
    if req[request, R_COMPUTED] == req[request, R_TOKENS]:
        req[request, R_COMPUTED] -= 1
    req[request, K_LOADED], req[request, R_STATUS] = 0, WAITING


@njit(cache=False, **INNER)
def admit(s, request, limit):
    """Try to start a waiting request. Returns 1 if it runs, 0 if it blocks those behind it, -1 if it is passed over,
    2 if it is being loaded."""
    g, req, size = s.g, s.req, s.p[P_BLOCK_SIZE]
    if req[request, R_STATUS] == LOADING:
        if not req[request, K_LOADED]:
            return -1
        has_loaded(s, request)
    hit, loads = np.int64(0), np.int64(0)
    known, computed = np.int64(req[request, R_TOKENS]), np.int64(req[request, R_COMPUTED])
    fresh = computed == 0
    if fresh:
        hit = longest_hit(s, request)
        loads = find_on_host(s, request, hit * size) if s.p[P_SIMPLE] else matched(s, request, hit * size)
        if req[request, L_NO_READ]:
            loads = np.int64(0)
        if loads == ASK_LATER:
            return -1
        computed = hit * size + loads
        if req[request, R_PREEMPTIONS] == 0:
            req[request, K_CACHED] = computed
    tokens = np.int64(0)
    if loads == 0:
        tokens = known - computed
        if 0 < limit < tokens:
            tokens = limit
        if not s.p[P_CHUNKED] and tokens > g[G_BUDGET]:
            return 0
        tokens = min(tokens, g[G_BUDGET])
    looks = fresh and s.p[P_CACHING] and not req[request, L_NO_READ]
    if not give_slots(s, request, tokens, hit, computed, loads > 0, hit * size if looks else np.int64(-1)):
        return 0
    if loads > 0 and s.p[P_SIMPLE]:
        load_from_host(s, request, loads)
    elif loads > 0:
        plan_load(s, request, loads)
    if looks:
        after = 1 if req[request, R_PREEMPTIONS] > 0 else 0
        write(s, LOG_LOOKUP, g[G_BEGUN], request, known, hit * size, after, 0)
        g[G_HIT_TOKENS] += hit * size
        g[G_LOOKUP_TOKENS] += known
    req[request, R_COMPUTED] = computed
    if loads > 0:
        req[request, R_STATUS], req[request, R_PREFILLING] = LOADING, 1
        return 2
    req[request, R_STATUS] = RUNNING
    if req[request, O_CACHED] < 0:
        req[request, O_CACHED] = req[request, K_CACHED]
    if computed + tokens < known:
        req[request, R_PREFILLING] = 1
    put(s, request, tokens, 1)
    return 1


@njit(cache=False, **INNER)
def schedule_waiting(s, limit):
    """Those with blocks first. One that is passed over keeps its place; one that loads goes to the end of these."""
    g, req = s.g, s.req
    g[G_LOADING] = 0
    for queue in (HOLDS, WAITS):
        end = end_of(s, queue)
        request = np.int64(req[end, R_NEXT])
        while request != end:
            if g[G_BUDGET] <= 0 or g[G_RUNNING] >= s.p[P_MAX_SEQS]:
                queue = NOWHERE
                break
            following = np.int64(req[request, R_NEXT])
            outcome = admit(s, request, limit)
            if outcome == 0:
                queue = NOWHERE
                break
            if outcome > 0:
                unlink(s, request)
            if outcome == 1:
                link(s, RUNS, np.int64(req[end_of(s, RUNS), R_PREV]), request)
            elif outcome == 2:
                s.jobs[LOADING_NOW, g[G_LOADING]] = request
                g[G_LOADING] += 1
            request = following
        if queue == NOWHERE:
            break
    for i in range(g[G_LOADING]):
        enqueue(s, HOLDS, np.int64(s.jobs[LOADING_NOW, i]), False)
    g[G_LOADING] = 0
