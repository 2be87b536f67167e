"""`prefix` semantics: a request hits its longest resident prefix, and holds its blocks while it runs.

Admission looks up the prompt's blocks and takes them; finish takes the output's blocks and lets go of
all. Imports have each finish right after its admission, so one driver serves both kinds.

*Taking* blocks, of a prompt or of an output, in this order:
1. the resident ones are used and pinned, so that no block of the request evicts another one;
2. of the missing ones, in chain order, those that are admitted (`second-touch`, the policy's `admit`) get a
   place as far as the pinned blocks leave room: the rest, at the tail, is bypassed, and the request counts as
   an overflow;
3. those are placed, each after evicting a victim where the cache is full, and pinned.
Within steps 1 and 3 the tail comes before the head, so that the head is the younger one whatever the
policy orders by.

Imports know no lifetimes, so that nothing need be held. Where a policy's order does not depend on use (`in_order`),
their blocks are simply placed one by one in chain order, and a request's own blocks may be evicted for its others.

*Letting go*: each block is unpinned, the tail first; the last request that held it makes it evictable again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import admit, begin, evict, expire, hit, insert, pin, unpin
from kvtrace_replay.cache.totals import (
    BAD_VICTIM,
    BLOCK_HITS,
    BYPASSED,
    EVICTIONS,
    EXPIRED,
    PIN_OVERFLOWS,
    PINNED,
    RESIDENT,
    TOKEN_HITS,
)
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

# Values of `pins` below 0: not resident; not resident but about to be placed.
ABSENT, CHOSEN = -1, -2
# Values of `held`: not held by its request; held since it was resident; held since it is being placed.
NOT_HELD, FOUND, PLACED = 0, 1, 2


@njit(cache=False)
def take(
    tag: Any, refs: I32, start: int, stop: int, capacity: int, uses: int, seen: U8, pins: I32, held: U8, totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> bool:  # fmt: skip
    """Steps 1 to 3 for `refs[start:stop]`; returns True when a block was bypassed for want of room."""
    missing = 0
    for p in range(stop - 1, start - 1, -1):
        key = np.intp(np.uint32(refs[p]))
        holders = pins[key]
        if holders < 0:
            missing += 1
            continue
        hit(tag, key, holders > 0, p, s0, s1, s2, s3, s4, s5, s6, s7)
        if holders == 0:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            totals[PINNED] += 1
        pins[key] = holders + 1
        held[p] = FOUND
    if missing == 0:
        return False

    room = capacity - totals[PINNED]
    bypassed = False
    first_missing = stop
    for p in range(start, stop):
        key = np.intp(np.uint32(refs[p]))
        if held[p] == FOUND:
            continue
        if pins[key] == ABSENT:
            if uses > 1 and seen[key] < uses - 1:
                seen[key] += 1
                totals[BYPASSED] += 1
                continue
            if room == 0:
                bypassed = True
                continue
            if not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
                totals[BYPASSED] += 1
                continue
            room -= 1
            pins[key] = CHOSEN
        held[p] = PLACED  # also the second reference to a block chosen by the first
        first_missing = min(first_missing, p)

    for p in range(stop - 1, first_missing - 1, -1):
        if held[p] != PLACED:
            continue
        key = np.intp(np.uint32(refs[p]))
        if pins[key] != CHOSEN:
            hit(tag, key, True, p, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] += 1
            continue
        if totals[RESIDENT] == capacity:
            victim = evict(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if victim < 0 or victim >= pins.size or pins[victim] != 0:
                totals[BAD_VICTIM] = 1  # a defect of the policy; memory must stay whole
                return True
            pins[victim] = ABSENT
            totals[EVICTIONS] += 1
        else:
            totals[RESIDENT] += 1
        insert(tag, key, p, s0, s1, s2, s3, s4, s5, s6, s7)
        pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
        totals[PINNED] += 1
        pins[key] = 1
    return bypassed


@njit(cache=False)
def place_in_order(
    tag: Any, refs: I32, start: int, stop: int, capacity: int, uses: int, seen: U8, pins: I32, totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """A place for every missing block of `refs[start:stop]`, one after the other."""
    for p in range(start, stop):
        key = np.intp(np.uint32(refs[p]))
        if pins[key] >= 0:
            hit(tag, key, False, p, s0, s1, s2, s3, s4, s5, s6, s7)
            continue
        if uses > 1 and seen[key] < uses - 1:
            seen[key] += 1
            totals[BYPASSED] += 1
            continue
        if not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
            totals[BYPASSED] += 1
            continue
        if totals[RESIDENT] == capacity:
            victim = evict(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if victim < 0 or victim >= pins.size or pins[victim] != 0:
                totals[BAD_VICTIM] = 1
                return
            pins[victim] = ABSENT
            totals[EVICTIONS] += 1
        else:
            totals[RESIDENT] += 1
        insert(tag, key, p, s0, s1, s2, s3, s4, s5, s6, s7)
        pins[key] = 0


@njit
def prefix_driver(
    tag: Any,
    refs: I32,
    indptr: I64,
    last_tokens: I32,
    block_size: int,
    prompt_blocks: I32,
    hit_cap: I32,
    events: I64,
    first: int,
    last: int,
    capacity: int,
    uses: int,
    in_order: bool,
    seen: U8,
    pins: I32,
    held: U8,
    overflowed: U8,
    request_hits: I64,
    totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Replays `events[first:last]` (int64[m]; r + 1 admits request r, -(r + 1) finishes it) into `capacity` blocks,
    going on from where the call before left them.

    Modified in place: `pins` int32[n_identities], all ABSENT at first, else the number of holds of a
    resident block; `seen` uint8[n_identities], how often a missing block was asked for, or empty with `uses`
    1; `held` uint8[n_refs] and `overflowed` uint8[n_requests], all 0 at first; `request_hits`
    int64[n_requests]; `totals`, to which is added; the policy's state.
    """
    for e in range(first, last):
        admission = events[e] > 0
        r = abs(events[e]) - 1
        start = indptr[r]
        stop = indptr[r + 1]
        middle = start + prompt_blocks[r]
        if admission:
            begin(tag, r, start, s0, s1, s2, s3, s4, s5, s6, s7)
            dropped = expire(tag, start, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            while dropped >= 0:
                if dropped >= pins.size or pins[dropped] != 0:
                    totals[BAD_VICTIM] = 1
                    return
                pins[dropped] = ABSENT
                totals[RESIDENT] -= 1
                totals[EXPIRED] += 1
                dropped = expire(tag, start, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            limit = min(middle, start + hit_cap[r])
            p = start
            while p < limit and pins[refs[p]] >= 0:
                p += 1
            request_hits[r] = p - start
            totals[BLOCK_HITS] += p - start
            totals[TOKEN_HITS] += (p - start) * block_size
            if p > start and p == stop:
                totals[TOKEN_HITS] -= block_size - last_tokens[r]
            stop = middle
        else:
            start = middle
        if in_order:
            place_in_order(tag, refs, start, stop, capacity, uses, seen, pins, totals, s0, s1, s2, s3, s4, s5, s6, s7)
            if totals[BAD_VICTIM]:
                return
        elif start < stop and take(
            tag, refs, start, stop, capacity, uses, seen, pins, held, totals, s0, s1, s2, s3, s4, s5, s6, s7
        ):
            if overflowed[r] == 0:
                overflowed[r] = 1
                totals[PIN_OVERFLOWS] += 1
            if totals[BAD_VICTIM]:
                return
        if not admission:
            for p in range(stop - 1, indptr[r] - 1, -1):
                if held[p] == NOT_HELD:
                    continue
                key = np.intp(np.uint32(refs[p]))
                pins[key] -= 1
                if pins[key] == 0:
                    totals[PINNED] -= 1
                    unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
