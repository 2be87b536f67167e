"""Last pass of the decoder: plays the operations and writes the rows of every table. Compiled.

It follows the block table of each request, so that fills and frees get their block numbers, and the identity each
block holds, so that evictions are seen: a block that holds one and is handed out was evicted. Where a part of the log
is missing nothing is believed until it is seen again: rows that would need it are counted in ``C_LOST``, not guessed.

Here are the operations of a running engine; ``scheduled`` has what a scheduler call is about, ``rare`` the others,
``played`` what they share, and ``rows`` the arrays they write.
"""

# ruff: noqa: I001, SIM109 -- long lists of constants; chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.carried import carry
from kvtrace_traces.compile import njit
from kvtrace_traces.played import (
    C_AT, C_CALL, C_COMMIT, C_CONTEXT, C_DUE, C_EMPTY, C_EPOCH, C_EVENTS, C_INSIDE, C_LOOKUPS, C_LOST, C_MOVES, C_NODES,
    C_OUTPUT, C_OWNER_AT, C_OWNERS, C_PREEMPTIONS, C_REQUESTS, C_RESUMED, C_SET, C_SPANS, C_STEPS, C_TIME, C_WANTED,
    C_WHOLE, NODE_BLOCK, NODE_NEXT, NODE_PREVIOUS, Q_ASKED, Q_FILL, Q_FILLED, Q_FOUND, Q_HELD, Q_KNOWN, Q_LOOKED,
    Q_TAIL, SCALARS, drop_table, held, hold_block, identity_of, leave, now_step, preempt, row,
)  # fmt: skip
from kvtrace_traces.rare import arrive, extended, resume
from kvtrace_traces.rows import (
    ALLOCATED, EVICTED, FILLED, FREED, HITS, R_FINISH_EMPTY, R_FINISH_NS, R_FINISH_STEP, R_OUTPUT, R_REASON, S_END,
)  # fmt: skip
from kvtrace_traces.scheduled import begin_call, end_call
from kvtrace_traces.survey import (
    ALLOC, ALLOCN, BEGIN, FILL, FILL1, FINISH, FREE, HIT, KEY, LOOKUP, OUTPUT, PREEMPT, SCHED, X_REQ, op_words,
)  # fmt: skip

#: Where the counts stand that :func:`play` returns.
N_STEPS, N_SPANS, N_LOOKUPS, N_PREEMPTIONS = C_STEPS, C_SPANS, C_LOOKUPS, C_PREEMPTIONS
N_EVENTS, N_LOST, N_EMPTY_AFTER, N_MOVES = C_EVENTS, C_LOST, C_EMPTY, C_MOVES


@njit
def new_state():
    """The state before the first commit, int64[SCALARS]."""
    state = np.zeros(SCALARS, np.int64)
    state[C_EPOCH] = 1
    state[C_WHOLE] = 1  # tables are known whole of requests looked up since the last gap
    state[C_NODES] = 1
    state[C_CONTEXT] = -1
    state[C_AT] = -1
    state[C_RESUMED] = 1  # the first frame sets the state, as one after a gap does
    return state


