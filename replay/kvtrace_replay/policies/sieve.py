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
has still to see. Where blocks are removed (`Stream.removes`), `slots` tells where each lies, and GONE fills the gap,
which the hand passes over; there always is a block at `HAND`.
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.kept import is_kept, new_kept
from kvtrace_replay.structures.rings import GONE
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

KEPT, HAND, END = range(3)  # of `at`


@njit(cache=False)
def _append(queue: I32, at: I64, slots: I32, key: int) -> None:
    if at[END] == queue.size:  # at least `capacity` blocks left since the last time
        if is_kept(slots):
            _close_gaps(queue, at, slots)
        else:
            kept = at[KEPT]
            for i in range(at[HAND], at[END]):
                queue[kept + i - at[HAND]] = queue[i]
            at[END] -= at[HAND] - kept
            at[HAND] = kept
    queue[np.uintp(at[END])] = key
    if is_kept(slots):
        slots[key] = at[END]
    at[END] += 1


@njit(cache=False)
def _close_gaps(queue: I32, at: I64, slots: I32) -> None:
    kept = _move_down(queue, slots, 0, at[KEPT], 0)
    at[END] = _move_down(queue, slots, at[HAND], at[END], kept)
    at[KEPT] = at[HAND] = kept


@njit(cache=False)
def _move_down(queue: I32, slots: I32, start: int, stop: int, to: int) -> int:
    """Moves the blocks from `start` to `stop` to the place `to` and on; returns the place behind them."""
    for i in range(start, stop):
        key = queue[i]
        if key != GONE:
            queue[to] = key
            slots[key] = to
            to += 1
    return to


@njit(cache=False)
def _pass_gaps(queue: I32, at: I64) -> None:
    """Brings the hand to a block, from the new end back to the old one."""
    for _ in range(2):
        while at[HAND] < at[END] and queue[at[HAND]] == GONE:
            at[HAND] += 1
        if at[HAND] < at[END]:
            return
        at[END] = at[KEPT]
        at[HAND] = at[KEPT] = 0


@policy(
    "sieve",
    summary="a hand evicts the first block unused since it last came by; survivors keep their place",
    paper="Zhang et al., NSDI 2024",
)
class Sieve:
    """State: `queue` int32[2 capacity]; `at` int64[3], its three places; `used` uint8[n_identities], the marks of
    resident blocks; `aside` bool[n_identities], set aside until it is let go (empty in `object` semantics); `slots`
    int32[n_identities], kept where blocks are removed."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I64, U8, Flags, I32]:
        n_held = stream.n_identities if stream.semantics != "object" else 0
        return (
            np.zeros(2 * capacity, np.int32),
            np.zeros(3, np.int64),
            np.zeros(stream.n_identities, np.uint8),
            np.zeros(n_held, np.bool_),
            new_kept(stream.n_identities, np.int32, stream.removes),
        )

    @staticmethod
    def insert(key: int, now: int, queue: I32, at: I64, used: U8, aside: Flags, slots: I32) -> None:
        _append(queue, at, slots, key)
        used[key] = 0

    @staticmethod
    def hit(key: int, pinned: bool, now: int, queue: I32, at: I64, used: U8, aside: Flags, slots: I32) -> None:
        used[key] = 1

    @staticmethod
    def evict(key: int, now: int, pins: I32, queue: I32, at: I64, used: U8, aside: Flags, slots: I32) -> int:
        hand, kept = at[HAND], at[KEPT]
        while True:
            entry = queue[np.uintp(hand)]
            candidate = np.uintp(entry)
            hand += 1
            stop = False
            if is_kept(slots) and entry == GONE:
                pass
            elif used[candidate]:
                used[candidate] = 0
                queue[np.uintp(kept)] = candidate
                if is_kept(slots):
                    slots[candidate] = kept
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
                if is_kept(slots):
                    _pass_gaps(queue, at)
                return np.int64(candidate)

    @staticmethod
    def unpin(key: int, queue: I32, at: I64, used: U8, aside: Flags, slots: I32) -> None:
        if aside[key]:
            aside[key] = False
            _append(queue, at, slots, key)

    @staticmethod
    def remove(key: int, queue: I32, at: I64, used: U8, aside: Flags, slots: I32) -> None:
        queue[slots[key]] = GONE
        _pass_gaps(queue, at)
