"""LFU: least frequently used.

Each resident block has a count of its uses since it was placed, that one included; a block that is evicted is
forgotten with its count. The victim is the block with the lowest count, of several the one whose last use is longest
ago.

With prefixes a held block is no candidate, and letting go of it is its last use, though one that does not count.

Folklore; described with in-cache counts in D. Lee et al., "LRFU: a spectrum of policies that subsumes the least
recently used and least frequently used policies", IEEE Transactions on Computers 50(12), 2001. Exactly the misses of
libCacheSim 0.3.5.

Blocks with less than `LISTS` uses stand in lists, one for each priority (the count; with `lfuda` the age is added).
The others have many hits among them and few victims, so a use of theirs only writes their row, and a heap holds each
under a rank that it once had, which is never above the true one: who comes to the top under an old rank goes back
under the true one. Where blocks are removed (`Stream.removes`), entries of blocks that have gone stay in the heap
until they come to the top, or it is full.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.kept import is_kept, new_kept
from kvtrace_replay.structures.lazy_heap import KEY, SCORE, LazyHeap, drop_top, lazy_push, renew_top
from kvtrace_replay.structures.lists import oldest, push_new, unlink
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

LISTS = 16
# Columns of `rows`. The first two are links of a list, or, from `LISTS` uses on, the priority and whether it is in the
# heap.
PRIORITY, IN_HEAP, COUNT, STAMP = range(4)
# Slots of `counters`: uses so far; length of the heap; no list of a lower priority has blocks; what is added to
# counts (`lfuda`), and whether it grows.
CLOCK, HEAP, LEAST, AGE, AGES = range(5)
STAMP_BITS = NEVER = (1 << 32) - 1


def setup_counts(stream: Stream, capacity: int, ages: bool) -> tuple[U32, I64, LazyHeap, U32]:
    """The state of `lfu` and `lfuda`."""
    if stream.refs.size >= 2**30:
        raise KvtraceError("lfu and lfuda count at most 2^30 references: cut the trace first")
    rows = np.zeros((stream.n_identities + LISTS, 4), np.uint32)
    rows[stream.n_identities :, :2] = np.arange(stream.n_identities, rows.shape[0], dtype=np.uint32)[:, None]
    counters = np.zeros(5, np.int64)
    counters[AGES] = ages
    heap = np.zeros((2 * capacity + 1 if stream.removes else capacity, 2), np.int64)
    return rows, counters, heap, new_kept(stream.n_identities, np.uint32, stream.removes)


@njit(cache=False)
def _list(rows: U32, priority: int) -> int:
    """The list of all blocks of a priority: those in lists lie less than LISTS apart."""
    return np.uintp(rows.shape[0] - LISTS) + (np.uintp(priority) & np.uintp(LISTS - 1))


@njit(cache=False)
def _rank(priority: int, stamp: int) -> int:
    return (np.int64(priority) << np.int64(32)) | np.int64(stamp)


@njit(cache=False)
def _is_current(heap: LazyHeap, at: int, since: U32) -> bool:
    """Whether the entry is of a block that is in the heap, and was made since that entered it; `since` is kept."""
    return (heap[at, SCORE] & STAMP_BITS) >= since[np.uintp(heap[at, KEY])]


@njit(cache=False)
def _tidy(counters: I64, heap: LazyHeap, since: U32) -> None:
    size = 0
    for at in range(counters[HEAP]):
        if _is_current(heap, at, since):
            size = lazy_push(heap, size, heap[at, SCORE], heap[at, KEY])  # at or before the row just read
    counters[HEAP] = size


@njit(cache=False)
def _enter_heap(rows: U32, counters: I64, heap: LazyHeap, since: U32, key: int) -> None:
    if is_kept(since):
        if counters[HEAP] == heap.shape[0]:
            _tidy(counters, heap, since)
        since[key] = rows[key, STAMP]
    rows[key, IN_HEAP] = 1
    counters[HEAP] = lazy_push(heap, counters[HEAP], _rank(rows[key, PRIORITY], rows[key, STAMP]), key)


@njit(cache=False)
def _enter_list(rows: U32, counters: I64, key: int) -> None:
    priority = np.int64(rows[key, COUNT]) + counters[AGE]
    push_new(rows, _list(rows, priority), key)
    if priority < counters[LEAST]:
        counters[LEAST] = priority


@policy(
    "lfu",
    summary="evicts the block used least often since it was placed",
    paper="Lee et al., IEEE Transactions on Computers 50(12), 2001",
)
class Lfu:
    """State: `rows` uint32[n_identities + LISTS, 4], see above; `counters` int64[5]; `heap` int64[capacity, 2] (or
    2 capacity + 1 rows), blocks with many uses by priority << 32 | time of last use; `since` uint32[n_identities], the
    clock when a block entered the heap, NEVER where it has gone, kept where blocks are removed."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[U32, I64, LazyHeap, U32]:
        return setup_counts(stream, capacity, ages=False)

    @staticmethod
    def insert(key: int, now: int, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> None:
        counters[CLOCK] += 1
        rows[key, COUNT] = 1
        rows[key, STAMP] = counters[CLOCK]
        _enter_list(rows, counters, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> None:
        counters[CLOCK] += 1
        count = rows[key, COUNT] + np.uint32(1)
        rows[key, COUNT] = count
        rows[key, STAMP] = counters[CLOCK]
        if count > LISTS:
            rows[key, PRIORITY] = count + counters[AGE]
            return
        if not pinned:
            unlink(rows, key)
        if count < LISTS:
            if not pinned:
                _enter_list(rows, counters, key)
            return
        rows[key, PRIORITY] = count + counters[AGE]
        rows[key, IN_HEAP] = 0
        if not pinned:
            _enter_heap(rows, counters, heap, since, key)

    @staticmethod
    def evict(key: int, now: int, pins: I32, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> int:
        priority = max(counters[LEAST], counters[AGE])
        end = counters[AGE] + LISTS
        head = _list(rows, priority)
        first = np.uintp(oldest(rows, head))
        while first == head and priority < end:
            priority += 1
            head = _list(rows, priority)
            first = np.uintp(oldest(rows, head))
        counters[LEAST] = priority
        while counters[HEAP] > 0:
            if first != head and heap[0, SCORE] > _rank(priority, rows[first, STAMP]):
                break
            top = np.uintp(heap[0, KEY])
            if is_kept(since) and not _is_current(heap, 0, since):
                counters[HEAP] = drop_top(heap, counters[HEAP])
                continue
            rank = _rank(rows[top, PRIORITY], rows[top, STAMP])
            if pins[top] > 0:
                rows[top, IN_HEAP] = 0
                counters[HEAP] = drop_top(heap, counters[HEAP])
            elif rank != heap[0, SCORE]:
                renew_top(heap, counters[HEAP], rank, top)
            else:
                counters[HEAP] = drop_top(heap, counters[HEAP])
                if counters[AGES] != 0:
                    counters[AGE] = rows[top, PRIORITY]
                return np.int64(top)
        unlink(rows, first)
        if counters[AGES] != 0:
            counters[AGE] = priority
        return np.int64(first)

    @staticmethod
    def pin(key: int, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> None:
        if rows[key, COUNT] < LISTS:
            unlink(rows, key)

    @staticmethod
    def unpin(key: int, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> None:
        counters[CLOCK] += 1
        rows[key, STAMP] = counters[CLOCK]
        if rows[key, COUNT] < LISTS:
            _enter_list(rows, counters, key)
            return
        rows[key, PRIORITY] = rows[key, COUNT] + counters[AGE]
        if rows[key, IN_HEAP] == 0:
            _enter_heap(rows, counters, heap, since, key)

    @staticmethod
    def remove(key: int, rows: U32, counters: I64, heap: LazyHeap, since: U32) -> None:
        if rows[key, COUNT] < LISTS:
            unlink(rows, key)
        else:
            since[key] = NEVER
