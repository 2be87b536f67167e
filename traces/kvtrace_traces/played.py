"""State of the decoder's last pass, and the steps of it that all operations share. Compiled; see ``events``."""

# ruff: noqa: I001 -- long lists of constants
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.rows import (
    E_BLOCK, E_IDENTITY, E_REQUEST, E_STEP, P_COMPUTED, P_FIRST, P_REQUEST, P_STEPS, P_TOKENS, R_FIRST, R_LAST,
    R_PREEMPTIONS, V_BLOCKS, V_REQUEST, V_STEP, V_TOKENS,
)  # fmt: skip

# Scalars, in one array so that helpers can change them. The first seven are what the pass returns.
(C_STEPS, C_SPANS, C_LOOKUPS, C_PREEMPTIONS, C_EVENTS, C_LOST, C_EMPTY, C_TIME, C_STEP, C_TOKENS, C_SET, C_NODES,
 C_EPOCH, C_WHOLE, C_INSIDE, C_CALL, C_BEGUN, C_RUNNING, C_WAITING, C_SPECIAL, C_PREEMPTED, C_REQUESTS, C_OUTPUT,
 C_DUE, C_ID_AT, C_EXPLICIT_AT, C_CONTEXT, C_OWNERS, C_OWNER_AT, C_TYPES, C_MOVES, C_SPARE, C_COMMIT, C_AT, C_RESUMED,
 C_WANTED, SCALARS) = range(37)  # fmt: skip
# Per request: membership of the scheduled set, its open span, its block table, when that was last known whole, and
# its last lookup.
(Q_PLACE, Q_START, Q_TOKENS, Q_COMPUTED, Q_STAMP, Q_TAIL, Q_HELD, Q_FILL, Q_FILLED, Q_KNOWN, Q_LOOKED, Q_ASKED, Q_FOUND,
 PER_REQUEST) = range(14)  # fmt: skip
# Nodes of the block tables, which are linked lists; node 0 means none.
NODE_BLOCK, NODE_PREVIOUS, NODE_NEXT = range(3)


@njit
def time_of(words, at):
    """The u64 at ``words[at]`` as an int64."""
    return np.int64(words[at]) | np.int64(words[at + 1]) << 32


@njit
def now_step(state):
    """The step that what happens now belongs to: the one of the call under way, else the last one begun."""
    return max(state[C_STEP] if state[C_INSIDE] else state[C_STEP] - 1, 0)


@njit
def leave(state, per, members, spans, requests32, r):
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
    if requests32[R_FIRST, r] == -1:  # else it began here, or before the trace (`carried`)
        requests32[R_FIRST, r] = per[Q_START, r]
    requests32[R_LAST, r] = state[C_STEP] - 1


@njit
def enter(state, per, members, r, tokens, computed):
    """Put request ``r`` into the scheduled set from the next step on."""
    members[state[C_SET]] = r
    state[C_SET] += 1
    per[Q_PLACE, r] = state[C_SET]
    per[Q_START, r] = state[C_STEP]
    per[Q_TOKENS, r] = tokens
    per[Q_COMPUTED, r] = computed
    state[C_TOKENS] += tokens


@njit
def going_on(state, per, r):
    """Tokens that ``r``, a member of the scheduled set, has computed by now."""
    return per[Q_COMPUTED, r] + (state[C_STEP] - per[Q_START, r]) * per[Q_TOKENS, r]


@njit
def preempt(state, per, members, spans, requests32, preemptions, preempted_at, r, tokens, blocks):
    """Write the row of a preemption, and take ``r`` out of the scheduled set."""
    n = state[C_PREEMPTIONS]
    preemptions[V_STEP, n] = now_step(state)
    preemptions[V_REQUEST, n] = r
    preemptions[V_BLOCKS, n] = blocks
    preemptions[V_TOKENS, n] = tokens
    preempted_at[n] = state[C_TIME]
    state[C_PREEMPTIONS] = n + 1
    state[C_PREEMPTED] += 1
    requests32[R_PREEMPTIONS, r] += 1
    leave(state, per, members, spans, requests32, r)


@njit
def event(state, events, times, kinds, groups, kind, request, block, identity, group):
    """Write the row of a block event. (Four arrays, not the tuple of all: to take one out of it costs a reference.)"""
    n = state[C_EVENTS]
    row(events, times, kinds, groups, n, now_step(state), state[C_TIME], kind, request, block, identity, group)
    state[C_EVENTS] = n + 1


@njit
def row(events, times, kinds, groups, n, step, time, kind, request, block, identity, group):
    """As :func:`event`, for loops that keep count, step and time themselves."""
    events[E_STEP, n] = step
    events[E_REQUEST, n] = request
    events[E_BLOCK, n] = block
    events[E_IDENTITY, n] = identity
    times[n] = time
    kinds[n] = kind
    groups[n] = group


@njit
def held(holds, epoch, block):
    """The identity that ``block`` is known to hold, -1 for none. ``holds``: epoch * 2^32 + identity + 1."""
    value = holds[block]
    if value >> 32 != epoch:
        return np.int64(-1)
    return (value & 0xFFFFFFFF) - 1


@njit
def identity_of(indptr, chains, r, block, per_block):
    """The identity of block number ``block`` of request ``r``, -1 where its chain does not reach so far."""
    at = indptr[r] + (block + 1) * per_block - 1
    if at < indptr[r + 1]:
        return np.int64(chains[at])
    return np.int64(-1)


@njit
def add_block(state, per, nodes, r, block):
    """Append ``block`` to the table of request ``r``, in a node that was never used: one behind the last such one."""
    n = state[C_NODES]
    state[C_NODES] = n + 1
    _append(per, nodes, r, block, n)


@njit
def hold_block(state, per, nodes, r, block):
    """Append ``block`` to the table of request ``r``, in a node that was given back if there is one: so the nodes in
    use stay few, and near."""
    n = state[C_SPARE]
    if n > 0:
        state[C_SPARE] = nodes[NODE_NEXT, n]
    else:
        n = state[C_NODES]
        state[C_NODES] = n + 1
    _append(per, nodes, r, block, n)


@njit
def _append(per, nodes, r, block, n):
    tail = per[Q_TAIL, r]
    nodes[NODE_BLOCK, n] = block
    nodes[NODE_PREVIOUS, n] = tail
    nodes[NODE_NEXT, n] = 0
    if tail > 0:
        nodes[NODE_NEXT, tail] = n
    per[Q_TAIL, r] = n
    per[Q_HELD, r] += 1
    if per[Q_FILL, r] == 0:
        per[Q_FILL, r] = n


@njit
def drop_table(state, per, nodes, r, first):
    """Forget the block table of request ``r`` and give its nodes back, of which ``first`` is the first, 0 for none."""
    tail = per[Q_TAIL, r]
    if first > 0:
        nodes[NODE_NEXT, tail] = state[C_SPARE]
        state[C_SPARE] = first
    per[Q_TAIL, r] = 0
    per[Q_HELD, r] = 0
    per[Q_FILL, r] = 0
    per[Q_FILLED, r] = 0
