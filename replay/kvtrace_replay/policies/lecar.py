"""LeCaR: two experts, LRU and LFU, and a weight for each that it loses when its victims come back.

Each eviction asks both: LRU names the block whose last use is longest ago, LFU the one with the fewest uses since it
was placed (of equals the one whose last use is longest ago). If they name the same block it goes. Else a random
number decides, by the weights, whose block goes, and the block is remembered under that expert: the last capacity / 2
victims of each. A block that is missed while remembered counts against the expert: its weight is multiplied by
exp(-rate * discount ^ (t / capacity)), where t is how many references ago it was evicted, and the two weights are
brought back to a sum of 1. They start equal.

With prefixes, a reference of a request is a use when the request takes its blocks, the tail of the chain before the
head; letting go of a block is its last use, though one that LFU does not count. Both experts choose among blocks that
no running request holds. In the engine's pool, where what a new block will hold is not always known when a victim is
chosen, the weights may change with the placement instead, after the choice. The same `seed` gives the same run.

Blocks with less than `LISTS` uses stand in one list for each count, the others in a heap.

libCacheSim's `LeCaR` (0.3.5) has the same rule and constants and takes its seed from elsewhere (it also rounds the
random number down to whole hundredths); the two are compared by the spread of repeated runs.

G. Vietri, L. V. Rodriguez, W. A. Martinez, S. Lyons, J. Liu, R. Rangaswami, M. Zhao, G. Narasimhan, "Driving cache
replacement with ML-based LeCaR", USENIX HotStorage 2018.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.indices import as_index
from kvtrace_replay.structures.lazy_heap import KEY, SCORE, LazyHeap, drop_top, lazy_push, renew_top
from kvtrace_replay.structures.sampling import Rng, draw, new_rng
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError, UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]

LISTS = 16
# Places of a block; the lists of that number: residents, and victims of LRU and LFU that are remembered.
RESIDENT, BY_LRU, BY_LFU, NOWHERE = range(4)
IN_HEAP = 4  # a bit of a place
# Columns of `rows`. The first two are links among residents or the remembered, by time; the next two by uses.
BY_TIME, BY_USES, USES, LAST, SINCE, PLACE = 0, 2, 4, 5, 6, 7
# Slots of `counts`; REMEMBERED + BY_LRU and + BY_LFU are in use.
CLOCK, SIZE, LEAST, MOST_REMEMBERED, REMEMBERED = range(5)
# Slots of `weights`.
WEIGHT_LRU, WEIGHT_LFU, RATE, LOG_DISCOUNT = range(4)
# What keeps a weight above 0.
LEAST_WEIGHT = 1e-10
CLOCK_BITS = (1 << 32) - 1


@njit(cache=False)
def _push(rows: U32, links: int, head: int, key: int) -> None:
    """`structures.lists.push_new`, by the links in the columns `links` and the next."""
    newest = rows[head, links + 1]
    rows[key, links] = head
    rows[key, links + 1] = newest
    rows[head, links + 1] = key
    rows[newest, links] = key


@njit(cache=False)
def _unlink(rows: U32, links: int, key: int) -> None:
    newer = rows[key, links]
    older = rows[key, links + 1]
    rows[newer, links + 1] = older
    rows[older, links] = newer


@njit(cache=False)
def _list(rows: U32, place: int) -> int:
    """The list by time of a place."""
    return rows.shape[0] - LISTS - 3 + place


@njit(cache=False)
def _rank_of(rows: U32, key: int) -> int:
    return np.int64(rows[key, USES]) << 32 | np.int64(rows[key, LAST])  # type: ignore[return-value]


@njit(cache=False)
def _learn(key: int, rows: U32, counts: I64, weights: F64) -> None:
    """Where the missing `key` is remembered, its expert loses weight, and it is forgotten."""
    expert = np.int64(rows[key, PLACE])
    if expert != BY_LRU and expert != BY_LFU:
        return
    _unlink(rows, BY_TIME, key)
    rows[key, PLACE] = NOWHERE
    counts[REMEMBERED + expert] -= 1
    wrong, right = (WEIGHT_LRU, WEIGHT_LFU) if expert == BY_LRU else (WEIGHT_LFU, WEIGHT_LRU)
    age = counts[CLOCK] + 1 - np.int64(rows[key, SINCE])
    regret = math.exp(age * weights[LOG_DISCOUNT])
    lowered = weights[wrong] * math.exp(-weights[RATE] * regret) + LEAST_WEIGHT
    total = lowered + weights[right] + 2 * LEAST_WEIGHT
    weights[wrong] = lowered / total
    weights[right] = (weights[right] + LEAST_WEIGHT) / total


@njit(cache=False)
def _is_current(heap: LazyHeap, at: int, rows: U32) -> bool:
    """Whether the heap's entry is of a block that is resident and has been since the entry was made."""
    key = as_index(heap[at, KEY])
    return rows[key, PLACE] == RESIDENT | IN_HEAP and heap[at, SCORE] & CLOCK_BITS >= np.int64(rows[key, SINCE])


