"""What a simulated run writes into its log: the operations of a `.kvt` file (`docs/format.md`), as the tracer would.

Each function appends 32-bit words at `g[G_LOG]`; the caller has seen that there is room. Where nothing is timed, time
is logical: every scheduler call and every output advances it by one microsecond.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import (
    FLAG_STEADY,
    G_CALL,
    G_EVENTS,
    G_EXPECTED,
    G_FREE,
    G_LOG,
    G_LOGGED_RUNNING,
    G_LOGGED_WAITING,
    G_NOW,
    G_OUTPUT,
    G_OUTPUTS,
    G_OWNERS,
    G_RUNNING,
    G_SCHEDULED,
    G_STEADY_CALLS,
    G_WAITING,
    P_TIMED,
    R_CALL,
    R_COMPUTED,
    R_FLAGS,
    R_RUN_NEXT,
    R_SLOT,
    ST_CALLS,
    ST_END,
    ST_SKIPS,
)
from kvtrace_traces.compile import njit
from kvtrace_traces.schema import EXT_OPS, OPS, SCHED_BIG, SCHED_COUNTS, SCHED_FULL, SCHED_WIDE

TICK = 1000  # ns
BEGIN, SCHED, OUTPUT, CHAIN = OPS["BEGIN"].code, OPS["SCHED"].code, OPS["OUTPUT"].code, OPS["CHAIN"].code
LOOKUP, HIT, ALLOC, ALLOCN = OPS["LOOKUP"].code, OPS["HIT"].code, OPS["ALLOC"].code, OPS["ALLOCN"].code
FILL, FREE, PREEMPT, FINISH = OPS["FILL"].code, OPS["FREE"].code, OPS["PREEMPT"].code, OPS["FINISH"].code
EVICT = OPS["EXT"].code | (EXT_OPS["EVICT"].code | 1 << 8) << 4
TIME = OPS["EXT"].code | (EXT_OPS["TIME"].code | 2 << 8) << 4
ABORTED = 2  # schema.FINISH_REASONS


@njit(cache=False)
def put(log, g, word):
    log[g[G_LOG]] = np.uint32(word)
    g[G_LOG] += 1


@njit(cache=False)
def log_arrival(p, log, g, words, start, stop, came):
    """A request arrives: its prepared words, REQ and CHAIN, with the time set (words 1 and 2)."""
    at = g[G_LOG]
    if not p[P_TIMED]:
        came = g[G_OUTPUT]
    for i in range(stop - start):
        log[at + i] = words[start + i]
    log[at + 1] = np.uint32(came & 0xFFFFFFFF)
    log[at + 2] = np.uint32(came >> 32)
    g[G_LOG] = at + stop - start


@njit(cache=False)
def log_time(p, log, g, op):
    """BEGIN or OUTPUT; `g[G_OUTPUT]` is the time that the log stands at. No two are at one time, for a reader knows by
    it what was before a step and what after: a call made at the moment of another stands 1 ns later."""
    passed = max(g[G_NOW] - g[G_OUTPUT], 1) if p[P_TIMED] else TICK
    g[G_OUTPUT] += passed
    if passed >> 28:  # more than the operation holds
        put(log, g, TIME)
        put(log, g, g[G_OUTPUT] & 0xFFFFFFFF)
        put(log, g, g[G_OUTPUT] >> 32)
        passed = 0
    put(log, g, passed << 4 | op)


@njit(cache=False)
def log_moment(log, g):
    """What follows comes 1 ns after what was logged last: an abort after a call is no part of it."""
    g[G_OUTPUT] += 1
    put(log, g, TIME)
    put(log, g, g[G_OUTPUT] & 0xFFFFFFFF)
    put(log, g, g[G_OUTPUT] >> 32)


@njit(cache=False)
def log_begin(p, log, g):
    log_time(p, log, g, BEGIN)


@njit(cache=False)
def log_output(p, log, g):
    log_time(p, log, g, OUTPUT)


@njit(cache=False)
def log_lookup(log, g, request, asked, hit):
    """`hit` tokens, or -1 where the cache was not read."""
    put(log, g, request << 4 | LOOKUP)
    put(log, g, asked)
    put(log, g, hit + 1)


@njit(cache=False)
def log_blocks(log, g, op, table, start, stop):
    """HIT or ALLOCN of `table[start:stop]`."""
    if stop > start:
        put(log, g, (stop - start) << 4 | op)
        for i in range(start, stop):
            put(log, g, table[i])
        g[G_EVENTS] += stop - start


@njit(cache=False)
def log_alloc(log, g, owners, request, block):
    """A block for a running request; whose it is, SCHED says."""
    put(log, g, block << 4 | ALLOC)
    owners[g[G_OWNERS]] = request
    g[G_OWNERS] += 1
    g[G_EVENTS] += 1


@njit(cache=False)
def log_fill(log, g, request, n):
    put(log, g, request << 4 | FILL)
    put(log, g, n)
    g[G_EVENTS] += n


@njit(cache=False)
def log_guess(log, g, request, nth):
    """One more identity of a request whose tokens the trace does not know: equal to none."""
    x = np.uint64(request) << np.uint64(32) | np.uint64(nth)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    put(log, g, request << 4 | CHAIN)
    put(log, g, 1)
    put(log, g, np.int64(x & np.uint64(0xFFFFFFFF)))
    put(log, g, np.int64(x >> np.uint64(32)))


@njit(cache=False)
def leave_set(req, g, request):
    """`request` leaves the set that the next SCHED starts from."""
    if req[request, R_CALL] == g[G_CALL]:
        g[G_EXPECTED] -= 1
    req[request, R_CALL] = -1


@njit(cache=False)
def log_finish(log, g, request, reason, output_tokens, blocks):
    put(log, g, request << 4 | FINISH)
    put(log, g, reason)
    put(log, g, output_tokens)
    if blocks > 0:
        put(log, g, request << 4 | FREE)
        put(log, g, blocks)
        g[G_EVENTS] += blocks


@njit(cache=False)
def log_evict(log, g, block):
    """A block's identity is forgotten before it is handed out."""
    put(log, g, EVICT)
    put(log, g, block)
    g[G_EVENTS] += 1


