"""SIEVE: FIFO order, a mark, and a hand that stays where it stopped.

Resident blocks stand in a queue in the order in which they were placed; a use marks the block and moves nothing. A hand
walks from the oldest block towards the newest and from there back to the oldest: a marked block loses its mark and
keeps its place, the first one without a mark is the victim, and the next walk starts behind it. So blocks that are not
used soon after they were placed go early, while those that survived a round stay where they are.

With prefixes, a held block whose turn it is to go is set aside instead; when it is let go it enters the queue at the
new end. So a hold costs one look, however long it lasts.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is simpler than LRU: an efficient turn-key
eviction algorithm for web caches", NSDI 2024. Exactly the misses of libCacheSim 0.3.5.

The queue is one array and not a list: the hand's walk closes the gaps that victims leave, so blocks lie side by side.
The survivors of this round stand before `KEPT`, then comes a gap, then from `HAND` to `END` those that the hand
has still to see.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

KEPT, HAND, END = range(3)  # slots of `at`


@njit(cache=False)
def _append(queue: I32, at: I64, key: int) -> None:
    if at[END] == queue.size:  # at least `capacity` blocks left since the last time
        kept = at[KEPT]
        for i in range(at[HAND], at[END]):
            queue[kept + i - at[HAND]] = queue[i]
        at[END] -= at[HAND] - kept
        at[HAND] = kept
    queue[np.uintp(at[END])] = key
    at[END] += 1


@policy(
    "sieve",
    summary="a hand evicts the first block unused since it last came by; survivors keep their place",
    paper="Zhang et al., NSDI 2024",
)
class Sieve:
    """State: `queue` int32[2 capacity]; `at` int64[3], its three places; `used` uint8[n_identities], the marks of
    resident blocks; `aside` bool[n_identities], set aside until it is let go (empty in `object` semantics)."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I64, U8, Flags]:
        n_held = stream.n_identities if stream.semantics != "object" else 0
        return (
            np.zeros(2 * capacity, np.int32),
            np.zeros(3, np.int64),
            np.zeros(stream.n_identities, np.uint8),
            np.zeros(n_held, np.bool_),
        )

    @staticmethod
    def insert(key: int, now: int, queue: I32, at: I64, used: U8, aside: Flags) -> None:
        _append(queue, at, key)
        used[key] = 0

    @staticmethod
    def hit(key: int, pinned: bool, now: int, queue: I32, at: I64, used: U8, aside: Flags) -> None:
        used[key] = 1

    @staticmethod
    def evict(key: int, now: int, pins: I32, queue: I32, at: I64, used: U8, aside: Flags) -> int:
        hand, kept = at[HAND], at[KEPT]
        while True:
            candidate = np.uintp(queue[np.uintp(hand)])
            hand += 1
            stop = False
            if used[candidate]:
                used[candidate] = 0
                queue[np.uintp(kept)] = candidate
                kept += 1
            elif pins[candidate] > 0:
                aside[candidate] = True
            else:
                stop = True
            if hand == at[END]:
                at[END] = kept
                hand = kept = 0
            if stop:
                at[HAND], at[KEPT] = hand, kept
                return np.int64(candidate)

    @staticmethod
    def unpin(key: int, queue: I32, at: I64, used: U8, aside: Flags) -> None:
        if aside[key]:
            aside[key] = False
            _append(queue, at, key)
