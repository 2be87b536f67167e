"""W-TinyLFU: a small window takes what is new, and what leaves it must be worth more than what it would replace.

New blocks enter the window, an LRU list of a share `window` of the cache (at least one block). The rest, the main
cache, is a segmented LRU: one part in five on probation, four protected; a block used on probation becomes protected,
and the least recently used protected block goes back where there are too many. When room is needed, the window's
oldest block is the candidate and the oldest on probation (or, if there is none, of the protected) the victim. Their
counts are compared: if the candidate was counted more often it takes the victim's place, else it is evicted itself.
While the main cache is not full, candidates just move there.

Counts are kept, for resident and other blocks alike, in a small filter (`structures.sketch`): a block is counted when
it is placed, at each hit in the main cache, and when it leaves the window; all counts are halved after 32 hits in the
main cache for each block that it holds.

Most hits are of few blocks, whose counts decide nothing while they are high. So a block whose ten counters have all
come to `HIGH` is not counted there any more but in its own row, and these counts are carried over when they could
matter: before counts are halved, and when both of two estimates to be compared are as high themselves, in which case
`HIGH` is doubled. An estimate below `HIGH` is exact, for it comes from a counter that no such block has.

The ten counters of a block lie anywhere in the filter, which a processor's cache does not hold where the cache has
some 100,000 blocks: waiting for them would be most of the work. So they are asked for early: those of a block that the
stream is about to refer to (`soon`), and, with each eviction, those of the next candidate and the next victim.

With prefixes, a reference of a request is a use when the request takes its blocks. A block that a running request holds
is out of its list, though still counted there, and comes back at the new end when it is let go; if no block of the main
cache can be evicted, the candidate is.

libCacheSim's `WTinyLFU` (0.3.5) is the same, filter and hashes included, where the main cache is a multiple of five
blocks. Elsewhere its two parts do not add up to the main cache, and what does not fit into them is dropped on a hit,
though nobody needs a place, after which a candidate enters the main cache without a contest; here the parts add up.
With this added, the slow twin of the tests equals it everywhere (`test_libcachesim_scores.py`). Misses here and
there, of 20,000 references: Zipf, capacity 103: 10,942 and 10,690; 300: 8,987 and 8,961; 998: 7,264 and 7,234. Two
phases of Zipf, 103: 12,757 and 12,200; 998: 8,181 and 7,919. Growing conversations, 103: 15,455 and 15,743; 998:
4,846 and 4,883. With a capacity below 100 its window has no room and it places nothing. Where the counters of two
blocks collide depends on their ids: here the dense ones, in order of first use.

G. Einziger, R. Friedman, B. Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on Storage
13(4), 2017.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.indices import as_index
from kvtrace_replay.structures.lists import TOWARDS_NEW, oldest, push_new, unlink
from kvtrace_replay.structures.machine import prefetch
from kvtrace_replay.structures.sketch import (
    Counters,
    Wide,
    new_sketch,
    sketch_add,
    sketch_estimate,
    sketch_halve,
    sketch_hashes,
    sketch_magic,
    sketch_prefetch,
)
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

# Parts of the cache, and the lists of that number.
WINDOW, PROBATION, PROTECTED = range(3)
# Columns of `rows`, after the links: the part, the hashes, 0 or 1 + uses not yet in the filter.
PART, HASH_A, HASH_B, OWN_COUNT = range(2, 6)
COLUMNS = 6
# Slots of `counts`.
IN_PROBATION, IN_PROTECTED, MOST_PROBATION, MOST_PROTECTED, HITS, HITS_TO_HALVE, HIGH, N_HIGH, MAGIC = range(9)
LEAST_HIGH = 32


@njit(cache=False)
def _count(rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64, key: int) -> Any:
    """A use of `key`, which does not count for itself. Returns the estimate that it had before."""
    before: Any = sketch_add(counters, wide, counts[MAGIC], rows[key, HASH_A], rows[key, HASH_B], 1)
    if before + 1 >= counts[HIGH]:
        rows[key, OWN_COUNT] = 1
        high[counts[N_HIGH]] = key
        counts[N_HIGH] += 1
    return before


@njit(cache=False)
def _count_use(rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64, key: int) -> None:
    """A use of `key`."""
    if rows[key, OWN_COUNT] > 0:
        rows[key, OWN_COUNT] += np.uint32(1)
    else:
        _count(rows, counters, wide, high, counts, key)


@njit(cache=False)
def _carry_over(rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> None:
    """All uses come into the filter."""
    for i in range(counts[N_HIGH]):
        key = as_index(high[i])
        own: Any = np.int64(rows[key, OWN_COUNT])
        sketch_add(counters, wide, counts[MAGIC], rows[key, HASH_A], rows[key, HASH_B], own - 1)
        rows[key, OWN_COUNT] = 0
    counts[N_HIGH] = 0


@njit(cache=False)
def _wins(rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64, one: int, other: int) -> bool:
    """Whether `one` was counted more often than `other`; then it is counted itself."""
    others: Any = sketch_estimate(counters, wide, counts[MAGIC], rows[other, HASH_A], rows[other, HASH_B])
    if others < counts[HIGH] and rows[one, OWN_COUNT] == 0:
        return _count(rows, counters, wide, high, counts, one) > others
    return _wins_high(rows, counters, wide, high, counts, one, other, others)


@njit(cache=False)
def _wins_high(
    rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64, one: int, other: int, others: int
) -> bool:
    """`_wins` where both may be high."""
    ones = sketch_estimate(counters, wide, counts[MAGIC], rows[one, HASH_A], rows[one, HASH_B])
    if min(ones, others) >= counts[HIGH]:
        _carry_over(rows, counters, wide, high, counts)
        counts[HIGH] *= 2
        ones = sketch_estimate(counters, wide, counts[MAGIC], rows[one, HASH_A], rows[one, HASH_B])
        others = sketch_estimate(counters, wide, counts[MAGIC], rows[other, HASH_A], rows[other, HASH_B])
    _count_use(rows, counters, wide, high, counts, one)
    return ones > others


@njit(cache=False)
def _bring_row(rows: U32, key: int) -> None:
    """Asks for the row of `key`, which may lie in two lines of memory; also if it is a list's."""
    first = as_index(key) * np.intp(COLUMNS)
    prefetch(rows, first)
    prefetch(rows, first + np.intp(COLUMNS - 1))


