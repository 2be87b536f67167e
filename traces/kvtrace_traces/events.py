"""Last pass of the decoder: plays the operations and writes the rows of every table. Compiled.

It follows the block table of each request, so that fills and frees get their block numbers, and the identity each
block holds, so that evictions are seen: a block that holds one and is handed out was evicted. Where a part of the log is
missing nothing is believed until it is seen again: rows that would need it are counted in ``LOST``, not guessed.
"""

from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.schema import BLOCK_EVENT_KINDS, SCHED_COUNTS, SCHED_FULL, SCHED_WIDE
from kvtrace_traces.survey import (
    ALLOC,
    ALLOCN,
    BEGIN,
    FILL,
    FILL1,
    FINISH,
    FREE,
    HIT,
    KEY,
    KEY_WORDS,
    LOOKUP,
    OUTPUT,
    PREEMPT,
    REQ_WORDS,
    SCHED,
    X_ALLOC,
    X_EVICT,
    X_FILL,
    X_FREE,
    X_HIT,
    X_IDS,
    X_LOAD,
    X_LOST,
    X_OWN,
    X_REQ,
    X_RESET,
    X_SKIP,
    X_STORE,
    X_TIME,
    op_words,
    sched_parts,
)

ALLOCATED, HITS, FILLED, FREED, EVICTED, RESET, STORED, LOADED = range(len(BLOCK_EVENT_KINDS))

# Rows of the int32 and int64 arrays of requests.
(R_ARRIVAL_STEP, R_PROMPT, R_OUTPUT, R_MAX, R_PRIORITY, R_FLAGS, R_CACHED, R_PREEMPTIONS, R_FIRST, R_LAST,
 R_FINISH_STEP, R_REASON, R_ID_BYTES) = range(13)  # fmt: skip
R_ARRIVAL_NS, R_ARRIVAL_S, R_TENANT, R_FINISH_NS, R_ID_AT = range(5)
# Rows of the int32 arrays of steps, spans, lookups, preemptions and block events.
S_STEP, S_REQUESTS, S_TOKENS, S_RUNNING, S_WAITING, S_FREE, S_PREEMPTED, S_EMPTY = range(8)
S_START, S_END = range(2)
P_REQUEST, P_FIRST, P_STEPS, P_TOKENS, P_COMPUTED = range(5)
L_STEP, L_REQUEST, L_ASKED, L_HIT, L_AFTER = range(5)
V_STEP, V_REQUEST, V_BLOCKS, V_TOKENS = range(4)
E_STEP, E_REQUEST, E_BLOCK, E_IDENTITY = range(4)
# Counts that the pass returns.
(N_STEPS, N_SPANS, N_LOOKUPS, N_PREEMPTIONS, N_EVENTS, N_LOST, N_EMPTY_AFTER) = range(7)

# Scalars of the pass, in one array so that helpers can change them.
(C_TIME, C_STEP, C_TOKENS, C_SET, C_SPANS, C_EVENTS, C_LOST, C_NODES, C_EPOCH) = range(9)
# Per request: membership of the scheduled set, its open span, its block table, and when that was last known whole.
(Q_PLACE, Q_START, Q_TOKENS, Q_COMPUTED, Q_STAMP, Q_TAIL, Q_FILL, Q_FILLED, Q_KNOWN, Q_LOOKED, Q_ASKED,
 Q_FOUND) = range(12)  # fmt: skip
NODE_BLOCK, NODE_PREVIOUS, NODE_NEXT = range(3)


