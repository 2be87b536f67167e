"""`prefix` semantics: a request hits its longest resident prefix, and holds its blocks while it runs.

Admission looks up the prompt's blocks and takes them; finish takes the output's blocks and lets go of
all. Imports have each finish right after its admission, so one driver serves both kinds.

*Taking* blocks, of a prompt or of an output, in this order:
1. the resident ones are used and pinned, so that no block of the request evicts another one;
2. of the missing ones, in chain order, as many get a place as the pinned blocks leave room for: the rest,
   at the tail, is bypassed, and the request counts as an overflow;
3. those are placed, each after evicting a victim where the cache is full, and pinned.
Within steps 1 and 3 the tail comes before the head, so that the head is the younger one whatever the
policy orders by.

*Letting go*: each block is unpinned, the tail first; the last request that held it makes it evictable again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import evict, hit, insert, pin, unpin
from kvtrace_replay.cache.totals import (
    BAD_VICTIM,
    BLOCK_HITS,
    EVICTIONS,
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
    tag: Any, refs: I32, start: int, stop: int, capacity: int, pins: I32, held: U8, totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> bool:  # fmt: skip
    """Steps 1 to 3 for `refs[start:stop]`; returns True when a block was bypassed."""
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
            if room == 0:
                bypassed = True
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


@njit
def prefix_driver(
    tag: Any,
    refs: I32,
    indptr: I64,
    block_tokens: I32,
    prompt_blocks: I32,
    hit_cap: I32,
    events: I64,
    capacity: int,
    pins: I32,
    held: U8,
    overflowed: U8,
    request_hits: I64,
    totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Replays `events` (int64[m]; r + 1 admits request r, -(r + 1) finishes it) into `capacity` blocks.

    Modified in place: `pins` int32[n_identities], all ABSENT at first, else the number of holds of a
    resident block; `held` uint8[n_refs] and `overflowed` uint8[n_requests], all 0 at first;
    `request_hits` int64[n_requests]; `totals`; the policy's state.
    """
    for e in range(events.size):
        admission = events[e] > 0
        r = abs(events[e]) - 1
        start = indptr[r]
        stop = indptr[r + 1]
        middle = start + prompt_blocks[r]
        if admission:
            last = min(middle, start + hit_cap[r])
            p = start
            tokens = 0
            while p < last and pins[refs[p]] >= 0:
                tokens += block_tokens[p]
                p += 1
            request_hits[r] = p - start
            totals[BLOCK_HITS] += p - start
            totals[TOKEN_HITS] += tokens
            stop = middle
        else:
            start = middle
        if start < stop and take(tag, refs, start, stop, capacity, pins, held, totals, s0, s1, s2, s3, s4, s5, s6, s7):
            overflowed[r] = 1
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
    totals[PIN_OVERFLOWS] = np.sum(overflowed)
