"""workload-aware: one queue for each class of requests, evicted from by predicted reuse.

A class is what the trace calls a request's (type, turn). A block belongs to the class of the request that used it
last and stands in that class's queue, ordered by last use; blocks of one request are queued the tail before
the head. The victim is the head of one of the queues: that of the class whose head is least likely to be used
within the next `life_s` seconds (60).

The chance comes from past uses. When a block is used again after a time x, x is a reuse time of the class it
belonged to until then; blocks that have left the cache meanwhile count too. With n uses by class c, k of them
followed by a reuse, and m the mean of their reuse times, a block whose last use was t ago is used within the next
`life_s` with the chance

    (k / n) * exp(-t / m) * (1 - exp(-life_s / m)),

an exponential fitted by its mean. m is at least 1 ms. A class with fewer than `samples` reuses (16) takes k, n
and m of all classes together; before the first reuse of any, the head used longest ago is the victim. Of equal
chances the block deeper in its prompt goes first, then the one used longer ago.

Time is the arrival time of the latest request looked up; where a trace has none, a second lies between two
requests. Where it has no classes, all requests are of one: then this is `lru`. With prefixes a block enters its
queue when the last request that holds it ends. The heads of queues need not be leaves of a tree, so this does
not run in `radix` semantics.

J. Wang et al., "KVCache Cache in the Wild: Characterizing and Optimizing KVCache Cache at a Large Cloud Provider",
USENIX ATC 2025 (arXiv 2506.02634). From there: queues, exponentials, the time window and the tie by offset. The
estimates from running means, and what stands in where samples are few, are ours.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
State = tuple[I32, I32, I64, I32, Links, I64, F64, I64]

TIME, CLASS, DEPTH, STAMP = range(4)  # columns of `facts`; STAMP orders entries into queues
USES, REUSES, SUM_S, LOG_CHANCE, RATE, STALE = range(6)  # columns of `classes`; its last row is all together
NOW_NS, CLOCK, LIFE_US, SAMPLES, NEVER_PINNED = range(5)  # slots of `at`
NO_CLASS = -1
_LEAST_S = 1e-3


@policy(
    "workload-aware",
    summary="evicts from the queue of the request class whose head is least likely to be reused (Alibaba)",
    paper="Wang et al., USENIX ATC 2025, arXiv 2506.02634",
    open_loop=True,
    semantics=("object", "prefix"),
)
class WorkloadAware:
    """State: `request_of` int32[n_refs], `request_class` int32[n_requests], `arrival_ns` int64[n_requests] and `depths`
    int32[n_refs] of the stream; `links`, a list a class; `facts` int64[n_identities, 4], of blocks ever used; `classes`
    float64[n_classes + 1, 6]; `at` int64[5]."""

    @staticmethod
    def setup(stream: Stream, capacity: int, life_s: float = 60.0, samples: int = 16) -> State:
        if not 1e-3 <= life_s <= 1e9 or math.isnan(life_s):
            raise UsageError(f"workload-aware: life_s={life_s} must lie between 0.001 and 1e9 seconds")
        if samples < 1:
            raise UsageError(f"workload-aware: samples={samples} must be 1 or more")
        n_classes = int(stream.request_class.max(initial=0)) + 1
        if int(stream.request_class.min(initial=0)) < 0:
            raise UsageError("workload-aware: request classes must not be negative")
        facts = np.zeros((stream.n_identities, 4), np.int64)
        facts[:, CLASS] = NO_CLASS
        at = np.zeros(5, np.int64)
        at[NOW_NS] = np.iinfo(np.int64).min
        at[LIFE_US], at[SAMPLES] = round(life_s * 1e6), samples
        at[NEVER_PINNED] = stream.semantics == "object"
        classes = np.zeros((n_classes + 1, 6))
        classes[:, STALE] = 1
        links = new_lists(stream.n_identities, n_classes)
        request_class = stream.request_class
        return stream.request_of(), request_class, stream.arrival_ns, stream.depths(), links, facts, classes, at

    @staticmethod
    def begin(
        request: int, now: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        at[NOW_NS] = max(at[NOW_NS], arrival_ns[request])

    @staticmethod
    def insert(
        key: int, now: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        _use(key, request_class[request_of[now]], depths[now], facts, classes, at)
        _queue(key, links, facts, classes, at)

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        if not pinned:
            unlink(links, key)
        _use(key, request_class[request_of[now]], depths[now], facts, classes, at)
        if not pinned:
            _queue(key, links, facts, classes, at)

    @staticmethod
    def evict(
        key: int, now: int, pins: I32,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> int:  # fmt: skip
        n_classes = classes.shape[0] - 1
        n = links.shape[0] - n_classes
        victim = -1
        least = 0.0
        for c in range(n_classes):
            head = int(oldest(links, n + c))
            if head >= n:
                continue
            chance = _log_chance(c, facts[head, TIME], classes, at)
            if victim >= 0:
                if chance > least:
                    continue
                if chance == least:
                    if facts[head, DEPTH] < facts[victim, DEPTH]:
                        continue
                    if facts[head, DEPTH] == facts[victim, DEPTH] and facts[head, STAMP] > facts[victim, STAMP]:
                        continue
            victim = head
            least = chance
        if victim >= 0:
            unlink(links, victim)
        return victim

    @staticmethod
    def pin(
        key: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        unlink(links, key)

    @staticmethod
    def unpin(
        key: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        facts[key, TIME] = at[NOW_NS]
        _queue(key, links, facts, classes, at)

    @staticmethod
    def remove(
        key: int,
        request_of: I32, request_class: I32, arrival_ns: I64, depths: I32, links: Links, facts: I64, classes: F64,
        at: I64,
    ) -> None:  # fmt: skip
        unlink(links, key)


@njit(cache=False)
def _queue(key: int, links: Links, facts: I64, classes: F64, at: I64) -> None:
    at[CLOCK] += 1
    facts[key, STAMP] = at[CLOCK]
    push_new(links, links.shape[0] - (classes.shape[0] - 1) + facts[key, CLASS], key)


@njit(cache=False)
def _use(key: int, of: int, depth: int, facts: I64, classes: F64, at: I64) -> None:
    together = classes.shape[0] - 1
    before = facts[key, CLASS]
    if before != NO_CLASS:
        reuse_s = (at[NOW_NS] - facts[key, TIME]) * 1e-9
        classes[before, REUSES] += 1.0
        classes[before, SUM_S] += reuse_s
        classes[before, STALE] = 1.0
        classes[together, REUSES] += 1.0
        classes[together, SUM_S] += reuse_s
    classes[of, USES] += 1.0
    classes[of, STALE] = 1.0
    classes[together, USES] += 1.0
    classes[together, STALE] = 1.0
    facts[key, TIME] = at[NOW_NS]
    facts[key, CLASS] = of
    facts[key, DEPTH] = depth


@njit(cache=False)
def _log_chance(c: int, used_ns: int, classes: F64, at: I64) -> float:
    """Logarithm of the chance of the module's docstring; before any reuse the idle time's negative."""
    idle_s = (at[NOW_NS] - used_ns) * 1e-9
    together = classes.shape[0] - 1
    if classes[together, REUSES] == 0.0:
        return -idle_s
    row = c if classes[c, REUSES] >= at[SAMPLES] else together
    if classes[row, STALE] != 0.0:
        mean_s = max(classes[row, SUM_S] / classes[row, REUSES], _LEAST_S)
        share = classes[row, REUSES] / classes[row, USES]
        classes[row, RATE] = 1.0 / mean_s
        classes[row, LOG_CHANCE] = math.log(share) + math.log(-math.expm1(-at[LIFE_US] * 1e-6 / mean_s))
        classes[row, STALE] = 0.0
    return classes[row, LOG_CHANCE] - idle_s * classes[row, RATE]
