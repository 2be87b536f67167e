"""`radix` semantics: the cache is a tree of blocks, as SGLang's. Only leaves are evicted, never on the request's own
path; a block is the whole path that leads to it.

Admission looks up the prompt's path and takes it; finish takes the output's blocks and lets go of all. Imports
have each finish right after its admission. *Taking* a path, of a prompt or of an output behind it:
1. its resident blocks, which are its upper end, are used and locked: first those that the lookup hit, then
   those beyond the most that a lookup may hit, each run tail before head;
2. of the missing ones, in chain order, those that are admitted get a place as far as the locked blocks leave
   room. A block needs its parent: behind the first one that gets no place none does. Where room was short
   the request counts as an overflow;
3. those are placed, tail before head, each after evicting where the cache is full, and locked.
An output gets a place only when its prompt is in the tree whole.

*Letting go*: each block is unlocked, the tail first; the last request that held it makes it evictable again.

What an eviction policy is told differs in two points from `prefix` semantics (see `policies.registry`):
- `pin` and `unpin` speak of locks alone, but `pins[block]` is the number of locks plus the number of resident
  blocks right below it. It is 0 for an unlocked leaf. A block's locks are never more than its parent's.
- `evict` may also return the head of an unlocked end of the tree that does not branch: all blocks from it down
  leave at once, as SGLang frees a whole node.
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

ABSENT = -1

# Columns of `below`: how many resident blocks stand right below a block, and the exclusive or of their ids,
# which is the id itself where there is one.
COUNT, WHICH = range(2)

# How a request stands with the tree, in `closed`: its path may grow; a block of it was not admitted; there was
# no room for one.
OPEN, REFUSED, OVERFLOWED = range(3)


@njit(cache=False)
def leave(top: int, pins: I32, below: I32, parents: I32) -> int:
    """Takes `top` and all blocks below it out of the tree; returns how many they were, 0 (and nothing is done) when
    one of them is locked or has more than one block below it."""
    n = 0
    key = top
    while True:
        n += 1
        if below[key, COUNT] > 1 or pins[key] != below[key, COUNT]:
            return 0
        if below[key, COUNT] == 0:
            break
        key = below[key, WHICH]
    key = top
    for _ in range(n):
        lower = below[key, WHICH]
        pins[key] = ABSENT
        below[key, COUNT] = 0
        below[key, WHICH] = 0
        key = lower
    parent = parents[top]
    if parent >= 0:
        pins[parent] -= 1
        below[parent, COUNT] -= 1
        below[parent, WHICH] ^= top
    return n


@njit(cache=False)
def use(
    tag: Any, refs: I32, start: int, stop: int, pins: I32, below: I32, held: U8, totals: I64,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Step 1 for the resident blocks `refs[start:stop]`."""
    for p in range(stop - 1, start - 1, -1):
        key = np.intp(np.uint32(refs[p]))
        locked = pins[key] > below[key, COUNT]
        hit(tag, key, locked, p, s0, s1, s2, s3, s4, s5, s6, s7)
        if not locked:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            totals[PINNED] += 1
        pins[key] += 1
        held[p] = 1


