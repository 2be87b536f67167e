"""CLOCK with two bits: a block that was used gets as many further rounds as it had uses, three at most.

The rule, held blocks included, is that of the policy `clock` with `bits=2`. Exactly the misses of libCacheSim 0.3.5
(`Clock`, `n-bit-counter=2`).

A. J. Smith, "Sequentiality and prefetching in database systems", ACM TODS 3(3), 1978.
"""

from __future__ import annotations

from kvtrace_replay.policies.clock import I32, I64, U8, Clock, Flags
from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream


@policy(
    "clock2",
    summary="CLOCK that counts up to three uses",
    paper="Smith, ACM TODS 3(3), 1978",
)
class Clock2:
    """State: that of `clock`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I64, U8, Flags, I32]:
        return Clock.setup(stream, capacity, bits=2)

    insert = Clock.insert
    hit = Clock.hit
    evict = Clock.evict
    unpin = Clock.unpin
    remove = Clock.remove
