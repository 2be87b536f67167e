"""The rarer operations (EXT) and the start after a gap (KEY) in the decoder's last pass. Compiled; see ``events``."""

# ruff: noqa: I001, SIM109 -- long lists of constants; chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.played import (
    C_CALL, C_CONTEXT, C_DUE, C_EMPTY, C_EPOCH, C_EXPLICIT_AT, C_ID_AT, C_INSIDE, C_OUTPUT, C_OWNER_AT, C_OWNERS,
    C_PREEMPTED, C_REQUESTS, C_RUNNING, C_SET, C_SPECIAL, C_STEP, C_STEPS, C_TIME, C_TYPES, C_WAITING, C_WHOLE, Q_PLACE,
    enter,
    event, held, leave, preempt, time_of,
)  # fmt: skip
from kvtrace_traces.rows import (
    ALLOCATED, EVICTED, FILLED, FREED, HITS, LOADED, R_ARRIVAL_NS, R_ARRIVAL_S, R_ARRIVAL_STEP, R_FLAGS, R_ID_AT,
    R_ID_BYTES, R_MAX, R_OUTPUT, R_PARENT, R_PRIORITY, R_PROMPT, R_TENANT, R_TURN, R_TYPE, RESET, STORED, T_AT, T_BYTES,
    T_NUMBER,
)  # fmt: skip
from kvtrace_traces.schema import REQUEST_FINISHED
from kvtrace_traces.survey import (
    KEY_WORDS, REQ_WORDS, X_ABOUT, X_ALLOC, X_EVICT, X_FILL, X_FREE, X_HIT, X_IDS, X_LOAD, X_LOST, X_RESET, X_SKIP,
    X_STORE, X_TIME, X_TYPE, X_WHEN,
)  # fmt: skip


@njit
def resume(words, at, state, per, members, spans, requests32):
    """KEY after a gap: what stood before may be stale, so what the frame says is believed, and what follows it."""
    while state[C_SET] > 0:
        leave(state, per, members, spans, requests32, np.int64(members[state[C_SET] - 1]))
    state[C_TIME] = time_of(words, at + 1)
    state[C_STEP] = words[at + 3]
    state[C_RUNNING] = words[at + 7]
    state[C_WAITING] = words[at + 8]
    state[C_DUE] = words[at + 9]
    state[C_OUTPUT] = state[C_STEPS]
    state[C_SPECIAL] = 0
    state[C_WHOLE] += 1
    state[C_EPOCH] += 1
    state[C_CALL] += 1  # a lookup before the gap belongs to no call after it
    state[C_INSIDE] = 0
    state[C_CONTEXT] = -1
    state[C_OWNERS] = 0
    state[C_OWNER_AT] = 0
    state[C_EMPTY] = 0
    state[C_PREEMPTED] = 0
    for i in range(np.int64(words[at] >> np.uint32(4))):
        base = at + 1 + KEY_WORDS + 3 * i
        r = np.int64(words[base])
        if r < state[C_REQUESTS] and per[Q_PLACE, r] == 0:
            enter(state, per, members, r, 1, np.int64(words[base + 1]) + np.int64(words[base + 2]))