@njit
def _close(state, per, members, spans, requests32, r):  # type: ignore[no-untyped-def]
    """Take request ``r`` out of the scheduled set and write its span, if any step is in it."""
    place = per[Q_PLACE, r] - 1
    if place < 0:
        return
    last = members[state[C_SET] - 1]
    members[place] = last
    per[Q_PLACE, last] = place + 1
    per[Q_PLACE, r] = 0
    state[C_SET] -= 1
    state[C_TOKENS] -= per[Q_TOKENS, r]
    steps = state[C_STEP] - per[Q_START, r]
    if steps <= 0:
        return
    n = state[C_SPANS]
    spans[P_REQUEST, n] = r
    spans[P_FIRST, n] = per[Q_START, r]
    spans[P_STEPS, n] = steps
    spans[P_TOKENS, n] = per[Q_TOKENS, r]
    spans[P_COMPUTED, n] = per[Q_COMPUTED, r]
    state[C_SPANS] = n + 1
    if requests32[R_FIRST, r] < 0:
        requests32[R_FIRST, r] = per[Q_START, r]
    requests32[R_LAST, r] = state[C_STEP] - 1


@njit
def _open(state, per, members, r, tokens, computed):  # type: ignore[no-untyped-def]
    """Put request ``r`` into the scheduled set from the next step on."""
    members[state[C_SET]] = r
    state[C_SET] += 1
    per[Q_PLACE, r] = state[C_SET]
    per[Q_START, r] = state[C_STEP]
    per[Q_TOKENS, r] = tokens
    per[Q_COMPUTED, r] = computed
    state[C_TOKENS] += tokens


@njit
def _event(state, inside, events, times, kinds, groups, kind, request, block, identity, group):  # type: ignore[no-untyped-def]
    n = state[C_EVENTS]
    step = state[C_STEP] if inside else state[C_STEP] - 1
    events[E_STEP, n] = max(step, 0)
    events[E_REQUEST, n] = request
    events[E_BLOCK, n] = block
    events[E_IDENTITY, n] = identity
    times[n] = state[C_TIME]
    kinds[n] = kind
    groups[n] = group
    state[C_EVENTS] = n + 1


@njit
def _held(holds, epoch, block):  # type: ignore[no-untyped-def]
    """The identity that ``block`` is known to hold, -1 for none. ``holds``: epoch * 2^32 + identity + 1."""
    value = holds[block]
    if value >> 32 != epoch:
        return np.int64(-1)
    return (value & 0xFFFFFFFF) - 1


@njit
def _identity(indptr, chains, r, block, per_block):  # type: ignore[no-untyped-def]
    """The identity of block number ``block`` of request ``r``, -1 where its chain does not reach so far."""
    at = indptr[r] + (block + 1) * per_block - 1
    if at < indptr[r + 1]:
        return np.int64(chains[at])
    return np.int64(-1)


@njit
def _add_block(state, per, nodes, r, block):  # type: ignore[no-untyped-def]
    """Append ``block`` to the table of request ``r``."""
    n = state[C_NODES]
    state[C_NODES] = n + 1
    tail = per[Q_TAIL, r]
    nodes[NODE_BLOCK, n] = block
    nodes[NODE_PREVIOUS, n] = tail
    nodes[NODE_NEXT, n] = 0
    if tail > 0:
        nodes[NODE_NEXT, tail] = n
    per[Q_TAIL, r] = n
    if per[Q_FILL, r] == 0:
        per[Q_FILL, r] = n


