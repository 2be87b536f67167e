"""FIFO: first in, first out.

Resident blocks stand in a queue in the order in which they were placed; using a block does not move it;
the victim is the oldest of them. In a recorded trace the tail of what a request places counts as older than
the head; an import's blocks are placed in chain order, and none is held: hit for hit the `fifo` of
`kvcache-simulator` 0.1.3.

With the prefixes of a recorded trace, blocks that a running request holds are passed over. So that they are
not passed over again and again, a held block met at the old end of the queue is set aside; when it is let go
it enters a small heap, ordered by insertion. Everything in that heap is older than everything in the queue,
so the heap is asked first.

Where blocks are removed (`Stream.removes`) they leave gaps in the queue, which is closed up when it is full of them.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
5(2), 1966.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.heap import Heap, heap_pop, heap_push
from kvtrace_replay.structures.kept import is_kept, new_kept
from kvtrace_replay.structures.rings import GONE
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Slots of `now_at`.
HEAD, COUNT, TAKEN, RETURNED = range(4)
IN_HEAP = -1  # of `slots`


@njit(cache=False)
def _close_gaps(queue: I32, now_at: I64, slots: I32) -> None:
    head, room = now_at[HEAD], queue.size
    kept = 0
    for i in range(now_at[COUNT]):
        key = queue[(head + i) % room]
        if key != GONE:
            queue[(head + kept) % room] = key
            slots[key] = (head + kept) % room
            kept += 1
    now_at[COUNT] = kept


@policy(
    "fifo",
    summary="evicts the block that was placed longest ago",
    paper="Belady, IBM Systems Journal 5(2), 1966",
    in_order=True,
    stand_in={"radix": "sglang-fifo"},
)
class Fifo:
    """State: `queue` int32[capacity], a ring (twice that where blocks are removed); `now_at` int64[4]: the ring's head,
    its count, gaps among them, how many entries were ever taken from it (the insertion number of the next), the heap's
    size; `aside` bool[n_identities], set aside and still held; `number` int64[n_identities], insertion numbers of
    blocks set aside; `heap` of number << 32 | key; `slots` int32[n_identities], where in the ring each block lies, or
    IN_HEAP, kept where blocks are removed."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I64, Flags, I64, Heap, I32]:
        n = stream.n_identities if stream.semantics != "object" else 0
        return (
            np.zeros(2 * capacity if stream.removes else capacity, np.int32),
            np.zeros(4, np.int64),
            np.zeros(n, np.bool_),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            new_kept(stream.n_identities, np.int32, stream.removes),
        )

    @staticmethod
    def insert(key: int, now: int, queue: I32, now_at: I64, aside: Flags, number: I64, heap: Heap, slots: I32) -> None:
        if is_kept(slots) and now_at[COUNT] == queue.size:
            _close_gaps(queue, now_at, slots)
        at = now_at[HEAD] + now_at[COUNT]
        if at >= queue.size:
            at -= queue.size
        queue[at] = key
        now_at[COUNT] += 1
        if is_kept(slots):
            slots[key] = at

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int,
        queue: I32, now_at: I64, aside: Flags, number: I64, heap: Heap, slots: I32,
    ) -> None:  # fmt: skip
        pass

    @staticmethod
    def evict(
        key: int, now: int, pins: I32,
        queue: I32, now_at: I64, aside: Flags, number: I64, heap: Heap, slots: I32,
    ) -> int:  # fmt: skip
        while now_at[RETURNED] > 0:
            victim = np.int64(heap[0] & 0xFFFFFFFF)
            now_at[RETURNED] = heap_pop(heap, now_at[RETURNED])
            if pins[victim] == 0:
                return victim  # type: ignore[return-value]
            aside[victim] = True
        while True:
            victim = np.int64(queue[now_at[HEAD]])
            now_at[HEAD] += 1
            if now_at[HEAD] == queue.size:
                now_at[HEAD] = 0
            now_at[COUNT] -= 1
            now_at[TAKEN] += 1
            if is_kept(slots) and victim == GONE:
                continue
            if pins[victim] == 0:
                return victim  # type: ignore[return-value]
            aside[victim] = True
            number[victim] = now_at[TAKEN]
            if is_kept(slots):
                slots[victim] = IN_HEAP

    @staticmethod
    def unpin(key: int, queue: I32, now_at: I64, aside: Flags, number: I64, heap: Heap, slots: I32) -> None:
        if aside[key]:
            aside[key] = False
            now_at[RETURNED] = heap_push(heap, now_at[RETURNED], (number[key] << 32) | key)

    @staticmethod
    def remove(key: int, queue: I32, now_at: I64, aside: Flags, number: I64, heap: Heap, slots: I32) -> None:
        if slots[key] != IN_HEAP:
            queue[slots[key]] = GONE
            return
        left = 0
        for i in range(now_at[RETURNED]):  # few: blocks whose turn came while they were held
            if heap[i] & 0xFFFFFFFF != key:
                left = heap_push(heap, left, heap[i])
        now_at[RETURNED] = left