@njit(cache=False)
def _rank(heap: LazyHeap, rows: U32, counts: I64, key: int) -> None:
    """Lets LFU choose `key`, which is in none of its lists."""
    count = np.int64(rows[key, USES])
    if count < LISTS:
        _push(rows, BY_USES, rows.shape[0] - LISTS + count, key)
        counts[LEAST] = min(counts[LEAST], count)
    elif rows[key, PLACE] & IN_HEAP == 0:
        if counts[SIZE] == heap.shape[0]:  # with what LRU evicted since
            size = 0
            for at in range(counts[SIZE]):
                if _is_current(heap, at, rows):
                    size = lazy_push(heap, size, heap[at, SCORE], heap[at, KEY])  # at or before the row just read
            counts[SIZE] = size
        rows[key, PLACE] = RESIDENT | IN_HEAP
        counts[SIZE] = lazy_push(heap, counts[SIZE], _rank_of(rows, key), key)


@njit(cache=False)
def _least_used(pins: I32, heap: LazyHeap, rows: U32, counts: I64) -> int:
    """LFU's choice; where it comes from the heap, it is on top."""
    for count in range(counts[LEAST], LISTS):
        head = rows.shape[0] - LISTS + count
        first = as_index(rows[head, BY_USES])
        if first != head:
            counts[LEAST] = count
            return first
    counts[LEAST] = LISTS
    while True:
        top = as_index(heap[0, KEY])
        if not _is_current(heap, 0, rows):
            counts[SIZE] = drop_top(heap, counts[SIZE])
        elif pins[top] > 0:
            rows[top, PLACE] = RESIDENT
            counts[SIZE] = drop_top(heap, counts[SIZE])
        elif _rank_of(rows, top) == heap[0, SCORE]:
            return top
        else:
            renew_top(heap, counts[SIZE], _rank_of(rows, top), top)


