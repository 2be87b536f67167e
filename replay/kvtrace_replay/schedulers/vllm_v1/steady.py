"""The fast path: requests that only decode are counted by the call, not one by one.

In a steady call every decoding request gets one token, so that nothing has to be done for it but at three occasions:
when its next token needs a new block, when a block becomes full, and when it ends. Such a request is *steady*: its
row of `req` stands still, two counters of calls say how far it has come, and it is in two lists: that of its phase
(its computed tokens modulo the block size, which decides when it needs a block) and that of the output it ends with.
Both are in the order of the running list. All else (prefill, admission, preemption, a tight budget) is done by the
plain path, to which `dissolve` hands all steady requests back; `gather` takes up those that decode.

With asynchronous scheduling, a call is under way while the next one is scheduled: an output lags one call behind, and
`R_HOLDERS` and `R_FLIGHT` are 1 between calls. Of the call under way, `flights` names only the requests not steady.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.choice import remember, take_block
from kvtrace_replay.schedulers.vllm_v1.clock import note_steady, start_call
from kvtrace_replay.schedulers.vllm_v1.layout import (
    F_END,
    F_NAMED,
    F_TOKENS,
    FLAG_CHUNK,
    FLAG_STEADY,
    G_CALL,
    G_CONTEXT,
    G_EMPTY,
    G_FILLED,
    G_FINISHED_IDS,
    G_FLIGHTS,
    G_FREE,
    G_GAPS,
    G_GUESSED,
    G_LATE,
    G_NOW,
    G_OUTPUTS,
    G_PREEMPTED,
    G_RUNNING,
    G_STEADY,
    G_STEADY_CALLS,
    G_STEP,
    G_STEP_BEFORE,
    G_TOLD_LAST,
    G_WAITING,
    GUESSED,
    L_GRANULES,
    L_MOST,
    L_STOP,
    O_LAST,
    P_ASYNC,
    P_BLOCK_SIZE,
    P_BY_TIME,
    P_CACHING,
    P_DEPTH,
    P_LOG,
    P_MAX_BATCHED,
    P_MAX_LEN,
    P_MAX_SEQS,
    P_MAX_TOKENS,
    P_ROWS,
    P_SKIPS_FINISHING,
    P_STRIDE,
    P_TIMED,
    R_BLOCKS,
    R_CACHED,
    R_CALL,
    R_COMPUTED,
    R_FLAGS,
    R_FLIGHT,
    R_HOLDERS,
    R_RUN_NEXT,
    R_RUN_PREV,
    R_SLOT,
    R_STALE,
    R_TOKENS,
    ST_BLOCKS,
    ST_CACHED,
    ST_CALLS,
    ST_CHAIN,
    ST_END,
    ST_END_NEXT,
    ST_END_PREV,
    ST_KNOWN,
    ST_ORDER,
    ST_OUTPUTS,
    ST_PHASE,
    ST_PHASE_NEXT,
    ST_PHASE_PREV,
    ST_REQUEST,
    ST_SKIPS,
    T_LAST,
)
from kvtrace_replay.schedulers.vllm_v1.words import log_alloc, log_fill, log_guess
from kvtrace_traces.compile import njit

FAR = np.int64(1) << np.int64(62)
HEAD, TAIL, COUNT = range(3)  # columns of `phases` and `ends`


@njit(cache=False)
def enlist(st, lists, at, slot, after, before):
    """Put `slot` into the list `at`, in the order of running; new ones mostly go to its end."""
    place = lists[at, TAIL]
    while place >= 0 and st[place, ST_ORDER] > st[slot, ST_ORDER]:
        place = st[place, before]
    follower = lists[at, HEAD] if place < 0 else st[place, after]
    st[slot, before], st[slot, after] = place, follower
    if place < 0:
        lists[at, HEAD] = slot
    else:
        st[place, after] = slot
    if follower < 0:
        lists[at, TAIL] = slot
    else:
        st[follower, before] = slot
    lists[at, COUNT] += 1


@njit(cache=False)
def delist(st, lists, at, slot, after, before):
    place, follower = st[slot, before], st[slot, after]
    if place < 0:
        lists[at, HEAD] = follower
    else:
        st[place, after] = follower
    if follower < 0:
        lists[at, TAIL] = place
    else:
        st[follower, before] = place
    lists[at, COUNT] -= 1


@njit(cache=False, forceinline=True)
def may_enter(p, g, req, times, request):
    """Whether a running request only decodes from here on, as far as it alone is concerned; between calls."""
    if req[request, R_FLAGS] & (FLAG_CHUNK | FLAG_STEADY) or req[request, R_STALE] > 0:
        return False
    if p[P_TIMED] and times[request, T_LAST] != g[G_NOW]:
        return False  # from here on its tokens come with the others', one an output
    size, computed = p[P_BLOCK_SIZE], req[request, R_COMPUTED]
    cached = computed // size
    if p[P_ASYNC]:
        if req[request, R_HOLDERS] != 1 or req[request, R_FLIGHT] != 1 or computed != req[request, R_TOKENS]:
            return False
        cached = (computed - 1) // size  # the block that the call under way filled is cached by the next call
    elif req[request, R_TOKENS] - computed != 1:
        return False
    if p[P_CACHING] and req[request, R_CACHED] != cached:
        return False
    return req[request, R_BLOCKS] == (computed + size - 1) // size


@njit(cache=False, forceinline=True)
def enter(p, g, req, st, phases, ends, chain_at, request):
    """`request` becomes steady; between calls only."""
    slot = req[request, R_SLOT]
    stop = req[request, L_STOP]
    req[request, R_FLAGS] |= FLAG_STEADY
    st[slot, ST_REQUEST] = request
    st[slot, ST_CALLS] = g[G_STEADY_CALLS]
    st[slot, ST_OUTPUTS] = g[G_OUTPUTS]
    st[slot, ST_BLOCKS] = req[request, R_BLOCKS]
    st[slot, ST_CACHED] = req[request, R_CACHED]
    st[slot, ST_CHAIN] = chain_at[request]
    st[slot, ST_KNOWN] = chain_at[request + 1] - chain_at[request]
    # Asynchronous scheduling leaves a request out whose output under way is its last, if it can know.
    st[slot, ST_SKIPS] = 0
    if p[P_ASYNC] and ((p[P_SKIPS_FINISHING] and stop >= req[request, L_MOST]) or stop >= p[P_MAX_LEN]):
        st[slot, ST_SKIPS] = 1
    st[slot, ST_END] = g[G_OUTPUTS] + stop - req[request, R_TOKENS] - 1
    st[slot, ST_PHASE] = (g[G_STEADY_CALLS] - req[request, R_COMPUTED]) % p[P_BLOCK_SIZE]
    enlist(st, phases, st[slot, ST_PHASE], slot, ST_PHASE_NEXT, ST_PHASE_PREV)
    enlist(st, ends, st[slot, ST_END] & (ends.shape[0] - 1), slot, ST_END_NEXT, ST_END_PREV)
    g[G_STEADY] += 1
    g[G_CONTEXT] += req[request, R_COMPUTED]


@njit(cache=False)
def leave(p, g, req, st, phases, ends, times, request):
    """`request` is steady no more: its row says again how far it is."""
    slot = req[request, R_SLOT]
    calls = g[G_STEADY_CALLS] - st[slot, ST_CALLS]
    outputs = g[G_OUTPUTS] - st[slot, ST_OUTPUTS]
    delist(st, phases, st[slot, ST_PHASE], slot, ST_PHASE_NEXT, ST_PHASE_PREV)
    delist(st, ends, st[slot, ST_END] & (ends.shape[0] - 1), slot, ST_END_NEXT, ST_END_PREV)
    req[request, R_FLAGS] &= ~FLAG_STEADY
    g[G_CONTEXT] -= req[request, R_COMPUTED] + calls
    if p[P_TIMED]:
        times[request, T_LAST] = g[G_TOLD_LAST]
    last, in_last_call = g[G_STEP] - 1, True
    if g[G_LATE] and st[slot, ST_SKIPS] and st[slot, ST_END] == g[G_OUTPUTS]:
        calls -= 1  # the call just made left it out
        last, in_last_call = g[G_STEP_BEFORE] - 1, False
    if calls > 0:
        req[request, O_LAST] = last
        req[request, R_CALL] = g[G_CALL]
    if not in_last_call:
        req[request, R_CALL] = -1
    req[request, R_COMPUTED] += calls
    req[request, R_TOKENS] += outputs
    req[request, R_FLIGHT] += calls - outputs
    if p[P_ASYNC]:
        req[request, R_HOLDERS] += calls - outputs
    req[request, R_BLOCKS] = st[slot, ST_BLOCKS]
    req[request, R_CACHED] = st[slot, ST_CACHED]
    g[G_STEADY] -= 1


@njit(cache=False, forceinline=True)
def gather(p, g, req, st, phases, ends, times, chain_at, flights, flight_n, request):
    """Between calls: from `request` on in the running list, whoever only decodes becomes steady."""
    end = req.shape[0] - 1
    entered = False
    while request != end:
        if may_enter(p, g, req, times, request):
            enter(p, g, req, st, phases, ends, chain_at, request)
            entered = True
        request = req[request, R_RUN_NEXT]
    if entered and g[G_FLIGHTS] > 0:
        drop_steady(req, flights, flight_n)


@njit(cache=False)
def copy_row(flights, call, i, to, k):
    """Entry `i` of a call under way to entry `k` of another."""
    for field in range(3):
        flights[to, k, field] = flights[call, i, field]


@njit(cache=False)
def drop_steady(req, flights, flight_n):
    """The newest call names the requests not steady alone."""
    kept = 0
    for i in range(flight_n[0, F_NAMED]):
        if not req[flights[0, i, 0], R_FLAGS] & FLAG_STEADY:
            copy_row(flights, 0, i, 0, kept)
            kept += 1
    flight_n[0, F_NAMED] = kept


@njit(cache=False)
def dissolve(p, g, req, st, phases, ends, times, flights, flight_n):
    """Between calls: nobody is steady any more, and the call under way names all its requests, in order."""
    end = req.shape[0] - 1
    named = flight_n[0, F_NAMED] if g[G_FLIGHTS] > 0 else 0
    spare = flights.shape[0] - 1
    for i in range(named):
        copy_row(flights, 0, i, spare, i)
    i, n = 0, 0
    request = req[end, R_RUN_NEXT]
    while request != end:
        if req[request, R_FLAGS] & FLAG_STEADY:
            order = st[req[request, R_SLOT], ST_ORDER]
            while i < named and order_of(req, st, flights[spare, i, 0]) < order:
                copy_row(flights, spare, i, 0, n)
                n, i = n + 1, i + 1
            leave(p, g, req, st, phases, ends, times, request)
            if g[G_FLIGHTS] > 0:
                flights[0, n, 0], flights[0, n, 1], flights[0, n, 2] = request, 1, 1
                n += 1
        request = req[request, R_RUN_NEXT]
    while i < named:
        copy_row(flights, spare, i, 0, n)
        n, i = n + 1, i + 1
    if g[G_FLIGHTS] > 0:
        flight_n[0, F_NAMED] = n


@njit(cache=False)
def order_of(req, st, request):
    """Where a request stands in the running list; those that have left it come first: their order decides nothing."""
    return st[req[request, R_SLOT], ST_ORDER] if req[request, R_SLOT] >= 0 else -1


@njit(cache=False, forceinline=True)
def first_unsteady(g, req):
    """The first of the running requests that are not steady, where these are the last ones; else -1."""
    end = req.shape[0] - 1
    request, n = end, g[G_RUNNING] - g[G_STEADY]
    for _ in range(n):
        request = req[request, R_RUN_PREV]
        if req[request, R_FLAGS] & FLAG_STEADY:
            return -1
    return request


@njit(cache=False, forceinline=True)
def left_out(p, g, st, ends):
    """How many steady requests the next call leaves since the output under way is their last."""
    n = 0
    if p[P_ASYNC]:
        slot = ends[g[G_OUTPUTS] & (ends.shape[0] - 1), HEAD]
        while slot >= 0:
            n += st[slot, ST_SKIPS]
            slot = st[slot, ST_END_NEXT]
    return n


@njit(cache=False, forceinline=True)
def can_stay_steady(p, g, req, phases, unsteady, limit):
    """Whether the next call gives every steady request its token, and the others their blocks without a preemption."""
    if unsteady < 0 or g[G_STEADY] == 0 or g[G_FLIGHTS] != p[P_DEPTH] - 1:
        return False
    budget = min(p[P_MAX_TOKENS], p[P_MAX_BATCHED]) - g[G_STEADY]
    if budget < 0:
        return False
    size, end = p[P_BLOCK_SIZE], req.shape[0] - 1
    need = phases[g[G_STEADY_CALLS] % size, COUNT]
    while unsteady != end:
        computed = req[unsteady, R_COMPUTED]
        tokens = req[unsteady, R_TOKENS] + req[unsteady, R_HOLDERS] - computed
        if 0 < limit < tokens:
            tokens = limit
        # At most this; those that come before may leave less.
        tokens = min(tokens, min(p[P_MAX_TOKENS], p[P_MAX_BATCHED]), p[P_MAX_LEN] - 1 - computed)
        if tokens > 0:
            need += max((computed + tokens + size - 1) // size - req[unsteady, R_BLOCKS], 0)
        unsteady = req[unsteady, R_RUN_NEXT]
    return need <= g[G_FREE]


@njit(cache=False)
def steady_fill(tag, pol, p, g, req, blk, first, table, chain, log, st, slot):
    """The next block of a steady request becomes cached."""
    i = st[slot, ST_CACHED]
    identity = GUESSED
    if i < st[slot, ST_KNOWN]:
        identity = chain[st[slot, ST_CHAIN] + i]
    else:
        g[G_GUESSED] += 1
        if p[P_LOG]:
            request = st[slot, ST_REQUEST]
            for nth in range(max(req[request, L_GRANULES], i * p[P_STRIDE]), (i + 1) * p[P_STRIDE]):
                log_guess(log, g, request, nth)
            req[request, L_GRANULES] = max(req[request, L_GRANULES], (i + 1) * p[P_STRIDE])
    remember(tag, pol, p, blk, first, g, table[slot, i], identity, log)
    st[slot, ST_CACHED] = i + 1
    g[G_FILLED] += 1
    if p[P_LOG]:
        log_fill(log, g, st[slot, ST_REQUEST], 1)


@njit(cache=False, forceinline=True)
def steady_call(tag, pol, p, g, req, blk, first, table, chain, owners, log, st, phases, phase):
    """The running part of a call for all steady requests: those at a block's end get a new one; full blocks are cached.

    In the order of the running list, as `Scheduler.schedule` does it one by one. `phase`: steady calls before, modulo
    the block size.
    """
    needing = phases[phase, HEAD]
    filling = -1  # in a synchronous call: whose block becomes full with this token
    if p[P_CACHING] and not p[P_ASYNC]:
        filling = phases[phase + 1 if phase + 1 < p[P_BLOCK_SIZE] else 0, HEAD]
    while needing >= 0 or filling >= 0:
        if filling < 0 or (needing >= 0 and st[needing, ST_ORDER] <= st[filling, ST_ORDER]):
            slot = needing
            needing = st[slot, ST_PHASE_NEXT]
            if st[slot, ST_SKIPS] and st[slot, ST_END] == g[G_OUTPUTS]:
                continue
            i = st[slot, ST_BLOCKS]
            key = np.int64(first.shape[0] - 1)
            if i < st[slot, ST_KNOWN]:
                key = np.int64(chain[st[slot, ST_CHAIN] + i])
            block = take_block(tag, pol, blk, first, g, key)
            table[slot, i] = block
            st[slot, ST_BLOCKS] += 1
            if p[P_LOG]:
                log_alloc(log, g, owners, st[slot, ST_REQUEST], block)
            if p[P_CACHING] and p[P_ASYNC]:
                steady_fill(tag, pol, p, g, req, blk, first, table, chain, log, st, slot)
        else:
            slot = filling
            filling = st[slot, ST_PHASE_NEXT]
            steady_fill(tag, pol, p, g, req, blk, first, table, chain, log, st, slot)
    g[G_STEADY_CALLS] += 1
    g[G_CONTEXT] += g[G_STEADY]


@njit(cache=False, forceinline=True)
def coast(tag, pol, p, g, req, blk, first, table, chain, owners, log, st, phases, ends, costs, gaps, flight_n, until):
    """Make calls, up to the position `until`, as long as every running request is steady, none ends, none can be
    admitted and blocks suffice: nothing then happens but at the ends of blocks. Returns whether it made any."""
    if g[G_STEADY] == 0 or g[G_STEADY] != g[G_RUNNING] or p[P_LOG] or p[P_ROWS]:
        return False
    if g[G_WAITING] > 0 and g[G_RUNNING] < p[P_MAX_SEQS]:
        return False
    if g[G_STEADY] > min(p[P_MAX_TOKENS], p[P_MAX_BATCHED]) or g[G_FLIGHTS] != p[P_DEPTH] - 1:
        return False
    if g[G_FLIGHTS] > 0 and flight_n[0, F_NAMED] > 0:
        return False
    size, mask = p[P_BLOCK_SIZE], ends.shape[0] - 1
    phase, step, output = g[G_STEADY_CALLS] % size, g[G_STEP], g[G_OUTPUTS]
    due = FAR
    if p[P_BY_TIME]:
        until, due = FAR, until
    if p[P_TIMED]:
        until = min(until, step + gaps.shape[0] - g[G_GAPS])
    while step < until and g[G_NOW] < due and ends[output & mask, HEAD] < 0 and phases[phase, COUNT] <= g[G_FREE]:
        steady_call(tag, pol, p, g, req, blk, first, table, chain, owners, log, st, phases, phase)
        phase = phase + 1 if phase + 1 < size else 0
        step, output = step + 1, output + 1
        if p[P_TIMED]:
            end = start_call(g, costs[0] + costs[3] * g[G_STEADY] + costs[4] * g[G_CONTEXT])
            if p[P_DEPTH] > 1:
                flight_n[0, F_END], end = end, flight_n[0, F_END]
            g[G_NOW] = max(g[G_NOW], end)
            note_steady(g, gaps, g[G_STEADY])
    if step == g[G_STEP]:
        return False
    g[G_STEP], g[G_OUTPUTS] = step, output
    g[G_EMPTY], g[G_PREEMPTED], g[G_FINISHED_IDS] = 0, 0, 0
    flight_n[0, F_TOKENS] = g[G_STEADY]
    return True
