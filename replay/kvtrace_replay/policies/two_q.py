"""2Q: a FIFO queue for new blocks, an LRU list for those that came back, and ghosts between the two.

A new block enters the queue `A1in`, where a use changes nothing. The victim is the oldest block of `A1in` while that
holds more than the share `a_in` of the capacity, and becomes a ghost (`A1out`, the share `a_out` of the capacity);
otherwise it is the least recently used block of the list `Am`, which leaves no ghost. A ghost that is asked for
enters `Am`, whose blocks go to its new end when used.

With prefixes, the blocks of `Am` leave the list while held and come back, at the new end, when let go. A held block
of `A1in` whose turn it is to go is set aside, still counts as one of the queue, and when let go stands before the
queue's old end, behind others that came back so. When all blocks of the part chosen are held the other one gives the
victim.

T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management replacement algorithm", VLDB 1994 (the
full version). Exactly the misses of libCacheSim 0.3.5, which places nothing while `A1in` has no room for one block
(fewer than 4 blocks, with these shares): so it is here in `object` semantics, unless all blocks fit; the others go on
by the rule.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink
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

QUEUE, RETURNED = range(2)  # the rings: A1in, and blocks that stand before its old end
# Slots of `counters` behind those of the rings: how many blocks are of A1in, those set aside included, and how many
# should be; whether blocks are placed at all.
IN_QUEUE, LIMIT, PLACES = range(4, 7)
# Values of `where`; PROMISED is no ghost any more, but was asked for when it was one.
NOWHERE, IN_A1, ASIDE, IN_AM, GHOST, PROMISED = range(6)


@policy(
    "2q",
    summary="new blocks in a FIFO queue; those asked for again after it, in an LRU list",
    paper="Johnson and Shasha, VLDB 1994",
)
class TwoQ:
    """State: `counters` int64[7]; `where` uint8[n_identities]; `links`, one list, `Am`, and the places of
    ghosts; `rings`, `slots` and `ghosts`, see `structures.rings`."""

    @staticmethod
    def setup(
        stream: Stream, capacity: int, a_in: float = 0.25, a_out: float = 0.5
    ) -> tuple[I64, U8, Links, I32, I32, I32]:
        if not 0 < a_in <= 1:
            raise UsageError(f"2q: a_in={a_in} must be above 0 and at most 1")
        if not 0 <= a_out <= 100:
            raise UsageError(f"2q: a_out={a_out} must lie between 0 and 100")
        counters = np.zeros(7, np.int64)
        counters[LIMIT] = int(capacity * a_in)
        strict = stream.semantics == "object" and capacity < stream.n_identities
        counters[PLACES] = not strict or TwoQ.places(capacity, a_in)
        return (
            counters,
            np.zeros(stream.n_identities, np.uint8),
            new_lists(stream.n_identities, 1),
            *new_rings(2, capacity, stream.n_identities, stream.removes),
            new_ghosts(stream.n_identities, int(capacity * a_out)),
        )

    @staticmethod
    def admit(
        key: int, now: int, pins: I32,
        counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32,
    ) -> bool:  # fmt: skip
        return counters[PLACES] != 0

    @staticmethod
    def places(capacity: int, a_in: float, **_: float) -> bool:
        return int(capacity * a_in) > 0

    @staticmethod
    def insert(key: int, now: int, counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32) -> None:
        was = where[key]
        if was == GHOST:
            forget(ghosts, links, key)
        if was >= GHOST:
            where[key] = IN_AM
            push_new(links, links.shape[0] - 1, key)
        else:
            where[key] = IN_A1
            ring_push(rings, counters, slots, QUEUE, key)
            counters[IN_QUEUE] += 1

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int,
        counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32,
    ) -> None:  # fmt: skip
        if not pinned and where[key] == IN_AM:
            unlink(links, key)
            push_new(links, links.shape[0] - 1, key)

    @staticmethod
    def evict(
        key: int, now: int, pins: I32,
        counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32,
    ) -> int:  # fmt: skip
        if where[key] == GHOST:
            forget(ghosts, links, key)
            where[key] = PROMISED
        head = links.shape[0] - 1
        while True:
            waiting = ring_length(counters, QUEUE) + ring_length(counters, RETURNED)
            least = np.intp(oldest(links, head))
            if (counters[IN_QUEUE] > counters[LIMIT] and waiting > 0) or least == head:
                ring = RETURNED if ring_length(counters, RETURNED) > 0 else QUEUE
                candidate = np.uintp(ring_pop(rings, counters, slots, ring))
                if pins[candidate] > 0:
                    where[candidate] = ASIDE
                    continue
                counters[IN_QUEUE] -= 1
                where[candidate] = GHOST
                forgotten = remember(ghosts, links, candidate)
                if forgotten >= 0:
                    where[np.uintp(forgotten)] = NOWHERE
                return np.int64(candidate)
            unlink(links, least)
            where[least] = NOWHERE
            return least

    @staticmethod
    def pin(key: int, counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32) -> None:
        if where[key] == IN_AM:
            unlink(links, key)

    @staticmethod
    def unpin(key: int, counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32) -> None:
        if where[key] == IN_AM:
            push_new(links, links.shape[0] - 1, key)
        elif where[key] == ASIDE:
            where[key] = IN_A1
            ring_push(rings, counters, slots, RETURNED, key)

    @staticmethod
    def remove(key: int, counters: I64, where: U8, links: Links, rings: I32, slots: I32, ghosts: I32) -> None:
        if where[key] == IN_AM:
            unlink(links, key)
        else:
            ring_remove(rings, counters, slots, key)
            counters[IN_QUEUE] -= 1
        where[key] = NOWHERE
