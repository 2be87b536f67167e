"""Follows a log up to a place, keeping what is alive there and nothing of what has ended. Compiled.

The decoder keeps arrays over all requests and identities; here there is a window over those requests that may still
be alive, and block tables that are given back. Identities are not looked up while following: a block remembers whose
chain it holds and where in it (``H_REQUEST``, ``H_AT``), or the identity itself where the log names it.

The free queue follows vLLM's rules as ``kvtrace_replay.pool`` states them; whether blocks without an identity go to
its front depends on the version and is told by the caller. Running requests queue in the order of their admission; a
preempted one goes back to the head of those that wait (``RequestQueue.prepend_request``).
"""

# ruff: noqa: I001, SIM102, SIM109 -- long lists of constants; chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.cut.blocks import (
    F_AT, F_BACK, F_BASE, F_BEGUN, F_CHOSEN_SET, F_COMMIT, F_FREED_BY, F_FREE_NODE, F_FRONT, F_INEXACT, F_KEPT, F_NODES,
    F_SCHEDS, H_NEXT, H_PREVIOUS, H_REFERENCES, H_REQUEST, NAMED, NOTHING, fill, give_back, hand_out, put, take,
)  # fmt: skip
from kvtrace_traces.played import (
    C_BEGUN, C_CALL, C_CONTEXT, C_DUE, C_EMPTY, C_INSIDE, C_OWNER_AT, C_OWNERS, C_PREEMPTED, C_REQUESTS, C_RUNNING,
    C_SET, C_SPECIAL, C_STEP, C_TIME, C_WAITING, NODE_BLOCK, NODE_NEXT, NODE_PREVIOUS, time_of,
)  # fmt: skip
from kvtrace_traces.scheduled import begin_call
from kvtrace_traces.schema import (
    KNOWN_GIVES, LIVE_BEGUN, LIVE_RUNNING, LIVE_SCHEDULED, LIVE_TABLE, MOVE_LOAD, REQUEST_FINISHED, SCHED_COUNTS,
    SCHED_FULL,
)  # fmt: skip
from kvtrace_traces.survey import (
    ALLOC, ALLOCN, BEGIN, CHAIN, FILL, FILL1, FINISH, FREE, HIT, KEY, KEY_WORDS, LOOKUP, OUTPUT, PREEMPT, SCHED,
    X_ALLOC, X_EVICT, X_FILL, X_FREE, X_HIT, X_IDS, X_INEXACT, X_KEPT, X_KNOWN, X_LIVE, X_LOST, X_MOVE, X_QUEUE,
    X_REQ, X_RESET, X_SKIP, X_START, X_TIME, op_words, sched_parts,
)  # fmt: skip

# Rows per request of the window: int32 and int64.
(W_STATUS, W_PLACE, W_TOKENS, W_STAMP, W_TAIL, W_FILL, W_FILLED, W_LENGTH, W_KNOWN, W_CACHED, W_PREEMPTIONS, W_FOUND,
 W_LOOKED, W_BEGUN, W_CHOSEN, W_LOST, WINDOW32) = range(17)  # fmt: skip
# W_MOST: most tokens it ever had computed, as far as its stretches of steps have ended: it gets a token whenever it has
# computed all that are known, so these tell how many are.
W_START, W_COMPUTED, W_ORDER, W_LOOKUP, W_REQ, W_CHAIN, W_MOST, W_TOKENS_LOST, W_MOST_LOST, WINDOW64 = range(10)
UNKNOWN, WAITING, RUNNING, GONE = range(4)
# What `follow` returns.
AT_END, AT_STEP, MORE_ROOM, AT_TIME = range(4)
NO_LIMIT = np.int64(1) << np.int64(62)


@njit
def _add(state, small, nodes, w, block):
    """Append ``block`` to the table of the request at ``w``."""
    n = state[F_FREE_NODE]
    if n > 0:
        state[F_FREE_NODE] = nodes[NODE_NEXT, n]
    else:
        n = state[F_NODES]
        state[F_NODES] = n + 1
    tail = small[W_TAIL, w]
    nodes[NODE_BLOCK, n] = block
    nodes[NODE_PREVIOUS, n] = tail
    nodes[NODE_NEXT, n] = 0
    if tail > 0:
        nodes[NODE_NEXT, tail] = n
    small[W_TAIL, w] = n
    small[W_LENGTH, w] += 1
    if small[W_FILL, w] == 0:
        small[W_FILL, w] = n


