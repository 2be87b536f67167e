"""The engine core's loop: `EngineCore.step` and `step_with_batch_queue`, with what reaches it from outside."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.clock import call_cost, decodes, note_steady, note_token, position, start_call
from kvtrace_replay.schedulers.vllm_v1.layout import (
    A_CALLS,
    A_DUE,
    A_LATE,
    A_REQUEST,
    DONE,
    F_END,
    F_NAMED,
    F_TOKENS,
    FINISHED,
    FLAG_CHUNK,
    FLAG_STEADY,
    FULL,
    G_ABORTED,
    G_ARRIVED,
    G_DEVICE,
    G_EMPTY,
    G_EVICTIONS,
    G_FINISHED_IDS,
    G_FLIGHTS,
    G_FREE,
    G_GAPS,
    G_IDLE,
    G_LATE,
    G_LIVE,
    G_LOG,
    G_NOW,
    G_OUTPUTS,
    G_PREEMPTED,
    G_PREEMPTIONS,
    G_QUIET,
    G_RUNNING,
    G_SCHEDULED,
    G_STEADY,
    G_STEADY_SCHEDULED,
    G_STEP,
    G_STEP_ROWS,
    G_STUCK,
    G_TOKENS,
    G_WAITING,
    L_PROMPT,
    L_REASON,
    L_STOP,
    NEW,
    O_REASON,
    P_ASYNC,
    P_BY_TIME,
    P_DEPTH,
    P_FAST,
    P_LOG,
    P_PRIORITY,
    P_ROWS,
    P_TIMED,
    Q_HEAP,
    Q_REQUEST,
    R_CALL,
    R_COMPUTED,
    R_FLAGS,
    R_FLIGHT,
    R_HOLDERS,
    R_RUN_NEXT,
    R_SLOT,
    R_STALE,
    R_STATUS,
    R_TOKENS,
    R_WAIT_NEXT,
    RUNNING,
    S_EMPTY,
    S_EVICTIONS,
    S_FREE,
    S_PREEMPTED,
    S_PREFILL,
    S_REQUESTS,
    S_RUNNING,
    S_TOKENS,
    S_WAITING,
    ST_END,
    ST_END_NEXT,
    ST_REQUEST,
    ST_SKIPS,
    STUCK,
    T_ARRIVED,
    WAITING,
    X_DUE,
    X_LATE,
    X_REQUEST,
)
from kvtrace_replay.schedulers.vllm_v1.queues import enqueue
from kvtrace_replay.schedulers.vllm_v1.requests import cache_up_to, finish
from kvtrace_replay.schedulers.vllm_v1.schedule import schedule, wants_tokens
from kvtrace_replay.schedulers.vllm_v1.steady import FAR, HEAD, coast, copy_row, first_unsteady, gather, leave
from kvtrace_replay.schedulers.vllm_v1.words import ABORTED, log_arrival, log_moment, log_output
from kvtrace_traces.compile import njit

IDLE, STARVED = 1, 2  # g[G_IDLE]: nothing to do; or only an abort can free what the rest waits for


@njit(cache=False)
def runs_dry(p, g, req, st, flight_n):
    """Whether outputs are under way and nobody needs more than these."""
    under_way = 0
    for k in range(g[G_FLIGHTS]):
        under_way += flight_n[k, F_TOKENS]
    if under_way == 0 or g[G_WAITING] > 0:
        return False
    end = req.shape[0] - 1
    request = req[end, R_RUN_NEXT]
    while request != end:
        slot = req[request, R_SLOT]
        if req[request, R_FLAGS] & FLAG_STEADY:
            if not (st[slot, ST_SKIPS] and st[slot, ST_END] == g[G_OUTPUTS]):
                return False
        elif wants_tokens(p, req, request):
            return False
        request = req[request, R_RUN_NEXT]
    return True


@njit(cache=False, forceinline=True)
def awaits_calls(g, gone):
    """Whether the next abort comes after more calls without tokens than there were since the last step."""
    at = g[G_ABORTED]
    return at < gone.shape[0] and gone[at, A_DUE] == g[G_STEP] and gone[at, A_CALLS] > g[G_EMPTY]


@njit(cache=False, forceinline=True)
def abort_awaits(g, req, gone):
    """As `awaits_calls`, of a request that has come."""
    return awaits_calls(g, gone) and req[gone[g[G_ABORTED], A_REQUEST], R_STATUS] != NEW


@njit(cache=False, forceinline=True)
def drop_ended(g, req, gone):
    """Pass over aborts of requests that have ended."""
    while g[G_ABORTED] < gone.shape[0] and req[gone[g[G_ABORTED], A_REQUEST], R_STATUS] == FINISHED:
        g[G_ABORTED] += 1


@njit(cache=False, forceinline=True)
def is_held_back(p, g, req, st, come, gone, flight_n):
    """Whether the next arrival, after all outputs were in, has to wait: for an abort that comes first, or for outputs,
    as the engine is about to run dry."""
    at, next_abort = g[G_ARRIVED], g[G_ABORTED]
    if not come[at, X_LATE] or come[at, X_DUE] != g[G_STEP]:
        return False
    due = next_abort < gone.shape[0] and gone[next_abort, A_DUE] <= g[G_STEP] and not awaits_calls(g, gone)
    if due and req[gone[next_abort, A_REQUEST], R_STATUS] != NEW:
        return True
    return runs_dry(p, g, req, st, flight_n)


@njit(cache=False)
def take_arrivals(
    tag, pol, p, g, req, blk, first, table, order, come, gone, log, arrivals, arrival_at, room, flight_n, st,
    phases, ends, times,
):  # fmt: skip
    """Requests that are due arrive; where the engine idles, those of the next due step.

    Returns False where the log has no room left for one and for a call after it.
    """
    due = position(p, g)
    if g[G_IDLE] and g[G_ARRIVED] < come.shape[0]:
        due = max(due, come[g[G_ARRIVED], X_DUE])
        if p[P_BY_TIME]:
            g[G_NOW] = due
    while g[G_ARRIVED] < come.shape[0] and come[g[G_ARRIVED], X_DUE] <= due:
        request = come[g[G_ARRIVED], X_REQUEST]
        if is_held_back(p, g, req, st, come, gone, flight_n):
            break
        came = come[g[G_ARRIVED], X_DUE] if p[P_BY_TIME] else g[G_NOW]
        if p[P_LOG]:
            start, stop = arrival_at[request], arrival_at[request + 1]
            if g[G_LOG] + stop - start + room > log.shape[0]:
                return False
            log_arrival(p, log, g, arrivals, start, stop, came)
        if p[P_TIMED]:
            times[request, T_ARRIVED] = came
        req[request, R_STATUS] = WAITING
        g[G_LIVE] += req[request, L_STOP]
        req[request, R_TOKENS] = req[request, L_PROMPT]
        req[request, R_CALL] = -1
        enqueue(p, g, req, order, request, False)
        g[G_ARRIVED] += 1
        if req[request, O_REASON] == ABORTED:  # before it came
            finish(tag, pol, p, g, req, blk, first, table, order, log, st, phases, ends, times, request, ABORTED)
    return True


@njit(cache=False)
def take_aborts(
    tag, pol, p, g, req, blk, first, table, order, gone, log, room, only_early, st, phases, ends, times,
):  # fmt: skip
    """Aborts that are due; where the engine idles and nobody will arrive, the next one. As `take_arrivals`."""
    due = position(p, g)
    if g[G_IDLE] == STARVED and g[G_ABORTED] < gone.shape[0]:
        due = max(due, gone[g[G_ABORTED], A_DUE])
        if p[P_BY_TIME]:
            g[G_NOW] = due
    drop_ended(g, req, gone)
    while g[G_ABORTED] < gone.shape[0] and gone[g[G_ABORTED], A_DUE] <= due:
        if only_early and gone[g[G_ABORTED], A_LATE]:
            break
        if g[G_IDLE] != STARVED and awaits_calls(g, gone):
            break
        request = gone[g[G_ABORTED], A_REQUEST]
        if req[request, R_STATUS] == NEW:
            req[request, O_REASON] = ABORTED
        else:
            if p[P_LOG] and not only_early and g[G_LOG] + room > log.shape[0]:
                return False
            if p[P_LOG] and g[G_FLIGHTS] > 0:
                log_moment(log, g)
            finish(tag, pol, p, g, req, blk, first, table, order, log, st, phases, ends, times, request, ABORTED)
        g[G_ABORTED] += 1
        drop_ended(g, req, gone)
    return True


@njit(cache=False)
def next_due(g, come, gone):
    """The position at which somebody arrives or is aborted next."""
    due = FAR
    if g[G_ARRIVED] < come.shape[0]:
        due = come[g[G_ARRIVED], X_DUE]
    if g[G_ABORTED] < gone.shape[0]:
        due = min(due, gone[g[G_ABORTED], A_DUE] - 1 + gone[g[G_ABORTED], A_LATE])
    return due


@njit(cache=False, forceinline=True)
def take_output(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, log, st, phases,
    ends, times, gaps, request, tokens, sampled,
):  # fmt: skip
    """The output of a call for one of its requests."""
    status = req[request, R_STATUS]
    if status == FINISHED:
        return
    req[request, R_FLIGHT] -= tokens
    stale = req[request, R_STALE] > 0
    if stale:
        req[request, R_STALE] -= tokens
    if not sampled:
        return
    known = req[request, R_TOKENS] + 1
    req[request, R_TOKENS] = known
    g[G_QUIET] = 0
    if p[P_TIMED]:
        note_token(g, times, gaps, request)
    if p[P_ASYNC]:
        if not stale:
            req[request, R_HOLDERS] -= 1
        if status == RUNNING:
            cache_up_to(
                tag, pol, p, g, req, blk, first, table, chain, chain_at, log, request,
                req[request, R_COMPUTED] - req[request, R_HOLDERS],
            )  # fmt: skip
    if known >= req[request, L_STOP]:
        finish(
            tag,
            pol,
            p,
            g,
            req,
            blk,
            first,
            table,
            order,
            log,
            st,
            phases,
            ends,
            times,
            request,
            req[request, L_REASON],
        )


@njit(cache=False, forceinline=True)
def update(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, log, st, phases,
    ends, times, gaps, flight, n,
):  # fmt: skip
    """The output of a call arrives: `Scheduler.update_from_output`. `flight`: its `n` requests that are not steady, as
    (request, tokens, sampled); the steady ones, all of which stand before them, need looking at only where they end."""
    slot, i = np.int64(-1), 0
    if g[G_LATE]:  # the list holds who ends now, since it has a place for each output that anyone can still wait for
        slot = ends[g[G_OUTPUTS] & (ends.shape[0] - 1), HEAD]
    while True:
        if slot >= 0:
            request, tokens, sampled = st[slot, ST_REQUEST], np.int64(1), np.int64(1)
            slot = st[slot, ST_END_NEXT]
            leave(p, g, req, st, phases, ends, times, request)
        elif i < n:
            request, tokens, sampled = np.int64(flight[i, 0]), np.int64(flight[i, 1]), np.int64(flight[i, 2])
            i += 1
        else:
            break
        take_output(
            tag, pol, p, g, req, blk, first, table, order, chain, chain_at, log, st,
            phases, ends, times, gaps, request, tokens, sampled,
        )  # fmt: skip
    if p[P_TIMED]:
        note_steady(g, gaps, g[G_STEADY])
    if g[G_LATE]:
        g[G_OUTPUTS] += 1
        g[G_QUIET] = 0


@njit(cache=False, forceinline=True)
def note_step(g, req, sch, rows, step_ns, evictions, begin, end):
    at = g[G_STEP_ROWS]
    n, prefill = g[G_SCHEDULED], 0
    for i in range(n):
        if not decodes(req, sch[i, 0], sch[i, 1], sch[i, 2]):
            prefill += 1
    rows[at, S_REQUESTS] = n + g[G_STEADY_SCHEDULED]
    rows[at, S_TOKENS] = g[G_TOKENS]
    rows[at, S_RUNNING] = g[G_RUNNING]
    rows[at, S_WAITING] = g[G_WAITING]
    rows[at, S_FREE] = g[G_FREE]
    rows[at, S_PREEMPTED] = g[G_PREEMPTED]
    rows[at, S_EMPTY] = g[G_EMPTY]
    rows[at, S_PREFILL] = prefill
    rows[at, S_EVICTIONS] = g[G_EVICTIONS] - evictions
    step_ns[at, 0], step_ns[at, 1] = begin, end
    g[G_STEP_ROWS] += 1


@njit(cache=False, forceinline=True)
def send(g, req, sch, flights, flight_n, end):
    """The call just made is under way, its output arrives at `end`: it goes before the others in `flights` (few, so
    they move)."""
    for k in range(g[G_FLIGHTS], 0, -1):
        for field in range(3):
            flight_n[k, field] = flight_n[k - 1, field]
        for i in range(flight_n[k, F_NAMED]):
            copy_row(flights, k - 1, i, k, i)
    n = g[G_SCHEDULED]
    flight_n[0, F_NAMED], flight_n[0, F_TOKENS], flight_n[0, F_END] = n, g[G_TOKENS], end
    for i in range(n):
        request = sch[i, 0]
        flights[0, i, 0], flights[0, i, 1] = request, sch[i, 1]
        flights[0, i, 2] = 0 if req[request, R_FLAGS] & FLAG_CHUNK else 1
    g[G_FLIGHTS] += 1


@njit(cache=False)
def is_stuck(p, g, req, order, flight_n):
    """After a call without tokens: whether nothing that is under way can change that. Sets `g[G_STUCK]`."""
    for k in range(g[G_FLIGHTS]):
        if flight_n[k, F_TOKENS] > 0:
            return False
    end = req.shape[0] - 1
    stuck = req[end, R_RUN_NEXT]
    if stuck == end:
        stuck = order[order[0, Q_HEAP], Q_REQUEST] if p[P_PRIORITY] else req[end, R_WAIT_NEXT]
    g[G_STUCK] = stuck
    return True


def _run(
    tag, pol, p, g, req, blk, first, table, order, chain, chain_at, sch,
    owners, come, gone, flights, flight_n, st, phases, ends, costs, times, gaps, step_ns, rows, log, arrivals,
    arrival_at, room,
):  # fmt: skip
    """Run until nothing is left (DONE), nothing can go on (STUCK: `g[G_STUCK]` is the request), or buffers are full
    (FULL: take them, set `g[G_LOG]` and `g[G_STEP_ROWS]` to 0, and call again). `room`: words a call may log."""
    end = req.shape[0] - 1
    while True:
        if p[P_LOG] and g[G_LOG] + room > log.shape[0]:
            return FULL
        if p[P_ROWS] and g[G_STEP_ROWS] >= rows.shape[0]:
            return FULL
        if p[P_TIMED] and g[G_GAPS] + flights.shape[1] + 1 > gaps.shape[0]:
            return FULL
        drop_ended(g, req, gone)
        due = next_due(g, come, gone)
        if (g[G_IDLE] or due <= position(p, g)) and not take_arrivals(
            tag, pol, p, g, req, blk, first, table, order, come, gone, log, arrivals, arrival_at, room, flight_n,
            st, phases, ends, times,
        ):  # fmt: skip
            return FULL
        if g[G_IDLE] == IDLE:  # those of one step came: coming back here from FULL must not take in the next
            g[G_IDLE] = 0
        if (g[G_IDLE] or due <= position(p, g)) and not take_aborts(
            tag, pol, p, g, req, blk, first, table, order, gone, log, room, False, st, phases,
            ends, times,
        ):  # fmt: skip
            return FULL
        g[G_IDLE] = 0
        at = g[G_ARRIVED]  # an abort may have been what the next arrival waited for
        if at < come.shape[0] and come[at, X_LATE] and come[at, X_DUE] == g[G_STEP] and not take_arrivals(
            tag, pol, p, g, req, blk, first, table, order, come, gone, log, arrivals, arrival_at, room, flight_n,
            st, phases, ends, times,
        ):  # fmt: skip
            return FULL
        if coast(
            tag, pol, p, g, req, blk, first, table, chain, owners, log, st, phases, ends, costs, gaps, flight_n,
            next_due(g, come, gone),
        ):  # fmt: skip
            continue
        unfinished = g[G_RUNNING] + g[G_WAITING]
        # More calls are under way than there may be where a run taken up is scheduled synchronously from here on.
        if (unfinished > 0 or g[G_FINISHED_IDS]) and g[G_FLIGHTS] < p[P_DEPTH]:
            evictions, preemptions = g[G_EVICTIONS], g[G_PREEMPTIONS]
            schedule(
                tag, pol, p, g, req, blk, first, table, order, chain, chain_at,
                sch, owners, log, st, phases, ends, times, flights, flight_n,
            )  # fmt: skip
            begin = end_ns = g[G_NOW]
            if p[P_TIMED]:
                begin = max(g[G_NOW], g[G_DEVICE])
                cost = 0.0
                if g[G_TOKENS] > 0:
                    cost = call_cost(p, g, req, sch, st, ends, costs, times, g[G_STEADY_SCHEDULED])
                end_ns = start_call(g, cost)
            send(g, req, sch, flights, flight_n, end_ns)
            calm = g[G_PREEMPTIONS] == preemptions
            if g[G_TOKENS] > 0:
                if p[P_ROWS]:
                    note_step(g, req, sch, rows, step_ns, evictions, begin, end_ns)
                g[G_EMPTY] = 0
                g[G_PREEMPTED] = 0
                if g[G_QUIET] > 100 + 2 * g[G_LIVE]:  # they preempt each other for ever
                    g[G_STUCK] = req[end, R_RUN_NEXT] if g[G_RUNNING] > 0 else sch[0, 0]
                    return STUCK
            elif unfinished > 0 and calm and not abort_awaits(g, req, gone) and is_stuck(p, g, req, order, flight_n):
                if g[G_ARRIVED] < come.shape[0]:
                    g[G_IDLE] = IDLE
                elif g[G_ABORTED] < gone.shape[0]:
                    g[G_IDLE] = STARVED
                else:
                    return STUCK
            waits = g[G_TOKENS] > 0 or g[G_RUNNING] + g[G_WAITING] > 0 or g[G_FINISHED_IDS]
            if g[G_FLIGHTS] < p[P_DEPTH] and waits:
                continue
        elif g[G_FLIGHTS] == 0:
            if g[G_ARRIVED] >= come.shape[0]:
                return DONE
            g[G_IDLE] = IDLE
            continue
        else:
            calm = False
        if g[G_ABORTED] < gone.shape[0] and gone[g[G_ABORTED], A_DUE] <= position(p, g):
            take_aborts(
                tag, pol, p, g, req, blk, first, table, order, gone, log, room, True, st, phases,
                ends, times,
            )  # fmt: skip
        g[G_FLIGHTS] -= 1
        oldest = g[G_FLIGHTS]
        g[G_NOW] = max(g[G_NOW], flight_n[oldest, F_END])
        if p[P_LOG] and flight_n[oldest, F_TOKENS] > 0:
            log_output(p, log, g)
        late = g[G_LATE]
        update(
            tag, pol, p, g, req, blk, first, table, order, chain, chain_at, log, st,
            phases, ends, times, gaps, flights[oldest], flight_n[oldest, F_NAMED],
        )  # fmt: skip
        g[G_LATE] = 0
        if p[P_FAST] and calm and g[G_RUNNING] > g[G_STEADY]:
            unsteady = first_unsteady(g, req) if late else req[end, R_RUN_NEXT]
            if unsteady >= 0:
                gather(p, g, req, st, phases, ends, times, chain_at, flights, flight_n, unsteady)


# Counting references to the arrays took 40 % of a run: each is an atomic addition, and the arguments outlive the kernel
# anyway. So nothing in it may allocate, nor assign rows as a whole. A user's policy may: it runs with the counting.
run = njit(_nrt=False)(_run)
run_by_policy = njit(_run)
