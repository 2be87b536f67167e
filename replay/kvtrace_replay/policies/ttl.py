"""TTL: LRU whose blocks are dropped when they have not been used for a while.

Hosted services price their prompt caches so: a prefix stays for `seconds` after its last use, and each use starts the
time anew (five minutes and one hour are common). What is evicted for want of room is chosen by `lru`; with infinite
capacity only time drops blocks, which then count as `expired_blocks` and not as evictions.

The clock is the arrival time of the latest request that was begun (never going back, where requests are begun out of
order). A block is dropped at the beginning of the first request that arrives more than `seconds` after its last use.
In `object` semantics a block is used when its request arrives; with prefixes when the last request that held it lets
go of it, and until then it does not age. The open loop does not know when a request ends on the clock, so that this
moment, too, has the arrival time of the latest request begun before.

It takes a trace with times: without, it would expire blocks by an invented clock, and is refused.

The rule stands in the documentation of hosted models, for instance "Prompt caching" in Anthropic's API reference.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.indices import as_index
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Slots of `clock`.
NOW_NS, LIFETIME_NS = 0, 1


@policy(
    "ttl",
    summary="lru, and blocks not used for a while are dropped, as hosted prompt caches do",
    paper='documentation of hosted models, e.g. Anthropic\'s API reference, "Prompt caching"',
    open_loop=True,
)
class Ttl:
    """State: `links`, one list of the blocks that may be evicted, by last use; `used` int64[n_identities], when that
    was in ns; `arrival` int64[n_requests] in ns; `clock` int64[2]: the time and how long a block stays, in ns."""

    @staticmethod
    def setup(stream: Stream, capacity: int, seconds: float = 300.0) -> tuple[Links, I64, I64, I64]:
        if not (math.isfinite(seconds) and 0 < seconds < 9e9):
            raise UsageError(f"ttl: seconds={seconds} must be a time above 0 and below 9e9")
        if not stream.timed:
            raise UsageError(
                "policy 'ttl' needs the times at which requests arrive, which this trace lacks: import one that has "
                "them, or replay lru"
            )
        start = int(stream.arrival_ns.min(initial=2**62))
        return (
            new_lists(stream.n_identities, 1),
            np.zeros(stream.n_identities, np.int64),
            stream.arrival_ns,
            np.array([start, round(seconds * 1e9)], np.int64),
        )

    @staticmethod
    def begin(request: int, now: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        clock[NOW_NS] = max(clock[NOW_NS], arrival[request])

    @staticmethod
    def expire(now: int, pins: I32, links: Links, used: I64, arrival: I64, clock: I64) -> int:
        head = links.shape[0] - 1
        first = as_index(oldest(links, head))
        if first == head or clock[NOW_NS] - used[first] <= clock[LIFETIME_NS]:
            return -1
        unlink(links, first)
        return first

    @staticmethod
    def insert(key: int, now: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        push_new(links, links.shape[0] - 1, key)
        used[key] = clock[NOW_NS]

    @staticmethod
    def hit(key: int, pinned: bool, now: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        if not pinned:
            unlink(links, key)
            push_new(links, links.shape[0] - 1, key)
            used[key] = clock[NOW_NS]

    @staticmethod
    def evict(key: int, now: int, pins: I32, links: Links, used: I64, arrival: I64, clock: I64) -> int:
        victim = oldest(links, links.shape[0] - 1)
        unlink(links, victim)
        return victim

    @staticmethod
    def pin(key: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        unlink(links, key)

    @staticmethod
    def unpin(key: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        push_new(links, links.shape[0] - 1, key)
        used[key] = clock[NOW_NS]

    @staticmethod
    def remove(key: int, links: Links, used: I64, arrival: I64, clock: I64) -> None:
        unlink(links, key)
