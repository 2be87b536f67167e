"""Which tiers hold a block, and what follows when one of them gives it up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.tiers.words import ABSENT, INCLUSIVE, LOST, RESIDENT
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


@njit(cache=False)
def first_tier(mask: int) -> int:
    """The first tier of a block's `mask`, which is not 0."""
    tiers = np.int64(mask)
    k = 0
    while tiers & 1 == 0:
        tiers >>= 1
        k += 1
    return k


@njit(cache=False)
def forget(
    k: int, key: int, rules: I64, totals: I64, counts: I64, mask: U8, lost: I32, lost_from: U8, pins: I32
) -> None:
    """Tier k gave up `key`; where it is inclusive, the tiers above must."""
    bit = 1 << k
    pins[key] = ABSENT
    mask[key] &= 255 - bit
    totals[k, RESIDENT] -= 1
    above = mask[key] & (bit - 1)
    if rules[k, INCLUSIVE] and above:
        mask[key] &= 255 - above
        lost[counts[LOST]] = key
        lost_from[counts[LOST]] = above
        counts[LOST] += 1
