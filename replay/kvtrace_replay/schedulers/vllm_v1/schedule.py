"""One scheduler call: `Scheduler.schedule`, first the running requests in order, then the waiting ones."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.families import VICTIM_INDEX_IF_SCHEDULED, VICTIM_STAYS_SCHEDULED
from kvtrace_replay.schedulers.vllm_v1.blocks import find_run, known_run
from kvtrace_replay.schedulers.vllm_v1.choice import take_run, touch_run
from kvtrace_replay.schedulers.vllm_v1.layout import (
    B_REFS,
    BY_CHEAPEST,
    BY_ENGINE,
    BY_FEWEST,
    BY_FIRST,
    BY_MOST,
    BY_PRIORITY,
    FLAG_CHUNK,
    G_CALL,
    G_EMPTY,
    G_FINISHED_IDS,
    G_FREE,
    G_HIT_AFTER,
    G_HIT_TOKENS,
    G_LATE,
    G_LOOKUP_AFTER,
    G_LOOKUP_TOKENS,
    G_ORDER,
    G_QUIET,
    G_RUNNING,
    G_SCHEDULED,
    G_SLOTS,
    G_STEADY,
    G_STEADY_CALLS,
    G_STEADY_SCHEDULED,
    G_STEP,
    G_STEP_BEFORE,
    G_TOKENS,
    G_WAITING,
    L_MOST,
    L_NO_READ,
    O_CACHED,
    O_FIRST,
    O_HIT,
    O_LAST,
    P_ASYNC,
    P_BLOCK_SIZE,
    P_CACHING,
    P_CHUNKED,
    P_GATE,
    P_LOG,
    P_LONE_LONG,
    P_LONG,
    P_LONG_ADAPTIVE,
    P_MAX_BATCHED,
    P_MAX_LEN,
    P_MAX_SEQS,
    P_MAX_TOKENS,
    P_PASSES_LONG,
    P_PRIORITY,
    P_SKIPS_FINISHING,
    P_VICTIM,
    P_VICTIM_BY,
    P_WATERMARK,
    Q_HEAP,
    Q_RANK,
    Q_REQUEST,
    Q_SKIPPED,
    Q_VICTIM,
    R_BLOCKS,
    R_CACHED,
    R_CALL,
    R_COMPUTED,
    R_FLAGS,
    R_FLIGHT,
    R_HOLDERS,
    R_PREEMPTIONS,
    R_RUN_NEXT,
    R_RUN_PREV,
    R_SLOT,
    R_STALE,
    R_STATUS,
    R_TOKENS,
    R_WAIT_NEXT,
    RUNNING,
    ST_FREE,
    ST_ORDER,
)
from kvtrace_replay.schedulers.vllm_v1.queues import append_running, link_waiting, pop_heap, push_heap, unlink_waiting
from kvtrace_replay.schedulers.vllm_v1.requests import blocks_of, cache_up_to, extend, preempt
from kvtrace_replay.schedulers.vllm_v1.steady import (
    FAR,
    can_stay_steady,
    dissolve,
    first_unsteady,
    left_out,
    steady_call,
)
from kvtrace_replay.schedulers.vllm_v1.words import ALLOCN, HIT, log_begin, log_blocks, log_lookup, log_sched
from kvtrace_traces.compile import njit


@njit(cache=False, forceinline=True)
def long_prefill_limit(p, g):
    """The most tokens of one request in this call, 0 for no limit."""
    limit = p[P_LONG]
    if limit > 0:
        eligible = g[G_RUNNING] + g[G_WAITING]
        if eligible <= 1 and not p[P_LONE_LONG]:
            return 0
        if p[P_LONG_ADAPTIVE]:
            limit = max(limit, p[P_MAX_BATCHED] // max(eligible, 1))
    return limit


@njit(cache=False)
def wants_tokens(p, req, request):
    """Whether a running request has something to compute, for all that is known before its outputs arrive."""
    computed, holders = req[request, R_COMPUTED], req[request, R_HOLDERS]
    if p[P_SKIPS_FINISHING] and holders > 0 and computed + 2 - holders >= req[request, L_MOST]:
        return False  # the output under way is its last
    return min(req[request, R_TOKENS] + holders - computed, p[P_MAX_LEN] - 1 - computed) > 0


@njit(cache=False)
def victim_by(p, req, order):
    """The running request with the highest key; of several, the one that arrived last."""
    end = req.shape[0] - 1
    rule = p[P_VICTIM_BY]
    request = req[end, R_RUN_NEXT]
    chosen, highest = request, np.int64(-FAR)
    while request != end:
        key = np.int64(request)
        if rule == BY_FIRST:
            key = -key
        elif rule == BY_FEWEST:
            key = -np.int64(req[request, R_BLOCKS])
        elif rule == BY_MOST:
            key = np.int64(req[request, R_BLOCKS])
        elif rule == BY_PRIORITY:
            key = np.int64(order[request, Q_VICTIM])
        elif rule == BY_CHEAPEST:
            key = -np.int64(req[request, R_COMPUTED])
        if key > highest or (key == highest and request > chosen):
            chosen, highest = request, key
        request = req[request, R_RUN_NEXT]
    return chosen


@njit(cache=False)
def victim_of(p, req, order):
    """Who is preempted: the last to run, or, by priority, the first of those with the highest (priority, arrival); or
    by another rule than the engine's."""
    end = req.shape[0] - 1
    chosen = req[end, R_RUN_PREV]
    if p[P_VICTIM_BY] != BY_ENGINE:
        return victim_by(p, req, order)
    if p[P_PRIORITY]:
        request = req[end, R_RUN_NEXT]
        chosen = request
        while request != end:
            if order[request, Q_VICTIM] > order[chosen, Q_VICTIM]:
                chosen = request
            request = req[request, R_RUN_NEXT]
    return chosen