@njit(cache=False)
def _bring(rows: U32, counters: Counters, counts: I64, key: int) -> None:
    """Asks for the counters of `key`, if it is counted there; its row should be near."""
    if rows[key, OWN_COUNT] == 0:
        sketch_prefetch(counters, counts[MAGIC], rows[key, HASH_A], rows[key, HASH_B])


@njit(cache=False)
def _enter_main(rows: U32, counts: I64, key: int) -> None:
    """`key`, in no list, goes into the lower part with room; there is room for it."""
    to = PROBATION
    if counts[IN_PROBATION] >= counts[MOST_PROBATION] and counts[IN_PROTECTED] < counts[MOST_PROTECTED]:
        to = PROTECTED
    rows[key, PART] = to
    counts[to - 1] += 1
    push_new(rows, rows.shape[0] - 3 + to, key)


@njit(cache=False)
def _use_in_main(rows: U32, counts: I64, key: int, pinned: bool) -> None:
    protected = rows.shape[0] - 3 + PROTECTED
    if not pinned:
        unlink(rows, key)
        push_new(rows, protected, key)
    if rows[key, PART] == PROTECTED:
        return
    rows[key, PART] = PROTECTED
    counts[IN_PROBATION] -= 1
    counts[IN_PROTECTED] += 1
    if counts[IN_PROTECTED] > counts[MOST_PROTECTED]:
        demoted = as_index(oldest(rows, protected))
        if demoted != protected:  # else all are held
            unlink(rows, demoted)
            rows[demoted, PART] = PROBATION
            counts[IN_PROTECTED] -= 1
            counts[IN_PROBATION] += 1
            push_new(rows, protected - 1, demoted)


@njit(cache=False)
def _remove(rows: U32, counts: I64, key: int) -> None:
    """`key` leaves the main cache."""
    unlink(rows, key)
    counts[np.int64(rows[key, PART]) - 1] -= 1


