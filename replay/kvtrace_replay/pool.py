"""Rebuilds the engine's block pool from block events: references, identities, block tables and the free queue.

The rules are vLLM's (``v1/core/block_pool.py`` and ``FreeKVCacheBlockQueue`` of 0.32.0): block 0 is the null block; an
allocation pops the front of the free queue; a request gives its blocks back last first, of which those without an
identity go to the front in this order, those with one to the back (older versions differ: see
:func:`uncached_first`); of several blocks with one identity a lookup gets the one cached first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_replay.schedulers.families import rules_of
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.schema import BLOCK_EVENT_KINDS
from kvtrace_traces.snapshot import Snapshot

ALLOCATE, HIT, FILL, FREE, EVICT, RESET, STORE, LOAD = range(len(BLOCK_EVENT_KINDS))

#: What is checked while events are followed, and which rule a mismatch breaks.
CHECKS = (
    ("free queue order", "every allocated block was at the front of the free queue"),
    ("reference counts", "blocks are handed out free, and hit or given up only while someone can hold them"),
    ("evictions", "a block that held an identity, and no other, was evicted when handed out"),
    ("hits", "every hit block held the identity looked up, and was the first cached with it"),
    ("longest hit", "every admitted request was looked up, and got the longest cached prefix"),
    ("fills", "blocks became cached in order, by a request that held them, with the identity of its chain"),
    ("frees", "a request gave up its own blocks, all of them, last first, with the identities they held"),
)
(C_ORDER, C_REFERENCES, C_EVICTIONS, C_HITS, C_LONGEST, C_FILLS, C_FREES) = range(len(CHECKS))


class PoolState(NamedTuple):
    """A block pool at one moment.

    ``references`` int32[blocks]; ``identities`` int32[blocks], -1 for none; ``free`` int32, the free queue from its
    front; ``tables``: request number -> its blocks in order. The null block (0) is never in ``free``.
    """

    references: NDArray[np.int32]
    identities: NDArray[np.int32]
    free: NDArray[np.int32]
    tables: dict[int, list[int]]


class Followed(NamedTuple):
    """``state`` after the last event; ``mismatches`` int64, one per ``CHECKS``; ``first`` int64, the row of the first
    of each, -1 for none; ``free_counts`` int64: length of the free queue before each row of ``at``."""

    state: PoolState
    mismatches: NDArray[np.int64]
    first: NDArray[np.int64]
    free_counts: NDArray[np.int64]


def uncached_first(header: dict[str, Any]) -> bool | None:
    """Whether blocks without an identity go to the front of the free queue in this engine; None if not known.

    The rule is that of `schedulers.families`, at the engine's own prefix caching.
    """
    try:
        rules = rules_of(str(header.get("engine_version")))
    except ValueError:
        return None
    return rules.uncached_first if header.get("prefix_caching") else rules.uncached_first_without_caching


def follow(trace: Any, engine_index: int | None = None, upto: int | None = None, at: Any = None) -> Followed:
    """Follow the block events of one engine of ``trace`` (the first ``upto`` of them; default all).

    ``at``: int64, ascending rows at which to note the length of the free queue. Raises :class:`KvtraceError` for a
    trace without block events of a single pool (imports).
    """
    header = (
        trace.header if engine_index is None else next(e for e in trace.engines if e["engine_index"] == engine_index)
    )
    if header.get("source") == "import":
        raise KvtraceError("an imported trace has no block events: there is no pool to rebuild")
    index = int(header["engine_index"])
    events = trace.block_events
    lookups = trace.lookups
    if len(trace.engines) > 1:
        events = events.filter(events["engine_index"] == index)
        lookups = lookups.filter(lookups["engine_index"] == index)
    if upto is not None:
        events = events.head(upto)
    chains = trace.chains(index)
    total = len(chains.indptr) - 1
    blocks = int(header["num_blocks"])
    kinds = events["kind"].to_physical().to_numpy().astype(np.uint8)
    state, mismatches, first = np.zeros((7, blocks), np.int32), np.zeros(7, np.int64), np.full(7, -1, np.int64)
    rows = np.asarray([] if at is None else at, np.int64)
    free_counts = np.zeros(len(rows), np.int64)
    tails, lengths = np.zeros(total, np.int32), np.zeros(total, np.int32)
    begun = trace.snapshot(index)
    carried = 0 if begun is None else sum(len(live.table or ()) for live in begun.live)
    nodes = np.zeros((2, carried + int(np.isin(kinds, (ALLOCATE, HIT)).sum()) + 1), np.int32)
    same, filled = np.zeros((2, max(1, len(chains.hashes))), np.int32), np.zeros(total, np.int32)
    _start(state, begun, same, tails, lengths, filled, nodes)
    front = uncached_first(header)
    _follow(
        kinds,
        events["request"].fill_null(-1).to_numpy(),
        events["block"].fill_null(-1).to_numpy(),
        events["identity"].fill_null(-1).to_numpy(),
        chains.indptr,
        chains.identities,
        max(1, int(header["block_size"]) // int(header["granule"])),
        same,
        lookups["request"].to_numpy(),
        lookups["tokens_asked"].to_numpy(),
        lookups["tokens_hit"].to_numpy(),
        _counted(trace, index, total, bool(header.get("prefix_caching"))),
        int(header["block_size"]),
        bool(front),
        state,
        tails,
        lengths,
        filled,
        nodes,
        carried,
        rows,
        free_counts,
        mismatches,
        first,
    )
    if front is None:
        mismatches[C_ORDER], first[C_ORDER] = 0, -1
    return Followed(_state(state, tails, nodes), mismatches, first, free_counts)


def _start(
    state: NDArray[np.int32],
    begun: Snapshot | None,
    same: NDArray[np.int32],
    tails: NDArray[np.int32],
    lengths: NDArray[np.int32],
    filled: NDArray[np.int32],
    nodes: NDArray[np.int32],
) -> None:
    """Set the state to that of an idle engine, or to what a cut begins with."""
    if begun is None:
        _queue_up(state, np.arange(1, state.shape[1], dtype=np.int32))
        return
    _queue_up(state, begun.queue)
    for block, identity in zip(begun.blocks.tolist(), begun.identities.tolist(), strict=True):
        _remember(state, same, block, identity)
    n = 0
    for live in begun.live:
        for block in live.table or ():
            n += 1
            nodes[0, n], nodes[1, n] = block, tails[live.request]
            tails[live.request] = n
            state[S_REFERENCES, block] += 1
        lengths[live.request] = len(live.table or ())
        filled[live.request] = live.filled


def _counted(trace: Any, index: int, total: int, caching: bool) -> NDArray[np.bool_]:
    """bool[requests]: whether lookups of the request are counted, so that each admission must have one."""
    counted = np.zeros(total, np.bool_)
    if caching:
        requests = trace.requests.filter(trace.requests["engine_index"] == index)
        counted[requests["request"].to_numpy()] = ~requests["no_cache_read"].to_numpy()
    return counted


def _state(state: NDArray[np.int32], tails: NDArray[np.int32], nodes: NDArray[np.int32]) -> PoolState:
    free = []
    block = int(state[S_NEXT, 0])
    while block:
        free.append(block)
        block = int(state[S_NEXT, block])
    tables = {}
    for request in np.flatnonzero(tails):
        table, node = [], int(tails[request])
        while node:
            table.append(int(nodes[0, node]))
            node = int(nodes[1, node])
        tables[int(request)] = table[::-1]
    return PoolState(state[S_REFERENCES].copy(), state[S_IDENTITY] - 1, np.array(free, np.int32), tables)


# Rows of the state per block. The free queue is a ring through block 0, the null block, which is never free.
# Blocks with one identity are a list in the order they were cached.
S_REFERENCES, S_IDENTITY, S_NEXT, S_PREVIOUS, S_SAME_NEXT, S_SAME_PREVIOUS, S_FREE = range(7)
SAME_FIRST, SAME_LAST = range(2)


@njit
def _take(state, block):  # type: ignore[no-untyped-def]
    """Take ``block`` off the free queue."""
    before, after = state[S_PREVIOUS, block], state[S_NEXT, block]
    state[S_NEXT, before] = after
    state[S_PREVIOUS, after] = before
    state[S_FREE, block] = 0


@njit
def _put(state, block, before):  # type: ignore[no-untyped-def]
    """Put ``block`` into the free queue behind ``before`` (0: to the front)."""
    after = state[S_NEXT, before]
    state[S_NEXT, before] = block
    state[S_PREVIOUS, block] = before
    state[S_NEXT, block] = after
    state[S_PREVIOUS, after] = block
    state[S_FREE, block] = 1


@njit
def _queue_up(state, blocks):  # type: ignore[no-untyped-def]
    """Append ``blocks`` to the free queue."""
    for block in blocks:
        _put(state, block, state[S_PREVIOUS, 0])


@njit
def _forget(state, same, block):  # type: ignore[no-untyped-def]
    """The block loses its identity."""
    identity = state[S_IDENTITY, block] - 1
    if identity < 0:
        return
    before, after = state[S_SAME_PREVIOUS, block], state[S_SAME_NEXT, block]
    if before:
        state[S_SAME_NEXT, before] = after
    else:
        same[SAME_FIRST, identity] = after
    if after:
        state[S_SAME_PREVIOUS, after] = before
    else:
        same[SAME_LAST, identity] = before
    state[S_IDENTITY, block] = 0


@njit
def _remember(state, same, block, identity):  # type: ignore[no-untyped-def]
    """The block gets an identity, as the last of those that have it."""
    last = same[SAME_LAST, identity]
    state[S_IDENTITY, block] = identity + 1
    state[S_SAME_PREVIOUS, block] = last
    state[S_SAME_NEXT, block] = 0
    if last:
        state[S_SAME_NEXT, last] = block
    else:
        same[SAME_FIRST, identity] = block
    same[SAME_LAST, identity] = block


@njit
def _miss(mismatches, first, check, row):  # type: ignore[no-untyped-def]
    mismatches[check] += 1
    if first[check] < 0:
        first[check] = row


@njit
def _follow(  # type: ignore[no-untyped-def]
    kinds, requests, blocks, identities, indptr, chains, per_block, same, looked, asked, found, counted,
    block_size, front, state, tails, lengths, filled, nodes, n_nodes, at, free_counts, mismatches, first,
):  # fmt: skip
    total = state.shape[1]
    free = np.int64(state[S_FREE].sum())
    next_lookup = 0
    next_at = 0
    freed_front = 0  # where the next block without identity of the running stretch of frees goes
    freed_before = np.int64(-1)
    evicted_for = np.int64(-1)
    due, due_of = np.int64(0), np.int64(-1)  # blocks that the lookup under way found, and whose it is
    for row in range(len(kinds)):
        while next_at < len(at) and at[next_at] <= row:
            free_counts[next_at] = free
            next_at += 1
        kind, block, identity = kinds[row], blocks[row], identities[row]
        request = np.int64(requests[row])
        if kind != FREE or request != freed_before:
            freed_front = 0
        freed_before = request if kind == FREE else np.int64(-1)
        admitted = False
        if request >= 0 and lengths[request] == 0:
            if kind == EVICT:  # to make room for the first block of a request
                admitted = True
                evicted_for = request
            elif kind == ALLOCATE or kind == HIT:
                admitted = evicted_for != request
                evicted_for = np.int64(-1)
        if admitted and next_lookup < len(looked) and looked[next_lookup] == request:
            # The lookup was made in the pool as it stands here: before the request's first block changed it.
            cap = (asked[next_lookup] - 1) // block_size
            hits = np.int64(0)
            while hits < cap:
                place = indptr[request] + (hits + 1) * per_block - 1
                if place >= indptr[request + 1] or same[SAME_FIRST, chains[place]] == 0:
                    break
                hits += 1
            if hits * block_size != found[next_lookup]:
                _miss(mismatches, first, C_LONGEST, row)
            due = np.int64(found[next_lookup]) // block_size
            due_of = request
            next_lookup += 1
        elif admitted and counted[request]:
            _miss(mismatches, first, C_LONGEST, row)
        if kind == ALLOCATE and request == due_of:
            # What was found comes before what had to be allocated.
            if due != 0:
                _miss(mismatches, first, C_HITS, row)
            due_of = np.int64(-1)
        elif kind == HIT and request == due_of:
            due -= 1
        if kind == ALLOCATE:
            if state[S_NEXT, 0] != block:
                _miss(mismatches, first, C_ORDER, row)
            if state[S_IDENTITY, block] != 0:
                _miss(mismatches, first, C_EVICTIONS, row)
                _forget(state, same, block)
            if state[S_REFERENCES, block] != 0 or not state[S_FREE, block]:
                _miss(mismatches, first, C_REFERENCES, row)
            if state[S_FREE, block]:
                _take(state, block)
                free -= 1
            state[S_REFERENCES, block] = 1
        elif kind == HIT:
            if identity < 0 or same[SAME_FIRST, identity] != block:
                _miss(mismatches, first, C_HITS, row)
            elif request >= 0:
                place = indptr[request] + (lengths[request] + 1) * per_block - 1
                if place >= indptr[request + 1] or chains[place] != identity:
                    _miss(mismatches, first, C_HITS, row)
            if state[S_FREE, block]:
                _take(state, block)
                free -= 1
            state[S_REFERENCES, block] += 1
        elif kind == FILL:
            if state[S_IDENTITY, block] != 0 or state[S_REFERENCES, block] == 0 or identity < 0 or request < 0:
                _miss(mismatches, first, C_FILLS, row)
            else:
                place = indptr[request] + (filled[request] + 1) * per_block - 1
                if place >= indptr[request + 1] or chains[place] != identity:
                    _miss(mismatches, first, C_FILLS, row)
            if identity >= 0:
                _forget(state, same, block)
                _remember(state, same, block, identity)
            if request >= 0:
                filled[request] += 1
        elif kind == FREE:
            if state[S_IDENTITY, block] - 1 != identity:
                _miss(mismatches, first, C_FREES, row)
            if request >= 0:
                tail = tails[request]
                if tail == 0 or nodes[0, tail] != block:
                    _miss(mismatches, first, C_FREES, row)
                else:
                    tails[request] = nodes[1, tail]
                    lengths[request] -= 1
                if lengths[request] == 0:
                    filled[request] = 0
                elif row + 1 == len(kinds) or kinds[row + 1] != FREE or requests[row + 1] != request:
                    _miss(mismatches, first, C_FREES, row)
            if state[S_REFERENCES, block] <= 0:
                _miss(mismatches, first, C_REFERENCES, row)
            else:
                state[S_REFERENCES, block] -= 1
                if state[S_REFERENCES, block] == 0:
                    if state[S_IDENTITY, block] == 0 and front:
                        _put(state, block, freed_front)
                        freed_front = block
                    else:
                        _put(state, block, state[S_PREVIOUS, 0])
                    free += 1
        elif kind == EVICT:
            if state[S_IDENTITY, block] - 1 != identity:
                _miss(mismatches, first, C_EVICTIONS, row)
            _forget(state, same, block)
        elif kind == RESET:
            for other in range(1, total):
                _forget(state, same, other)
        if (kind == ALLOCATE or kind == HIT) and request >= 0:
            n_nodes += 1
            nodes[0, n_nodes] = block
            nodes[1, n_nodes] = tails[request]
            tails[request] = n_nodes
            lengths[request] += 1
            if kind == HIT:
                filled[request] = lengths[request]
    while next_at < len(at):
        free_counts[next_at] = free
        next_at += 1
    if next_lookup < len(looked):  # a lookup without an admission
        mismatches[C_LONGEST] += len(looked) - next_lookup
        if first[C_LONGEST] < 0:
            first[C_LONGEST] = len(kinds) - 1