@njit
def _forget_table(state, small, nodes, w):
    node = small[W_TAIL, w]
    while node > 0:
        before = nodes[NODE_PREVIOUS, node]
        nodes[NODE_NEXT, node] = state[F_FREE_NODE]
        state[F_FREE_NODE] = node
        node = before
    small[W_TAIL, w] = 0
    small[W_LENGTH, w] = 0
    small[W_FILL, w] = 0
    small[W_FILLED, w] = 0


@njit
def _now(state, small, large, w):
    """Tokens that a member of the scheduled set has computed by now."""
    return large[W_COMPUTED, w] + (state[C_STEP] - large[W_START, w]) * small[W_TOKENS, w]


@njit
def _leave(state, small, large, members, w):
    place = small[W_PLACE, w] - 1
    if place < 0:
        return
    large[W_COMPUTED, w] = _now(state, small, large, w)
    large[W_MOST, w] = max(large[W_MOST, w], large[W_COMPUTED, w])
    last = members[state[C_SET] - 1]
    members[place] = last
    small[W_PLACE, last - state[F_BASE]] = place + 1
    small[W_PLACE, w] = 0
    state[C_SET] -= 1
    state[F_CHOSEN_SET] -= small[W_CHOSEN, w]


@njit
def _enter(state, small, large, members, r, tokens, computed):
    w = r - state[F_BASE]
    members[state[C_SET]] = r
    state[C_SET] += 1
    small[W_PLACE, w] = state[C_SET]
    small[W_TOKENS, w] = tokens
    large[W_START, w] = state[C_STEP]
    large[W_COMPUTED, w] = computed
    state[F_CHOSEN_SET] += small[W_CHOSEN, w]


@njit
def _arrive(state, small, large, r, position, status, chosen):
    w = r - state[F_BASE]
    small[:, w] = 0
    large[:, w] = 0
    small[W_STATUS, w] = status
    large[W_REQ, w] = position
    large[W_ORDER, w] = state[F_BACK]
    state[F_BACK] += 1
    i = np.searchsorted(chosen, r)
    small[W_CHOSEN, w] = i < len(chosen) and chosen[i] == r


@njit
def _admitted(state, small, large, w, loaded):
    """The request at ``w`` runs from now on, by its lookup in this call."""
    if small[W_STATUS, w] != RUNNING:
        small[W_STATUS, w] = RUNNING
        large[W_ORDER, w] = large[W_LOOKUP, w]
    if small[W_CACHED, w] == 0 and small[W_LOOKED, w] == state[C_CALL] + 1:
        small[W_CACHED, w] = max(small[W_FOUND, w] - 1, 0) + loaded + 1


@njit
def _preempted(state, small, large, members, w, tokens):
    _leave(state, small, large, members, w)
    large[W_COMPUTED, w] = 0
    small[W_LOST, w] = state[C_CALL] + 1
    large[W_TOKENS_LOST, w] = tokens
    large[W_MOST_LOST, w] = max(large[W_MOST_LOST, w], tokens)
    small[W_PREEMPTIONS, w] += 1
    small[W_STATUS, w] = WAITING
    large[W_ORDER, w] = state[F_FRONT]
    state[F_FRONT] -= 1
    state[C_PREEMPTED] += 1


@njit
def _end_call(words, at, state, small, large, members, special, made):
    base = state[F_BASE]
    call = state[C_CALL] + 1
    flags = np.int64(words[at] >> np.uint32(4)) & 15
    entries, _, free, first, _ = sched_parts(words, at)
    if flags & SCHED_COUNTS:
        state[C_RUNNING] = words[free + 1]
        state[C_WAITING] = words[free + 2]
    for i in range(entries):
        r = np.int64(words[first + 3 * i])
        w = r - base
        if w < 0:
            continue
        tokens, computed = np.int64(words[first + 3 * i + 1]), np.int64(words[first + 3 * i + 2])
        if small[W_PLACE, w] > 0:
            if small[W_STATUS, w] == WAITING and small[W_LOOKED, w] == call:  # such a victim, admitted at once
                _admitted(state, small, large, w, 0)
            if tokens != small[W_TOKENS, w] or computed != _now(state, small, large, w):
                _leave(state, small, large, members, w)
                _enter(state, small, large, members, r, tokens, computed)
        else:
            if small[W_LOST, w] == call:  # up to vLLM 0.11.0 a victim stays scheduled, and waits all the same
                large[W_MOST, w] = max(large[W_MOST, w], large[W_TOKENS_LOST, w] + tokens)
            else:
                _admitted(state, small, large, w, 0)
            _enter(state, small, large, members, r, tokens, computed)
        small[W_BEGUN, w] = 1
        small[W_STAMP, w] = call
    state[C_CALL] = call
    if flags & SCHED_FULL:
        i = state[C_SET] - 1
        while i >= 0:
            w = members[i] - base
            if small[W_STAMP, w] != call:
                _leave(state, small, large, members, w)
            i -= 1
    else:
        for i in range(state[C_SPECIAL]):
            w = special[i] - base
            if w >= 0 and small[W_PLACE, w] > 0 and small[W_STAMP, w] != call:
                computed = _now(state, small, large, w)
                _leave(state, small, large, members, w)
                _enter(state, small, large, members, special[i], 1, computed)
    n = 0
    for i in range(entries):
        if words[first + 3 * i + 1] != 1 and n < len(special):
            special[n] = words[first + 3 * i]
            n += 1
    state[C_SPECIAL] = n
    kind = 0
    if state[C_SET] > 0:
        state[C_STEP] += 1
        state[C_DUE] += 1
        state[C_PREEMPTED] = 0
        state[C_EMPTY] = 0
        kind = 1
        if state[F_CHOSEN_SET] > 0:
            state[F_KEPT] += 1
            kind = 3
    else:
        state[C_EMPTY] += 1
    if state[F_SCHEDS] < len(made):
        made[state[F_SCHEDS]] = kind
    state[F_SCHEDS] += 1
    state[C_INSIDE] = 0
    state[C_CONTEXT] = -1


