"""Random: the victim is any resident block, each as likely.

No use of a block changes anything, so nothing is written on a hit. With prefixes, blocks that a running request holds
are left out of the draw. The same `seed` gives the same run.

libCacheSim's `Random` takes its seed from the clock; the two are compared by the spread of repeated runs.

The usual yardstick of replacement: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer",
IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.sampling import (
    EVICTABLE,
    Bounds,
    Rng,
    Slots,
    add_resident,
    draw,
    hold_resident,
    new_rng,
    release_resident,
    remove_resident,
)

I32 = npt.NDArray[np.int32]


@policy(
    "random",
    summary="evicts any block, each as likely",
    paper="Belady, IBM Systems Journal 5(2), 1966",
)
class Random:
    """State: `slots`, `slot_of` and `bounds`, the residents to draw from; `rng`."""

    @staticmethod
    def setup(stream: Stream, capacity: int, seed: int = 0) -> tuple[Slots, Slots, Bounds, Rng]:
        return (
            np.zeros(capacity, np.int32),
            np.zeros(stream.n_identities, np.int32),
            np.zeros(2, np.int64),
            new_rng(seed),
        )

    @staticmethod
    def insert(key: int, now: int, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> None:
        add_resident(slots, slot_of, bounds, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> None:
        pass

    @staticmethod
    def evict(key: int, now: int, pins: I32, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> int:
        return remove_resident(slots, slot_of, bounds, draw(rng, bounds[EVICTABLE]))

    @staticmethod
    def pin(key: int, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> None:
        hold_resident(slots, slot_of, bounds, key)

    @staticmethod
    def unpin(key: int, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> None:
        release_resident(slots, slot_of, bounds, key)

    @staticmethod
    def remove(key: int, slots: Slots, slot_of: Slots, bounds: Bounds, rng: Rng) -> None:
        remove_resident(slots, slot_of, bounds, slot_of[key])
