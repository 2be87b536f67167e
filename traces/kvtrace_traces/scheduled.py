"""Scheduler calls in the decoder's last pass: owners of allocations, the scheduled set. Compiled; see ``events``."""

# ruff: noqa: I001 -- long lists of constants
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.played import (
    C_BEGUN, C_CALL, C_CONTEXT, C_EMPTY, C_INSIDE, C_LOOKUPS, C_OWNER_AT, C_OWNERS, C_PREEMPTED, C_RUNNING, C_SET,
    C_SPECIAL, C_STEP, C_STEPS, C_TIME, C_TOKENS, C_WAITING, Q_ASKED, Q_FOUND, Q_LOOKED, Q_PLACE, Q_STAMP, Q_TOKENS,
    enter, going_on, leave,
)  # fmt: skip
from kvtrace_traces.rows import (
    L_AFTER, L_ASKED, L_HIT, L_REQUEST, L_STEP, R_CACHED, R_PREEMPTIONS, S_EMPTY, S_FREE, S_PREEMPTED, S_REQUESTS,
    S_RUNNING, S_START, S_STEP, S_TOKENS, S_WAITING,
)  # fmt: skip
from kvtrace_traces.schema import SCHED_COUNTS, SCHED_FULL, SCHED_WIDE
from kvtrace_traces.survey import BEGIN, SCHED, X_OWN, op_words, sched_parts


@njit
def begin_call(words, at, stop, state, owners):
    """BEGIN, of which the operation after it is at ``at``: look ahead for the owners of the call's allocations.

    ``owners`` (uint32) has room for all that one commit names, which the first pass has counted, and one more.
    """
    state[C_BEGUN] = state[C_TIME]
    state[C_INSIDE] = 1
    state[C_CONTEXT] = -1
    state[C_OWNER_AT] = 0
    n = 0
    most = len(owners) - 1
    while at < stop:
        op = words[at] & np.uint32(15)
        if op == BEGIN:  # a call that never ended; looking further at each BEGIN would take quadratic time
            break
        if op == SCHED:
            _, k, _, _, first = sched_parts(words, at)
            wide = (words[at] >> np.uint32(4)) & np.uint32(SCHED_WIDE)
            for i in range(k):
                if wide:
                    owners[n] = words[first + i]
                else:
                    pair = words[first + 1 + i // 2]
                    offset = pair >> np.uint32(16) if i & 1 else pair & np.uint32(0xFFFF)
                    owners[n] = words[first] + offset
                n = min(n + 1, most)
            break
        size = op_words(words, at, stop)
        if op == 15 and (words[at] >> np.uint32(4)) & np.uint32(255) == X_OWN:
            for i in range(at + 1, at + size):
                owners[n] = words[i]
                n = min(n + 1, most)
        at += size
    state[C_OWNERS] = n


@njit
def end_call(words, at, state, per, members, special, spans, requests32, steps32, steps64, lookups):
    """SCHED: change the scheduled set, and write the step and the lookups of those admitted."""
    call = state[C_CALL] + 1
    state[C_CALL] = call
    flags = np.int64(words[at] >> np.uint32(4)) & 15
    entries, _, free, first, _ = sched_parts(words, at)
    if flags & SCHED_COUNTS:
        state[C_RUNNING] = words[free + 1]
        state[C_WAITING] = words[free + 2]
    for i in range(entries):
        r = np.int64(words[first + 3 * i])
        tokens = np.int64(words[first + 3 * i + 1])
        computed = np.int64(words[first + 3 * i + 2])
        per[Q_STAMP, r] = call
        if per[Q_PLACE, r] > 0:
            if tokens != per[Q_TOKENS, r] or computed != going_on(state, per, r):
                leave(state, per, members, spans, requests32, r)
                enter(state, per, members, r, tokens, computed)
        else:
            enter(state, per, members, r, tokens, computed)
            if per[Q_LOOKED, r] == call:
                looked_up(state, per, requests32, lookups, r, 0)
    if flags & SCHED_FULL:
        i = state[C_SET] - 1
        while i >= 0:
            r = np.int64(members[i])
            if per[Q_STAMP, r] != call:
                leave(state, per, members, spans, requests32, r)
            i -= 1
    else:
        for i in range(state[C_SPECIAL]):
            r = np.int64(special[i])
            if per[Q_PLACE, r] > 0 and per[Q_STAMP, r] != call:
                computed = going_on(state, per, r)
                leave(state, per, members, spans, requests32, r)
                enter(state, per, members, r, 1, computed)
    n = 0
    for i in range(entries):
        if words[first + 3 * i + 1] != 1 and n < len(special):
            special[n] = words[first + 3 * i]
            n += 1
    state[C_SPECIAL] = n
    if state[C_SET] > 0:
        _write_step(state, steps32, steps64, np.int64(words[free]))
    else:
        state[C_EMPTY] += 1
    state[C_INSIDE] = 0
    state[C_CONTEXT] = -1


@njit
def looked_up(state, per, requests32, lookups, r, loaded):
    """Write the lookup with which ``r`` was admitted; one that was not made counts for ``cached_tokens`` alone, as do
    ``loaded`` tokens that a slower tier has."""
    found = per[Q_FOUND, r]
    if requests32[R_CACHED, r] < 0:
        requests32[R_CACHED, r] = max(found - 1, 0) + loaded
    if found <= 0:
        return
    n = state[C_LOOKUPS]
    lookups[L_STEP, n] = state[C_STEP]
    lookups[L_REQUEST, n] = r
    lookups[L_ASKED, n] = per[Q_ASKED, r]
    lookups[L_HIT, n] = found - 1
    lookups[L_AFTER, n] = requests32[R_PREEMPTIONS, r] > 0
    state[C_LOOKUPS] = n + 1


@njit
def _write_step(state, steps32, steps64, free_blocks):
    n = state[C_STEPS]
    steps32[S_STEP, n] = state[C_STEP]
    steps32[S_REQUESTS, n] = state[C_SET]
    steps32[S_TOKENS, n] = state[C_TOKENS]
    steps32[S_RUNNING, n] = state[C_RUNNING]
    steps32[S_WAITING, n] = state[C_WAITING]
    steps32[S_FREE, n] = free_blocks
    steps32[S_PREEMPTED, n] = state[C_PREEMPTED]
    steps32[S_EMPTY, n] = state[C_EMPTY]
    steps64[S_START, n] = state[C_BEGUN]
    state[C_STEPS] = n + 1
    state[C_STEP] += 1
    state[C_EMPTY] = 0
    state[C_PREEMPTED] = 0