@njit(cache=False)
def stands_before(req, one, other):
    """1 if `one` runs before `other`: older engines then overlook the request after `other`. Else 0."""
    end = req.shape[0] - 1
    request = req[one, R_RUN_NEXT]
    while request != end:
        if request == other:
            return 1
        request = req[request, R_RUN_NEXT]
    return 0


@njit(cache=False)
def unschedule(g, sch, request):
    """Take a request that this call had scheduled off again; returns its tokens, 0 if it was not."""
    n = g[G_SCHEDULED]
    for i in range(n):
        if sch[i, 0] == request:
            tokens = sch[i, 1]
            for j in range(i, n - 1):
                for field in range(3):
                    sch[j, field] = sch[j + 1, field]
            g[G_SCHEDULED] = n - 1
            return tokens
    return 0


@njit(cache=False, forceinline=True)
def schedule_running(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch, owners, log, st,
    limit, request, budget,
):  # fmt: skip
    """The first loop of `Scheduler.schedule`, from `request` on. Returns (budget left, if anyone was preempted)."""
    end = req.shape[0] - 1
    preempted = False
    while request != end and budget > 0:
        computed, holders = req[request, R_COMPUTED], req[request, R_HOLDERS]
        following = req[request, R_RUN_NEXT]
        if not wants_tokens(p, req, request):
            request = following
            continue
        tokens = req[request, R_TOKENS] + holders - computed
        if 0 < limit < tokens:
            tokens = limit
        tokens = min(tokens, budget, p[P_MAX_LEN] - 1 - computed)
        need = blocks_of(min(computed + tokens, p[P_MAX_LEN]), p[P_BLOCK_SIZE]) - req[request, R_BLOCKS]
        fits, overlooked = True, 0
        while need > g[G_FREE]:
            victim = victim_of(p, req, order)
            preempted = True
            if p[P_VICTIM_BY] != BY_ENGINE:
                budget += unschedule(g, sch, victim)
            elif p[P_PRIORITY] and p[P_VICTIM] == VICTIM_STAYS_SCHEDULED:
                overlooked += stands_before(req, victim, request)
            elif p[P_PRIORITY]:
                restored = unschedule(g, sch, victim)
                budget += restored
                if p[P_VICTIM] == VICTIM_INDEX_IF_SCHEDULED and restored == 0:
                    overlooked += stands_before(req, victim, request)
            preempt(tag, pol, p, g, req, blk, first, table, order, log, st, victim)
            if victim == request:
                fits = False
                break
        if not fits:
            break
        if need > 0:
            extend(tag, pol, p, g, req, blk, first, table, chain, chain_at, owners, log, request, need)
        cache_up_to(
            tag, pol, p, g, req, blk, first, table, chain, chain_at, log, request, min(computed + tokens,
            req[request, R_TOKENS]),
        )  # fmt: skip
        n = g[G_SCHEDULED]
        sch[n, 0], sch[n, 1], sch[n, 2] = request, tokens, computed
        g[G_SCHEDULED] = n + 1
        budget -= tokens
        request = req[request, R_RUN_NEXT]  # as it is now: victims have left the list
        while overlooked > 0 and request != end:
            overlooked -= 1
            request = req[request, R_RUN_NEXT]
    return budget, preempted