@njit
def play(
    words, starts, stops, gaps, use, indptr, chains, per_block, explicit_ids, state, per, members, special, owners,
    holds, nodes, out,
):  # fmt: skip
    """Decode the commits marked in ``use``, from where ``state`` stands until the rows of block events are full.

    Writes the arrays of ``out`` (:class:`rows.Rows`), those of block events from their begin, and counts the rows in
    ``state`` at ``N_*``. Returns whether the log is at its end; where it is not, and no event was written, the next
    operation needs room for ``C_WANTED`` of them.

    ``explicit_ids``: dense identities of FILLX in log order, as ``gather`` met them. Scratch: ``per``
    int32[PER_REQUEST, requests], ``holds`` int64[blocks], both zero at first; ``members`` and ``special``
    int32[requests]; ``owners`` uint32, one more than a commit names; ``nodes`` int32[3, references + 1].
    """
    events, times, kinds, groups = out.events, out.times, out.kinds, out.groups
    requests32, requests64, spans = out.requests32, out.requests64, out.spans
    steps32, steps64, lookups = out.steps32, out.steps64, out.lookups
    preemptions, preempted_at, id_bytes = out.preemptions, out.preempted_at, out.id_bytes
    room = len(times)
    state[C_EVENTS] = 0
    for c in range(state[C_COMMIT], len(starts)):
        at, stop = starts[c], stops[c]
        if state[C_AT] >= 0:  # within a commit
            at = state[C_AT]
            state[C_AT] = -1
        else:
            if gaps[c] or not use[c]:
                state[C_RESUMED] = 1
            if not use[c]:
                continue
        while at < stop:
            n = op_words(words, at, stop)
            op = words[at] & np.uint32(15)
            operand = np.int64(words[at] >> np.uint32(4))
            most = 2 * n  # rows of block events: a block that is handed out may evict what it held
            if op == FREE or op == FILL or op == PREEMPT:
                most += per[Q_HELD, operand]
            if state[C_EVENTS] + most > room:
                state[C_COMMIT] = c
                state[C_AT] = at
                state[C_WANTED] = most
                return False
            if op == ALLOC or op == ALLOCN:
                request = state[C_CONTEXT]
                if request < 0 and state[C_INSIDE] and state[C_OWNER_AT] < state[C_OWNERS]:
                    request = np.int64(owners[state[C_OWNER_AT]])
                    state[C_OWNER_AT] += 1
                    if request >= state[C_REQUESTS]:
                        request = np.int64(-1)
                follow = request >= 0 and per[Q_KNOWN, request] == state[C_WHOLE]
                e, step, time, epoch = state[C_EVENTS], now_step(state), state[C_TIME], state[C_EPOCH]
                for i in range(np.int64(1) if op == ALLOC else operand):
                    block = operand if op == ALLOC else np.int64(words[at + 1 + i])
                    old = held(holds, epoch, block)
                    if old >= 0:
                        row(events, times, kinds, groups, e, step, time, EVICTED, request, block, old, 0)
                        e += 1
                        holds[block] = 0
                    row(events, times, kinds, groups, e, step, time, ALLOCATED, request, block, -1, 0)
                    e += 1
                    if follow:
                        hold_block(state, per, nodes, request, block)
                state[C_EVENTS] = e
            elif op == HIT:
                context = state[C_CONTEXT]
                e, step, time, epoch = state[C_EVENTS], now_step(state), state[C_TIME], state[C_EPOCH]
                for i in range(operand):
                    block = np.int64(words[at + 1 + i])
                    identity = np.int64(-1)
                    if context >= 0:
                        identity = identity_of(indptr, chains, context, i, per_block)
                        if identity >= 0:
                            holds[block] = epoch << 32 | (identity + 1)
                        hold_block(state, per, nodes, context, block)
                    row(events, times, kinds, groups, e, step, time, HITS, context, block, identity, 0)
                    e += 1
                state[C_EVENTS] = e
                if context >= 0:
                    per[Q_FILL, context] = 0
                    per[Q_FILLED, context] = operand
            elif op == FILL1 or op == FILL:
                _fill(words, at, state, per, nodes, holds, indptr, chains, per_block, events, times, kinds, groups)
            elif op == FREE or op == PREEMPT:
                many = np.int64(words[at + 1]) if op == FREE else np.int64(words[at + 2])
                if op == PREEMPT:
                    tokens = np.int64(words[at + 1])
                    preempt(state, per, members, spans, requests32, preemptions, preempted_at, operand, tokens, many)
                _free(state, per, nodes, holds, operand, many, events, times, kinds, groups)
            elif op == LOOKUP:
                state[C_CONTEXT] = operand
                # Whoever is admitted has no blocks yet: from here on its table is known from the start.
                per[Q_KNOWN, operand] = state[C_WHOLE]
                per[Q_TAIL, operand] = 0
                per[Q_HELD, operand] = 0
                per[Q_FILL, operand] = 0
                per[Q_FILLED, operand] = 0
                per[Q_LOOKED, operand] = state[C_CALL] + 1
                per[Q_ASKED, operand] = np.int64(words[at + 1])
                per[Q_FOUND, operand] = np.int64(words[at + 2])
            elif op == FINISH:
                leave(state, per, members, spans, requests32, operand)
                requests32[R_REASON, operand] = np.int64(words[at + 1])
                requests32[R_OUTPUT, operand] = np.int64(words[at + 2])
                requests32[R_FINISH_STEP, operand] = now_step(state)
                requests32[R_FINISH_EMPTY, operand] = 0 if state[C_INSIDE] else state[C_EMPTY]
                requests64[R_FINISH_NS, operand] = state[C_TIME]
            elif op == BEGIN:
                state[C_TIME] += operand
                begin_call(words, at + n, stop, state, owners)
            elif op == OUTPUT:
                state[C_TIME] += operand
                if state[C_DUE] > 0:
                    state[C_DUE] -= 1
                elif state[C_OUTPUT] < state[C_STEPS]:
                    steps64[S_END, state[C_OUTPUT]] = state[C_TIME]
                    state[C_OUTPUT] += 1
            elif op == SCHED:
                end_call(words, at, state, per, members, special, spans, requests32, steps32, steps64, lookups)
            elif op == KEY:
                state[C_REQUESTS] = words[at + 4]
                if state[C_RESUMED]:
                    resume(words, at, state, per, members, spans, requests32)
                    state[C_RESUMED] = 0
            elif op == 15 and operand & 255 == X_REQ:
                arrive(words, at, state, requests32, requests64, id_bytes)
            elif op == 15 and carry(
                words, at, n, operand & 255, state, per, members, nodes, holds, explicit_ids, requests32
            ):
                pass
            elif op == 15:
                extended(words, at, n, state, per, members, holds, explicit_ids, indptr, chains, per_block, out)
            at += n
    while state[C_SET] > 0:
        leave(state, per, members, spans, requests32, np.int64(members[state[C_SET] - 1]))
    state[C_COMMIT] = len(starts)
    return True


