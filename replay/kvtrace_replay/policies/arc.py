"""ARC: two LRU lists that share the cache, and a share that follows what the ghosts say.

`T1` holds blocks used once since they were placed, `T2` those used more often; a use moves a block to the new end of
`T2`. A victim of `T1` becomes a ghost in `B1`, one of `T2` a ghost in `B2`. `p` is how long `T1` should be: the victim
is the oldest of `T1` when that is longer than `p`, otherwise the oldest of `T2`. Where a missing block is a ghost of
`B1`, `T1` was too short: `p` grows by max(1, |B2| / |B1|). Where it is one of `B2`, `p` shrinks by max(1, |B1| /
|B2|) and, if `T1` is just as long as `p`, the victim is of `T1`. In both cases the block enters `T2`; all other new
blocks enter `T1`. `T1` and `B1` together have as many blocks as the capacity at most, all four twice as many. `p` is a
real number.

With prefixes, a held block counts as one of its list but is not in it; when let go it enters the new end. When all
blocks of the list chosen are held the other one gives the victim.

N. Megiddo, D. S. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4. Exactly the
misses of libCacheSim 0.3.5.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink
from kvtrace_replay.structures.rings import COUNT, forget, forget_oldest, new_ghosts, remember
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

# Values of `which`: the lists, also of `links` and `numbers`; the ghosts; known to none; asked for when it was a ghost.
T1, T2, B1, B2, NOWHERE, PROMISED = range(6)
CAPACITY, P = 2, 3  # of `numbers`, behind the lengths of the two lists


@njit(cache=False)
def _adapt(key: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
    """Forgets the ghost `key` and moves `p`."""
    n1, n2 = float(b1[COUNT]), float(b2[COUNT])
    if which[key] == B1:
        numbers[P] = min(numbers[P] + max(n2 / n1, 1.0), numbers[CAPACITY])
        forget(b1, links, key)
    else:
        numbers[P] = max(numbers[P] - max(n1 / n2, 1.0), 0.0)
        forget(b2, links, key)
    which[key] = PROMISED


@policy(
    "arc",
    summary="balances recency and frequency by the hits of ghosts",
    paper="Megiddo and Modha, FAST 2003",
)
class Arc:
    """State: `which` uint8[n_identities], where each block is; `links`, the lists T1 and T2, and the places of ghosts;
    `numbers` float64[4]; `b1` and `b2`, ghosts, see `structures.rings`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[U8, Links, F64, I32, I32]:
        return (
            np.full(stream.n_identities, NOWHERE, np.uint8),
            new_lists(stream.n_identities, 2),
            np.array([0, 0, capacity, 0], np.float64),
            new_ghosts(stream.n_identities, 2 * capacity),
            new_ghosts(stream.n_identities, 2 * capacity),
        )

    @staticmethod
    def insert(key: int, now: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
        was = which[key]
        if was == B1 or was == B2:  # noqa: SIM109  a tuple costs
            _adapt(key, which, links, numbers, b1, b2)
        if was == NOWHERE:
            which[key] = T1
            push_new(links, which.size + T1, key)
            numbers[T1] += 1
        else:
            which[key] = T2
            push_new(links, which.size + T2, key)
            numbers[T2] += 1

    @staticmethod
    def hit(key: int, pinned: bool, now: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
        if which[key] == T1:
            which[key] = T2
            numbers[T1] -= 1
            numbers[T2] += 1
        if not pinned:
            unlink(links, key)
            push_new(links, which.size + T2, key)

    @staticmethod
    def evict(key: int, now: int, pins: I32, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> int:
        was = which[key]
        t1, t2 = which.size + T1, which.size + T2
        leaves_ghost = True
        if was == B1 or was == B2:  # noqa: SIM109
            _adapt(key, which, links, numbers, b1, b2)
        elif was != PROMISED:
            if numbers[T1] + b1[COUNT] >= numbers[CAPACITY]:
                if b1[COUNT] > 0:
                    which[np.uintp(forget_oldest(b1))] = NOWHERE
                else:
                    leaves_ghost = oldest(links, t1) == t1
            elif numbers[T1] + numbers[T2] + b1[COUNT] + b2[COUNT] >= 2 * numbers[CAPACITY] and b2[COUNT] > 0:
                which[np.uintp(forget_oldest(b2))] = NOWHERE
        above = numbers[T1] > numbers[P] or (numbers[T1] == numbers[P] and was == B2)
        first = numbers[T2] == 0 or (numbers[T1] > 0 and above) or not leaves_ghost
        # Where all blocks of the list are held, the other one gives the victim.
        first = oldest(links, t1) != t1 if first else oldest(links, t2) == t2
        forgotten = -1
        if first:
            victim = np.uintp(oldest(links, t1))
            unlink(links, victim)
            numbers[T1] -= 1
            which[victim] = NOWHERE
            if leaves_ghost:
                which[victim] = B1
                forgotten = np.int64(remember(b1, links, victim))
        else:
            victim = np.uintp(oldest(links, t2))
            unlink(links, victim)
            numbers[T2] -= 1
            which[victim] = B2
            forgotten = np.int64(remember(b2, links, victim))
        if forgotten >= 0:
            which[np.uintp(forgotten)] = NOWHERE
        return np.int64(victim)

    @staticmethod
    def pin(key: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
        unlink(links, key)

    @staticmethod
    def unpin(key: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
        push_new(links, which.size + np.int64(which[key]), key)

    @staticmethod
    def remove(key: int, which: U8, links: Links, numbers: F64, b1: I32, b2: I32) -> None:
        unlink(links, key)
        numbers[np.intp(which[key])] -= 1
        which[key] = NOWHERE