@njit
def extended(words, at, n, state, per, members, holds, explicit_ids, out):
    """EXT: the operation of ``n`` words at ``at``. An unknown code is of a newer minor version and is passed over."""
    code = np.int64(words[at] >> np.uint32(4)) & 255
    size = n - 1
    events, times, kinds, groups = out.events, out.times, out.kinds, out.groups
    if code == X_TIME:
        state[C_TIME] = time_of(words, at + 1)
    elif code == X_IDS:
        first = state[C_REQUESTS]
        for r in range(first, first + size // 2):
            out.requests32[R_ARRIVAL_STEP, r] = 0
            out.requests32[R_PROMPT, r] = 1
            out.requests32[R_OUTPUT, r] = 0
        state[C_REQUESTS] = first + size // 2
    elif code == X_RESET:
        event(state, events, times, kinds, groups, RESET, -1, -1, -1, 0)
        state[C_EPOCH] += 1
    elif code == X_EVICT:
        for i in range(at + 1, at + n):
            block = np.int64(words[i])
            event(state, events, times, kinds, groups, EVICTED, -1, block, held(holds, state[C_EPOCH], block), 0)
            holds[block] = 0
    elif code == X_SKIP:
        skipped = np.int64(words[at + 1])
        due = min(skipped, state[C_DUE])
        state[C_DUE] -= due
        state[C_OUTPUT] = min(state[C_OUTPUT] + skipped - due, state[C_STEPS])
    elif code == X_LOST:
        tokens, blocks = np.int64(words[at + 2]), np.int64(words[at + 3])
        preempt(
            state, per, members, out.spans, out.requests32, out.preemptions, out.preempted_at,
            np.int64(words[at + 1]), tokens, blocks,
        )  # fmt: skip
    elif code == X_ALLOC or code == X_HIT or code == X_FREE or code == X_STORE or code == X_LOAD:
        _named(words, at, n, code, state, holds, out)
    elif code == X_FILL:
        r, group = _whose(words, at, state)
        for i in range((size - 2) // 3):
            block = np.int64(words[at + 3 + 3 * i])
            identity = np.int64(explicit_ids[state[C_EXPLICIT_AT]])
            state[C_EXPLICIT_AT] += 1
            holds[block] = state[C_EPOCH] << 32 | (identity + 1)
            event(state, events, times, kinds, groups, FILLED, r, block, identity, group)
    elif code == X_TYPE:
        _name_type(words, at, state, out.types, out.type_bytes)
    elif code == X_ABOUT:
        r = np.int64(words[at + 1])
        for i, place in enumerate((R_TYPE, R_TURN, R_PARENT)):
            out.requests32[place, r] = np.int32(words[at + 2 + i])
    elif code == X_WHEN:
        _arrived(words, at, size, out.requests64)


@njit
def _name_type(words, at, state, types, type_bytes):
    n = state[C_TYPES]
    begin = np.int64(0) if n == 0 else np.int64(types[T_AT, n - 1]) + np.int64(types[T_BYTES, n - 1])
    types[T_NUMBER, n] = words[at + 1]
    types[T_AT, n] = begin
    types[T_BYTES, n] = words[at + 2]
    for i in range(np.int64(words[at + 2])):
        type_bytes[begin + i] = (words[at + 3 + i // 4] >> np.uint32(8 * (i & 3))) & np.uint32(255)
    state[C_TYPES] = n + 1


@njit
def _arrived(words, at, size, requests64):
    r = np.int64(words[at + 1])
    seconds = np.empty(1, np.float64)
    bits = seconds.view(np.int64)
    for i in range(size // 3):
        time = time_of(words, at + 3 + 3 * i)
        seconds[0] = time / 1e9
        for _ in range(np.int64(words[at + 2 + 3 * i])):
            requests64[R_ARRIVAL_NS, r] = time
            requests64[R_ARRIVAL_S, r] = bits[0]
            r += 1


@njit
def _whose(words, at, state):
    """Request and group of an operation that names its blocks, -1 for unknown ones."""
    r = np.int64(words[at + 1])
    group = np.int64(words[at + 2])
    return r if r < state[C_REQUESTS] else np.int64(-1), group if group < 32768 else np.int64(-1)


@njit
def _named(words, at, n, code, state, holds, out):
    events, times, kinds, groups = out.events, out.times, out.kinds, out.groups
    kind, fixed = FREED, 2
    if code == X_ALLOC:
        kind = ALLOCATED
    elif code == X_HIT:
        kind = HITS
    elif code == X_STORE:
        kind, fixed = STORED, 6
    elif code == X_LOAD:
        kind, fixed = LOADED, 6
    r, group = _whose(words, at, state)
    if fixed == 6:
        group = np.int64(0)
    for i in range(at + 1 + fixed, at + n):
        block = np.int64(words[i])
        old = held(holds, state[C_EPOCH], block)
        if code == X_ALLOC:
            if old >= 0:
                event(state, events, times, kinds, groups, EVICTED, r, block, old, group)
            holds[block] = 0
            old = np.int64(-1)
        event(state, events, times, kinds, groups, kind, r, block, old, group)


@njit
def arrive(words, at, state, requests32, requests64, id_bytes):
    """EXT REQ: a request arrives. (The one EXT that is not so rare: it is called for itself, without the tuple.)"""
    r = state[C_REQUESTS]
    state[C_REQUESTS] = r + 1
    requests64[R_ARRIVAL_NS, r] = time_of(words, at + 1)
    requests64[R_ARRIVAL_S, r] = time_of(words, at + 3)  # the bits of an f64
    requests64[R_TENANT, r] = time_of(words, at + 9)
    requests32[R_PROMPT, r] = np.int64(words[at + 5])
    requests32[R_MAX, r] = np.int64(words[at + 6])
    requests32[R_PRIORITY, r] = np.int32(words[at + 7])
    requests32[R_FLAGS, r] = np.int64(words[at + 8])
    requests32[R_ARRIVAL_STEP, r] = state[C_STEP]
    if words[at + 8] & np.uint32(REQUEST_FINISHED):
        requests32[R_OUTPUT, r] = np.int64(words[at + 11])
    size = np.int64(words[at + REQ_WORDS])
    id_at = state[C_ID_AT]
    requests32[R_ID_BYTES, r] = size
    requests64[R_ID_AT, r] = id_at
    for i in range(size):
        word = words[at + 1 + REQ_WORDS + i // 4]
        id_bytes[id_at + i] = (word >> np.uint32(8 * (i & 3))) & np.uint32(255)
    state[C_ID_AT] = id_at + size
