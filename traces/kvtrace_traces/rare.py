"""The rarer operations (EXT) and the start after a gap (KEY) in the decoder's last pass. Compiled; see ``events``."""

# ruff: noqa: I001, SIM109 -- long lists of constants; chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.played import (
    C_CALL, C_CONTEXT, C_DUE, C_EMPTY, C_EPOCH, C_EXPLICIT_AT, C_ID_AT, C_INSIDE, C_MOVES, C_OUTPUT, C_OWNER_AT,
    C_OWNERS, C_PREEMPTED, C_REQUESTS, C_RUNNING, C_SET, C_SPECIAL, C_STEP, C_STEPS, C_TIME, C_TYPES, C_WAITING,
    C_WHOLE, Q_LOOKED, Q_PLACE, enter, event, held, identity_of, leave, now_step, preempt, time_of,
)  # fmt: skip
from kvtrace_traces.rows import (
    ALLOCATED, EVICTED, FILLED, FREED, HITS, LOADED, M_BLOCKS, M_BYTES, M_COPY, M_DONE, M_DONE_STEP, M_KIND, M_NUMBER,
    M_REQUEST, M_STEP, M_TIER, M_TIME, M_TOKENS, R_ARRIVAL_NS, R_ARRIVAL_S, R_ARRIVAL_STEP, R_FLAGS, R_ID_AT,
    R_ID_BYTES, R_MAX, R_OUTPUT, R_PARENT, R_PRIORITY, R_PROMPT, R_TENANT, R_TURN, R_TYPE, RESET, STORED, T_AT, T_BYTES,
    T_NUMBER,
)  # fmt: skip
from kvtrace_traces.scheduled import looked_up
from kvtrace_traces.schema import MOVE_LOAD, NO_REQUEST, REQUEST_FINISHED
from kvtrace_traces.survey import (
    KEY_WORDS, REQ_WORDS, X_ABOUT, X_ALLOC, X_EVICT, X_FILL, X_FREE, X_HIT, X_IDS, X_LOAD, X_LOST, X_MOVE, X_MOVED,
    X_RESET, X_SKIP, X_STORE, X_TIME, X_TYPE, X_WHEN,
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
def extended(words, at, n, state, per, members, holds, explicit_ids, indptr, chains, per_block, out):
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
    elif code == X_ALLOC or code == X_HIT or code == X_FREE:
        _named(words, at, n, code, state, holds, out)
    elif code == X_STORE or code == X_LOAD:
        _copied(words, at, n, code, state, holds, out)
    elif code == X_MOVE:
        _moves(words, at, n, state, per, holds, indptr, chains, per_block, out)
    elif code == X_MOVED:
        _moved(words, at, state, out.moves32, out.moves64)
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
    kind = FREED
    if code == X_ALLOC:
        kind = ALLOCATED
    elif code == X_HIT:
        kind = HITS
    r, group = _whose(words, at, state)
    for i in range(at + 3, at + n):
        block = np.int64(words[i])
        old = held(holds, state[C_EPOCH], block)
        if code == X_ALLOC:
            if old >= 0:
                event(state, events, times, kinds, groups, EVICTED, r, block, old, group)
            holds[block] = 0
            old = np.int64(-1)
        event(state, events, times, kinds, groups, kind, r, block, old, group)


@njit
def _copied(words, at, n, code, state, holds, out):
    """STORE or LOAD: a transfer of which begin and end are told at once, 0 for an end that is not told."""
    r, _ = _whose(words, at, state)
    kind = STORED if code == X_STORE else LOADED
    for i in range(at + 7, at + n):
        block = np.int64(words[i])
        identity = held(holds, state[C_EPOCH], block)
        event(state, out.events, out.times, out.kinds, out.groups, kind, r, block, identity, 0)
    moves32, moves64, m = out.moves32, out.moves64, state[C_MOVES]
    _begin_move(moves32, moves64, m, state, r, kind, np.int64(words[at + 2]), n - 7, time_of(words, at + 3))
    done = time_of(words, at + 5)
    moves64[M_DONE, m] = done if done > 0 else np.int64(-1)
    # Found by no MOVED: that looks for the first with its number.
    moves64[M_NUMBER, m] = moves64[M_NUMBER, m - 1] if m > 0 else np.int64(-1)


@njit
def _begin_move(moves32, moves64, m, state, r, kind, tier, blocks, size):
    moves32[M_STEP, m] = now_step(state)
    moves32[M_REQUEST, m] = r
    moves32[M_KIND, m] = kind
    moves32[M_TIER, m] = min(tier, np.int64(32767))
    moves32[M_BLOCKS, m] = blocks
    moves32[M_TOKENS, m] = -1
    moves32[M_DONE_STEP, m] = -1
    moves64[M_TIME, m] = state[C_TIME]
    moves64[M_BYTES, m] = size
    moves64[M_DONE, m] = -1
    moves64[M_COPY, m] = -1
    state[C_MOVES] = m + 1


@njit
def _moves(words, at, n, state, per, holds, indptr, chains, per_block, out):
    """MOVE: a transfer begins. A load admits its request, whose lookup counts from here on."""
    r = np.int64(words[at + 2])
    if r >= state[C_REQUESTS]:
        r = np.int64(-1)
    load = (words[at + 3] & np.uint32(255)) == np.uint32(MOVE_LOAD)
    kind = LOADED if load else STORED
    first = min(np.int64(words[at + 5]), np.int64(1) << 28)  # beyond any chain, and no overflow
    for i in range(at + 8, at + n):
        block = np.int64(words[i])
        identity = held(holds, state[C_EPOCH], block)
        if r >= 0 and words[at + 5] != np.uint32(NO_REQUEST):  # it holds that not yet, or not any more
            identity = identity_of(indptr, chains, r, first + i - at - 8, per_block)
        event(state, out.events, out.times, out.kinds, out.groups, kind, r, block, identity, 0)
    moves32, moves64, m = out.moves32, out.moves64, state[C_MOVES]
    tier = np.int64(words[at + 3] >> np.uint32(8))
    _begin_move(moves32, moves64, m, state, r, kind, tier, n - 8, time_of(words, at + 6))
    moves64[M_NUMBER, m] = np.int64(words[at + 1])
    if load:
        tokens = np.int64(words[at + 4])
        moves32[M_TOKENS, m] = tokens
        if r >= 0 and per[Q_LOOKED, r] == state[C_CALL] + 1:
            looked_up(state, per, out.requests32, out.lookups, r, tokens)
            per[Q_LOOKED, r] = 0


@njit
def _moved(words, at, state, moves32, moves64):
    """MOVED: the transfer with this number, if it was read, has ended. Numbers ascend."""
    number = np.int64(words[at + 1])
    low, high = np.int64(0), state[C_MOVES]
    while low < high:
        middle = (low + high) // 2
        if moves64[M_NUMBER, middle] < number:
            low = middle + 1
        else:
            high = middle
    if low == state[C_MOVES] or moves64[M_NUMBER, low] != number:
        return
    moves32[M_DONE_STEP, low] = now_step(state)
    moves64[M_DONE, low] = time_of(words, at + 2)
    size = time_of(words, at + 4)
    if size >= 0:  # 2^64 - 1, not told, is -1
        moves64[M_BYTES, low] = size
    moves64[M_COPY, low] = max(time_of(words, at + 6), np.int64(-1))


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
