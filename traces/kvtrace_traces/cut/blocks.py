"""Blocks while a log is followed: who holds them, what they hold, and the free queue. Compiled; see ``follow``."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_traces.compile import njit
from kvtrace_traces.played import SCALARS

# Scalars behind those of the decoder.
(F_BASE, F_NODES, F_FREE_NODE, F_FILLS, F_BACK, F_FRONT, F_INEXACT, F_FREED_BY, F_FREED_BEHIND, F_COMMIT, F_AT, F_KEPT,
 F_SCHEDS, F_CHOSEN_SET, F_BEGUN, FOLLOW_SCALARS) = range(SCALARS, SCALARS + 16)  # fmt: skip
# Rows per block: int64.
H_REQUEST, H_AT, H_PARENT, H_FILLED, H_REFERENCES, H_NEXT, H_PREVIOUS, H_QUEUED, BLOCK_ROWS = range(9)
NOTHING, NAMED = -1, -2  # H_REQUEST: nothing is held; the identity itself is in H_AT


@njit
def start_queue(pool):
    """All blocks but the null block are free, in order."""
    for block in range(1, pool.shape[1]):
        put(pool, block, pool[H_PREVIOUS, 0])


@njit
def put(pool, block, before):
    """Put ``block`` into the free queue behind ``before`` (0: to the front)."""
    after = pool[H_NEXT, before]
    pool[H_NEXT, before] = block
    pool[H_PREVIOUS, block] = before
    pool[H_NEXT, block] = after
    pool[H_PREVIOUS, after] = block
    pool[H_QUEUED, block] = 1


@njit
def take(pool, block):
    """Take ``block`` off the free queue, if it is there."""
    if not pool[H_QUEUED, block]:
        return
    before, after = pool[H_PREVIOUS, block], pool[H_NEXT, block]
    pool[H_NEXT, before] = after
    pool[H_PREVIOUS, after] = before
    pool[H_QUEUED, block] = 0


@njit
def hand_out(state, pool, block):
    state[F_FREED_BY] = -1
    pool[H_REQUEST, block] = NOTHING
    pool[H_REFERENCES, block] = 1
    take(pool, block)


@njit
def give_back(state, pool, request, block, front):
    """``request`` gives up ``block``; of one stretch of frees the blocks without identity keep their order in front."""
    if state[F_FREED_BY] != request:
        state[F_FREED_BY] = request
        state[F_FREED_BEHIND] = 0
    if pool[H_REFERENCES, block] <= 0:
        return
    pool[H_REFERENCES, block] -= 1
    if pool[H_REFERENCES, block] > 0 or pool[H_QUEUED, block]:
        return
    if front and pool[H_REQUEST, block] == NOTHING:
        put(pool, block, state[F_FREED_BEHIND])
        state[F_FREED_BEHIND] = block
    else:
        put(pool, block, pool[H_PREVIOUS, 0])


@njit
def fill(state, pool, block, request, at, parent):
    state[F_FREED_BY] = -1
    pool[H_REQUEST, block] = request
    pool[H_AT, block] = at
    pool[H_PARENT, block] = parent
    pool[H_FILLED, block] = state[F_FILLS]
    state[F_FILLS] += 1
