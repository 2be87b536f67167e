"""The run: arrivals and aborts, one call after another, and what is told of them."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v0.layout import (
    ABORTED,
    BY_RECOMPUTE,
    BY_SWAP,
    DECODE,
    DIED,
    DONE,
    DROPPED_RECOMPUTED,
    DROPPED_SWAPPED,
    ENDED,
    FINISHED,
    FULL,
    G_CALL,
    G_COME,
    G_FREE_CPU,
    G_FREE_GPU,
    G_GAPS,
    G_GONE,
    G_IDLE_CALLS,
    G_MOVES,
    G_MOVES_BEFORE,
    G_NOW,
    G_PREFILL_CALLS,
    G_ROWS,
    G_RUNNING,
    G_SCHEDULED,
    G_STACKED,
    G_SUMS,
    G_SWAPPED,
    G_TICK,
    G_WAITING,
    IDLE,
    LIVELOCK,
    M_AMOUNT,
    M_KIND,
    M_REQUEST,
    MODEL_LENGTH,
    MOVED_BACK,
    MOVED_OUT,
    MOVED_RECOMPUTE,
    NEVER_FITS,
    NEW,
    O_AGAIN,
    O_ARRIVED_NS,
    O_BACK,
    O_BEGUN_NS,
    O_END,
    O_FIRST,
    O_FIRST_NS,
    O_LAST,
    O_LAST_NS,
    O_OUT,
    O_RECOMPUTES,
    O_SWAPS,
    P_BY_TIME,
    P_DETAIL,
    P_MAX_LEN,
    P_MAX_TOKENS,
    P_ROWS,
    P_TIMED,
    PREFILL,
    PROMPT_TOO_LONG,
    R_ASKED,
    R_STATUS,
    R_STOP,
    R_TOKENS,
    R_WAY,
    RUNNING,
    S_BACK,
    S_BLOCKS_IN,
    S_BLOCKS_OUT,
    S_END,
    S_FIELDS,
    S_FREE_CPU,
    S_FREE_GPU,
    S_IGNORED,
    S_KIND,
    S_OUT,
    S_PREFILL,
    S_RECOMPUTED,
    S_REQUESTS,
    S_RUNNING,
    S_START,
    S_SWAPPED,
    S_WAITING,
    SWAPPED,
    WAITING,
)
from kvtrace_replay.schedulers.vllm_v0.queues import (
    add_running,
    add_swapped,
    find,
    give_back,
    take_out,
)
from kvtrace_replay.schedulers.vllm_v0.schedule import (
    schedule_calm,
    schedule_prefills,
    schedule_running,
    schedule_swapped,
)
from kvtrace_replay.timing.costs import WORK
from kvtrace_traces.compile import njit

FAR = np.int64(1) << np.int64(62)
OVERLAP = len(WORK)  # its place in `costs`


@njit(cache=False)
def position(p, g):
    """Where the run stands among what reaches it from outside: ns, or calls."""
    return g[G_NOW] if p[P_BY_TIME] else g[G_TICK]


@njit(cache=False)
def abort(g, req, told, running, swapped, request):
    """`Scheduler.abort_seq_group`; one that has not come yet will not come."""
    status = req[request, R_STATUS]
    if status == ENDED:
        return
    if status == WAITING:
        g[G_WAITING] -= 1
    elif status == RUNNING:
        take_out(running, g[G_RUNNING], find(running, g[G_RUNNING], request))
        g[G_RUNNING] -= 1
    elif status == SWAPPED:
        take_out(swapped, g[G_SWAPPED], find(swapped, g[G_SWAPPED], request))
        g[G_SWAPPED] -= 1
    if status != NEW:
        give_back(g, req, request)
        told[request, O_LAST] = max(g[G_CALL] - 1, 0)
    told[request, O_END] = ABORTED
    req[request, R_STATUS] = ENDED


@njit(cache=False)
def next_due(g, come_due, gone_due):
    due = FAR
    if g[G_COME] < come_due.shape[0]:
        due = come_due[g[G_COME]]
    if g[G_GONE] < gone_due.shape[0]:
        due = min(due, gone_due[g[G_GONE]])
    return due


@njit(cache=False)
def take_events(p, g, req, told, running, swapped, come, come_due, gone, gone_due):
    """Requests that are due arrive or are aborted; of two due at once, the arrival first."""
    due = next_due(g, come_due, gone_due)
    while due <= position(p, g):
        if g[G_COME] < come_due.shape[0] and come_due[g[G_COME]] == due:
            request = come[g[G_COME]]
            g[G_COME] += 1
            if req[request, R_STATUS] == NEW:
                req[request, R_STATUS] = WAITING
                g[G_WAITING] += 1
                told[request, O_ARRIVED_NS] = due if p[P_BY_TIME] else g[G_NOW]
        else:
            abort(g, req, told, running, swapped, gone[g[G_GONE]])
            g[G_GONE] += 1
        due = next_due(g, come_due, gone_due)


@njit(cache=False)
def settle_moves(p, g, req, told, swapped, stack, moves, row):
    """What happened to requests takes effect at the end of the call (a call in which the engine dies has none)."""
    for at in range(g[G_MOVES_BEFORE], g[G_MOVES]):
        kind, request, amount = moves[at, M_KIND], moves[at, M_REQUEST], moves[at, M_AMOUNT]
        if kind == MOVED_RECOMPUTE:
            row[S_RECOMPUTED] += 1
            told[request, O_RECOMPUTES] += 1
            req[request, R_STATUS] = WAITING
            stack[g[G_STACKED]] = request
            g[G_STACKED] += 1
            g[G_WAITING] += 1
        elif kind == MOVED_OUT:
            row[S_OUT] += 1
            row[S_BLOCKS_OUT] += amount
            told[request, O_SWAPS] += 1
            told[request, O_OUT] += amount
            add_swapped(g, req, swapped, request)
        elif kind == MOVED_BACK:
            row[S_BACK] += 1
            row[S_BLOCKS_IN] += amount
            told[request, O_BACK] += amount
        else:
            row[S_IGNORED] += 1
            told[request, O_LAST] = g[G_CALL]
            req[request, R_STATUS] = ENDED
            if req[request, R_WAY] == BY_RECOMPUTE:
                told[request, O_END] = DROPPED_RECOMPUTED
            elif req[request, R_WAY] == BY_SWAP:
                told[request, O_END] = DROPPED_SWAPPED
            elif amount > min(p[P_MAX_LEN], p[P_MAX_TOKENS]):
                told[request, O_END] = PROMPT_TOO_LONG
            else:
                told[request, O_END] = NEVER_FITS


@njit(cache=False)
def close_row(p, g, costs, row, kind, free_gpu, free_cpu, running):
    """Completes the row of the call, and moves the clock by what the call's work costs."""
    row[S_KIND] = kind
    row[S_FREE_GPU], row[S_FREE_CPU] = free_gpu, free_cpu
    row[S_RUNNING], row[S_WAITING], row[S_SWAPPED] = running, g[G_WAITING], g[G_SWAPPED]
    row[S_START] = g[G_NOW]
    g[G_TICK] += 1
    if p[P_TIMED]:
        computing, copying = costs[0], costs[5] * row[S_BLOCKS_IN] + costs[6] * row[S_BLOCKS_OUT]
        for i in range(S_BLOCKS_IN - S_PREFILL):
            computing += costs[i + 1] * row[S_PREFILL + i]
        g[G_NOW] += np.int64(computing + copying - costs[OVERLAP] * min(computing, copying))
    row[S_END] = g[G_NOW]
    for i in range(S_FIELDS - S_PREFILL):
        g[G_SUMS + i] += row[S_PREFILL + i]
    if kind == PREFILL:
        g[G_PREFILL_CALLS] += 1
    elif kind == IDLE:
        g[G_IDLE_CALLS] += 1