@njit
def _fill(words, at, state, per, nodes, holds, indptr, chains, per_block, events, times, kinds, groups):
    op, r = words[at] & np.uint32(15), np.int64(words[at] >> np.uint32(4))
    many = np.int64(1) if op == FILL1 else np.int64(words[at + 1])
    e, step, time, epoch = state[C_EVENTS], now_step(state), state[C_TIME], state[C_EPOCH]
    node = per[Q_FILL, r] if per[Q_KNOWN, r] == state[C_WHOLE] else np.int32(0)
    filled = per[Q_FILLED, r]
    done = 0
    while done < many and node > 0:
        block = np.int64(nodes[NODE_BLOCK, node])
        identity = identity_of(indptr, chains, r, filled + done, per_block)
        done += 1
        node = nodes[NODE_NEXT, node]
        if identity >= 0:
            holds[block] = epoch << 32 | (identity + 1)
        row(events, times, kinds, groups, e, step, time, FILLED, r, block, identity, 0)
        e += 1
    state[C_EVENTS] = e
    if done:
        per[Q_FILL, r] = node
        per[Q_FILLED, r] = filled + done
    state[C_LOST] += many - done


@njit
def _free(state, per, nodes, holds, r, many, events, times, kinds, groups):
    """Request ``r`` gives up its blocks, ``many`` as the log has it, last first."""
    node = per[Q_TAIL, r] if per[Q_KNOWN, r] == state[C_WHOLE] else np.int32(0)
    e, step, time, epoch = state[C_EVENTS], now_step(state), state[C_TIME], state[C_EPOCH]
    rows, first = 0, np.int32(0)
    while node > 0:
        first = node
        block = np.int64(nodes[NODE_BLOCK, node])
        row(events, times, kinds, groups, e, step, time, FREED, r, block, held(holds, epoch, block), 0)
        e += 1
        node = nodes[NODE_PREVIOUS, node]
        rows += 1
    state[C_EVENTS] = e
    state[C_LOST] += abs(many - rows)
    drop_table(state, per, nodes, r, first)