@njit
def _tells_of_step(words, at, stop, state):
    """Whether the call whose operations begin at ``at`` makes a step, or has rows of the one to come.

    Others, which did nothing, count as empty calls of that step; what happens after them belongs to the step before.
    """
    while at < stop:
        n = op_words(words, at, stop)
        op = words[at] & np.uint32(15)
        operand = np.int64(words[at] >> np.uint32(4))
        if op == SCHED:
            entries, _, _, _, _ = sched_parts(words, at)
            return entries > 0 or (state[C_SET] > 0 and not operand & SCHED_FULL)
        if op == BEGIN:
            break
        quiet = op == LOOKUP or op == CHAIN or op == OUTPUT or op == FINISH
        if not quiet and (op != 15 or (operand & 255 != X_TIME and operand & 255 != X_REQ)):
            return True
        at += n
    return True


@njit
def follow(
    words, starts, stops, state, small, large, pool, nodes, members, special, owners, per_block, front, step_limit,
    time_limit, last_commit, chosen, made,
):  # fmt: skip
    """Go on from where ``state`` stands: to the BEGIN of the first call of step ``step_limit`` (AT_STEP); to the
    end of the first call of a step that began at ``time_limit`` or later (AT_TIME); to the end of the commits before
    ``last_commit`` (AT_END); or until the arrays need more room (MORE_ROOM).

    Args:
        state: int64[FOLLOW_SCALARS]. small, large: the window, int32[WINDOW32, n] and int64[WINDOW64, n]. pool:
            int64[BLOCK_ROWS, blocks]. nodes: int32[3, n]. members, special: int64, as long as the window. owners:
            uint32. All of them change.
        chosen: int64, ascending: requests whose presence in a step is told. made: uint8, one entry for each call, from
            number 0 of this run of ``follow``: bit 0 it made a step, bit 1 a chosen request is in it.
    """
    window = small.shape[1]
    while state[F_COMMIT] < last_commit:
        c = state[F_COMMIT]
        at, stop = max(starts[c], state[F_AT]), stops[c]
        if at == starts[c]:  # what it may need is bounded by its length
            size = stop - at
            if state[F_NODES] + size > nodes.shape[1] or state[C_REQUESTS] - state[F_BASE] + size > window:
                return MORE_ROOM
        while at < stop:
            n = op_words(words, at, stop)
            op = words[at] & np.uint32(15)
            operand = np.int64(words[at] >> np.uint32(4))
            w = operand - state[F_BASE]
            if op == BEGIN:
                if state[C_STEP] >= step_limit and _tells_of_step(words, at + n, stop, state):
                    state[F_AT] = at
                    return AT_STEP
                state[C_TIME] += operand
                begin_call(words, at + n, stop, state, owners)
            elif op == SCHED:
                _end_call(words, at, state, small, large, members, special, made)
                if state[C_SET] > 0 and state[C_BEGUN] >= time_limit:
                    state[F_AT] = at + n
                    return AT_TIME
            elif op == OUTPUT:
                state[C_TIME] += operand
                if state[C_DUE] > 0:
                    state[C_DUE] -= 1
            elif op == ALLOC or op == ALLOCN:
                request = state[C_CONTEXT]
                if request < 0 and state[C_INSIDE] and state[C_OWNER_AT] < state[C_OWNERS]:
                    request = np.int64(owners[state[C_OWNER_AT]])
                    state[C_OWNER_AT] += 1
                    if request >= state[C_REQUESTS]:
                        request = np.int64(-1)
                w = request - state[F_BASE]
                for i in range(np.int64(1) if op == ALLOC else operand):
                    block = operand if op == ALLOC else np.int64(words[at + 1 + i])
                    hand_out(state, pool, block)
                    if request >= 0 and w >= 0 and small[W_KNOWN, w]:
                        _add(state, small, nodes, w, block)
            elif op == HIT:
                context = state[C_CONTEXT]
                w = context - state[F_BASE]
                state[F_FREED_BY] = -1
                for i in range(operand):
                    block = np.int64(words[at + 1 + i])
                    take(pool, block)
                    pool[H_REFERENCES, block] += 1
                    if context >= 0 and w >= 0:
                        _add(state, small, nodes, w, block)
                        if pool[H_REQUEST, block] == NOTHING:  # cached before recording began
                            fill(state, pool, block, context, (i + 1) * per_block - 1, 0)
                if context >= 0 and w >= 0:
                    small[W_FILL, w] = 0
                    small[W_FILLED, w] = operand
            elif w < 0 and op != 15 and op != KEY:
                pass  # it ended, and what is told of it later finds nothing
            elif op == FILL1 or op == FILL:
                if op == FILL1:
                    large[W_CHAIN, w] += 1
                node = small[W_FILL, w]
                many = np.int64(1) if op == FILL1 else np.int64(words[at + 1])
                while many > 0 and node > 0:
                    position = (small[W_FILLED, w] + 1) * per_block - 1
                    fill(state, pool, np.int64(nodes[NODE_BLOCK, node]), operand, position, 0)
                    node = nodes[NODE_NEXT, node]
                    small[W_FILL, w] = node
                    small[W_FILLED, w] += 1
                    many -= 1
            elif op == CHAIN:
                large[W_CHAIN, w] += np.int64(words[at + 1])
            elif op == FREE or op == PREEMPT:
                if op == PREEMPT:
                    _preempted(state, small, large, members, w, np.int64(words[at + 1]))
                node = small[W_TAIL, w]
                while node > 0:
                    give_back(state, pool, operand, np.int64(nodes[NODE_BLOCK, node]), front)
                    node = nodes[NODE_PREVIOUS, node]
                _forget_table(state, small, nodes, w)
            elif op == LOOKUP:
                state[C_CONTEXT] = operand
                _forget_table(state, small, nodes, w)
                small[W_KNOWN, w] = 1
                small[W_LOOKED, w] = state[C_CALL] + 1
                small[W_FOUND, w] = np.int64(words[at + 2])
                large[W_LOOKUP, w] = state[F_BACK]
                state[F_BACK] += 1
            elif op == FINISH:
                _leave(state, small, large, members, w)
                small[W_STATUS, w] = GONE
            elif op == KEY:
                _key(words, at, state, small, large, members, chosen)
            elif op == 15:
                _extended(words, at, n, operand & 255, state, small, large, pool, nodes, members, front, chosen)
            at += n
        state[F_COMMIT] = c + 1
        state[F_AT] = 0
    return AT_END


