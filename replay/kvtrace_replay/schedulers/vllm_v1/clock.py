"""The clock of a timed run: what calls cost, when their outputs arrive, and when each request has its tokens.

A call is made at `g[G_NOW]`. The device computes it once it is done with the calls before (`g[G_DEVICE]`), for as long
as its work costs (`timing.costs`); then its output arrives, and the clock stands at that moment. So a call that is
scheduled while another is under way (asynchronous scheduling) sees only what had come until then, and its time is the
interval between two outputs, which is how the duration of a step is measured in a trace.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_CONTEXT,
    G_DEVICE,
    G_GAPS,
    G_NOW,
    G_OUTPUTS,
    G_SCHEDULED,
    G_STEADY_CALLS,
    G_STEP,
    G_TOLD_LAST,
    L_PROMPT,
    P_ASYNC,
    P_BY_TIME,
    R_COMPUTED,
    ST_CALLS,
    ST_END_NEXT,
    ST_REQUEST,
    ST_SKIPS,
    T_BEGUN,
    T_FIRST,
    T_LAST,
)
from kvtrace_traces.compile import njit

HEAD = 0  # of a list in `ends`


@njit(cache=False, forceinline=True)
def position(p, g):
    """Where the run stands among what reaches it from outside: ns, or steps begun."""
    return g[G_NOW] if p[P_BY_TIME] else g[G_STEP]


@njit(cache=False, forceinline=True)
def start_call(g, cost):
    """The device takes up a call of `cost` ns when it is done with the others. Returns when the output arrives."""
    begin = max(g[G_NOW], g[G_DEVICE])
    g[G_DEVICE] = begin + np.int64(cost)
    return g[G_DEVICE]


@njit(cache=False, forceinline=True)
def decodes(req, request, tokens, before):
    """Whether a row of a call is decode: one token, past the prompt. All other rows are prefill."""
    return tokens == 1 and before >= req[request, L_PROMPT]


@njit(cache=False)
def call_cost(p, g, req, sch, st, ends, costs, times, steady):
    """ns of the call just made: `sch` and `steady` requests more, as `schedule` left them."""
    prefill, pairs, rows, context = np.int64(0), np.int64(0), np.int64(steady), np.int64(0)
    for i in range(g[G_SCHEDULED]):
        request, tokens, before = np.int64(sch[i, 0]), np.int64(sch[i, 1]), np.int64(sch[i, 2])
        if decodes(req, request, tokens, before):
            rows += 1
            context += before + 1
        else:
            prefill += tokens
            pairs += tokens * before + tokens * (tokens + 1) // 2
        if times[request, T_BEGUN] < 0:
            times[request, T_BEGUN] = max(g[G_NOW], g[G_DEVICE])
    if steady > 0:
        context += g[G_CONTEXT]
        if p[P_ASYNC]:  # those whose last output is under way have been left out
            slot = ends[g[G_OUTPUTS] & (ends.shape[0] - 1), HEAD]
            while slot >= 0:
                if st[slot, ST_SKIPS]:
                    context -= req[st[slot, ST_REQUEST], R_COMPUTED] + g[G_STEADY_CALLS] - st[slot, ST_CALLS]
                slot = st[slot, ST_END_NEXT]
    return costs[0] + costs[1] * prefill + costs[2] * pairs + costs[3] * rows + costs[4] * context


@njit(cache=False, forceinline=True)
def note_gap(g, gaps, since, many):
    gaps[g[G_GAPS], 0] = g[G_NOW] - since
    gaps[g[G_GAPS], 1] = many
    g[G_GAPS] += 1


@njit(cache=False, forceinline=True)
def note_token(g, times, gaps, request):
    """`request` has a token now."""
    if times[request, T_FIRST] < 0:
        times[request, T_FIRST] = g[G_NOW]
    else:
        note_gap(g, gaps, times[request, T_LAST], 1)
    times[request, T_LAST] = g[G_NOW]


@njit(cache=False, forceinline=True)
def note_steady(g, gaps, many):
    """`many` steady requests have a token now, and had one at the output before."""
    if many > 0:
        note_gap(g, gaps, g[G_TOLD_LAST], many)
    g[G_TOLD_LAST] = g[G_NOW]