@njit(cache=False)
def log_preempt(log, g, request, computed, blocks):
    put(log, g, request << 4 | PREEMPT)
    put(log, g, computed)
    put(log, g, blocks)
    g[G_EVENTS] += blocks


@njit(cache=False)
def log_sched(log, g, req, sch, owners, st, steady):
    """The call ends: SCHED names what differs from the set of the call before with one token each.

    `sch` int32[., 3]: (request, tokens, ...) of this call, but for `steady` more with a token each, which were all in
    the call before. `R_CALL` still tells the call before; `g[G_CALL]` likewise.
    """
    n, expected, named = g[G_SCHEDULED], steady, 0
    for i in range(n):
        if req[sch[i, 0], R_CALL] == g[G_CALL]:
            expected += 1
            if sch[i, 1] == 1:
                continue
        named += 1
    flags = 0
    if expected != g[G_EXPECTED]:
        flags, named = SCHED_FULL, n + steady
    if g[G_RUNNING] != g[G_LOGGED_RUNNING] or g[G_WAITING] != g[G_LOGGED_WAITING]:
        flags |= SCHED_COUNTS
        g[G_LOGGED_RUNNING], g[G_LOGGED_WAITING] = g[G_RUNNING], g[G_WAITING]
    owned = g[G_OWNERS]
    base, top = 0, 0
    if owned:
        base = top = owners[0]
        for i in range(owned):
            base, top = min(base, owners[i]), max(top, owners[i])
    wide = top - base > 0xFFFF
    if wide:
        flags |= SCHED_WIDE
    if named > 0xFFF or owned > 0xFFF:
        put(log, g, (flags | SCHED_BIG) << 4 | SCHED)
        put(log, g, named)
        put(log, g, owned)
    else:
        put(log, g, (owned << 16 | named << 4 | flags) << 4 | SCHED)
    put(log, g, g[G_FREE])
    if flags & SCHED_COUNTS:
        put(log, g, g[G_RUNNING])
        put(log, g, g[G_WAITING])
    if flags & SCHED_FULL and steady:
        log_steady(log, g, req, st)
    for i in range(n):
        request = sch[i, 0]
        if flags & SCHED_FULL or req[request, R_CALL] != g[G_CALL] or sch[i, 1] != 1:
            put(log, g, request)
            put(log, g, sch[i, 1])
            put(log, g, req[request, R_COMPUTED])
    log_owners(log, g, owners, base, wide)
    g[G_EXPECTED] = n + steady


@njit(cache=False)
def log_steady(log, g, req, st):
    """The entries of the steady requests that the call just made has not left out."""
    end = req.shape[0] - 1
    request = req[end, R_RUN_NEXT]
    while request != end:
        slot = req[request, R_SLOT]
        if req[request, R_FLAGS] & FLAG_STEADY and not (st[slot, ST_SKIPS] and st[slot, ST_END] == g[G_OUTPUTS]):
            put(log, g, request)
            put(log, g, 1)
            put(log, g, req[request, R_COMPUTED] + g[G_STEADY_CALLS] - 1 - st[slot, ST_CALLS])
        request = req[request, R_RUN_NEXT]


@njit(cache=False)
def log_owners(log, g, owners, base, wide):
    owned = g[G_OWNERS]
    if wide:
        for i in range(owned):
            put(log, g, owners[i])
    elif owned:
        put(log, g, base)
        for i in range(0, owned, 2):
            low = owners[i] - base
            high = owners[i + 1] - base if i + 1 < owned else 0
            put(log, g, low | high << 16)
    g[G_OWNERS] = 0