@policy(
    "lecar",
    summary="evicts by LRU or LFU at random, by weights that fall when an expert's victims come back",
    paper="Vietri et al., USENIX HotStorage 2018",
)
class LeCaR:
    """State: `rows` uint32[n_identities + 3 + LISTS, 8]: of each block its links (by time: residents that may be
    evicted, remembered victims of LRU and of LFU; by uses: residents that may be evicted), its uses, the clock at
    its last use and when it was placed or evicted, and its place, all in one cache line; the last rows are the
    lists. `heap` int64[2 capacity + 1, 2], residents with LISTS uses or more by a rank they have or had (uses << 32
    | last use), and some that are no more. `weights` float64[4]: the weights, the rate, the logarithm of the
    discount for one reference. `counts` int64[7]: the clock (hits, placements and lettings go so far), the heap's
    size, no list of fewer uses has blocks, how many victims are remembered of each at most, and now. `rng`."""

    @staticmethod
    def setup(
        stream: Stream, capacity: int, rate: float = 0.45, discount: float = 0.005, seed: int = 0
    ) -> tuple[U32, LazyHeap, F64, I64, Rng]:
        if not 0 <= rate <= 100:
            raise UsageError(f"lecar: rate={rate} must lie between 0 and 100")
        if not 0 < discount <= 1:
            raise UsageError(f"lecar: discount={discount} must be above 0 and at most 1")
        if stream.refs.size >= 2**30:
            raise KvtraceError("lecar takes at most 2^30 references: cut the trace first")
        n = stream.n_identities
        rows = np.zeros((n + 3 + LISTS, 8), np.uint32)
        rows[:n, PLACE] = NOWHERE
        rows[n:, : BY_USES + 2] = np.arange(n, rows.shape[0], dtype=np.uint32)[:, None]
        return (
            rows,
            np.zeros((2 * capacity + 1, 2), np.int64),
            np.array([0.5, 0.5, rate, math.log(discount) / capacity]),
            np.array([0, 0, LISTS, capacity // 2, 0, 0, 0], np.int64),
            new_rng(seed),
        )

    @staticmethod
    def insert(key: int, now: int, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> None:
        _learn(key, rows, counts, weights)
        counts[CLOCK] += 1
        rows[key, PLACE] = RESIDENT
        rows[key, USES] = 1
        rows[key, LAST] = counts[CLOCK]
        rows[key, SINCE] = counts[CLOCK]
        _push(rows, BY_TIME, _list(rows, RESIDENT), key)
        _rank(heap, rows, counts, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> None:
        counts[CLOCK] += 1
        before = rows[key, USES]
        rows[key, USES] = before + np.uint32(1)
        rows[key, LAST] = counts[CLOCK]
        if not pinned:
            _unlink(rows, BY_TIME, key)
            _push(rows, BY_TIME, _list(rows, RESIDENT), key)
            if before < LISTS:
                _unlink(rows, BY_USES, key)
                _rank(heap, rows, counts, key)

    @staticmethod
    def evict(key: int, now: int, pins: I32, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> int:
        _learn(key, rows, counts, weights)
        by_lru = as_index(rows[_list(rows, RESIDENT), BY_TIME])
        by_lfu = _least_used(pins, heap, rows, counts)
        victim, expert = by_lru, NOWHERE
        if by_lru != by_lfu:
            expert = BY_LRU
            if draw(rng, 1 << 30) * 2.0**-30 >= weights[WEIGHT_LRU]:
                victim, expert = by_lfu, BY_LFU
        if rows[victim, USES] < LISTS:
            _unlink(rows, BY_USES, victim)
        elif victim == by_lfu:
            counts[SIZE] = drop_top(heap, counts[SIZE])
        _unlink(rows, BY_TIME, victim)
        rows[victim, PLACE] = expert
        rows[victim, SINCE] = counts[CLOCK] + 1
        if expert != NOWHERE:
            _push(rows, BY_TIME, _list(rows, expert), victim)
            counts[REMEMBERED + expert] += 1
            if counts[REMEMBERED + expert] > counts[MOST_REMEMBERED]:
                forgotten = as_index(rows[_list(rows, expert), BY_TIME])
                _unlink(rows, BY_TIME, forgotten)
                rows[forgotten, PLACE] = NOWHERE
                counts[REMEMBERED + expert] -= 1
        return victim

    @staticmethod
    def pin(key: int, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> None:
        _unlink(rows, BY_TIME, key)
        if rows[key, USES] < LISTS:
            _unlink(rows, BY_USES, key)

    @staticmethod
    def unpin(key: int, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> None:
        counts[CLOCK] += 1
        rows[key, LAST] = counts[CLOCK]
        _push(rows, BY_TIME, _list(rows, RESIDENT), key)
        _rank(heap, rows, counts, key)

    @staticmethod
    def remove(key: int, rows: U32, heap: LazyHeap, weights: F64, counts: I64, rng: Rng) -> None:
        _unlink(rows, BY_TIME, key)
        if rows[key, USES] < LISTS:
            _unlink(rows, BY_USES, key)
        rows[key, PLACE] = NOWHERE
