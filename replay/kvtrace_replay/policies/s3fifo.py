"""S3-FIFO: a small queue for blocks that have still to prove themselves, a main queue, and ghosts.

A new block enters the small queue, which is to hold the share `small` of the capacity; one that left the small queue
not long ago and is asked for again, a ghost, enters the main queue at once. A use only counts, up to 3. The victim
comes from the main queue when that holds more than the rest of the capacity, or when the small one is empty;
otherwise from the small one:
- the oldest block of the small queue is the victim and becomes a ghost, unless it was used `threshold` times or more:
  then it goes to the new end of the main queue, its count back at 0, and the next is looked at;
- the oldest block of the main queue is the victim, unless it was used: then its count falls by one, it goes to the
  new end, and the next is looked at.
There are as many ghosts as the share `ghost` of the capacity. Until the first eviction, what the small queue has no
room for enters the main queue.

With prefixes, a held block whose turn it is to go is set aside instead, and still counts as one of its queue. When it
is let go, one of the small queue stands before that queue's old end, behind others that came back so; one of the main
queue enters that at its new end. When all blocks of the queue chosen are set aside the other one gives the victim.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023. Exactly
the misses of libCacheSim 0.3.5 from 10 blocks on. That places nothing at all while the small queue has room for one
block only (fewer than 20 blocks, with these shares), and does not run where it has room for none. So `object`
semantics place nothing in either case, unless all blocks fit; the others take a small queue of one block then.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.rings import (
    forget,
    new_ghosts,
    new_rings,
    remember,
    ring_length,
    ring_pop,
    ring_push,
    ring_remove,
)
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

SMALL, MAIN, RETURNED = range(3)  # the rings; the last holds blocks that stand before the old end of the small queue
# Slots of `counters` behind those of the rings: how many blocks are of each queue, those set aside included, and how
# many should be; how many uses lead to the main queue; whether blocks are placed at all; whether there was an eviction.
IN_SMALL, IN_MAIN, SMALL_LIMIT, MAIN_LIMIT, THRESHOLD, PLACES, EVICTED = range(6, 13)
# Bits of `marks`: the count; a ghost; no ghost any more, but asked for when it was one; set aside.
COUNT, GHOST, PROMISED, ASIDE_SMALL, ASIDE_MAIN = 3, 4, 8, 16, 32


@policy(
    "s3fifo",
    summary="three FIFO queues: small, main and ghosts; unused blocks leave by the small one",
    paper="Yang et al., SOSP 2023",
)
class S3Fifo:
    """State: `counters` int64[13]; `marks` uint8[n_identities]; `rings` and `slots`, `ghosts` and `places`
    int32[n_identities, 1], see `structures.rings`."""

    @staticmethod
    def setup(
        stream: Stream, capacity: int, small: float = 0.1, ghost: float = 0.9, threshold: int = 2
    ) -> tuple[I64, U8, I32, I32, I32, I32]:
        if not 0 < small < 1:
            raise UsageError(f"s3fifo: small={small} must lie between 0 and 1")
        if not 0 <= ghost <= 100:
            raise UsageError(f"s3fifo: ghost={ghost} must lie between 0 and 100")
        if not 1 <= threshold <= 3:
            raise UsageError(f"s3fifo: threshold={threshold} must be 1, 2 or 3")
        small_blocks = int(capacity * small)
        counters = np.zeros(13, np.int64)
        counters[SMALL_LIMIT] = max(1, small_blocks)
        counters[MAIN_LIMIT] = capacity - small_blocks
        counters[THRESHOLD] = threshold
        strict = stream.semantics == "object" and capacity < stream.n_identities
        counters[PLACES] = not strict or S3Fifo.places(capacity, small)
        rings, slots = new_rings(3, capacity, stream.n_identities, stream.removes)
        return (
            counters,
            np.zeros(stream.n_identities, np.uint8),
            rings,
            slots,
            new_ghosts(stream.n_identities, int(capacity * ghost)),
            np.zeros((stream.n_identities, 1), np.int32),
        )

    @staticmethod
    def places(capacity: int, small: float, **_: float) -> bool:
        return int(capacity * small) > 1

    @staticmethod
    def admit(
        key: int, now: int, pins: I32,
        counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32,
    ) -> bool:  # fmt: skip
        return counters[PLACES] != 0

    @staticmethod
    def insert(key: int, now: int, counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32) -> None:
        was = marks[key]
        marks[key] = 0
        if was & GHOST:
            forget(ghosts, places, key)
        full = counters[EVICTED] == 0 and counters[IN_SMALL] >= counters[SMALL_LIMIT]
        if was & (GHOST | PROMISED) or full:
            ring_push(rings, counters, slots, MAIN, key)
            counters[IN_MAIN] += 1
        else:
            ring_push(rings, counters, slots, SMALL, key)
            counters[IN_SMALL] += 1

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int,
        counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32,
    ) -> None:  # fmt: skip
        mark = marks[key]
        if (mark & COUNT) < COUNT:
            marks[key] = mark + 1

    @staticmethod
    def evict(
        key: int, now: int, pins: I32,
        counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32,
    ) -> int:  # fmt: skip
        counters[EVICTED] = 1
        if marks[key] & GHOST:
            forget(ghosts, places, key)
            marks[key] = PROMISED
        while True:
            over = counters[IN_MAIN] > counters[MAIN_LIMIT] and ring_length(counters, MAIN) > 0
            if over or ring_length(counters, SMALL) + ring_length(counters, RETURNED) == 0:
                while ring_length(counters, MAIN) > 0:
                    candidate = np.uintp(ring_pop(rings, counters, slots, MAIN))
                    if marks[candidate] & COUNT:
                        marks[candidate] -= 1
                        ring_push(rings, counters, slots, MAIN, candidate)
                    elif pins[candidate] > 0:
                        marks[candidate] = ASIDE_MAIN
                    else:
                        counters[IN_MAIN] -= 1
                        return np.int64(candidate)
            while ring_length(counters, SMALL) + ring_length(counters, RETURNED) > 0:
                ring = RETURNED if ring_length(counters, RETURNED) > 0 else SMALL
                candidate = np.uintp(ring_pop(rings, counters, slots, ring))
                if (marks[candidate] & COUNT) >= counters[THRESHOLD]:
                    marks[candidate] = 0
                    ring_push(rings, counters, slots, MAIN, candidate)
                    counters[IN_SMALL] -= 1
                    counters[IN_MAIN] += 1
                elif pins[candidate] > 0:
                    marks[candidate] |= ASIDE_SMALL
                else:
                    counters[IN_SMALL] -= 1
                    marks[candidate] = GHOST
                    forgotten = remember(ghosts, places, candidate)
                    if forgotten >= 0:
                        marks[np.uintp(forgotten)] = 0
                    return np.int64(candidate)

    @staticmethod
    def unpin(key: int, counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32) -> None:
        mark = marks[key]
        if mark & ASIDE_SMALL:
            marks[key] = mark & COUNT
            ring_push(rings, counters, slots, RETURNED, key)
        elif mark & ASIDE_MAIN:
            marks[key] = mark & COUNT
            ring_push(rings, counters, slots, MAIN, key)

    @staticmethod
    def remove(key: int, counters: I64, marks: U8, rings: I32, slots: I32, ghosts: I32, places: I32) -> None:
        if ring_remove(rings, counters, slots, key) == MAIN:
            counters[IN_MAIN] -= 1
        else:
            counters[IN_SMALL] -= 1
        marks[key] = 0
