"""What a tier does over an import whose policy's order no use changes (`Policy.in_order`).

As in `cache.prefix_driver`, such a tier holds nothing: it places a request's blocks one by one in chain order, and one
of them may be evicted for another. The arrays are those of `levels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import admit, hit, remove
from kvtrace_replay.tiers.mask import first_tier, take_in
from kvtrace_replay.tiers.words import (
    ABSENT,
    BAD_TIER,
    BYPASSED,
    EXCLUSIVE,
    PLACING,
    PROMOTE,
    RESIDENT,
    UP,
    USES,
)
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


@njit(cache=False)
def _place(
    tag: Any, k: int, key: Any, p: int, rules: I64, totals: I64, counts: I64, mask: U8, used: U8, victims: I32,
    lost: I32, lost_from: U8, pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k places the missing `key`, if that was used often enough and is admitted."""
    if used[key] < rules[k, USES] or not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
        totals[k, BYPASSED] += 1
        return
    take_in(tag, k, key, p, rules, totals, counts, mask, victims, lost, lost_from, pins, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(cache=False)
def place_in_order(
    tag: Any, refs: I32, lo: int, run_end: int, hi: int, counting: bool, rules: I64, totals: I64, counts: I64,
    mask: U8, used: U8, last_use: I64, held: U8, victims: I32, lost: I32, lost_from: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """The top tier uses and places the blocks of the range; what a lower tier has of those before `run_end` is read,
    though not what this tier had when the range was looked up, and has lost to an earlier block of it."""
    for p in range(lo, run_end):
        if pins[np.intp(np.uint32(refs[p]))] == ABSENT:
            held[p] |= PLACING
    for p in range(lo, hi):
        key = np.intp(np.uint32(refs[p]))
        if last_use[key] < lo or last_use[key] >= p:
            last_use[key] = p
        if counting and used[key] < 255:
            used[key] += 1
        was_below = held[p] & PLACING != 0
        held[p] &= 255 - PLACING
        if pins[key] >= 0:
            hit(tag, key, False, p, s0, s1, s2, s3, s4, s5, s6, s7)
            continue
        if was_below and mask[key] != 0:
            source = first_tier(mask[key])
            totals[source, UP] += 1
            if not rules[source, PROMOTE]:
                continue
        _place(
            tag, 0, key, p, rules, totals, counts, mask, used, victims, lost, lost_from, pins,
            s0, s1, s2, s3, s4, s5, s6, s7,
        )  # fmt: skip
        if counts[BAD_TIER]:
            return


@njit(cache=False)
def touch_in_order(
    tag: Any, k: int, refs: I32, lo: int, hi: int, rules: I64, totals: I64, mask: U8, top: I32, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """The blocks of the range that tier k holds are used; an exclusive tier gives up those in the top tier."""
    for p in range(lo, hi):
        key = np.intp(np.uint32(refs[p]))
        if pins[key] < 0:
            continue
        if rules[k, EXCLUSIVE] and top[key] >= 0:
            remove(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = ABSENT
            mask[key] &= 255 - (1 << k)
            totals[k, RESIDENT] -= 1
        else:
            hit(tag, key, False, p, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(cache=False)
def write_in_order(
    tag: Any, k: int, refs: I32, lo: int, hi: int, rules: I64, totals: I64, counts: I64, mask: U8, top: I32, used: U8,
    victims: I32, lost: I32, lost_from: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k stores what the top tier has of the range and itself has not."""
    for p in range(lo, hi):
        key = np.intp(np.uint32(refs[p]))
        if pins[key] == ABSENT and top[key] >= 0:
            _place(
                tag, k, key, p, rules, totals, counts, mask, used, victims, lost, lost_from, pins,
                s0, s1, s2, s3, s4, s5, s6, s7,
            )  # fmt: skip
            if counts[BAD_TIER]:
                return
