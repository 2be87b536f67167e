"""CLOCK: first in, first out, with a second chance.

Resident blocks stand in a queue in the order in which they were placed; each has a counter of `bits` bits, 0 at first,
which every use raises until it is full. The candidate is the oldest block: where its counter is 0 it is the victim,
otherwise the counter falls by one and the block goes to the new end, and the next is looked at. A use moves
nothing.

With prefixes, a held block whose turn it is to go is set aside instead; when it is let go it enters the queue at the
new end. So a hold costs one look, however long it lasts.

F. J. Corbato, "A paging experiment with the Multics system", MIT Project MAC report MAC-M-384, 1968. The
counter of several bits: A. J. Smith, "Sequentiality and prefetching in database systems", ACM TODS 3(3), 1978.
Exactly the misses of libCacheSim 0.3.5 (`Clock`, one bit; two bits are the policy `clock2`).
"""

# NumPy's integers are Python's once this is compiled:
# mypy: disable-error-code="arg-type, return-value, assignment"
from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.kept import is_kept
from kvtrace_replay.structures.rings import GONE, new_rings, ring_push, ring_remove, ring_trim
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

QUEUE = 0  # the one ring
HEAD, LENGTH, MOST = range(3)  # slots of `counters`: those of the ring, the highest count


@policy(
    "clock",
    summary="FIFO in which a block that was used gets a second round",
    paper="Corbato, MIT Project MAC report MAC-M-384, 1968",
)
class Clock:
    """State: `rings` and `slots`, the queue, see `structures.rings`; `counters` int64[3]; `uses` uint8[n_identities],
    the count of each resident block; `aside` bool[n_identities], set aside until it is let go (empty in `object`
    semantics)."""

    @staticmethod
    def setup(stream: Stream, capacity: int, bits: int = 1) -> tuple[I32, I64, U8, Flags, I32]:
        if not 1 <= bits <= 8:
            raise UsageError(f"clock: bits={bits} must lie between 1 and 8")
        n_held = stream.n_identities if stream.semantics != "object" else 0
        rings, slots = new_rings(1, capacity, stream.n_identities, stream.removes)
        return (
            rings,
            np.array([0, 0, 2**bits - 1], np.int64),
            np.zeros(stream.n_identities, np.uint8),
            np.zeros(n_held, np.bool_),
            slots,
        )

    @staticmethod
    def insert(key: int, now: int, rings: I32, counters: I64, uses: U8, aside: Flags, slots: I32) -> None:
        ring_push(rings, counters, slots, QUEUE, key)
        uses[key] = 0

    @staticmethod
    def hit(key: int, pinned: bool, now: int, rings: I32, counters: I64, uses: U8, aside: Flags, slots: I32) -> None:
        count = uses[key]
        if count < counters[MOST]:
            uses[key] = count + 1

    @staticmethod
    def evict(key: int, now: int, pins: I32, rings: I32, counters: I64, uses: U8, aside: Flags, slots: I32) -> int:
        head, length, room = counters[HEAD], counters[LENGTH], rings.shape[1]
        while True:
            oldest = rings[QUEUE, np.uintp(head)]
            tail = head + length
            head = head + 1 if head + 1 < room else 0
            if is_kept(slots) and oldest == GONE:
                length -= 1
                continue
            candidate = np.uintp(oldest)
            count = uses[candidate]
            if count > 0:
                uses[candidate] = count - 1
                tail = tail if tail < room else tail - room
                rings[QUEUE, np.uintp(tail)] = candidate
                if is_kept(slots):
                    slots[candidate] = tail
                continue
            length -= 1
            if pins[candidate] == 0:
                counters[HEAD], counters[LENGTH] = head, length
                if is_kept(slots):
                    ring_trim(rings, counters, QUEUE)
                return np.int64(candidate)
            aside[candidate] = True

    @staticmethod
    def unpin(key: int, rings: I32, counters: I64, uses: U8, aside: Flags, slots: I32) -> None:
        if aside[key]:
            aside[key] = False
            ring_push(rings, counters, slots, QUEUE, key)

    @staticmethod
    def remove(key: int, rings: I32, counters: I64, uses: U8, aside: Flags, slots: I32) -> None:
        ring_remove(rings, counters, slots, key)