@njit(cache=False)
def grow(
    tag: Any, refs: I32, first: int, start: int, stop: int, capacity: int, uses: int, seen: U8, pins: I32,
    below: I32, parents: I32, held: U8, totals: I64, closed: int,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> int:  # fmt: skip
    """Steps 2 and 3 for `refs[start:stop]` of the request whose chain begins at `first`; returns the new `closed`."""
    room = capacity - totals[PINNED]
    last = start
    for p in range(start, stop):
        key = np.intp(np.uint32(refs[p]))
        if pins[key] >= 0:
            continue  # below a block of the request that found no place, and here thanks to another request
        if uses > 1 and seen[key] < uses - 1:
            seen[key] += 1
            totals[BYPASSED] += 1
            closed = max(closed, REFUSED)
        elif closed == REFUSED:
            totals[BYPASSED] += 1
        elif closed == OPEN:
            if room == 0:
                closed = OVERFLOWED
            elif not admit(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7):
                totals[BYPASSED] += 1
                closed = REFUSED
            else:
                room -= 1
                last = p + 1

    for p in range(last - 1, start - 1, -1):
        key = np.intp(np.uint32(refs[p]))
        if totals[RESIDENT] == capacity:
            victim = evict(tag, key, p, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            left = 0
            if victim >= 0 and victim < pins.size and pins[victim] >= 0:
                left = leave(victim, pins, below, parents)
            if left == 0:
                totals[BAD_VICTIM] = 1  # a defect of the policy; memory must stay whole
                return closed
            totals[EVICTIONS] += left
            totals[RESIDENT] -= left
        insert(tag, key, p, s0, s1, s2, s3, s4, s5, s6, s7)
        pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
        totals[RESIDENT] += 1
        totals[PINNED] += 1
        pins[key] = 1 + below[key, COUNT]
        held[p] = 1
        if p > first:
            parent = np.intp(np.uint32(refs[p - 1]))
            below[parent, COUNT] += 1
            below[parent, WHICH] ^= key
            if p == start:
                pins[parent] += 1  # the parent is resident; that of the others is about to be
    return closed


@njit
def radix_driver(
    tag: Any,
    refs: I32,
    indptr: I64,
    last_tokens: I32,
    block_size: int,
    prompt_blocks: I32,
    hit_cap: I32,
    events: I64,
    first_event: int,
    last_event: int,
    capacity: int,
    uses: int,
    seen: U8,
    pins: I32,
    held: U8,
    closed: U8,
    request_hits: I64,
    totals: I64,
    below: I32,
    parents: I32,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Replays `events[first_event:last_event]` (int64[m]; r + 1 admits request r, -(r + 1) finishes it) into
    `capacity` blocks, going on from where the call before left them.

    `parents` int32[n_identities] as of `as_paths`. Modified in place: `pins` int32[n_identities], all ABSENT
    at first, else locks plus resident blocks right below; `below` int32[n_identities, 2], zeros at first;
    `seen` uint8[n_identities], how often a missing block was asked for, or empty with `uses` 1; `held`
    uint8[n_refs] and `closed` uint8[n_requests], zeros at first; `request_hits` int64[n_requests]; `totals`,
    to which is added; the policy's state.
    """
    for e in range(first_event, last_event):
        admission = events[e] > 0
        r = abs(events[e]) - 1
        start = indptr[r]
        stop = indptr[r + 1]
        middle = start + prompt_blocks[r]
        state = int(closed[r])
        if admission:
            begin(tag, r, start, s0, s1, s2, s3, s4, s5, s6, s7)
            dropped = expire(tag, start, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            while dropped >= 0:
                left = 0
                if dropped < pins.size and pins[dropped] >= 0:
                    left = leave(dropped, pins, below, parents)
                if left == 0:
                    totals[BAD_VICTIM] = 1
                    return
                totals[RESIDENT] -= left
                totals[EXPIRED] += left
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
            use(tag, refs, start, p, pins, below, held, totals, s0, s1, s2, s3, s4, s5, s6, s7)
            begin_of_run = p
            to = middle
        else:
            begin_of_run = p = middle
            to = stop
        if state == OPEN:
            while p < to and pins[refs[p]] >= 0:
                p += 1
            use(tag, refs, begin_of_run, p, pins, below, held, totals, s0, s1, s2, s3, s4, s5, s6, s7)
        if p < to:
            state = grow(
                tag, refs, start, p, to, capacity, uses, seen, pins, below, parents, held, totals, state,
                s0, s1, s2, s3, s4, s5, s6, s7,
            )  # fmt: skip
            if totals[BAD_VICTIM]:
                return
            if state == OVERFLOWED and closed[r] != OVERFLOWED:
                totals[PIN_OVERFLOWS] += 1
            closed[r] = state
        if not admission:
            for p in range(stop - 1, start - 1, -1):
                if held[p] == 0:
                    continue
                key = np.intp(np.uint32(refs[p]))
                pins[key] -= 1
                if pins[key] == below[key, COUNT]:
                    totals[PINNED] -= 1
                    unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
