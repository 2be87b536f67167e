"""LFUDA: LFU with dynamic aging.

As LFU, but ordered by a priority: the count plus the age that the cache had at the block's last use. The age is the
priority of the last victim, so blocks that were popular once fall behind newer ones in the end. Of equal priorities
the one whose last use is longest ago goes.

With prefixes a held block is no candidate; letting go of it is its last use, though one that does not count, and its
priority becomes its count plus the age at that moment.

M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content management techniques for web proxy
caches", ACM SIGMETRICS Performance Evaluation Review 27(4), 2000 (report HPL-98-173, 1999): K = C F + L with C = 1.
libCacheSim has another rule under this name (a hit adds the lowest priority in the cache to the block's own), so misses
differ: 1152 in its 0.3.5 against 1217 here for 3000 Zipf references to 60 blocks with room for 20, 849 against 844 with
room for 30; below 19 it did not end on that stream.
"""

from __future__ import annotations

from kvtrace_replay.policies.lfu import I64, U32, Lfu, setup_counts
from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lazy_heap import LazyHeap


@policy(
    "lfuda",
    summary="LFU whose counts age: the last victim's priority is added to those of later uses",
    paper="Arlitt et al., Performance Evaluation Review 27(4), 2000",
)
class Lfuda:
    """State: that of `lfu`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[U32, I64, LazyHeap, U32]:
        return setup_counts(stream, capacity, ages=True)

    insert = Lfu.insert
    hit = Lfu.hit
    evict = Lfu.evict
    pin = Lfu.pin
    unpin = Lfu.unpin
    remove = Lfu.remove
