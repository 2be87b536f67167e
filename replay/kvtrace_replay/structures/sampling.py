"""Residents to draw from at random, and the numbers to draw with.

`slots` int32[capacity] holds the resident keys, those that may be evicted before those that are held; `slot_of`
int32[n_identities] tells where each stands; `bounds` int64[2] how many may be evicted, and how many there are. Every
operation is a swap or two.

`rng` uint64[1] is the state of a generator (xorshift, 64 bits: G. Marsaglia, "Xorshift RNGs", Journal of Statistical
Software 8(14), 2003). Shifts alone, so that it runs the same uncompiled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

Slots = npt.NDArray[np.int32]
Bounds = npt.NDArray[np.int64]
Rng = npt.NDArray[np.uint64]

EVICTABLE, RESIDENT = 0, 1


def new_rng(seed: int) -> Rng:
    """The generator for a `seed` of 0 or more; neighbouring seeds are made unlike (splitmix64). Raises UsageError."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed} must be a whole number, 0 or more")
    mask = 2**64 - 1
    word = (seed + 0x9E3779B97F4A7C15) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return np.array([(word ^ (word >> 31)) | 1], np.uint64)


@njit(cache=False)
def draw(rng: Rng, n: int) -> int:
    """A whole number below `n` (at most 2^31), each as likely; modifies `rng`."""
    word = rng[0]
    word ^= word << np.uint64(13)
    word ^= word >> np.uint64(7)
    word ^= word << np.uint64(17)
    rng[0] = word
    return np.int64((word >> np.uint64(32)) * np.uint64(n) >> np.uint64(32))  # type: ignore[return-value]


@njit(cache=False)
def _exchange(slots: Slots, slot_of: Slots, one: int, other: int) -> None:
    key, its = slots[one], slots[other]
    slots[one], slots[other] = its, key
    slot_of[its], slot_of[key] = one, other


@njit(cache=False)
def add_resident(slots: Slots, slot_of: Slots, bounds: Bounds, key: int) -> None:
    """`key` becomes resident, and may be evicted."""
    at = bounds[RESIDENT]
    slots[at] = key
    slot_of[key] = at
    bounds[RESIDENT] = at + 1
    if at != bounds[EVICTABLE]:
        _exchange(slots, slot_of, at, bounds[EVICTABLE])
    bounds[EVICTABLE] += 1


@njit(cache=False)
def remove_resident(slots: Slots, slot_of: Slots, bounds: Bounds, at: int) -> int:
    """The key in slot `at`, which may be evicted, is resident no more; returns it."""
    key = slots[at]
    last = bounds[EVICTABLE] - 1
    moved = slots[last]
    slots[at] = moved
    slot_of[moved] = at
    bounds[EVICTABLE] = last
    final = bounds[RESIDENT] - 1
    if final != last:
        moved = slots[final]
        slots[last] = moved
        slot_of[moved] = last
    bounds[RESIDENT] = final
    return np.int64(key)  # type: ignore[return-value]


@njit(cache=False)
def hold_resident(slots: Slots, slot_of: Slots, bounds: Bounds, key: int) -> None:
    """`key` may not be drawn from now on."""
    bounds[EVICTABLE] -= 1
    _exchange(slots, slot_of, slot_of[key], bounds[EVICTABLE])


@njit(cache=False)
def release_resident(slots: Slots, slot_of: Slots, bounds: Bounds, key: int) -> None:
    """`key`, which was held, may be drawn again."""
    _exchange(slots, slot_of, slot_of[key], bounds[EVICTABLE])
    bounds[EVICTABLE] += 1