@njit(cache=False)
def note_tokens(g, told, gaps, queue, n):
    """Each of `queue[:n]` has a token now. Of neighbours with equal gaps one row is made."""
    at = g[G_GAPS]
    for i in range(n):
        request = queue[i]
        if told[request, O_FIRST_NS] < 0:
            told[request, O_FIRST_NS] = g[G_NOW]
        else:
            gap = g[G_NOW] - told[request, O_LAST_NS]
            if at > g[G_GAPS] and gaps[at - 1, 0] == gap:
                gaps[at - 1, 1] += 1
            else:
                gaps[at, 0], gaps[at, 1] = gap, 1
                at += 1
        told[request, O_LAST_NS] = g[G_NOW]
    g[G_GAPS] = at


@njit(cache=False)
def finish(p, g, req, told, row, request):
    """`request` has its last token (`StopChecker`): its blocks are free for the next call."""
    give_back(g, req, request)
    req[request, R_STATUS] = ENDED
    told[request, O_LAST] = g[G_CALL]
    told[request, O_END] = FINISHED if req[request, R_TOKENS] == req[request, R_ASKED] else MODEL_LENGTH


@njit(cache=False)
def log_scheduled(g, req, log, queue, n, prefill):
    at = g[G_SCHEDULED]
    for i in range(n):
        log[at + i, 0] = queue[i]
        log[at + i, 1] = req[queue[i], R_TOKENS] if prefill else 1
    g[G_SCHEDULED] = at + n


