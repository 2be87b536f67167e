"""The connectors' workers: which transfers a call begins, and which have ended (`kv_connector/v1/offloading/worker.py`,
`v1/simple_kv_offload/worker.py`, 0.32.0)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import G_NOW
from kvtrace_replay.schedulers.vllm_v1.offload.clock import copy, note_copy, on_link, taken_up
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    G_CALL_PREEMPTED,
    G_LOADS,
    G_STORES,
    G_UNDER_WAY,
    G_WAITS,
    INNER,
    J_ASKED,
    J_COUNT,
    J_END,
    J_FLUSH,
    J_LOAD,
    LOADS,
    P_BY_TIME,
    P_POLLS,
    P_TIMED,
    STORES,
    WAITING_FOR,
    WORKING,
)
from kvtrace_traces.compile import njit


@njit(cache=False, **INNER)
def submit(s, job, earliest):
    """The worker begins a transfer, not before `earliest`."""
    s.job[job, J_ASKED] = s.p[P_POLLS] if s.job[job, J_FLUSH] else 0
    s.jobs[WORKING, s.g[G_UNDER_WAY]] = job
    s.g[G_UNDER_WAY] += 1
    if s.p[P_TIMED]:
        copy(s, job, earliest)


@njit(cache=False, **INNER)
def begin_stores(s):
    """`OffloadingConnectorWorker.handle_preemptions`: stores wait for the next call unless they are flushed. Returns
    when those that are flushed have ended; the call waits for these."""
    g, earliest, flushed = s.g, taken_up(s), np.int64(0)
    for i in range(g[G_WAITS]):
        submit(s, np.int64(s.jobs[WAITING_FOR, i]), earliest)
    g[G_WAITS] = 0
    for i in range(g[G_STORES]):
        job = np.int64(s.jobs[STORES, i])
        if s.job[job, J_FLUSH]:
            submit(s, job, earliest)
        else:
            s.jobs[WAITING_FOR, g[G_WAITS]] = job
            g[G_WAITS] += 1
    for i in range(g[G_UNDER_WAY]):
        job = s.jobs[WORKING, i]
        if s.job[job, J_FLUSH]:
            s.job[job, J_ASKED] = s.p[P_POLLS]
            flushed = max(flushed, s.job[job, J_END])
    return flushed


@njit(cache=False, **INNER)
def begin_loads(s):
    """`start_kv_transfers`, after the forward pass of the call."""
    for i in range(s.g[G_LOADS]):
        submit(s, np.int64(s.jobs[LOADS, i]), taken_up(s))
    s.g[G_LOADS] = 0


@njit(cache=False, **INNER)
def end_all(s):
    """`SimpleCPUOffloadWorker.handle_preemptions`: a call that preempts waits for all copies under way. Returns when
    they have ended."""
    g, flushed = s.g, np.int64(0)
    if g[G_CALL_PREEMPTED] > 0:
        for i in range(g[G_UNDER_WAY]):
            job = s.jobs[WORKING, i]
            s.job[job, J_ASKED] = s.p[P_POLLS]
            flushed = max(flushed, s.job[job, J_END])
    return flushed


@njit(cache=False, **INNER)
def begin_copies(s, flushed):
    """`start_load_kv` and `wait_for_save`: loads wait for nothing, stores for what the call computes. All of a
    direction are one copy."""
    g = s.g
    for turn in range(2):
        row, count, blocks = (LOADS, g[G_LOADS], np.int64(0)) if turn == 0 else (STORES, g[G_STORES], np.int64(0))
        earliest = max(g[G_NOW], flushed) if turn == 0 else taken_up(s)
        for i in range(count):
            blocks += s.job[s.jobs[row, i], J_COUNT]
        begin, end = np.int64(-1), np.int64(-1)
        if s.p[P_TIMED] and count > 0:
            begin, end = on_link(s, turn == 0, earliest, blocks)
        for i in range(count):
            job = np.int64(s.jobs[row, i])
            s.job[job, J_ASKED] = 0
            s.jobs[WORKING, g[G_UNDER_WAY]] = job
            g[G_UNDER_WAY] += 1
            note_copy(s, job, begin, end)
    g[G_LOADS] = 0


@njit(cache=False, **INNER)
def ask(s, ended, now):
    """`get_finished` at `now`: writes the jobs that are done to `ended`, and returns how many. By time these are those
    whose bytes are through, stores before loads; else those that have been asked for so often."""
    g, n, left = s.g, 0, 0
    for turn in range(2 if s.p[P_BY_TIME] else 1):
        left = 0
        for i in range(g[G_UNDER_WAY]):
            job = s.jobs[WORKING, i]
            if s.p[P_BY_TIME]:
                done = s.job[job, J_LOAD] == turn and s.job[job, J_END] <= now
            else:
                done = s.job[job, J_ASKED] >= s.p[P_POLLS]
            if done:
                ended[n] = job
                n += 1
            else:
                s.job[job, J_ASKED] += 1
                s.jobs[WORKING, left] = job
                left += 1
        g[G_UNDER_WAY] = left
    return n