@njit(cache=False, forceinline=True)
def longest_hit(p, req, first, chain, chain_at, request):
    """Blocks of the longest cached prefix: `FullAttentionManager.find_longest_cache_hit`, the last token left out."""
    if not p[P_CACHING] or req[request, L_NO_READ]:
        return np.int64(0)
    start = chain_at[request]
    most = min((req[request, R_TOKENS] - 1) // p[P_BLOCK_SIZE], chain_at[request + 1] - start)
    return known_run(first, chain, start, most)


@njit(cache=False, forceinline=True)
def admit(
    tag, pol, p, g, req, blk, first, table, chain, chain_at, sch, owners, log, st, request,
    limit, budget,
):  # fmt: skip
    """Try to start a waiting request, still in its queue. Returns the tokens scheduled for it, 0 if it has to wait, -1
    if it is passed over."""
    size = p[P_BLOCK_SIZE]
    known = req[request, R_TOKENS]
    hit, computed = 0, req[request, R_COMPUTED]
    looked_up = computed == 0 and p[P_CACHING] and not req[request, L_NO_READ]
    if computed == 0:  # always, but for what up to 0.11.0 becomes of a victim that stays scheduled
        hit = longest_hit(p, req, first, chain, chain_at, request)
        computed = hit * size
    tokens = known - computed
    if 0 < limit < tokens:
        tokens = limit
    if not p[P_CHUNKED] and tokens > budget:
        return -1 if p[P_PASSES_LONG] else 0
    tokens = min(tokens, budget)
    start = chain_at[request]
    spare = p[P_WATERMARK] if g[G_RUNNING] > 0 else 0
    need = max(blocks_of(min(computed + tokens, p[P_MAX_LEN]), size) - hit, 0)
    most = need
    if p[P_GATE]:
        most = max(most, blocks_of(min(known, p[P_MAX_LEN]), size) - hit)
    if most + hit + spare > g[G_FREE]:  # else there is room, however many of the hits are idle
        # Hit blocks that nobody uses are in the free queue, and will leave it.
        idle = 0
        for i in range(hit):
            if blk[first[chain[start + i]], B_REFS] == 0:
                idle += 1
        if most + idle + spare > g[G_FREE]:
            return 0

    g[G_SLOTS] -= 1
    slot = st[g[G_SLOTS], ST_FREE]
    req[request, R_SLOT] = slot
    find_run(first, chain, start, table, slot, hit)
    touch_run(tag, pol, blk, g, table, slot, hit)
    take_run(tag, pol, blk, first, g, chain, start, chain_at[request + 1] - start, table, slot, hit, hit + need)
    req[request, R_BLOCKS] = hit + need
    req[request, R_CACHED] = hit
    if p[P_LOG]:
        log_lookup(log, g, request, known, computed if looked_up else -1)
        log_blocks(log, g, HIT, table[slot], 0, hit)
        log_blocks(log, g, ALLOCN, table[slot], hit, hit + need)
    cache_up_to(
        tag, pol, p, g, req, blk, first, table, chain, chain_at, log, request, min(computed + tokens, known),
    )  # fmt: skip
    req[request, R_COMPUTED] = computed
    if looked_up:
        g[G_HIT_TOKENS] += computed
        g[G_LOOKUP_TOKENS] += known
        req[request, O_HIT] += computed
        if req[request, R_PREEMPTIONS] > 0:
            g[G_HIT_AFTER] += computed
            g[G_LOOKUP_AFTER] += known
    if req[request, O_CACHED] < 0:
        req[request, O_CACHED] = computed
    req[request, R_STATUS] = RUNNING
    n = g[G_SCHEDULED]
    sch[n, 0], sch[n, 1], sch[n, 2] = request, tokens, computed
    g[G_SCHEDULED] = n + 1
    return tokens


@njit(cache=False, forceinline=True)
def schedule_waiting(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch,
    owners, log, limit, budget, st,
):  # fmt: skip
    """The second loop of `Scheduler.schedule`: the head of the queue starts, or blocks all behind it."""
    end = req.shape[0] - 1
    n_skipped = 0
    request = req[end, R_WAIT_NEXT]
    while budget > 0 and g[G_RUNNING] < p[P_MAX_SEQS]:
        if p[P_PRIORITY]:
            request = order[order[0, Q_HEAP], Q_REQUEST] if g[G_WAITING] > n_skipped else end
        if request == end:
            break
        following = req[request, R_WAIT_NEXT]
        tokens = -1  # its stale outputs are on their way: it cannot resume before
        if req[request, R_STALE] <= 0:
            tokens = admit(
                tag, pol, p, g, req, blk, first, table, chain, chain_at, sch, owners, log, st,
                request, limit, budget,
            )  # fmt: skip
        if tokens == 0:
            break
        if tokens < 0:
            order[n_skipped, Q_SKIPPED] = request
            n_skipped += 1
            if p[P_PRIORITY]:
                pop_heap(order, g)
            elif p[P_PASSES_LONG]:
                unlink_waiting(req, request)
            request = following
            continue
        budget -= tokens
        if p[P_PRIORITY]:
            pop_heap(order, g)
        else:
            unlink_waiting(req, request)
        g[G_WAITING] -= 1
        append_running(req, g, request)
        st[req[request, R_SLOT], ST_ORDER] = g[G_ORDER]
        g[G_ORDER] += 1
        request = following
    for i in range(n_skipped):
        if p[P_PRIORITY]:
            push_heap(order, g, order[order[i, Q_SKIPPED], Q_RANK])
        elif p[P_PASSES_LONG]:  # up to 0.10: put back at the head one by one, so the last first
            link_waiting(req, end, order[i, Q_SKIPPED])


@njit(cache=False, forceinline=True)
def schedule(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch,
    owners, log, st, phases, ends, times, flights, flight_n,
):  # fmt: skip
    """A call. Leaves what it scheduled in `sch`, `g[G_SCHEDULED]` rows of it, and `g[G_TOKENS]`; of steady requests,
    their number in `g[G_STEADY_SCHEDULED]`."""
    if p[P_LOG]:
        log_begin(p, log, g)
    g[G_SCHEDULED] = 0
    limit = long_prefill_limit(p, g)
    budget = min(p[P_MAX_TOKENS], p[P_MAX_BATCHED])
    request = req[req.shape[0] - 1, R_RUN_NEXT]
    steady = 0
    if g[G_STEADY] > 0:
        unsteady = first_unsteady(g, req)
        if can_stay_steady(p, g, req, phases, unsteady, limit):
            steady = g[G_STEADY] - left_out(p, g, st, ends)
            phase = g[G_STEADY_CALLS] % p[P_BLOCK_SIZE]
            steady_call(tag, pol, p, g, req, blk, first, table, chain, owners, log, st, phases, phase)
            request = unsteady
            g[G_LATE] = 1
        else:
            dissolve(p, g, req, st, phases, ends, times, flights, flight_n)
    budget, preempted = schedule_running(
        tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch, owners,
        log, st, limit, request, budget - steady,
    )  # fmt: skip
    if not preempted:
        schedule_waiting(
            tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch,
            owners, log, limit, budget, st,
        )  # fmt: skip
    if p[P_LOG]:
        log_sched(log, g, req, sch, owners, st, steady)
    # `Scheduler._update_after_schedule`
    g[G_CALL] += 1
    g[G_FINISHED_IDS] = 0
    total = steady
    for i in range(g[G_SCHEDULED]):
        request, tokens = sch[i, 0], sch[i, 1]
        total += tokens
        computed = req[request, R_COMPUTED] + tokens
        req[request, R_COMPUTED] = computed
        req[request, R_FLIGHT] += tokens
        req[request, R_CALL] = g[G_CALL]
        known = req[request, R_TOKENS] + req[request, R_HOLDERS]
        # What its worker knows decides whether it samples: up to 0.11.0, a victim may stay scheduled.
        if sch[i, 2] + tokens < known:
            req[request, R_FLAGS] |= FLAG_CHUNK
        else:
            req[request, R_FLAGS] &= ~FLAG_CHUNK
        if p[P_ASYNC] and computed >= known:
            req[request, R_HOLDERS] += 1
        if req[request, O_FIRST] < 0:
            req[request, O_FIRST] = g[G_STEP]
        req[request, O_LAST] = g[G_STEP]
    g[G_STEADY_SCHEDULED] = steady
    g[G_TOKENS] = total
    g[G_STEP_BEFORE] = g[G_STEP]
    if total > 0:
        g[G_STEP] += 1
        g[G_QUIET] += 1
    else:
        g[G_EMPTY] += 1
