"""LRU-K: the victim is the block whose K-th last use lies farthest back.

One use tells little; the time of the K-th last tells how often a block is used as well as how lately. Blocks with fewer
than `k` uses since they were placed count as never used that often: they go before all others, the one placed first
going first (so with k=2, a block used once goes before every block used twice). What was known of a block is forgotten
when it is evicted. With k=1 this is LRU.

With prefixes, each reference of a request is a use at the moment when the request takes its blocks, the tail of the
chain before the head, so that of blocks used by the same requests the deeper goes first. Letting go of a block is not
a use (in `lru` it is what counts). Blocks that a running request holds are passed over: one that is met on top of the
heap is set aside until it is let go.

Equal to libCacheSim's `LRUK` (0.3.5).

E. J. O'Neil, P. E. O'Neil, G. Weikum, "The LRU-K page replacement algorithm for database disk buffering", ACM SIGMOD
1993 (there with a memory of evicted pages and a time within which uses count as one; neither here nor in libCacheSim).
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
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Slots of `counts`.
CLOCK, SIZE = 0, 1
# Taken from the time of a block with fewer than K uses, so that it comes before all that have K.
FEW = 1 << 62
NEVER = FEW  # of `since`: not resident


@njit(cache=False)
def _score(uses: I64, key: int) -> int:
    """What decides: the K-th last use, or the first of fewer. Rises from use to use."""
    if uses[key, 0] > 0:
        return uses[key, 0]
    at = 1
    while uses[key, at] == 0:
        at += 1
    return uses[key, at] - FEW


@njit(cache=False)
def _is_current(heap: LazyHeap, at: int, since: I64) -> bool:
    """Whether the heap's entry was made since its block was placed; `since` is kept."""
    return heap[at, SCORE] & (FEW - 1) >= since[as_index(heap[at, KEY])]


@njit(cache=False)
def _push(uses: I64, heap: LazyHeap, counts: I64, since: I64, key: int) -> None:
    if is_kept(since) and counts[SIZE] == heap.shape[0]:
        size = 0
        for at in range(counts[SIZE]):
            if _is_current(heap, at, since):
                size = lazy_push(heap, size, heap[at, SCORE], heap[at, KEY])  # at or before the row just read
        counts[SIZE] = size
    counts[SIZE] = lazy_push(heap, counts[SIZE], _score(uses, key), key)


@policy(
    "lru-k",
    summary="evicts the block whose K-th last use is longest ago, those with fewer uses first",
    paper="O'Neil, O'Neil, Weikum, SIGMOD 1993",
)
class LruK:
    """State: `uses` int64[n_identities, k], the clock at the last K uses of a resident block, the latest at the end, 0
    for none; `heap`, resident blocks by a score they have or had; `counts` int64[2]: the clock (hits and
    placements so far), the heap's size; `aside` bool[n_identities], held and taken off the heap; `since`
    int64[n_identities], when a block was placed, kept where blocks are removed."""

    @staticmethod
    def setup(stream: Stream, capacity: int, k: int = 2) -> tuple[I64, LazyHeap, I64, Flags, I64]:
        if not 1 <= k <= 64:
            raise UsageError(f"lru-k: k={k} must lie between 1 and 64")
        n = stream.n_identities
        return (
            np.zeros((n, k), np.int64),
            np.zeros((2 * capacity + 1 if stream.removes else capacity, 2), np.int64),
            np.zeros(2, np.int64),
            np.zeros(n if stream.semantics != "object" else 0, np.bool_),
            new_kept(n, np.int64, stream.removes),
        )

    @staticmethod
    def insert(key: int, now: int, uses: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        counts[CLOCK] += 1
        last = uses.shape[1] - 1
        for at in range(last):
            uses[key, at] = 0
        uses[key, last] = counts[CLOCK]
        if is_kept(since):
            since[key] = counts[CLOCK]
        _push(uses, heap, counts, since, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, uses: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        counts[CLOCK] += 1
        last = uses.shape[1] - 1
        for at in range(last):
            uses[key, at] = uses[key, at + 1]
        uses[key, last] = counts[CLOCK]

    @staticmethod
    def evict(key: int, now: int, pins: I32, uses: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> int:
        while True:
            top = as_index(heap[0, KEY])
            if is_kept(since) and not _is_current(heap, 0, since):
                counts[SIZE] = drop_top(heap, counts[SIZE])
                continue
            if pins[top] > 0:
                aside[top] = True
                counts[SIZE] = drop_top(heap, counts[SIZE])
                continue
            score = _score(uses, top)
            if score == heap[0, SCORE]:
                counts[SIZE] = drop_top(heap, counts[SIZE])
                return top
            renew_top(heap, counts[SIZE], score, top)

    @staticmethod
    def unpin(key: int, uses: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        if aside[key]:
            aside[key] = False
            _push(uses, heap, counts, since, key)

    @staticmethod
    def remove(key: int, uses: I64, heap: LazyHeap, counts: I64, aside: Flags, since: I64) -> None:
        since[key] = NEVER
