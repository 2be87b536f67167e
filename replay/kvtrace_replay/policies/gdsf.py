"""GDSF: greedy dual, size, frequency; all blocks have one size here.

A block's priority is L + its uses since it was placed. L, the "inflation", is the highest priority that a victim had
(for the block in whose favour it goes: that of the victims before), so that blocks placed or used later start from a
higher level, and one with many uses long ago is overtaken in time. The victim is the block with the least priority;
of equals the one whose last use is longest ago.

In `object` semantics the missing block takes part in the contest: where every resident has more than its L + 1, it is
the victim itself, is not placed, and L rises to its priority. So it is in the paper, and in libCacheSim, which places
first and evicts afterwards. With prefixes, and in the engine's pool, a missing block is always placed: a request
cannot run without its blocks. There each reference of a request is a use at the moment when the request takes its
blocks, the tail before the head. Blocks that a running request holds are passed over: one that is met on top of the
heap is set aside until it is let go.

Equal to libCacheSim's `GDSF` (0.3.5) with objects of one size.

L. Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy", HP Laboratories
HPL-98-69R1, 1998.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.indices import as_index
from kvtrace_replay.structures.kept import is_kept, new_kept
from kvtrace_replay.structures.lazy_heap import KEY, SCORE, LazyHeap, drop_top, lazy_push, renew_top
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Columns of `rows`.
RANK, USES = 0, 1
# Slots of `counts`.
CLOCK, SIZE, INFLATION, RISING_TO, MAY_REFUSE, RESIDENT, CAPACITY = range(7)
CLOCK_BITS = (1 << 32) - 1
NEVER = 1 << 32  # of `since`: not resident


@njit(cache=False)
def _is_current(heap: LazyHeap, at: int, since: I64) -> bool:
    """Whether the heap's entry was made since its block was placed; `since` is kept."""
    return heap[at, SCORE] & CLOCK_BITS >= since[as_index(heap[at, KEY])]


@njit(cache=False)
def _push(rows: I64, heap: LazyHeap, counts: I64, since: I64, key: int) -> None:
    if is_kept(since) and counts[SIZE] == heap.shape[0]:
        size = 0
        for at in range(counts[SIZE]):
            if _is_current(heap, at, since):
                size = lazy_push(heap, size, heap[at, SCORE], heap[at, KEY])  # at or before the row just read
        counts[SIZE] = size
    counts[SIZE] = lazy_push(heap, counts[SIZE], rows[key, RANK], key)


@njit(cache=False)
def _settle_top(pins: I32, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> int:
    """Brings the block with the least priority to the top; returns it."""
    while True:
        top = as_index(heap[0, KEY])
        if is_kept(since) and not _is_current(heap, 0, since):
            counts[SIZE] = drop_top(heap, counts[SIZE])
        elif pins[top] > 0:
            aside[top] = True
            counts[SIZE] = drop_top(heap, counts[SIZE])
        elif rows[top, RANK] == heap[0, SCORE]:
            return top
        else:
            renew_top(heap, counts[SIZE], rows[top, RANK], top)


@policy(
    "gdsf",
    summary="evicts the block with the fewest uses, counted from a level that rises with each eviction",
    paper="Cherkasova, HP Laboratories HPL-98-69R1, 1998",
)
class Gdsf:
    """State: `rows` int64[n_identities, 2]: a resident block's priority << 32 | the clock at its last use, and its
    uses; `heap`, resident blocks by a rank they have or had; `counts` int64[7]: the clock (hits and placements so
    far), the heap's size, L, what L rises to after the next placement, whether a missing block may be refused, resident
    blocks, and the most there may be; `aside` bool[n_identities], held and taken off the heap; `since`
    int64[n_identities], when a block was placed, kept where blocks are removed."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I64, LazyHeap, I64, Flags, I64]:
        if stream.refs.size >= 2**30:
            # Neither L nor a count exceeds the number of references; their sum must fit 31 bits.
            raise KvtraceError("gdsf takes at most 2^30 references: cut the trace first")
        n = stream.n_identities
        by_object = stream.semantics == "object"
        return (
            np.zeros((n, 2), np.int64),
            np.zeros((2 * capacity + 1 if stream.removes else capacity, 2), np.int64),
            np.array([0, 0, 0, 0, by_object, 0, capacity], np.int64),
            np.zeros(0 if by_object else n, np.bool_),
            new_kept(n, np.int64, stream.removes),
        )

    @staticmethod
    def insert(key: int, now: int, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        counts[CLOCK] += 1
        rows[key, USES] = 1
        rows[key, RANK] = (counts[INFLATION] + 1) << 32 | counts[CLOCK]
        counts[INFLATION] = max(counts[INFLATION], counts[RISING_TO])
        counts[RESIDENT] += 1
        if is_kept(since):
            since[key] = counts[CLOCK]
        _push(rows, heap, counts, since, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        counts[CLOCK] += 1
        rows[key, USES] += 1
        rows[key, RANK] = (counts[INFLATION] + rows[key, USES]) << 32 | counts[CLOCK]

    @staticmethod
    def admit(key: int, now: int, pins: I32, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> bool:
        if counts[MAY_REFUSE] == 0 or counts[RESIDENT] < counts[CAPACITY]:
            return True
        own = counts[INFLATION] + 1
        least = _settle_top(pins, rows, heap, counts, aside, since)
        if rows[least, RANK] >> 32 <= own:
            return True
        counts[INFLATION] = own
        return False

    @staticmethod
    def evict(key: int, now: int, pins: I32, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> int:
        victim = _settle_top(pins, rows, heap, counts, aside, since)
        counts[RISING_TO] = max(counts[RISING_TO], rows[victim, RANK] >> 32)
        counts[SIZE] = drop_top(heap, counts[SIZE])
        counts[RESIDENT] -= 1
        return victim

    @staticmethod
    def unpin(key: int, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        if aside[key]:
            aside[key] = False
            _push(rows, heap, counts, since, key)

    @staticmethod
    def remove(key: int, rows: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        since[key] = NEVER
        counts[RESIDENT] -= 1
