"""LRU over an import in `prefix` semantics: the results of `prefix_driver` with `lru`, by time stamps and no list.

An import's requests finish right after their admission, and the cache can hold the largest of them. So a request's
order of events does not matter beyond this: what it refers to is resident in the end, and the youngest, the head of
its chain above all; what had to go for that is what was used longest ago and is not its own.

So each reference takes the next slot of a log, and a block's stamp is the slot of its last reference. The log is read
from its old end when a victim is needed; an entry whose block has another stamp by now is dead. A request goes over its
references twice: first it marks its blocks as taken, which makes their entries dead and counts what is missing, then it
gives them their new slots, the tail before the head. The first time, the references ahead are known and asked for
early; the second time they are near. A list costs three places in memory for each use, its neighbours', and none of
them is known ahead.

Output blocks are taken after the prompt has made its room, for which it may have evicted some of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.totals import BLOCK_HITS, EVICTIONS, RESIDENT, TOKEN_HITS
from kvtrace_replay.structures.machine import prefetch
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

# Values of `stamps` that are no slots: not resident; taken by the request that is being served.
ABSENT, TAKEN = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
TAIL, NOW = 0, 1  # slots of `at`: how many entries the log has lost, and ever had
_MOST_SLOTS = 2**31
_SLOTS_PER_BLOCK = 8  # what the log has beyond the blocks used last is gaps: it is closed up the less often
# So many references ahead, and entries of the log, memory is asked for.
_AHEAD, _LOG_AHEAD = 48, 24


def new_log(n_identities: int, capacity: int, n_refs: int, longest: int) -> tuple[U32, U32, I64]:
    """(stamps, log, at) of an empty cache of `capacity` blocks, for requests of `longest` references at most."""
    wanted = max(min(_SLOTS_PER_BLOCK * capacity, n_refs), capacity + 2 * longest, 2)
    slots = min(1 << (wanted - 1).bit_length(), _MOST_SLOTS)
    return np.full(n_identities, ABSENT, np.uint32), np.zeros(slots, np.uint32), np.zeros(2, np.int64)


@njit(cache=False)
def _close_up(stamps: U32, log: U32, at: I64) -> None:
    """Takes the dead entries out of the log."""
    mask = log.size - 1
    to = at[TAIL]
    for i in range(at[TAIL], at[NOW]):
        slot = np.intp(i & mask)
        prefetch(stamps, np.intp(log[np.intp((i + _LOG_AHEAD) & mask)]))
        key = np.intp(log[slot])
        if stamps[key] == slot:
            log[np.intp(to & mask)] = key
            stamps[key] = np.uint32(to & mask)
            to += 1
    at[NOW] = to


@njit(cache=False)
def _take(refs: I32, start: int, stop: int, limit: int, stamps: U32) -> tuple[Any, Any]:
    """Marks the blocks of `refs[start:stop]`; returns how many of them were missing, and how many, before `limit` and
    from the first on, were not. No branch: what hits would be as hard to guess as it is to cache."""
    missing = np.int64(0)
    hits = np.int64(0)
    whole = np.int64(1)
    for p in range(start, stop):
        if p + _AHEAD < refs.size:
            prefetch(stamps, np.intp(np.uint32(refs[p + _AHEAD])))
        key = np.intp(np.uint32(refs[p]))
        lacks = np.int64(stamps[key] == ABSENT)
        missing += lacks
        whole &= 1 - lacks
        hits += whole & np.int64(p < limit)
        stamps[key] = TAKEN
    return missing, hits


@njit(cache=False)
def _make_room(needed: Any, stamps: U32, log: U32, at: I64) -> None:
    """Evicts so many of the blocks used longest ago that are not taken."""
    mask = log.size - 1
    tail, now = at[TAIL], at[NOW]
    while needed > 0 and tail < now:
        slot = np.intp(tail & mask)
        prefetch(stamps, np.intp(log[np.intp((tail + _LOG_AHEAD) & mask)]))
        key = np.intp(log[slot])
        stamp = stamps[key]
        lives = stamp == slot
        stamps[key] = ABSENT if lives else stamp
        needed -= np.int64(lives)
        tail += 1
    at[TAIL] = tail


@njit
def recency_driver(
    refs: I32, indptr: I64, last_tokens: I32, block_size: int, prompt_blocks: I32, hit_cap: I32,
    first: int, last: int, capacity: int, stamps: U32, log: U32, at: I64, request_hits: I64, totals: I64,
) -> None:  # fmt: skip
    """Replays the requests `first` to `last` - 1 into `capacity` blocks, at least as many as the largest of them has,
    going on from where the call before left them.

    Modified in place: `stamps`, `log` and `at`, made by `new_log`; `request_hits` int64[n_requests]; `totals`, to which
    is added.
    """
    mask = log.size - 1
    resident = totals[RESIDENT]
    for r in range(first, last):
        start, stop = indptr[r], indptr[r + 1]
        if at[NOW] - at[TAIL] + stop - start > log.size:
            _close_up(stamps, log, at)
        middle = start + prompt_blocks[r]
        hits = 0
        for part in range(2):
            begin, end = (start, middle) if part == 0 else (middle, stop)
            if begin == end:
                continue
            missing, found = _take(refs, begin, end, min(middle, start + hit_cap[r]), stamps)
            if part == 0:
                hits = found
            resident += missing
            if resident > capacity:
                _make_room(resident - capacity, stamps, log, at)
                totals[EVICTIONS] += resident - capacity
                resident = capacity
        now = at[NOW]
        for p in range(stop - 1, start - 1, -1):
            key = np.intp(np.uint32(refs[p]))
            slot = np.intp(now & mask)
            stamps[key] = np.uint32(slot)
            log[slot] = np.uint32(key)
            now += 1
        at[NOW] = now
        request_hits[r] = hits
        totals[BLOCK_HITS] += hits
        totals[TOKEN_HITS] += hits * block_size
        if hits > 0 and start + hits == stop:
            totals[TOKEN_HITS] -= block_size - last_tokens[r]
    totals[RESIDENT] = resident