@njit
def play(  # type: ignore[no-untyped-def]
    words, starts, stops, gaps, use, known, indptr, chains, per_block, num_blocks, max_owners, explicit_ids,
    requests32, requests64, id_bytes, steps32, steps64, spans, lookups, preemptions, preempted_at,
    events, times, kinds, groups, nodes,
):  # fmt: skip
    """Decode the commits marked in ``use``. Writes the arrays in place and returns the counts ``N_*``.

    ``explicit_ids``: dense identities of FILLX and IDS in log order, as ``gather`` met them.
    """
    total = len(known)
    state = np.zeros(9, np.int64)
    state[C_EPOCH] = 1
    state[C_NODES] = 1  # node 0 means none
    per = np.zeros((12, total), np.int32)
    members = np.empty(total, np.int32)
    special = np.empty(total, np.int32)
    owners = np.empty(max_owners + 1, np.uint32)
    holds = np.zeros(num_blocks, np.int64)
    n_special = 0
    n_steps = 0
    n_lookups = 0
    n_preemptions = 0
    requests = 0
    output_row = 0
    outputs_due = 0
    running = 0
    waiting = 0
    empty = 0
    call = 0
    id_at = 0
    explicit_at = 0
    n_owners = 0
    owner_at = 0
    preempted_now = 0
    begun = np.int64(0)
    inside = False
    context = np.int64(-1)
    whole = np.int32(1)  # tables are known whole of requests looked up since the last gap
    resumed = False
    for c in range(len(starts)):
        if gaps[c] or not use[c]:
            resumed = True
        if not use[c]:
            continue
        at, stop = starts[c], stops[c]
        while at < stop:
            n = op_words(words, at, stop)
            op = words[at] & np.uint32(15)
            operand = np.int64(words[at] >> np.uint32(4))
            if op == ALLOC or op == ALLOCN:
                request = context
                if request < 0 and inside and owner_at < n_owners:
                    request = np.int64(owners[owner_at])
                    owner_at += 1
                    if request >= requests:
                        request = np.int64(-1)
                many = 1 if op == ALLOC else operand
                for i in range(many):
                    block = operand if op == ALLOC else np.int64(words[at + 1 + i])
                    old = _held(holds, state[C_EPOCH], block)
                    if old >= 0:
                        _event(state, inside, events, times, kinds, groups, EVICTED, request, block, old, 0)
                        holds[block] = 0
                    _event(state, inside, events, times, kinds, groups, ALLOCATED, request, block, -1, 0)
                    if request >= 0 and per[Q_KNOWN, request] == whole:
                        _add_block(state, per, nodes, request, block)
            elif op == HIT:
                for i in range(operand):
                    block = np.int64(words[at + 1 + i])
                    identity = np.int64(-1)
                    if context >= 0:
                        identity = _identity(indptr, chains, context, i, per_block)
                        if identity >= 0:
                            holds[block] = state[C_EPOCH] << 32 | (identity + 1)
                        _add_block(state, per, nodes, context, block)
                    _event(state, inside, events, times, kinds, groups, HITS, context, block, identity, 0)
                if context >= 0:
                    per[Q_FILL, context] = 0
                    per[Q_FILLED, context] = operand
            elif op == FILL1 or op == FILL:
                many = 1 if op == FILL1 else np.int64(words[at + 1])
                for done in range(many):
                    node = per[Q_FILL, operand]
                    if node == 0 or per[Q_KNOWN, operand] != whole:
                        state[C_LOST] += many - done
                        break
                    block = np.int64(nodes[NODE_BLOCK, node])
                    identity = _identity(indptr, chains, operand, per[Q_FILLED, operand], per_block)
                    per[Q_FILLED, operand] += 1
                    per[Q_FILL, operand] = nodes[NODE_NEXT, node]
                    if identity >= 0:
                        holds[block] = state[C_EPOCH] << 32 | (identity + 1)
                    _event(state, inside, events, times, kinds, groups, FILLED, operand, block, identity, 0)
            elif op == FREE or op == PREEMPT:
                many = np.int64(words[at + 1]) if op == FREE else np.int64(words[at + 2])
                if op == PREEMPT:
                    preemptions[V_STEP, n_preemptions] = max(state[C_STEP] if inside else state[C_STEP] - 1, 0)
                    preemptions[V_REQUEST, n_preemptions] = operand
                    preemptions[V_BLOCKS, n_preemptions] = many
                    preemptions[V_TOKENS, n_preemptions] = np.int64(words[at + 1])
                    preempted_at[n_preemptions] = state[C_TIME]
                    n_preemptions += 1
                    preempted_now += 1
                    requests32[R_PREEMPTIONS, operand] += 1
                    _close(state, per, members, spans, requests32, operand)
                node = per[Q_TAIL, operand]
                if per[Q_KNOWN, operand] != whole:
                    node = 0
                rows = 0
                while node > 0:
                    block = np.int64(nodes[NODE_BLOCK, node])
                    old = _held(holds, state[C_EPOCH], block)
                    _event(state, inside, events, times, kinds, groups, FREED, operand, block, old, 0)
                    node = nodes[NODE_PREVIOUS, node]
                    rows += 1
                state[C_LOST] += abs(many - rows)
                per[Q_TAIL, operand] = 0
                per[Q_FILL, operand] = 0
                per[Q_FILLED, operand] = 0
            elif op == LOOKUP:
                context = operand
                # Whoever is admitted has no blocks yet: from here on its table is known from the start.
                per[Q_KNOWN, operand] = whole
                per[Q_TAIL, operand] = 0
                per[Q_FILL, operand] = 0
                per[Q_FILLED, operand] = 0
                per[Q_LOOKED, operand] = call + 1
                per[Q_ASKED, operand] = np.int64(words[at + 1])
                per[Q_FOUND, operand] = np.int64(words[at + 2])
            elif op == FINISH:
                _close(state, per, members, spans, requests32, operand)
                requests32[R_REASON, operand] = np.int64(words[at + 1])
                requests32[R_OUTPUT, operand] = np.int64(words[at + 2])
                requests32[R_FINISH_STEP, operand] = max(state[C_STEP] - 1, 0)
                requests64[R_FINISH_NS, operand] = state[C_TIME]
            elif op == BEGIN:
                state[C_TIME] += operand
                begun = state[C_TIME]
                inside = True
                context = np.int64(-1)
                n_owners = 0
                owner_at = 0
                probe = at + n
                while probe < stop:
                    ahead = words[probe] & np.uint32(15)
                    if ahead == SCHED:
                        _, k, _, _, first = sched_parts(words, probe)
                        if k > 0:
                            wide = (words[probe] >> np.uint32(4)) & np.uint32(SCHED_WIDE)
                            for i in range(k):
                                if wide:
                                    owners[n_owners] = words[first + i]
                                else:
                                    pair = words[first + 1 + i // 2]
                                    offset = pair >> np.uint32(16) if i & 1 else pair & np.uint32(0xFFFF)
                                    owners[n_owners] = words[first] + offset
                                if n_owners < max_owners:
                                    n_owners += 1
                        break
                    size = op_words(words, probe, stop)
                    if ahead == 15 and (words[probe] >> np.uint32(4)) & np.uint32(255) == X_OWN:
                        for i in range(size - 1):
                            owners[n_owners] = words[probe + 1 + i]
                            if n_owners < max_owners:
                                n_owners += 1
                    probe += size
            elif op == OUTPUT:
                state[C_TIME] += operand
                if outputs_due > 0:
                    outputs_due -= 1
                elif output_row < n_steps:
                    steps64[S_END, output_row] = state[C_TIME]
                    output_row += 1
            elif op == SCHED:
                call += 1
                flags = operand & 15
                entries, _, free, first, _ = sched_parts(words, at)
                if flags & SCHED_COUNTS:
                    running = np.int64(words[free + 1])
                    waiting = np.int64(words[free + 2])
                for i in range(entries):
                    r = np.int64(words[first + 3 * i])
                    tokens = np.int64(words[first + 3 * i + 1])
                    computed = np.int64(words[first + 3 * i + 2])
                    per[Q_STAMP, r] = call
                    if per[Q_PLACE, r] > 0:
                        length = state[C_STEP] - per[Q_START, r]
                        going_on = per[Q_COMPUTED, r] + length * per[Q_TOKENS, r]
                        if tokens != per[Q_TOKENS, r] or computed != going_on:
                            _close(state, per, members, spans, requests32, r)
                            _open(state, per, members, r, tokens, computed)
                    else:
                        _open(state, per, members, r, tokens, computed)
                        if per[Q_LOOKED, r] == call:
                            found = per[Q_FOUND, r]
                            if requests32[R_CACHED, r] < 0:
                                requests32[R_CACHED, r] = max(found - 1, 0)
                            if found > 0:
                                lookups[L_STEP, n_lookups] = state[C_STEP]
                                lookups[L_REQUEST, n_lookups] = r
                                lookups[L_ASKED, n_lookups] = per[Q_ASKED, r]
                                lookups[L_HIT, n_lookups] = found - 1
                                lookups[L_AFTER, n_lookups] = requests32[R_PREEMPTIONS, r] > 0
                                n_lookups += 1
                for i in range(n_special):
                    r = special[i]
                    if per[Q_PLACE, r] > 0 and per[Q_STAMP, r] != call and not flags & SCHED_FULL:
                        length = state[C_STEP] - per[Q_START, r]
                        computed = per[Q_COMPUTED, r] + length * per[Q_TOKENS, r]
                        _close(state, per, members, spans, requests32, r)
                        _open(state, per, members, r, 1, computed)
                if flags & SCHED_FULL:
                    i = state[C_SET] - 1
                    while i >= 0:
                        r = members[i]
                        if per[Q_STAMP, r] != call:
                            _close(state, per, members, spans, requests32, r)
                        i -= 1
                n_special = 0
                for i in range(entries):
                    r = np.int64(words[first + 3 * i])
                    if words[first + 3 * i + 1] != 1 and n_special < total:
                        special[n_special] = r
                        n_special += 1
                if state[C_SET] > 0:
                    steps32[S_STEP, n_steps] = state[C_STEP]
                    steps32[S_REQUESTS, n_steps] = state[C_SET]
                    steps32[S_TOKENS, n_steps] = state[C_TOKENS]
                    steps32[S_RUNNING, n_steps] = running
                    steps32[S_WAITING, n_steps] = waiting
                    steps32[S_FREE, n_steps] = np.int64(words[free])
                    steps32[S_PREEMPTED, n_steps] = preempted_now
                    steps32[S_EMPTY, n_steps] = empty
                    steps64[S_START, n_steps] = begun
                    n_steps += 1
                    state[C_STEP] += 1
                    empty = 0
                    preempted_now = 0
                else:
                    empty += 1
                inside = False
                context = np.int64(-1)
            elif op == KEY:
                requests = np.int64(words[at + 4])
                if resumed:
                    # What stood before the gap may be stale: believe only what the frame says, or what is seen from here on.
                    while state[C_SET] > 0:
                        _close(state, per, members, spans, requests32, members[state[C_SET] - 1])
                    state[C_TIME] = np.int64(words[at + 1]) | np.int64(words[at + 2]) << 32
                    state[C_STEP] = np.int64(words[at + 3])
                    running = np.int64(words[at + 7])
                    waiting = np.int64(words[at + 8])
                    outputs_due = np.int64(words[at + 9])
                    output_row = n_steps
                    n_special = 0
                    whole += 1
                    state[C_EPOCH] += 1
                    inside = False
                    empty = 0
                    for i in range(operand):
                        base = at + 1 + KEY_WORDS + 3 * i
                        r = np.int64(words[base])
                        if per[Q_PLACE, r] == 0:
                            _open(state, per, members, r, 1, np.int64(words[base + 1]) + np.int64(words[base + 2]))
                    resumed = False
            elif op == 15:
                code = operand & 255
                size = n - 1
                if code == X_TIME:
                    state[C_TIME] = np.int64(words[at + 1]) | np.int64(words[at + 2]) << 32
                elif code == X_REQ:
                    r = requests
                    requests += 1
                    requests64[R_ARRIVAL_NS, r] = np.int64(words[at + 1]) | np.int64(words[at + 2]) << 32
                    requests64[R_ARRIVAL_S, r] = np.int64(words[at + 3]) | np.int64(words[at + 4]) << 32
                    requests64[R_TENANT, r] = np.int64(words[at + 9]) | np.int64(words[at + 10]) << 32
                    requests32[R_PROMPT, r] = np.int64(words[at + 5])
                    requests32[R_MAX, r] = np.int64(words[at + 6])
                    requests32[R_PRIORITY, r] = np.int32(words[at + 7])
                    requests32[R_FLAGS, r] = np.int64(words[at + 8])
                    requests32[R_ARRIVAL_STEP, r] = state[C_STEP]
                    if words[at + 8] & np.uint32(2):
                        requests32[R_OUTPUT, r] = np.int64(words[at + 11])
                    m = np.int64(words[at + REQ_WORDS])
                    requests32[R_ID_BYTES, r] = m
                    requests64[R_ID_AT, r] = id_at
                    for i in range(m):
                        word = words[at + 1 + REQ_WORDS + i // 4]
                        id_bytes[id_at + i] = (word >> np.uint32(8 * (i & 3))) & np.uint32(255)
                    id_at += m
                elif code == X_IDS:
                    for _ in range(size // 2):
                        requests32[R_ARRIVAL_STEP, requests] = 0
                        requests32[R_PROMPT, requests] = 1
                        requests32[R_OUTPUT, requests] = 0
                        requests += 1
                elif code == X_RESET:
                    _event(state, inside, events, times, kinds, groups, RESET, -1, -1, -1, 0)
                    state[C_EPOCH] += 1
                elif code == X_EVICT:
                    for i in range(at + 1, at + n):
                        block = np.int64(words[i])
                        old = _held(holds, state[C_EPOCH], block)
                        _event(state, inside, events, times, kinds, groups, EVICTED, -1, block, old, 0)
                        holds[block] = 0
                elif code == X_SKIP:
                    output_row = min(output_row + np.int64(words[at + 1]), n_steps)
                elif code == X_LOST:
                    r = np.int64(words[at + 1])
                    preemptions[V_STEP, n_preemptions] = max(state[C_STEP] if inside else state[C_STEP] - 1, 0)
                    preemptions[V_REQUEST, n_preemptions] = r
                    preemptions[V_TOKENS, n_preemptions] = np.int64(words[at + 2])
                    preemptions[V_BLOCKS, n_preemptions] = np.int64(words[at + 3])
                    preempted_at[n_preemptions] = state[C_TIME]
                    n_preemptions += 1
                    preempted_now += 1
                    requests32[R_PREEMPTIONS, r] += 1
                    _close(state, per, members, spans, requests32, r)
                elif code == X_ALLOC or code == X_HIT or code == X_FREE or code == X_STORE or code == X_LOAD:
                    fixed = 6 if code == X_STORE or code == X_LOAD else 2
                    kind = FREED
                    if code == X_ALLOC:
                        kind = ALLOCATED
                    elif code == X_HIT:
                        kind = HITS
                    elif code == X_STORE:
                        kind = STORED
                    elif code == X_LOAD:
                        kind = LOADED
                    r = np.int64(words[at + 1])
                    r = r if r < requests else np.int64(-1)
                    group = np.int64(words[at + 2]) if fixed == 2 else np.int64(0)
                    group = group if group < 32768 else np.int64(-1)
                    for i in range(at + 1 + fixed, at + n):
                        block = np.int64(words[i])
                        old = _held(holds, state[C_EPOCH], block)
                        if code == X_ALLOC:
                            if old >= 0:
                                _event(state, inside, events, times, kinds, groups, EVICTED, r, block, old, group)
                            holds[block] = 0
                            old = np.int64(-1)
                        _event(state, inside, events, times, kinds, groups, kind, r, block, old, group)
                elif code == X_FILL:
                    r = np.int64(words[at + 1])
                    r = r if r < requests else np.int64(-1)
                    group = np.int64(words[at + 2])
                    group = group if group < 32768 else np.int64(-1)
                    for i in range((size - 2) // 3):
                        block = np.int64(words[at + 3 + 3 * i])
                        identity = np.int64(explicit_ids[explicit_at])
                        explicit_at += 1
                        holds[block] = state[C_EPOCH] << 32 | (identity + 1)
                        _event(state, inside, events, times, kinds, groups, FILLED, r, block, identity, group)
            at += n
    while state[C_SET] > 0:
        _close(state, per, members, spans, requests32, members[state[C_SET] - 1])
    counts = np.empty(7, np.int64)
    counts[N_STEPS] = n_steps
    counts[N_SPANS] = state[C_SPANS]
    counts[N_LOOKUPS] = n_lookups
    counts[N_PREEMPTIONS] = n_preemptions
    counts[N_EVENTS] = state[C_EVENTS]
    counts[N_LOST] = state[C_LOST]
    counts[N_EMPTY_AFTER] = empty
    return counts