@policy(
    "wtinylfu",
    summary="new blocks pass through a window and stay only if counted more often than what they replace",
    paper="Einziger, Friedman, Manes, ACM Transactions on Storage 13(4), 2017",
)
class WTinyLfu:
    """State: `rows` uint32[n_identities + 3, 6], of each block its links, its part and what its counting needs, in one
    place; the last rows are the lists: the window, probation, protected, of blocks that may be evicted. `counters`
    and `wide`, the filter; `high` int32[n_identities], blocks that count for themselves; `counts` int64[9]: blocks on
    probation and protected, held ones included, and the most there may be; hits since counts were halved, and after how
    many they are; what a high estimate is, the blocks in `high`, and the filter's `magic`."""

    @staticmethod
    def setup(stream: Stream, capacity: int, window: float = 0.01) -> tuple[U32, Counters, Wide, I32, I64]:
        if not 0 < window < 1:
            raise UsageError(f"wtinylfu: window={window} must be a share of the cache, above 0 and below 1")
        n = stream.n_identities
        main = capacity - max(1, int(window * capacity))
        protected = main * 4 // 5
        rows = np.zeros((n + 3, COLUMNS), np.uint32)
        rows[n:, :2] = np.arange(n, n + 3, dtype=np.uint32)[:, None]
        rows[:n, HASH_A : HASH_B + 1] = stream.share("sketch hashes", lambda: sketch_hashes(n))
        counters, wide = new_sketch(main)
        limits = [main - protected, protected, 0, 32 * main, LEAST_HIGH, 0, sketch_magic(counters)]
        return rows, counters, wide, np.zeros(n, np.int32), np.array([0, 0, *limits], np.int64)

    @staticmethod
    def insert(key: int, now: int, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> None:
        rows[key, PART] = WINDOW
        push_new(rows, rows.shape[0] - 3, key)
        _count_use(rows, counters, wide, high, counts, key)

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64
    ) -> None:
        if rows[key, PART] == WINDOW:
            if not pinned:
                unlink(rows, key)
                push_new(rows, rows.shape[0] - 3, key)
            return
        _use_in_main(rows, counts, key, pinned)
        _count_use(rows, counters, wide, high, counts, key)
        counts[HITS] += 1
        if counts[HITS] >= counts[HITS_TO_HALVE]:
            counts[HITS] = 0
            _carry_over(rows, counters, wide, high, counts)
            sketch_halve(counters, wide)
            counts[HIGH] = max(LEAST_HIGH, counts[HIGH] >> 1)

    @staticmethod
    def evict(key: int, now: int, pins: I32, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> int:
        window = rows.shape[0] - 3
        room = counts[MOST_PROBATION] + counts[MOST_PROTECTED] - counts[IN_PROBATION] - counts[IN_PROTECTED]
        while True:
            candidate = as_index(oldest(rows, window))
            victim = as_index(oldest(rows, window + PROBATION))
            if victim == window + PROBATION:
                victim = as_index(oldest(rows, window + PROTECTED))
            if candidate == window:
                _remove(rows, counts, victim)
                return victim
            unlink(rows, candidate)
            if room > 0:
                _enter_main(rows, counts, candidate)
                _count_use(rows, counters, wide, high, counts, candidate)
                room -= 1
                continue
            following = as_index(oldest(rows, window))
            if following != window:
                _bring_row(rows, rows[following, TOWARDS_NEW])
                _bring(rows, counters, counts, following)
            if victim == window + PROTECTED:
                _count_use(rows, counters, wide, high, counts, candidate)
                return candidate
            if not _wins(rows, counters, wide, high, counts, candidate, victim):
                return candidate
            following = as_index(rows[victim, TOWARDS_NEW])
            _remove(rows, counts, victim)
            _enter_main(rows, counts, candidate)
            if following < window:
                _bring(rows, counters, counts, following)
                _bring_row(rows, rows[following, TOWARDS_NEW])
            return victim

    @staticmethod
    def pin(key: int, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> None:
        unlink(rows, key)

    @staticmethod
    def unpin(key: int, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> None:
        push_new(rows, rows.shape[0] - 3 + np.int64(rows[key, PART]), key)

    @staticmethod
    def remove(key: int, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64) -> None:
        if rows[key, PART] == WINDOW:
            unlink(rows, key)
        else:
            _remove(rows, counts, key)

    @staticmethod
    def soon(
        key: int, near: bool, pins: I32, rows: U32, counters: Counters, wide: Wide, high: I32, counts: I64
    ) -> None:
        if near:
            _bring(rows, counters, counts, key)
        else:
            prefetch(pins, key)
            _bring_row(rows, key)
