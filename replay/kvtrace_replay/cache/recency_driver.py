"""LRU by time stamps (`structures.recency`): the results of `object_driver` and `prefix_driver` with `lru`.

In `prefix` semantics for imports, where requests finish right after their admission, and with a cache that holds the
largest of them. There a request's order of events does not matter beyond this: what it refers to is resident in the
end, and the youngest, the head of its chain above all; what had to go for that is what was used longest ago and is not
its own. So a request goes over its references twice: first it takes its blocks out of the order and counts what is
missing, then it gives them their new slots, the tail before the head. The first time, the references ahead are asked
for early; the second time they are near.

Output blocks are taken after the prompt has made its room, for which it may have evicted some of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.totals import BLOCK_HITS, EVICTIONS, RESIDENT, TOKEN_HITS
from kvtrace_replay.structures.machine import prefetch
from kvtrace_replay.structures.recency import (
    NEVER,
    NOW,
    TAIL,
    TAKEN,
    clear,
    drop_oldest,
    live,
    make_slots,
    too_few,
    use,
)
from kvtrace_replay.structures.slots import ONE
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_AHEAD = 48  # so many references ahead memory is asked for


@njit
def object_recency_driver(
    refs: I32, indptr: I64, last_tokens: I32, block_size: int, first: int, last: int, capacity: int,
    stamps: U32, bits: U64, at: I64, request_hits: I64, totals: I64,
) -> None:  # fmt: skip
    """Replays the requests `first` to `last` - 1 into `capacity` blocks, in `object` semantics, going on from where the
    call before left them.

    Modified in place: `stamps`, `bits` and `at`, made by `new_recency`; `request_hits` int64[n_requests]; `totals`, to
    which is added.
    """
    resident = totals[RESIDENT]
    evicted = np.int64(0)
    tail, now = np.uint64(at[TAIL]), np.uint64(at[NOW])
    for r in range(first, last):
        hits, hit = np.int64(0), np.int64(0)
        for i in range(indptr[r], indptr[r + 1]):
            if too_few(1, now, bits):
                tail, now = ONE, make_slots(tail, stamps, bits)
            if i + _AHEAD < refs.size:
                prefetch(stamps, np.intp(np.uint32(refs[i + _AHEAD])))
            key = np.intp(np.uint32(refs[i]))
            stamp = stamps[key]
            found = live(stamp, tail)
            hit = np.int64(found)
            hits += hit
            clear(stamp if found else NEVER, bits)
            now = use(key, now, stamps, bits)
            if not found:
                resident += 1
                if resident > capacity:
                    tail = drop_oldest(tail, bits)
                    resident -= 1
                    evicted += 1
        request_hits[r] = hits
        totals[BLOCK_HITS] += hits
        totals[TOKEN_HITS] += hits * block_size - hit * (block_size - last_tokens[r])
    at[TAIL], at[NOW] = np.int64(tail), np.int64(now)
    totals[EVICTIONS] += evicted
    totals[RESIDENT] = resident


@njit(cache=False)
def _take(refs: I32, start: int, stop: int, limit: int, tail: np.uint64, stamps: U32, bits: U64) -> tuple[Any, Any]:
    """Takes the blocks of `refs[start:stop]` out of the order; returns how many of them were missing, and how many,
    before `limit` and from the first on, were not. No branch: what hits would be as hard to guess as it is to cache."""
    missing = np.int64(0)
    hits = np.int64(0)
    whole = np.int64(1)
    for p in range(start, stop):
        if p + _AHEAD < refs.size:
            prefetch(stamps, np.intp(np.uint32(refs[p + _AHEAD])))
        key = np.intp(np.uint32(refs[p]))
        stamp = stamps[key]
        found = live(stamp, tail)
        missing += 1 - np.int64(found)
        whole &= np.int64(found)
        hits += whole & np.int64(p < limit)
        clear(stamp if found and stamp != TAKEN else NEVER, bits)
        stamps[key] = TAKEN
    return missing, hits


@njit
def prefix_recency_driver(
    refs: I32, indptr: I64, last_tokens: I32, block_size: int, prompt_blocks: I32, hit_cap: I32,
    first: int, last: int, capacity: int, stamps: U32, bits: U64, at: I64, request_hits: I64, totals: I64,
) -> None:  # fmt: skip
    """As `object_recency_driver`, in `prefix` semantics, for an import, into at least as many blocks as the largest
    request has."""
    resident = totals[RESIDENT]
    evicted = np.int64(0)
    tail, now = np.uint64(at[TAIL]), np.uint64(at[NOW])
    for r in range(first, last):
        start, stop = indptr[r], indptr[r + 1]
        if too_few(stop - start, now, bits):
            tail, now = ONE, make_slots(tail, stamps, bits)
        middle = start + prompt_blocks[r]
        hits = 0
        for part in range(2):
            begin, end = (start, middle) if part == 0 else (middle, stop)
            if begin == end:
                continue
            missing, found = _take(refs, begin, end, min(middle, start + hit_cap[r]), tail, stamps, bits)
            if part == 0:
                hits = found
            resident += missing
            while resident > capacity:
                tail = drop_oldest(tail, bits)
                resident -= 1
                evicted += 1
        for p in range(stop - 1, start - 1, -1):
            key = np.intp(np.uint32(refs[p]))
            clear(stamps[key] if stamps[key] != TAKEN else NEVER, bits)
            now = use(key, now, stamps, bits)
        request_hits[r] = hits
        totals[BLOCK_HITS] += hits
        totals[TOKEN_HITS] += hits * block_size
        if hits > 0 and start + hits == stop:
            totals[TOKEN_HITS] -= block_size - last_tokens[r]
    at[TAIL], at[NOW] = np.int64(tail), np.int64(now)
    totals[EVICTIONS] += evicted
    totals[RESIDENT] = resident
