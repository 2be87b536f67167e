"""The clock of a run with a tier: what calls cost, when copies begin and end, and when each request has its tokens.

Calls and outputs are as in `vllm_v1.clock`. Copies run beside them (`kv_offload/cpu/gpu_worker.py`,
`v1/worker/kv_connector_model_runner_mixin.py`, 0.32.0): those of one direction one after another, the two directions
apart; a store begins when the device takes up the call that submits it, for its stream waits for what was computed
before; a load when the device is done with the call, for it is submitted after the forward pass and waits for it. Where
a store must be done before a step, the step waits. The worker asks which copies have ended once the call is under way,
so that the scheduler hears of an end with the output of the first call that is made after it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_DEVICE,
    G_EVICTIONS,
    G_FREE,
    G_GAPS,
    G_NOW,
    S_EMPTY,
    S_EVICTIONS,
    S_FREE,
    S_PREEMPTED,
    S_PREFILL,
    S_REQUESTS,
    S_RUNNING,
    S_TOKENS,
    S_WAITING,
    T_BEGUN,
    T_FIRST,
    T_LAST,
)
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    F_CALL,
    F_CONTEXT,
    F_ENDED,
    F_FIELDS,
    F_IN,
    F_NAMED,
    F_OUT,
    F_PAIR,
    F_PREFILL,
    F_ROW,
    G_ABORTS,
    G_ARRIVED,
    G_BEGUN,
    G_EMPTY,
    G_EMPTY_ROW,
    G_EVICTED,
    G_FLIGHT,
    G_FLIGHTS,
    G_HOLDING,
    G_LINK_IN,
    G_LINK_OUT,
    G_PREEMPTED,
    G_QUIET,
    G_ROOM,
    G_RUNNING,
    G_SCHEDULED,
    G_UNDER_WAY,
    G_WAITING,
    G_WAITS,
    INNER,
    J_BEGIN,
    J_COUNT,
    J_END,
    J_LOAD,
    J_ROW,
    K_LOADED,
    L_PROMPT,
    LOADING,
    M_BEGAN,
    M_ENDED,
    NOW,
    P_BY_TIME,
    P_CHUNK_BLOCKS,
    P_CHUNKS,
    P_TIMED,
    R_COMPUTED,
    R_NEXT,
    R_STATUS,
    S_BEGIN,
    S_END,
    S_LOADING,
    S_TIER,
    WORKING,
)
from kvtrace_traces.compile import njit

FAR = 1 << 62


@njit(cache=False, **INNER)
def position(s):
    """Where the run stands among what reaches it from outside: ns, or steps begun."""
    return s.g[G_NOW] if s.p[P_BY_TIME] else s.g[G_BEGUN]


@njit(cache=False, **INNER)
def taken_up(s):
    """When the device takes up a call that is made now."""
    return max(s.g[G_NOW], s.g[G_DEVICE])


@njit(cache=False, **INNER)
def on_link(s, load, earliest, blocks):
    """A copy of so many blocks is submitted: it begins when the one before it in its direction has ended. Returns when
    it begins and ends."""
    link, cost = (G_LINK_IN, F_IN) if load else (G_LINK_OUT, F_OUT)
    begin = max(earliest, s.g[link])
    end = begin + np.int64(s.real[cost] + s.real[cost + 1] * blocks)
    s.g[link] = end
    return begin, end


@njit(cache=False, **INNER)
def note_copy(s, job, begin, end):
    s.job[job, J_BEGIN], s.job[job, J_END] = begin, end
    row = s.job[job, J_ROW]
    if row < s.moves.shape[0]:
        s.moves[row, M_BEGAN], s.moves[row, M_ENDED] = begin, end


@njit(cache=False, **INNER)
def copy(s, job, earliest):
    """A transfer is a copy of its own."""
    begin, end = on_link(s, s.job[job, J_LOAD], earliest, s.job[job, J_COUNT])
    note_copy(s, job, begin, end)


@njit(cache=False, **INNER)
def decodes(s, request, tokens, before):
    """As in `vllm_v1.clock`."""
    return tokens == 1 and before >= s.req[request, L_PROMPT]


@njit(cache=False, **INNER)
def call_cost(s, begin):
    """ns of the call just made, which the device takes up at `begin`."""
    if s.g[G_SCHEDULED] == 0:
        return np.int64(0)
    prefill, pairs, rows, context = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for i in range(s.g[G_SCHEDULED]):
        request, tokens = np.int64(s.flight[NOW, i, 0]), np.int64(s.flight[NOW, i, 1])
        before = np.int64(s.req[request, R_COMPUTED]) - tokens
        if decodes(s, request, tokens, before):
            rows += 1
            context += before + 1
        else:
            prefill += tokens
            pairs += tokens * before + tokens * (tokens + 1) // 2
        if s.times[request, T_BEGUN] < 0:
            s.times[request, T_BEGUN] = begin
    real = s.real
    work = real[F_PREFILL] * prefill + real[F_PAIR] * pairs + real[F_ROW] * rows + real[F_CONTEXT] * context
    return np.int64(real[F_CALL] + work)


@njit(cache=False, **INNER)
def note_token(s, request):
    """`request` has a token now. Equal gaps that follow one another are one row; rows beyond the room are counted."""
    g, gaps, now = s.g, s.gaps, s.g[G_NOW]
    if s.times[request, T_FIRST] < 0:
        s.times[request, T_FIRST] = now
    else:
        gap, n = now - s.times[request, T_LAST], g[G_GAPS]
        if 0 < n <= gaps.shape[0] and gaps[n - 1, 0] == gap:
            gaps[n - 1, 1] += 1
        else:
            if n < gaps.shape[0]:
                gaps[n, 0], gaps[n, 1] = gap, 1
            g[G_GAPS] = n + 1
    s.times[request, T_LAST] = now


@njit(cache=False, **INNER)
def note_step(s, end_of_holds):
    """The row of the step that a call has just begun, if there is room; its times come later."""
    g, at = s.g, s.g[G_BEGUN] - 1
    if at >= s.rows.shape[0]:
        return
    row, prefill, tokens, loading = s.rows[at], 0, np.int64(0), 0
    for i in range(g[G_SCHEDULED]):
        request, many = np.int64(s.flight[NOW, i, 0]), np.int64(s.flight[NOW, i, 1])
        tokens += many
        prefill += not decodes(s, request, many, np.int64(s.req[request, R_COMPUTED]) - many)
    request = np.int64(s.req[end_of_holds, R_NEXT])
    while request != end_of_holds:
        loading += s.req[request, R_STATUS] == LOADING and not s.req[request, K_LOADED]
        request = np.int64(s.req[request, R_NEXT])
    row[S_REQUESTS], row[S_TOKENS], row[S_RUNNING] = g[G_SCHEDULED], tokens, g[G_RUNNING]
    row[S_WAITING], row[S_FREE] = g[G_WAITING] + g[G_HOLDING], g[G_FREE]
    row[S_PREEMPTED], row[S_EMPTY], row[S_PREFILL] = g[G_PREEMPTED], g[G_EMPTY_ROW], prefill
    row[S_EVICTIONS] = g[G_EVICTIONS] - g[G_EVICTED]
    row[S_TIER], row[S_LOADING] = (s.p[P_CHUNKS] - g[G_ROOM]) * s.p[P_CHUNK_BLOCKS], loading
    g[G_EVICTED] = g[G_EVICTIONS]


@njit(cache=False, **INNER)
def note_times(s, begin, end):
    """When the step just begun is computed, and its output arrives."""
    at = s.g[G_BEGUN] - 1
    if s.p[P_TIMED] and s.g[G_SCHEDULED] > 0 and at < s.rows.shape[0]:
        s.rows[at, S_BEGIN], s.rows[at, S_END] = begin, end


@njit(cache=False, **INNER)
def go_on(s):
    """After the output of an empty call that told nothing: where no call can do anything before the next copy ends or
    somebody comes or goes, the clock stands there at once."""
    g = s.g
    if not g[G_QUIET] or g[G_WAITS] > 0:
        return
    for of in range(g[G_FLIGHTS]):
        if g[G_FLIGHT + F_FIELDS * of + F_NAMED] > 0 or g[G_FLIGHT + F_FIELDS * of + F_ENDED] > 0:
            return
    due = np.int64(FAR)
    for i in range(g[G_UNDER_WAY]):
        due = min(due, s.job[s.jobs[WORKING, i], J_END])
    if g[G_ARRIVED] < s.come.shape[0]:
        due = min(due, s.come[g[G_ARRIVED], 0])
    if g[G_ABORTS] < s.aborts.shape[0]:
        due = min(due, s.aborts[g[G_ABORTS], 0])
    if due < FAR:
        g[G_NOW] = max(g[G_NOW], due)
        g[G_EMPTY] = 0