@njit(cache=False)
def sample_running(p, g, req, told, running, row):
    """A token for each that decodes."""
    kept = 0
    for i in range(g[G_RUNNING]):
        request = np.intp(np.uint32(running[i]))
        tokens = req[request, R_TOKENS] + 1
        req[request, R_TOKENS] = tokens
        if tokens == req[request, R_STOP]:
            finish(p, g, req, told, row, request)
        else:
            running[kept] = request
            kept += 1
    g[G_RUNNING] = kept


@njit(cache=False)
def sample_batch(p, g, req, told, running, row, batch, n, prefill):
    """A token for each of `batch`, which then run."""
    for i in range(n):
        request = batch[i]
        if prefill:
            if told[request, O_FIRST] < 0:
                told[request, O_FIRST] = g[G_CALL]
                told[request, O_BEGUN_NS] = row[S_START]
            if told[request, O_RECOMPUTES] > 0:
                told[request, O_AGAIN] += req[request, R_TOKENS] - 1  # the last had never been computed
        req[request, R_TOKENS] += 1
        req[request, R_STATUS] = RUNNING
        if req[request, R_TOKENS] == req[request, R_STOP]:
            finish(p, g, req, told, row, request)
        else:
            add_running(g, req, running, request)


@njit(cache=False)
def call(p, g, req, told, running, swapped, stack, come, batch, token_cost, block_cost, costs, gaps, row, moves, log):
    """`LLMEngine.step`: 1; 0 if it changed nothing; -1 where the engine dies."""
    row[:] = 0
    g[G_MOVES_BEFORE] = g[G_MOVES]
    n = 0
    if g[G_SWAPPED] == 0 and g[G_WAITING] > 0:
        n = schedule_prefills(p, g, req, stack, come, batch, moves, row)
    if n > 0:
        settle_moves(p, g, req, told, swapped, stack, moves, row)
        row[S_REQUESTS] = n
        if p[P_DETAIL]:
            log_scheduled(g, req, log, batch, n, True)
        close_row(p, g, costs, row, PREFILL, g[G_FREE_GPU], g[G_FREE_CPU], g[G_RUNNING] + n)
        if p[P_TIMED]:
            note_tokens(g, told, gaps, batch, n)
        sample_batch(p, g, req, told, running, row, batch, n, True)
        return 1
    if g[G_SWAPPED] == 0 and 0 < g[G_RUNNING] <= g[G_FREE_GPU]:
        settle_moves(p, g, req, told, swapped, stack, moves, row)
        running_now = g[G_RUNNING]
        row[S_REQUESTS] = running_now
        if p[P_DETAIL]:
            log_scheduled(g, req, log, running, running_now, False)
        n = schedule_calm(p, g, req, running, batch, row)
        close_row(p, g, costs, row, DECODE, g[G_FREE_GPU], g[G_FREE_CPU], running_now)
        g[G_RUNNING] -= n
        if p[P_TIMED]:
            note_tokens(g, told, gaps, running, g[G_RUNNING])
            note_tokens(g, told, gaps, batch, n)
        for i in range(n):
            finish(p, g, req, told, row, batch[i])
        return 1
    before = g[G_MOVES]
    if not schedule_running(p, g, req, running, token_cost, block_cost, moves, row):
        return -1
    if g[G_MOVES] == before:
        n = schedule_swapped(p, g, req, swapped, batch, moves, row)
    decoding = g[G_RUNNING] + n
    if decoding == 0 and g[G_MOVES] == g[G_MOVES_BEFORE]:
        return 0
    settle_moves(p, g, req, told, swapped, stack, moves, row)
    row[S_REQUESTS] = decoding
    if p[P_DETAIL]:
        log_scheduled(g, req, log, running, g[G_RUNNING], False)
        log_scheduled(g, req, log, batch, n, False)
    close_row(p, g, costs, row, DECODE if decoding > 0 else IDLE, g[G_FREE_GPU], g[G_FREE_CPU], decoding)
    if p[P_TIMED]:
        note_tokens(g, told, gaps, running, g[G_RUNNING])
        note_tokens(g, told, gaps, batch, n)
    sample_running(p, g, req, told, running, row)
    sample_batch(p, g, req, told, running, row, batch, n, False)
    return 1


