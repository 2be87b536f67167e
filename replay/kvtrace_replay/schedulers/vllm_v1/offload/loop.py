"""The scheduler with a connector: `Scheduler.schedule`, `update_from_output`, and the engine core's loop (0.32.0).

As `vllm_v1.schedule` and `loop`, with what a connector that loads asynchronously changes: those that wait and have
blocks stand in a queue of their own, which goes first; with several steps under way, blocks are free only once every
step that may write to them is done, and whose blocks would not be free at once is not preempted.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_DEVICE,
    G_FREE,
    G_NOW,
    T_ARRIVED,
    X_DUE,
    X_REQUEST,
)
from kvtrace_replay.schedulers.vllm_v1.offload.admission import (
    put,
    schedule_waiting,
)
from kvtrace_replay.schedulers.vllm_v1.offload.clock import (
    call_cost,
    go_on,
    note_step,
    note_times,
    note_token,
    position,
    taken_up,
)
from kvtrace_replay.schedulers.vllm_v1.offload.connector import (
    hear,
    plan,
)
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    ABSENT,
    DONE,
    ENDED,
    F_END,
    F_ENDED,
    F_FIELDS,
    F_NAMED,
    FINISHED,
    G_ABORTS,
    G_ALIVE,
    G_ARRIVED,
    G_BEGUN,
    G_BUDGET,
    G_CALL,
    G_CALL_PREEMPTED,
    G_CALLED,
    G_CALLS,
    G_DONE,
    G_EMPTY,
    G_EMPTY_ROW,
    G_FLIGHT,
    G_FLIGHTS,
    G_GONE,
    G_HOLDING,
    G_IDLE,
    G_JOBS,
    G_LAST,
    G_LEFT,
    G_LOADS,
    G_OUT,
    G_PREEMPTED,
    G_QUIET,
    G_RUNNING,
    G_SCHEDULED,
    G_SPIN,
    G_STORES,
    G_WAITING,
    HOLDS,
    INNER,
    J_END,
    K_LOADED,
    L_ABORTED,
    L_MOST,
    L_PROMPT,
    L_REASON,
    L_STOP,
    L_VICTIM,
    LEAVING,
    LIVELOCK,
    LOADING,
    LOG_CALL,
    LOG_CAME,
    LOG_EMPTY,
    LOG_OUTPUT,
    LOG_ROW,
    LOG_STEP,
    NOW,
    O_FIRST,
    O_LAST,
    P_ADAPTIVE,
    P_ASYNC,
    P_BUDGET,
    P_BY_TIME,
    P_EMPTY,
    P_IDLE,
    P_LONG,
    P_MAX_BATCHED,
    P_MAX_LEN,
    P_PATIENCE,
    P_PRIORITY,
    P_SIMPLE,
    P_SKIPS_FINISHING,
    P_TIMED,
    R_BLOCKS,
    R_CHUNK,
    R_COMPUTED,
    R_FLIGHT,
    R_HOLDERS,
    R_LAST_STEP,
    R_NEXT,
    R_PREFILLING,
    R_PREV,
    R_STATUS,
    R_TOKENS,
    RUNNING,
    RUNS,
    STUCK,
    WAITING,
    WAITS,
)
from kvtrace_replay.schedulers.vllm_v1.offload.requests import (
    blocks_of,
    cache_up_to,
    end_of,
    enqueue,
    finish,
    free_deferred,
    may_free,
    preempt,
    release,
    take,
)
from kvtrace_replay.schedulers.vllm_v1.offload.simple import hear_simple, plan_simple
from kvtrace_replay.schedulers.vllm_v1.offload.tier import (
    write,
    write_time,
)
from kvtrace_replay.schedulers.vllm_v1.offload.worker import ask, begin_copies, begin_loads, begin_stores, end_all
from kvtrace_replay.schedulers.vllm_v1.words import ABORTED
from kvtrace_traces.compile import njit

MOST_CALLS = 10_000  # without a step or a load: then those that wait do so for ever


@njit(cache=False, **INNER)
def wants(s, request):
    """Tokens that a running request has to compute, for all that is known."""
    req = s.req
    computed, holders = np.int64(req[request, R_COMPUTED]), np.int64(req[request, R_HOLDERS])
    if s.p[P_SKIPS_FINISHING] and holders > 0 and computed + 2 - holders >= req[request, L_MOST]:
        return np.int64(0)
    return min(req[request, R_TOKENS] + holders - computed, s.p[P_MAX_LEN] - 1 - computed)


@njit(cache=False, **INNER)
def victim_of(s):
    end = end_of(s, RUNS)
    chosen = np.int64(s.req[end, R_PREV])
    if s.p[P_PRIORITY]:
        request = np.int64(s.req[end, R_NEXT])
        chosen = request
        while request != end:
            if s.req[request, L_VICTIM] > s.req[chosen, L_VICTIM]:
                chosen = request
            request = np.int64(s.req[request, R_NEXT])
    return chosen


@njit(cache=False, **INNER)
def take_off(s, request):
    """A victim that this call had scheduled is not any more, and its tokens return to the budget."""
    n, at = s.g[G_SCHEDULED], 0
    while at < n and s.flight[NOW, at, 0] != request:
        at += 1
    if at == n:
        return
    s.g[G_BUDGET] += s.flight[NOW, at, 1]
    for i in range(at, n - 1):
        for k in range(3):
            s.flight[NOW, i, k] = s.flight[NOW, i + 1, k]
    s.g[G_SCHEDULED] = n - 1


@njit(cache=False, **INNER)
def schedule_running(s, limit):
    g, req, end = s.g, s.req, end_of(s, RUNS)
    request = np.int64(req[end, R_NEXT])
    while request != end and g[G_BUDGET] > 0:
        tokens = wants(s, request)
        if tokens <= 0:
            request = np.int64(req[request, R_NEXT])
            continue
        computed = np.int64(req[request, R_COMPUTED])
        if 0 < limit < req[request, R_TOKENS] + req[request, R_HOLDERS] - computed:
            tokens = min(tokens, limit)
        tokens = min(tokens, g[G_BUDGET])
        need = blocks_of(s, min(computed + tokens, s.p[P_MAX_LEN])) - req[request, R_BLOCKS]
        while need > g[G_FREE]:
            victim = victim_of(s)
            if not may_free(s, victim):
                return  # its blocks would not be free at once
            if s.p[P_PRIORITY]:
                take_off(s, victim)
            preempt(s, victim)
            if victim == request:
                return
        if need > 0:
            take(s, request, need)
        cache_up_to(s, request, min(computed + tokens, np.int64(req[request, R_TOKENS])))
        put(s, request, tokens, 0)
        request = np.int64(req[request, R_NEXT])


@njit(cache=False, **INNER)
def schedule(s):
    g, req = s.g, s.req
    write_time(s, LOG_CALL, 0, g[G_NOW])
    g[G_CALL] += 1
    g[G_SCHEDULED], g[G_CALL_PREEMPTED] = 0, 0
    g[G_BUDGET] = s.p[P_BUDGET]
    limit = s.p[P_LONG]
    eligible = g[G_RUNNING] + g[G_WAITING] + g[G_HOLDING]
    if eligible <= 1:
        limit = 0
    elif limit > 0 and s.p[P_ADAPTIVE]:
        limit = max(limit, s.p[P_MAX_BATCHED] // eligible)
    schedule_running(s, limit)
    if g[G_CALL_PREEMPTED] == 0:
        schedule_waiting(s, limit)
    if s.p[P_SIMPLE]:
        plan_simple(s)
    else:
        plan(s)
    n = g[G_SCHEDULED]
    g[G_QUIET] = n + g[G_CALL_PREEMPTED] + g[G_LOADS] + g[G_STORES] == 0
    if n > 0:
        g[G_CALLED] += 1
    for i in range(n):
        request, tokens = s.flight[NOW, i, 0], s.flight[NOW, i, 1]
        computed = req[request, R_COMPUTED] + tokens
        known = req[request, R_TOKENS] + req[request, R_HOLDERS]
        write(s, LOG_ROW, g[G_BEGUN], request, tokens, req[request, R_COMPUTED], 0, 0)
        req[request, R_COMPUTED] = computed
        req[request, R_FLIGHT] += tokens
        req[request, R_LAST_STEP] = g[G_CALLED]
        req[request, R_CHUNK] = computed < known
        if computed >= known:
            req[request, R_PREFILLING] = 0
            if s.p[P_ASYNC]:
                req[request, R_HOLDERS] += 1
        if req[request, O_FIRST] < 0:
            req[request, O_FIRST] = g[G_BEGUN]
        req[request, O_LAST] = g[G_BEGUN]
    g[G_BUDGET] = -1  # outside a call
    if n > 0:
        waiting = g[G_WAITING] + g[G_HOLDING]
        write(s, LOG_STEP, n, g[G_FREE], g[G_RUNNING], waiting, g[G_PREEMPTED], g[G_EMPTY_ROW])
        g[G_BEGUN] += 1
        note_step(s, end_of(s, HOLDS))
        g[G_PREEMPTED], g[G_EMPTY_ROW], g[G_EMPTY] = 0, 0, 0
        g[G_IDLE] += 1
    else:
        write(s, LOG_EMPTY, g[G_FREE], g[G_RUNNING], g[G_WAITING] + g[G_HOLDING], 0, 0, 0)
        g[G_EMPTY_ROW] += 1
        g[G_EMPTY] += 1


# ---------------------------------------------------------------- outputs, and the loop


@njit(cache=False, **INNER)
def send(s):
    """The call just made goes to the worker: its output and what ends with it are known from here on."""
    g, of = s.g, s.g[G_FLIGHTS]
    at = G_FLIGHT + F_FIELDS * of
    for i in range(g[G_SCHEDULED]):
        request = s.flight[NOW, i, 0]
        s.flight[of, i, 0], s.flight[of, i, 1] = request, s.flight[NOW, i, 1]
        s.flight[of, i, 2] = not s.req[request, R_CHUNK]
    flushed = end_all(s) if s.p[P_SIMPLE] else begin_stores(s)
    begin = max(taken_up(s), flushed)
    if s.p[P_TIMED]:
        g[G_DEVICE] = begin + call_cost(s, begin)
    if s.p[P_SIMPLE]:
        begin_copies(s, flushed)
    else:
        begin_loads(s)
    ended = s.jobs[ENDED + of]
    n = ask(s, ended, max(g[G_NOW], flushed))
    end = max(g[G_DEVICE], g[G_OUT])  # outputs arrive in order
    for i in range(n):  # where steps decide which end is heard of with it, it waits for the copy
        end = max(end, s.job[ended[i], J_END])
    g[G_OUT] = end
    g[at + F_NAMED], g[at + F_ENDED], g[at + F_END] = g[G_SCHEDULED], n, end
    note_times(s, begin, end)
    g[G_FLIGHTS] += 1


@njit(cache=False, **INNER)
def update(s, of):
    """`update_from_output` of the call `of` in `flight`, then what its worker says of transfers."""
    g, req = s.g, s.req
    at = G_FLIGHT + F_FIELDS * of
    n = g[at + F_NAMED]
    g[G_NOW] = max(g[G_NOW], g[at + F_END])
    if n > 0:
        write_time(s, LOG_OUTPUT, 0, g[G_NOW])
        g[G_LAST] = g[G_NOW]
        g[G_DONE] += 1
        free_deferred(s)
    for i in range(n):
        request, tokens, sampled = np.int64(s.flight[of, i, 0]), s.flight[of, i, 1], s.flight[of, i, 2]
        status = req[request, R_STATUS]
        if status in (FINISHED, LEAVING):
            continue
        req[request, R_FLIGHT] -= tokens
        if not sampled:
            continue
        req[request, R_TOKENS] += 1
        g[G_IDLE] = 0
        if s.p[P_TIMED]:
            note_token(s, request)
        if s.p[P_ASYNC]:
            req[request, R_HOLDERS] -= 1
            if status == RUNNING:
                cache_up_to(s, request, np.int64(req[request, R_COMPUTED] - req[request, R_HOLDERS]))
        if req[request, R_TOKENS] >= req[request, L_STOP]:
            finish(s, request, req[request, L_REASON])
    loaded = s.jobs[ENDED + 2]
    if s.p[P_SIMPLE]:
        many = hear_simple(s, s.jobs[ENDED + of], g[at + F_ENDED], loaded)
    else:
        many = hear(s, s.jobs[ENDED + of], g[at + F_ENDED], loaded)
    for i in range(many):
        request = np.int64(loaded[i])
        if req[request, R_STATUS] == LEAVING:
            req[request, R_STATUS] = FINISHED
            g[G_LEFT] -= 1
            release(s, request)
        else:
            req[request, K_LOADED] = 1


@njit(cache=False, **INNER)
def arrive(s, idle):
    g, due = s.g, position(s)
    if idle and g[G_ARRIVED] < s.come.shape[0]:
        due = max(due, s.come[g[G_ARRIVED], X_DUE])
        if s.p[P_BY_TIME]:
            g[G_NOW] = due
    while g[G_ARRIVED] < s.come.shape[0] and s.come[g[G_ARRIVED], X_DUE] <= due:
        request = s.come[g[G_ARRIVED], X_REQUEST]
        came = s.come[g[G_ARRIVED], X_DUE] if s.p[P_BY_TIME] else g[G_NOW]
        write_time(s, LOG_CAME, request, came)
        if s.p[P_TIMED]:
            s.times[request, T_ARRIVED] = came
        s.req[request, R_STATUS], s.req[request, R_TOKENS] = WAITING, s.req[request, L_PROMPT]
        enqueue(s, WAITS, request, False)
        g[G_ARRIVED] += 1
        if s.req[request, L_ABORTED]:  # before it came
            finish(s, request, ABORTED)


@njit(cache=False, **INNER)
def abort(s):
    g = s.g
    while g[G_ABORTS] < s.aborts.shape[0] and s.aborts[g[G_ABORTS], 0] <= position(s):
        request = s.aborts[g[G_ABORTS], 2]
        status = s.req[request, R_STATUS]
        if status == ABSENT:
            s.req[request, L_ABORTED] = 1
        if status in (WAITING, RUNNING, LOADING):
            finish(s, request, ABORTED)
        g[G_ABORTS] += 1


@njit(cache=False, **INNER)
def unfinished(s):
    """Whether the engine goes on. What a lazy connector stores may keep it awake for good: then for so many calls."""
    g = s.g
    rest = g[G_RUNNING] + g[G_WAITING] + g[G_HOLDING] > 0 or g[G_GONE] + g[G_LEFT] > 0
    if not s.p[P_SIMPLE]:
        return rest or g[G_JOBS] > 0
    if rest:
        g[G_ALIVE] = g[G_CALLS]
    return (rest or g[G_JOBS] > 0) and g[G_CALLS] - g[G_ALIVE] < s.p[P_IDLE]


@njit(cache=False, **INNER)
def receive(s):
    """The output of the oldest call arrives."""
    g = s.g
    told = g[G_FLIGHT + F_NAMED] + g[G_FLIGHT + F_ENDED]
    update(s, 0)
    if g[G_FLIGHTS] == 2:
        n, m = g[G_FLIGHT + F_FIELDS + F_NAMED], g[G_FLIGHT + F_FIELDS + F_ENDED]
        for i in range(n):
            for k in range(3):
                s.flight[0, i, k] = s.flight[1, i, k]
        for i in range(m):
            s.jobs[ENDED, i] = s.jobs[ENDED + 1, i]
        for k in range(F_FIELDS):
            g[G_FLIGHT + k] = g[G_FLIGHT + F_FIELDS + k]
    g[G_FLIGHTS] -= 1
    if s.p[P_BY_TIME] and told == 0:
        go_on(s)


@njit(_nrt=False)
def run(s):
    """Run to the end. Returns DONE, STUCK where nothing can ever be scheduled, or LIVELOCK."""
    g = s.g
    depth = 2 if s.p[P_ASYNC] else 1
    g[G_BUDGET] = -1
    while True:
        arrive(s, False)
        abort(s)
        if g[G_FLIGHTS] == 0 and not unfinished(s):
            if g[G_ARRIVED] == s.come.shape[0]:
                return DONE
            arrive(s, True)
            continue
        if unfinished(s):
            schedule(s)
            if g[G_EMPTY] > s.p[P_EMPTY] or g[G_SPIN] > MOST_CALLS:
                return STUCK
            send(s)
            if g[G_FLIGHTS] < depth and (g[G_SCHEDULED] > 0 or unfinished(s)):
                continue
        if g[G_FLIGHTS] > 0:
            receive(s)
        if g[G_IDLE] > s.p[P_PATIENCE]:
            return LIVELOCK
