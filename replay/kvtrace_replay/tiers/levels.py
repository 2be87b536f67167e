"""What one tier does for one request: the parts of which `driver` is made, each compiled once per policy.

A request comes with a range of its references, `refs[lo:hi]`: all that are looked up together, or a single one in
`object` semantics, where nothing is pinned. All functions modify the tier's `pins`, its row of `totals` and its
policy's state in place, and share these arrays:

- `mask` uint8[n_identities]: bit k says that tier k holds the block;
- `top` int32[n_identities]: the pins of tier 0;
- `used` uint8[n_identities]: how often a block was referred to, up to 255;
- `last_use` int64[n_identities]: its last reference, -1 before the first;
- `held` uint8[n_refs]: bits HELD and PLACING by tier;
- `victims` int32: blocks evicted by the tiers above, on offer to the next tier that stores what is demoted;
- `lost` int32 and `lost_from` uint8: blocks that an inclusive tier dropped, the tiers above that must drop them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import admit, begin, evict, expire, hit, insert, pin, remove, unpin
from kvtrace_replay.tiers.in_order import place_in_order, touch_in_order, write_in_order
from kvtrace_replay.tiers.mask import first_tier, forget, take_in
from kvtrace_replay.tiers.words import (
    ABSENT,
    BAD_TIER,
    BYPASSED,
    CAPACITY,
    CHOSEN,
    DOWN,
    EVICTIONS,
    EXCLUSIVE,
    EXPIRED,
    HELD,
    IN_ORDER,
    INCLUSIVE,
    INVALIDATED,
    LOST,
    PINNED,
    PLACING,
    PROMOTE,
    RESIDENT,
    THROUGH,
    UP,
    USES,
    VICTIMS,
)
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


@njit
def start(
    tag: Any, k: int, request: int, now: int, rules: I64, totals: I64, counts: I64, mask: U8, lost: I32, lost_from: U8,
    pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """`request` is about to be looked up: the policy is told, and drops what is too old."""
    begin(tag, request, now, s0, s1, s2, s3, s4, s5, s6, s7)
    age(tag, k, now, rules, totals, counts, mask, lost, lost_from, pins, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(cache=False)
def age(
    tag: Any, k: int, now: int, rules: I64, totals: I64, counts: I64, mask: U8, lost: I32, lost_from: U8,
    pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """The policy drops what is too old. That is not demoted."""
    dropped = expire(tag, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)
    while dropped >= 0:
        if dropped >= pins.size or pins[dropped] != 0:
            counts[BAD_TIER] = k + 1
            return
        forget(k, dropped, rules, totals, counts, mask, lost, lost_from, pins)
        totals[k, EXPIRED] += 1
        dropped = expire(tag, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(cache=False)
def _touch(
    tag: Any, k: int, refs: I32, lo: int, hi: int, pinning: bool, rules: I64, totals: I64, mask: U8, top: I32,
    held: U8, pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """The blocks of the range that tier k holds are used, and pinned so that none of the range evicts another.
    An exclusive tier gives up those that are in the top tier."""
    for p in range(hi - 1, lo - 1, -1):
        key = np.intp(np.uint32(refs[p]))
        holders = pins[key]
        if holders < 0:
            continue
        kept_above = k > 0 and top[key] >= 0
        if kept_above and rules[k, EXCLUSIVE]:
            remove(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = ABSENT
            mask[key] &= 255 - (1 << k)
            totals[k, RESIDENT] -= 1
            continue
        hit(tag, key, holders > 0, p, s0, s1, s2, s3, s4, s5, s6, s7)
        if not pinning:
            continue
        if holders == 0:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
        # An inclusive tier holds what the top holds and no more: it then always has room for what the top places.
        if kept_above or not rules[k, INCLUSIVE]:
            totals[k, PINNED] += holders == 0
            pins[key] = holders + 1
            held[p] |= HELD << k
        elif holders == 0:
            unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(cache=False)
def _choose(
    tag: Any, refs: I32, lo: int, run_end: int, hi: int, counting: bool, rules: I64, totals: I64,
    mask: U8, used: U8, last_use: I64, held: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> bool:  # fmt: skip
    """Chooses the blocks of the range that the top tier is to place, in chain order; those before `run_end` are hits,
    and what a lower tier has of them is read. Returns True when one was left out for want of room."""
    room = rules[0, CAPACITY] - totals[0, PINNED]
    overflow = False
    for p in range(lo, hi):
        key = np.intp(np.uint32(refs[p]))
        if last_use[key] < lo or last_use[key] >= p:  # of two in the range the one nearer the head, as in `_place`
            last_use[key] = p
        if counting and used[key] < 255:
            used[key] += 1
        if pins[key] >= 0:
            continue
        if pins[key] == ABSENT:
            if p < run_end:
                source = first_tier(mask[key])
                totals[source, UP] += 1
                if not rules[source, PROMOTE]:
                    continue
            if counting and used[key] < rules[0, USES]:
                totals[0, BYPASSED] += 1
                continue
            if room == 0:
                overflow = True
                continue
            if not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
                totals[0, BYPASSED] += 1
                continue
            room -= 1
            pins[key] = CHOSEN
        held[p] |= PLACING  # also the second reference to a block chosen by the first
    return overflow


@njit(cache=False)
def _place(
    tag: Any, k: int, refs: I32, lo: int, hi: int, pinning: bool, rules: I64, totals: I64, counts: I64, mask: U8,
    held: U8, victims: I32, lost: I32, lost_from: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Places the chosen blocks of the range in tier k, the tail first, and pins them; what is evicted for them is
    added to `victims`."""
    for p in range(hi - 1, lo - 1, -1):
        if held[p] & (PLACING << k) == 0:
            continue
        held[p] &= 255 - (PLACING << k)
        if pinning:
            held[p] |= HELD << k
        key = np.intp(np.uint32(refs[p]))
        if pins[key] != CHOSEN:
            hit(tag, key, True, p, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] += 1
            continue
        if not take_in(
            tag, k, key, p, rules, totals, counts, mask, victims, lost, lost_from, pins,
            s0, s1, s2, s3, s4, s5, s6, s7,
        ):  # fmt: skip
            return
        if pinning:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            totals[k, PINNED] += 1
            pins[key] = 1


