"""OPT with bypass: Belady's rule for a cache that need not place what it missed.

A missing block whose next use lies farther ahead than that of every resident block is served without a place;
otherwise the resident block whose next use is farthest goes. No policy that may refuse has fewer misses, so that this
is the bound for policies that do (`gdsf` in `object` semantics, `second-touch`): `opt` bounds those that always
place. Both hold for `object` semantics, where a use is a reference.

There is no such rule with prefixes. A request needs its blocks whether or not they are worth keeping, and a bypassed
block would make the blocks behind it in its chain useless, so that the farthest next use is no longer the right
measure.

Next uses are kept as in `opt`: a set of bits whose highest is the farthest.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966; with
bypass: P. Michaud, "Some mathematical facts about optimal cache replacement", ACM TACO 13(4), 2016.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.opt import Opt
from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.bitset import Starts, Words, clear_bit, highest_bit, set_bit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Slots of `room`.
RESIDENT, CAPACITY = 0, 1


@policy(
    "opt-bypass",
    summary="as opt, but does not place a block whose next use is farther ahead than that of all others",
    paper="Belady, IBM Systems Journal 5(2), 1966; Michaud, ACM TACO 13(4), 2016",
    needs_future=True,
    semantics=("object",),
)
class OptBypass:
    """State: that of `opt`, and `room` int64[2], resident blocks and capacity."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I32, I32, Words, Starts, I64]:
        return (*Opt.setup(stream, capacity), np.array([0, capacity], np.int64))

    @staticmethod
    def insert(
        key: int, now: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts, room: I64
    ) -> None:
        priority[key] = after[now]
        set_bit(words, starts, after[now])
        room[RESIDENT] += 1

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts, room: I64
    ) -> None:
        clear_bit(words, starts, priority[key])
        set_bit(words, starts, after[now])
        priority[key] = after[now]

    @staticmethod
    def admit(
        key: int, now: int, pins: I32, after: I32, owner: I32, priority: I32, words: Words, starts: Starts, room: I64
    ) -> bool:
        # One that is never used again has a rank from n_refs on: not worth an eviction, whoever else is worthless.
        return room[RESIDENT] < room[CAPACITY] or after[now] < min(highest_bit(words, starts), after.size)

    @staticmethod
    def evict(
        key: int, now: int, pins: I32, after: I32, owner: I32, priority: I32, words: Words, starts: Starts, room: I64
    ) -> int:
        farthest = highest_bit(words, starts)
        clear_bit(words, starts, farthest)
        room[RESIDENT] -= 1
        return owner[farthest]

    @staticmethod
    def remove(key: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts, room: I64) -> None:
        clear_bit(words, starts, priority[key])
        room[RESIDENT] -= 1