@njit
def run(
    p, g, req, told, running, swapped, stack, come, come_due, gone, gone_due, batch, token_cost, block_cost, costs,
    gaps, rows, moves, log,
):  # fmt: skip
    """Run until DONE, LIVELOCK (`swapped[0]` waits for ever), DIED (`g[G_DIED]` is the victim), or FULL: take away the
    rows, moves and scheduled requests, set their numbers in `g` to 0, and call again."""
    room = 2 * running.shape[0] + req.shape[0]
    while True:
        if p[P_ROWS]:
            if g[G_ROWS] >= rows.shape[0] or g[G_MOVES] + room > moves.shape[0]:
                return FULL
            if p[P_DETAIL] and g[G_SCHEDULED] + running.shape[0] > log.shape[0]:
                return FULL
        else:
            g[G_MOVES] = 0
        if p[P_TIMED] and g[G_GAPS] + running.shape[0] > gaps.shape[0]:
            return FULL
        take_events(p, g, req, told, running, swapped, come, come_due, gone, gone_due)
        if g[G_RUNNING] + g[G_SWAPPED] + g[G_WAITING] > 0:
            changed = call(
                p, g, req, told, running, swapped, stack, come, batch, token_cost, block_cost, costs, gaps,
                rows[g[G_ROWS]], moves, log,
            )  # fmt: skip
            if changed < 0:
                return DIED
            if changed > 0:
                g[G_CALL] += 1
                if p[P_ROWS]:
                    g[G_ROWS] += 1
                continue
        due = next_due(g, come_due, gone_due)
        if due == FAR:
            return LIVELOCK if g[G_RUNNING] + g[G_SWAPPED] + g[G_WAITING] > 0 else DONE
        if p[P_BY_TIME]:
            g[G_NOW] = max(g[G_NOW], due)
        else:
            g[G_TICK] = max(g[G_TICK], due)