@njit(cache=False)
def _write_through(
    tag: Any, k: int, refs: I32, lo: int, hi: int, pinning: bool, rules: I64, totals: I64, counts: I64, mask: U8,
    top: I32, used: U8, held: U8, victims: I32, lost: I32, lost_from: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k stores what the top tier has of the range and itself has not, after enough uses, as far as there is
    room, in chain order."""
    room = rules[k, CAPACITY] - totals[k, PINNED]
    chosen = False
    for p in range(lo, hi):
        key = np.intp(np.uint32(refs[p]))
        if pins[key] >= 0 or top[key] < 0:
            continue
        if pins[key] == ABSENT:
            if not rules[k, INCLUSIVE]:
                if used[key] < rules[k, USES]:
                    totals[k, BYPASSED] += 1
                    continue
                if room == 0:
                    continue
                if not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
                    totals[k, BYPASSED] += 1
                    continue
            room -= 1
            pins[key] = CHOSEN
        held[p] |= PLACING << k
        chosen = True
    if chosen:
        _place(
            tag, k, refs, lo, hi, pinning, rules, totals, counts, mask, held, victims, lost, lost_from, pins,
            s0, s1, s2, s3, s4, s5, s6, s7,
        )  # fmt: skip


@njit(cache=False)
def accept(
    tag: Any, k: int, pinning: bool, rules: I64, totals: I64, counts: I64, mask: U8, used: U8, last_use: I64,
    victims: I32, pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k stores the `victims` that no tier above it holds any more, each at the time of its last use. What is
    evicted for them takes their place in `victims`."""
    evicted = 0
    for i in range(counts[VICTIMS]):
        key = np.intp(np.uint32(victims[i]))
        if mask[key] & ((2 << k) - 1):
            continue
        now = last_use[key]
        if used[key] < rules[k, USES]:
            totals[k, BYPASSED] += 1
            continue
        if totals[k, PINNED] == rules[k, CAPACITY]:
            continue
        if not admit(tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7):
            totals[k, BYPASSED] += 1
            continue
        if totals[k, RESIDENT] == rules[k, CAPACITY]:
            victim = evict(tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if victim < 0 or victim >= pins.size or pins[victim] != 0:
                counts[BAD_TIER] = k + 1
                return
            pins[victim] = ABSENT
            mask[victim] &= 255 - (1 << k)
            totals[k, RESIDENT] -= 1
            totals[k, EVICTIONS] += 1
            victims[evicted] = victim
            evicted += 1
        insert(tag, key, now, s0, s1, s2, s3, s4, s5, s6, s7)
        if pinning:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
        pins[key] = 0
        mask[key] |= 1 << k
        totals[k, RESIDENT] += 1
        totals[k, DOWN] += 1
    counts[VICTIMS] = evicted


@njit
def release(
    tag: Any, k: int, refs: I32, lo: int, hi: int, totals: I64, held: U8,
    pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k lets go of the range, the tail first."""
    for p in range(hi - 1, lo - 1, -1):
        if held[p] & (HELD << k) == 0:
            continue
        held[p] &= 255 - (HELD << k)
        key = np.intp(np.uint32(refs[p]))
        pins[key] -= 1
        if pins[key] == 0:
            totals[k, PINNED] -= 1
            unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)


@njit(forceinline=True)
def serve_top(
    tag: Any, refs: I32, lo: int, run_end: int, hi: int, pinning: bool, counting: bool, rules: I64, totals: I64,
    counts: I64, mask: U8, used: U8, last_use: I64, held: U8, victims: I32, lost: I32, lost_from: U8, top: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> bool:  # fmt: skip
    """The top tier takes the range, of which the references before `run_end` are hits of some tier. Returns True when
    a block was left out for want of room."""
    if rules[0, IN_ORDER]:
        counts[VICTIMS] = 0
        place_in_order(
            tag, refs, lo, run_end, hi, counting, rules, totals, counts, mask, used, last_use, held, victims, lost,
            lost_from, top, s0, s1, s2, s3, s4, s5, s6, s7,
        )  # fmt: skip
        return False
    _touch(tag, 0, refs, lo, hi, pinning, rules, totals, mask, top, held, top, s0, s1, s2, s3, s4, s5, s6, s7)
    overflow = _choose(
        tag, refs, lo, run_end, hi, counting, rules, totals, mask, used, last_use, held, top,
        s0, s1, s2, s3, s4, s5, s6, s7,
    )  # fmt: skip
    counts[VICTIMS] = 0
    _place(
        tag, 0, refs, lo, hi, pinning, rules, totals, counts, mask, held, victims, lost, lost_from, top,
        s0, s1, s2, s3, s4, s5, s6, s7,
    )  # fmt: skip
    return overflow


@njit(forceinline=True)
def serve_below(
    tag: Any, k: int, refs: I32, lo: int, hi: int, pinning: bool, rules: I64, totals: I64, counts: I64, mask: U8,
    top: I32, used: U8, last_use: I64, held: U8, victims: I32, lost: I32, lost_from: U8, pins: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k, not the top, uses what it has of the range, takes what comes from above (copies of the range, or the
    victims), and lets go of the range; an inclusive tier does so when the top tier does."""
    if rules[k, IN_ORDER]:
        touch_in_order(tag, k, refs, lo, hi, rules, totals, mask, top, pins, s0, s1, s2, s3, s4, s5, s6, s7)
        if rules[k, THROUGH]:
            write_in_order(
                tag, k, refs, lo, hi, rules, totals, counts, mask, top, used, victims, lost, lost_from, pins,
                s0, s1, s2, s3, s4, s5, s6, s7,
            )  # fmt: skip
        elif counts[VICTIMS] > 0:
            accept(
                tag, k, False, rules, totals, counts, mask, used, last_use, victims, pins,
                s0, s1, s2, s3, s4, s5, s6, s7,
            )  # fmt: skip
        return
    _touch(tag, k, refs, lo, hi, pinning, rules, totals, mask, top, held, pins, s0, s1, s2, s3, s4, s5, s6, s7)
    if rules[k, THROUGH]:
        _write_through(
            tag, k, refs, lo, hi, pinning, rules, totals, counts, mask, top, used, held, victims, lost, lost_from,
            pins, s0, s1, s2, s3, s4, s5, s6, s7,
        )  # fmt: skip
    elif counts[VICTIMS] > 0:
        accept(
            tag, k, pinning, rules, totals, counts, mask, used, last_use, victims, pins, s0, s1, s2, s3, s4, s5, s6, s7
        )
    if pinning and not rules[k, INCLUSIVE]:
        release(tag, k, refs, lo, hi, totals, held, pins, s0, s1, s2, s3, s4, s5, s6, s7)


@njit
def invalidate(
    tag: Any, k: int, totals: I64, counts: I64, lost: I32, lost_from: U8,
    pins: I32, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Tier k drops the blocks that an inclusive tier below it dropped."""
    for i in range(counts[LOST]):
        if lost_from[i] & (1 << k):
            key = np.intp(np.uint32(lost[i]))
            remove(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = ABSENT
            totals[k, RESIDENT] -= 1
            totals[k, INVALIDATED] += 1
