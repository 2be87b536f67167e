"""SLRU: segmented LRU.

The cache is divided into `segments` LRU lists of equal length, the lowest first. A new block enters the lowest segment
that has room. A block that is used goes to the new end of the next higher segment, or of its own when that is the
highest; a segment that is then too long hands its oldest block to the new end of the one below, and so on down. The
victim is the oldest block of the lowest segment that is not empty. So a block is the safer the more often it was
used, and one long unused sinks. Where `segments` does not divide the capacity the lowest one takes the rest.

In `object` semantics two more rules are those of libCacheSim 0.3.5, unless all blocks fit. Nothing is placed where a
segment has no room for one block (fewer than 4 blocks, with 4 segments). And a block that is demoted into a lowest
segment which took the rest makes it drop what it has above the length of the others, though the cache is not full;
here the driver asks for what is to be dropped (`expire`), so it is reported as expired.

With prefixes, a held block is in no segment. Each use raises the segment it is meant for by one, and when it is let
go it enters that at the new end.

R. Karedla, J. S. Love, B. G. Wherry, "Caching strategies to improve disk system performance", Computer 27(3), 1994;
with four segments: Q. Huang et al., "An analysis of Facebook photo caching", SOSP 2013.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

# Slots of `counters`: the length of a segment; whether blocks are placed at all; whether the lowest segment ever drops
# what it has above that length, and whether it is to do so now; then how many blocks each segment has.
LIMIT, PLACES, SHEDS, DUE, FIRST = range(5)


@njit(cache=False)
def _enter(links: Links, level: U8, counters: I64, key: int, at: int) -> None:
    """Puts `key`, which is in no list, at the new end of segment `at`, and lets what is too much sink."""
    push_new(links, level.size + at, key)
    counters[FIRST + at] += 1
    while at > 0 and counters[FIRST + at] > counters[LIMIT]:
        demoted = np.uintp(oldest(links, level.size + at))
        unlink(links, demoted)
        counters[FIRST + at] -= 1
        at -= 1
        level[demoted] = at
        push_new(links, level.size + at, demoted)
        counters[FIRST + at] += 1
        if at == 0:
            counters[DUE] = counters[SHEDS]


@njit(cache=False)
def _lift(links: Links, level: U8, counters: I64, key: int) -> None:
    """Moves `key` to the next higher segment; apart from `hit`, so that what most hits do is inlined."""
    at = np.int64(level[key])
    unlink(links, key)
    counters[FIRST + at] -= 1
    level[key] = at + 1
    _enter(links, level, counters, key, at + 1)


@policy(
    "slru",
    summary="LRU lists one above the other; a use lifts a block, the overflow sinks",
    paper="Karedla et al., Computer 27(3), 1994",
)
class Slru:
    """State: `links`, a list for each segment, the lowest first; `level` uint8[n_identities], the segment of each
    resident block; `counters` int64[4 + segments]."""

    @staticmethod
    def setup(stream: Stream, capacity: int, segments: int = 4) -> tuple[Links, U8, I64]:
        if not 1 <= segments <= 16:
            raise UsageError(f"slru: segments={segments} must lie between 1 and 16")
        counters = np.zeros(FIRST + segments, np.int64)
        counters[LIMIT] = capacity // segments
        strict = stream.semantics == "object" and capacity < stream.n_identities
        counters[PLACES] = not strict or Slru.places(capacity, segments)
        counters[SHEDS] = strict and capacity % segments > 0
        return new_lists(stream.n_identities, segments), np.zeros(stream.n_identities, np.uint8), counters

    @staticmethod
    def places(capacity: int, segments: int) -> bool:
        return capacity >= segments

    @staticmethod
    def expire(now: int, pins: I32, links: Links, level: U8, counters: I64) -> int:
        if counters[DUE] == 0 or counters[FIRST] <= counters[LIMIT]:
            counters[DUE] = 0
            return -1
        victim = np.intp(oldest(links, level.size))
        unlink(links, victim)
        counters[FIRST] -= 1
        return victim

    @staticmethod
    def admit(key: int, now: int, pins: I32, links: Links, level: U8, counters: I64) -> bool:
        return counters[PLACES] != 0

    @staticmethod
    def insert(key: int, now: int, links: Links, level: U8, counters: I64) -> None:
        at = 0
        for i in range(counters.size - FIRST):
            if counters[FIRST + i] < counters[LIMIT]:
                at = i
                break
        level[key] = at
        push_new(links, level.size + at, key)
        counters[FIRST + at] += 1

    @staticmethod
    def hit(key: int, pinned: bool, now: int, links: Links, level: U8, counters: I64) -> None:
        at = np.uintp(level[key])
        highest = np.uintp(counters.size - FIRST - 1)
        if pinned:
            level[key] = min(at + np.uintp(1), highest)
        elif at == highest:
            unlink(links, key)
            push_new(links, np.uintp(level.size) + at, key)
        else:
            _lift(links, level, counters, key)

    @staticmethod
    def evict(key: int, now: int, pins: I32, links: Links, level: U8, counters: I64) -> int:
        at = 0
        while counters[FIRST + at] == 0:
            at += 1
        victim = np.intp(oldest(links, level.size + at))
        unlink(links, victim)
        counters[FIRST + at] -= 1
        return victim

    @staticmethod
    def pin(key: int, links: Links, level: U8, counters: I64) -> None:
        unlink(links, key)
        counters[FIRST + np.int64(level[key])] -= 1

    @staticmethod
    def unpin(key: int, links: Links, level: U8, counters: I64) -> None:
        _enter(links, level, counters, key, np.int64(level[key]))

    @staticmethod
    def remove(key: int, links: Links, level: U8, counters: I64) -> None:
        unlink(links, key)
        counters[FIRST + np.int64(level[key])] -= 1
