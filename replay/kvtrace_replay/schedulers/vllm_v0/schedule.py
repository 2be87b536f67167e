"""Which requests a call schedules: `Scheduler._schedule_default` of vLLM 0.4.2, in its three parts."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v0.layout import (
    G_CALL,
    G_FREE_CPU,
    G_FREE_GPU,
    G_LEAKED,
    G_NEEDLESS,
    G_RUNNING,
    G_SWAPPED,
    G_WAITING,
    MOVED_BACK,
    MOVED_IGNORED,
    P_BLOCK_SIZE,
    P_MAX_LEN,
    P_MAX_SEQS,
    P_MAX_TOKENS,
    P_MEND_LEAK,
    P_MEND_LIVELOCK,
    P_MEND_RETURN,
    P_MEND_SPARE,
    P_TOTAL,
    P_WATERMARK,
    R_BLOCKS,
    R_STOP,
    R_TOKENS,
    S_CONTEXT,
    S_PAIRS,
    S_PREFILL,
    S_ROWS,
)
from kvtrace_replay.schedulers.vllm_v0.preempt import place_of_victim, preempt
from kvtrace_replay.schedulers.vllm_v0.queues import head_of_waiting, note_move, pop_waiting, take_out
from kvtrace_traces.compile import njit


@njit(cache=False)
def schedule_prefills(p, g, req, stack, come, batch, moves, row):
    """`Scheduler._schedule_prefills`: puts whole prompts (and, after a recomputation, outputs) into `batch`. Returns
    how many."""
    n, spent, size, total = 0, np.int64(0), p[P_BLOCK_SIZE], p[P_TOTAL]
    limit = min(p[P_MAX_LEN], p[P_MAX_TOKENS])
    while g[G_WAITING] > 0:
        request = head_of_waiting(g, req, stack, come)
        tokens = np.int64(req[request, R_TOKENS])
        required = (tokens + size - 1) // size
        kept = p[P_WATERMARK]
        if p[P_MEND_RETURN]:
            never = required > total
            if g[G_FREE_GPU] == total:
                kept = np.int64(0)
        else:
            never = total - required < kept
        if tokens > limit or never:
            pop_waiting(g)
            g[G_WAITING] -= 1
            note_move(g, moves, g[G_CALL], MOVED_IGNORED, request, tokens)
            continue
        if g[G_FREE_GPU] - required < kept or spent + tokens > p[P_MAX_TOKENS]:
            break
        if g[G_RUNNING] + n + 1 > p[P_MAX_SEQS]:
            break
        pop_waiting(g)
        g[G_WAITING] -= 1
        g[G_FREE_GPU] -= required
        req[request, R_BLOCKS] = required
        spent += tokens
        row[S_PAIRS] += tokens * (tokens + 1) // 2
        batch[n] = request
        n += 1
    row[S_PREFILL] = spent
    return n


@njit(cache=False)
def schedule_calm(p, g, req, running, batch, row):
    """A decode of all that run where there are blocks for all, so that nobody is preempted, and its output at once.
    Puts those that end into `batch`, out of the queue; returns how many."""
    size, free, context = p[P_BLOCK_SIZE], g[G_FREE_GPU], np.int64(0)
    n, kept, ended = g[G_RUNNING], 0, 0
    for i in range(n):
        request = np.intp(np.uint32(running[i]))
        tokens = req[request, R_TOKENS]
        if tokens > req[request, R_BLOCKS] * size:
            req[request, R_BLOCKS] += 1
            free -= 1
        context += tokens
        req[request, R_TOKENS] = tokens + 1
        if tokens + 1 == req[request, R_STOP]:
            batch[ended] = request
            ended += 1
        else:
            running[kept] = request
            kept += 1
    g[G_FREE_GPU] = free
    row[S_ROWS], row[S_CONTEXT] = n, context
    return ended


@njit(cache=False)
def schedule_running(p, g, req, running, token_cost, block_cost, moves, row):
    """`Scheduler._schedule_running`: a block for each that needs one; those left in `running` decode. False where the
    engine dies."""
    size, context = p[P_BLOCK_SIZE], np.int64(0)
    i, n = 0, g[G_RUNNING]
    alive, alone = True, False
    while i < n and alive and not alone:
        request = np.intp(np.uint32(running[i]))
        tokens = req[request, R_TOKENS]
        need = 1 if tokens > req[request, R_BLOCKS] * size else 0
        asked = need if p[P_MEND_SPARE] else 1
        while g[G_FREE_GPU] < asked and alive and not alone:
            if need == 0:
                g[G_NEEDLESS] += 1
            victim = request
            if n > i + 1:
                place = place_of_victim(p, req, running, i + 1, n)
                victim = running[place]
                take_out(running, n, place)
                n -= 1
            else:
                alone = True
            alive = preempt(p, g, req, token_cost, block_cost, moves, victim)
        if alive and not alone:
            req[request, R_BLOCKS] += need
            g[G_FREE_GPU] -= need
            context += tokens
            i += 1
    g[G_RUNNING] = i
    row[S_ROWS], row[S_CONTEXT] = i, context
    return alive


@njit(cache=False)
def schedule_swapped(p, g, req, swapped, batch, moves, row):
    """`Scheduler._schedule_swapped`: puts those that come back, and decode in this very call, into `batch`. Returns how
    many. Its budget never binds: those running and swapped were running together once, and none was admitted since."""
    n, taken, size, total = 0, 0, p[P_BLOCK_SIZE], p[P_TOTAL]
    while taken < g[G_SWAPPED]:
        request = swapped[taken]
        tokens, blocks = req[request, R_TOKENS], np.int64(req[request, R_BLOCKS])
        need = 1 if tokens > blocks * size else 0
        required = blocks + (need if p[P_MEND_RETURN] else 1)
        if total < required:
            taken += 1
            note_move(g, moves, g[G_CALL], MOVED_IGNORED, request, tokens)
            if p[P_MEND_LEAK]:
                g[G_FREE_CPU] += blocks
                req[request, R_BLOCKS] = 0
            else:
                g[G_LEAKED] += blocks
            continue
        kept = p[P_WATERMARK]
        if p[P_MEND_LIVELOCK] and g[G_FREE_GPU] == total:
            kept = np.int64(0)
        if g[G_FREE_GPU] - required < kept:
            break
        taken += 1
        g[G_FREE_CPU] += blocks
        g[G_FREE_GPU] -= blocks + need
        req[request, R_BLOCKS] = blocks + need
        note_move(g, moves, g[G_CALL], MOVED_BACK, request, blocks)
        row[S_ROWS] += 1
        row[S_CONTEXT] += tokens
        batch[n] = request
        n += 1
    if taken > 0:
        g[G_SWAPPED] -= taken
        for i in range(g[G_SWAPPED]):
            swapped[i] = swapped[i + taken]
    return n