@njit
def _key(words, at, state, small, large, members, chosen):
    """The first frame sets the state; later ones repeat what is known."""
    if state[F_BEGUN]:
        return
    state[F_BEGUN] = 1
    state[C_TIME] = time_of(words, at + 1)
    state[C_STEP] = words[at + 3]
    state[C_REQUESTS] = words[at + 4]
    state[C_RUNNING] = words[at + 7]
    state[C_WAITING] = words[at + 8]
    state[C_DUE] = words[at + 9]
    for i in range(np.int64(words[at] >> np.uint32(4))):
        base = at + 1 + KEY_WORDS + 3 * i
        r = np.int64(words[base])
        if r < state[C_REQUESTS] and r >= state[F_BASE] and small[W_PLACE, r - state[F_BASE]] == 0:
            _arrive(state, small, large, r, -1, RUNNING, chosen)
            small[W_BEGUN, r - state[F_BASE]] = 1
            _enter(state, small, large, members, r, 1, np.int64(words[base + 1]) + np.int64(words[base + 2]))


@njit
def _extended(words, at, n, code, state, small, large, pool, nodes, members, front, chosen):
    base = state[F_BASE]
    if code == X_REQ:
        r = state[C_REQUESTS]
        ended = words[at + 8] & np.uint32(REQUEST_FINISHED)
        _arrive(state, small, large, r, at, GONE if ended else WAITING, chosen)
        state[C_REQUESTS] = r + 1
    elif code == X_IDS:
        for r in range(state[C_REQUESTS], state[C_REQUESTS] + (n - 1) // 2):
            _arrive(state, small, large, r, at, GONE, chosen)
        state[C_REQUESTS] += (n - 1) // 2
    elif code == X_TIME:
        state[C_TIME] = time_of(words, at + 1)
    elif code == X_RESET:
        pool[H_REQUEST, :] = NOTHING
        state[F_FREED_BY] = -1
    elif code == X_EVICT:
        for i in range(at + 1, at + n):
            pool[H_REQUEST, np.int64(words[i])] = NOTHING
        state[F_FREED_BY] = -1
    elif code == X_SKIP:
        state[C_DUE] = max(0, state[C_DUE] - np.int64(words[at + 1]))
    elif code == X_INEXACT:
        state[F_INEXACT] |= np.int64(1) << np.int64(words[at + 1])
    elif code == X_LOST:
        w = np.int64(words[at + 1]) - base
        if w >= 0:
            _preempted(state, small, large, members, w, np.int64(words[at + 2]))
    elif code == X_ALLOC:
        for i in range(at + 3, at + n):
            hand_out(state, pool, np.int64(words[i]))
    elif code == X_HIT:
        for i in range(at + 3, at + n):
            block = np.int64(words[i])
            state[F_FREED_BY] = -1
            take(pool, block)
            pool[H_REFERENCES, block] += 1
    elif code == X_FREE:
        for i in range(at + 3, at + n):
            give_back(state, pool, np.int64(words[at + 1]), np.int64(words[i]), front)
    elif code == X_FILL:
        for i in range((n - 3) // 3):
            fill(state, pool, np.int64(words[at + 3 + 3 * i]), NAMED, time_of(words, at + 4 + 3 * i), 0)
    elif code == X_MOVE:
        w = np.int64(words[at + 2]) - base
        if (words[at + 3] & np.uint32(255)) == np.uint32(MOVE_LOAD) and 0 <= w < state[C_REQUESTS] - base:
            if small[W_LOOKED, w] == state[C_CALL] + 1:
                _admitted(state, small, large, w, np.int64(words[at + 4]))
    elif code == X_START:
        state[C_PREEMPTED] = np.int64(words[at + 1])
        state[C_EMPTY] = np.int64(words[at + 2])
        while pool[H_NEXT, 0]:
            take(pool, pool[H_NEXT, 0])
    elif code == X_QUEUE:
        for i in range(at + 1, at + n):
            put(pool, np.int64(words[i]), pool[H_PREVIOUS, 0])
    elif code == X_KEPT:
        for i in range(at + 1, at + n, 5):
            fill(state, pool, np.int64(words[i]), NAMED, time_of(words, i + 1), time_of(words, i + 3))
    elif code == X_LIVE:
        _live(words, at, n, state, small, large, pool, nodes, members)
    elif code == X_KNOWN:
        for i in range(at + 1, at + n, 5):
            large[W_MOST_LOST, np.int64(words[i]) - base] = np.int64(words[i + 4])
            due = words[i + 2] > np.uint32(0) and words[i + 3] & np.uint32(KNOWN_GIVES)
            large[W_MOST, np.int64(words[i]) - base] = np.int64(words[i + 1]) - 1 + (1 if due else 0)


@njit
def _live(words, at, n, state, small, large, pool, nodes, members):
    r = np.int64(words[at + 1])
    w = r - state[F_BASE]
    flags = words[at + 2]
    if flags & np.uint32(LIVE_SCHEDULED):
        _enter(state, small, large, members, r, 1, np.int64(words[at + 3]))
    else:
        large[W_COMPUTED, w] = np.int64(words[at + 3])
    small[W_STATUS, w] = RUNNING if flags & np.uint32(LIVE_RUNNING) else WAITING
    small[W_BEGUN, w] = 1 if flags & np.uint32(LIVE_BEGUN) else 0
    small[W_KNOWN, w] = 1 if flags & np.uint32(LIVE_TABLE) else 0
    small[W_CACHED, w] = words[at + 4]
    small[W_PREEMPTIONS, w] = words[at + 5]
    large[W_ORDER, w] = state[F_BACK]
    state[F_BACK] += 1
    for i in range(at + 7, at + n):
        block = np.int64(words[i])
        pool[H_REFERENCES, block] += 1
        _add(state, small, nodes, w, block)
    filled = np.int64(words[at + 6])
    small[W_FILLED, w] = filled
    node = small[W_TAIL, w]
    small[W_FILL, w] = 0
    for _ in range(n - 7 - filled):
        small[W_FILL, w] = node
        node = nodes[NODE_PREVIOUS, node]
