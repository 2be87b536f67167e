"""Which tiers hold a block: one of them takes it in, or gives it up, and what follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import evict, insert
from kvtrace_replay.tiers.words import (
    ABSENT,
    BAD_TIER,
    CAPACITY,
    DOWN,
    EVICTIONS,
    INCLUSIVE,
    LOST,
    RESIDENT,
    VICTIMS,
)
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


@njit(cache=False)
def take_in(
    tag: Any, k: int, key: Any, p: int, rules: I64, totals: I64, counts: I64, mask: U8, victims: I32, lost: I32,
    lost_from: U8, pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> bool:  # fmt: skip
    """Tier k takes the missing `key`; what is evicted for it is added to `victims`. False for a defect of the policy:
    its victim is none, and memory must stay whole."""
    if totals[k, RESIDENT] == rules[k, CAPACITY]:
        victim = evict(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7)
        if victim < 0 or victim >= pins.size or pins[victim] != 0:
            counts[BAD_TIER] = k + 1
            return False
        forget(k, victim, rules, totals, counts, mask, lost, lost_from, pins)
        totals[k, EVICTIONS] += 1
        victims[counts[VICTIMS]] = victim
        counts[VICTIMS] += 1
    insert(tag, key, p, s0, s1, s2, s3, s4, s5, s6, s7)
    mask[key] |= 1 << k
    totals[k, RESIDENT] += 1
    totals[k, DOWN] += k > 0
    pins[key] = 0
    return True
