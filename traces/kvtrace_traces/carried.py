"""The state that a cut begins with, in the decoder's last pass: START, LIVE and KEPT. Compiled; see ``events``."""

# ruff: noqa: I001 -- long lists of constants
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.played import (
    C_EMPTY, C_EPOCH, C_EXPLICIT_AT, C_NODES, C_PREEMPTED, C_WHOLE, Q_FILL, Q_FILLED, Q_KNOWN, Q_PLACE, add_block,
    enter,
)  # fmt: skip
from kvtrace_traces.rows import R_CACHED, R_FIRST, R_PREEMPTIONS
from kvtrace_traces.schema import LIVE_BEGUN, LIVE_SCHEDULED, LIVE_TABLE
from kvtrace_traces.survey import X_KEPT, X_LIVE, X_START

BEFORE = -2
"""First step of a request that was scheduled before the trace begins; null in the table, as -1 is."""


@njit
def carry(words, at, n, code, state, per, members, nodes, holds, explicit_ids, requests32):
    """Whether the EXT operation ``code`` of ``n`` words at ``at`` is one of a cut's start; sets the state if so."""
    if code == X_START:
        state[C_PREEMPTED] = np.int64(words[at + 1])
        state[C_EMPTY] = np.int64(words[at + 2])
    elif code == X_LIVE:
        _live(words, at, n, state, per, members, nodes, requests32)
    elif code == X_KEPT:
        for i in range((n - 1) // 5):
            identity = np.int64(explicit_ids[state[C_EXPLICIT_AT]])
            state[C_EXPLICIT_AT] += 1
            holds[np.int64(words[at + 1 + 5 * i])] = state[C_EPOCH] << 32 | (identity + 1)
    else:
        return False
    return True


@njit
def _live(words, at, n, state, per, members, nodes, requests32):
    r, flags = np.int64(words[at + 1]), words[at + 2]
    computed, cached = np.int64(words[at + 3]), np.int64(words[at + 4])
    if flags & np.uint32(LIVE_SCHEDULED) and per[Q_PLACE, r] == 0:
        enter(state, per, members, r, 1, computed)
    requests32[R_CACHED, r] = cached - 1
    requests32[R_PREEMPTIONS, r] = np.int64(words[at + 5])
    if flags & np.uint32(LIVE_BEGUN):
        requests32[R_FIRST, r] = BEFORE
    if not flags & np.uint32(LIVE_TABLE):
        return
    per[Q_KNOWN, r] = state[C_WHOLE]
    first = state[C_NODES]
    for i in range(at + 7, at + n):
        add_block(state, per, nodes, r, np.int64(words[i]))
    filled = np.int64(words[at + 6])
    per[Q_FILLED, r] = filled
    per[Q_FILL, r] = first + filled if first + filled < state[C_NODES] else 0
