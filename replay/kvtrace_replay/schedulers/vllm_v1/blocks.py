"""The block pool: `vllm/v1/core/block_pool.py` and `FreeKVCacheBlockQueue` over arrays.

The free queue is a circular list through the rows of `blk`, whose last row is its end. The blocks cached with one
identity, where they are several, are a circular list too, from `first[identity]`, in the order in which they were
cached; the links of a block alone are 0, the null block.

Whole runs of blocks change hands at a time: a request takes, hits, fills and gives up many in a row, and those that
went into the queue together stand there together. So each function that takes a run goes through it once, keeps counts
in registers, and mends only the links at its ends. LANES blocks with consecutive numbers that are alike go together
(`lanes`), for which the columns of `blk` lie in one piece each; all others go one by one. Rows are indexed by unsigned
numbers, which saves the check for indices below 0.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.lanes import LANES, even, fill_even
from kvtrace_replay.schedulers.vllm_v1.layout import (
    B_IDENTITY,
    B_NEXT,
    B_PREV,
    B_REFS,
    B_TWIN_NEXT,
    B_TWIN_PREV,
    G_ALLOCATED,
    G_EVICTIONS,
    G_FREE,
    GUESSED,
    NO_IDENTITY,
)
from kvtrace_traces.compile import njit


@njit(cache=False, forceinline=True)
def row(number):
    """A block, identity or slot, never below 0, as an index."""
    return np.intp(np.uint32(number))


@njit(cache=False, forceinline=True)
def lowest(block, step):
    """The lowest number of LANES blocks from `block` on, each `step` (1 or -1) from the one before."""
    return block if step > 0 else block - (LANES - 1)


@njit(cache=False, forceinline=True)
def step_of(values, at):
    """1 or -1 where LANES values from `at` on go up or down one by one, else 0."""
    begin = np.int64(values[np.uintp(at)])
    step = values[np.uintp(at) + np.uintp(1)] - begin
    if (step != 1 and step != -1) or not even(values, 0, at, begin, step):
        return np.int64(0)
    return step


@njit(cache=False, forceinline=True)
def all_cached(blk, low):
    """Whether each of LANES blocks from `low` on is cached; False if that takes a closer look."""
    identity = np.int64(blk[row(low), B_IDENTITY])
    step = np.int64(blk[row(low + 1), B_IDENTITY]) - identity
    cached = identity >= 0 and identity + (LANES - 1) * step >= 0
    return (cached or (step == 0 and identity == GUESSED)) and even(blk, B_IDENTITY, low, identity, step)


@njit(cache=False, forceinline=True)
def stands(blk, block, step):
    """Whether the free queue, whose front is `block`, goes on with LANES blocks `step` apart, of which none has a
    twin."""
    low = lowest(block, step)
    if low < 1 or low + LANES >= blk.shape[0]:
        return False
    last = LANES - 1 if step > 0 else 0  # what follows the last of them may be any
    return even(blk, B_NEXT, low, low + step, 1, last) and even(blk, B_TWIN_NEXT, low, 0, 0)


@njit(cache=False)
def unlink_free(blk, g, block):
    """Take `block` off the free queue."""
    before, after = blk[row(block), B_PREV], blk[row(block), B_NEXT]
    blk[row(before), B_NEXT] = after
    blk[row(after), B_PREV] = before
    g[G_FREE] -= 1


@njit(cache=False)
def append_free(blk, g, block):
    """Put `block` at the back of the free queue, to be handed out last."""
    insert_free_after(blk, g, blk[blk.shape[0] - 1, B_PREV], block)


@njit(cache=False)
def insert_free_after(blk, g, before, block):
    """Put `block` behind `before` in the free queue."""
    after = blk[row(before), B_NEXT]
    blk[row(block), B_PREV] = before
    blk[row(block), B_NEXT] = after
    blk[row(before), B_NEXT] = block
    blk[row(after), B_PREV] = block
    g[G_FREE] += 1


@njit(cache=False)
def alone(blk, block):
    """Whether no other block has the identity of this cached one."""
    after = blk[row(block), B_TWIN_NEXT]
    return after == 0 or after == block


@njit(cache=False)
def add_twin(blk, head, block):
    """`block` is cached as the last of those with the identity of `head`."""
    last = blk[row(head), B_TWIN_PREV]
    if last == 0:
        last = head
    blk[row(last), B_TWIN_NEXT] = block
    blk[row(block), B_TWIN_PREV] = last
    blk[row(block), B_TWIN_NEXT] = head
    blk[row(head), B_TWIN_PREV] = block


@njit(cache=False)
def drop_twin(blk, first, block, identity):
    """`block` leaves the others with its identity."""
    before, after = blk[row(block), B_TWIN_PREV], blk[row(block), B_TWIN_NEXT]
    blk[row(block), B_TWIN_PREV] = 0
    blk[row(block), B_TWIN_NEXT] = 0
    if after == block:  # a list of one
        first[row(identity)] = -1
        return
    if before == after:  # one is left
        blk[row(after), B_TWIN_PREV] = 0
        blk[row(after), B_TWIN_NEXT] = 0
    else:
        blk[row(before), B_TWIN_NEXT] = after
        blk[row(after), B_TWIN_PREV] = before
    if first[row(identity)] == block:
        first[row(identity)] = after


@njit(cache=False, forceinline=True)
def remember(blk, first, block, identity):
    """`block` becomes cached: `BlockHashToBlockMap.insert`."""
    blk[row(block), B_IDENTITY] = identity
    if identity < 0:
        return
    head = first[row(identity)]
    if head < 0:
        first[row(identity)] = block
    else:
        add_twin(blk, head, block)


@njit(cache=False)
def remember_run(blk, first, table, slot, chain, at, start, stop):
    """As `remember`, of `table[slot, start:stop]`; entry i becomes `chain[at + i]`."""
    line = table[row(slot)]
    i = np.int64(start)
    while i < stop:
        part = min(i + LANES, stop)
        step, identity = np.int64(0), np.int64(chain[np.uintp(at + i)])
        if part == i + LANES and even(chain, 0, at + i, identity, 1) and even(first, 0, identity, -1, 0):
            step = step_of(line, i)
        if step != 0:
            block = np.int64(line[row(i)])
            fill_even(first, 0, identity, block, step)
            fill_even(blk, B_IDENTITY, lowest(block, step), identity if step > 0 else identity + LANES - 1, step)
        else:
            for k in range(i, part):
                remember(blk, first, line[np.uintp(k)], chain[np.uintp(at + k)])
        i = part


@njit(cache=False, forceinline=True)
def forget(blk, first, block):
    """`block` is cached no more: `BlockPool._maybe_evict_cached_block`."""
    identity = blk[row(block), B_IDENTITY]
    blk[row(block), B_IDENTITY] = NO_IDENTITY
    if identity < 0:
        return
    if blk[row(block), B_TWIN_NEXT] == 0:
        first[row(identity)] = -1
    else:
        drop_twin(blk, first, block, identity)


@njit(cache=False)
def take_block(blk, first, g):
    """Hand out the front of the free queue, evicting what it holds: `BlockPool.get_new_blocks`."""
    block = blk[blk.shape[0] - 1, B_NEXT]
    unlink_free(blk, g, block)
    if blk[row(block), B_IDENTITY] != NO_IDENTITY:
        forget(blk, first, block)
        g[G_EVICTIONS] += 1
    blk[row(block), B_REFS] = 1
    g[G_ALLOCATED] += 1
    return block


@njit(cache=False)
def take_run(blk, first, g, table, slot, start, stop):
    """As `take_block`, for `table[slot, start:stop]`."""
    end = blk.shape[0] - 1
    line = table[row(slot)]
    nobody = first.shape[0] - 1
    evicted = np.int64(0)
    block = np.int64(blk[end, B_NEXT])
    i = np.int64(start)
    while i < stop:
        # Behind a block mostly stands the one with the next number, up or down. Going on with that number, not with the
        # link just loaded, lets the loads overlap.
        step = np.int64(blk[row(block), B_NEXT]) - block
        while i + LANES <= stop and (step == 1 or step == -1) and stands(blk, block, step):
            low = lowest(block, step)
            if not even(blk, B_IDENTITY, low, NO_IDENTITY, 0):
                identity = np.int64(blk[row(low), B_IDENTITY])
                if identity >= 0 and even(blk, B_IDENTITY, low, identity, 1):
                    fill_even(first, 0, identity, -1, 0)
                    evicted += LANES
                elif identity >= LANES and even(blk, B_IDENTITY, low, identity, -1):
                    fill_even(first, 0, identity - (LANES - 1), -1, 0)
                    evicted += LANES
                else:
                    for b in range(np.uintp(low), np.uintp(low + LANES)):
                        identity = blk[b, B_IDENTITY]
                        evicted += identity != NO_IDENTITY
                        first[row(nobody if identity < 0 else identity)] = -1
                fill_even(blk, B_IDENTITY, low, NO_IDENTITY, 0)
            fill_even(blk, B_REFS, low, 1, 0)
            fill_even(line, 0, i, block, step)
            i += LANES
            block = np.int64(blk[row(block + step * (LANES - 1)), B_NEXT])
            if i < stop:
                step = np.int64(blk[row(block), B_NEXT]) - block
        part = min(i + LANES, stop)
        while i < part:
            b = row(block)
            if blk[b, B_IDENTITY] != NO_IDENTITY:
                forget(blk, first, block)
                evicted += 1
            blk[b, B_REFS] = 1
            line[row(i)] = block
            i += 1
            block = np.int64(blk[b, B_NEXT])
    blk[end, B_NEXT] = block
    blk[row(block), B_PREV] = end
    g[G_FREE] -= stop - start
    g[G_ALLOCATED] += stop - start
    g[G_EVICTIONS] += evicted


@njit(cache=False)
def known_run(first, chain, at, most):
    """How many of the identities `chain[at : at + most]` are cached, up to the first that is not."""
    n = np.int64(0)
    while n < most:
        if n + LANES <= most and blocks_in_row(first, chain, at + n) != 0:
            n += LANES
            continue
        part = min(n + LANES, most)
        while n < part and first[row(chain[np.uintp(at + n)])] >= 0:
            n += 1
        if n < part:
            break
    return n


@njit(cache=False)
def find_run(first, chain, at, table, slot, n):
    """Name in `table[slot]` the blocks that the identities `chain[at : at + n]` are cached in."""
    line = table[row(slot)]
    i = np.int64(0)
    while i < n:
        part = min(i + LANES, n)
        step = np.int64(0)
        if part == i + LANES:
            step = blocks_in_row(first, chain, at + i)
        if step != 0:
            fill_even(line, 0, i, first[row(chain[np.uintp(at + i)])], step)
        else:
            for k in range(i, part):
                line[np.uintp(k)] = first[row(chain[np.uintp(at + k)])]
        i = part


@njit(cache=False, forceinline=True)
def blocks_in_row(first, chain, at):
    """1 or -1 where LANES identities, one after the other, are cached in as many blocks whose numbers go up or down one
    by one; else 0."""
    identity = np.int64(chain[np.uintp(at)])
    if first[row(identity)] < 0 or not even(chain, 0, at, identity, 1):
        return np.int64(0)
    return step_of(first, identity)


@njit(cache=False)
def touch(blk, g, block):
    """A request hits `block`: `BlockPool.touch`."""
    if blk[row(block), B_REFS] == 0:
        unlink_free(blk, g, block)
    blk[row(block), B_REFS] += 1


@njit(cache=False)
def touch_run(blk, g, table, slot, n):
    """As `touch`, of the first `n` blocks of `table[slot]`, in order.

    A request's blocks went into the queue last first: the block before one of them there is mostly the next of them.
    """
    line = table[row(slot)]
    taken = np.int64(0)
    i = np.int64(0)
    while i < n:
        if i + LANES <= n:
            step = np.int64(step_of(line, i))
            if step != 0:
                block = np.int64(line[row(i)])
                low = lowest(block, step)
                refs = np.int64(blk[row(low), B_REFS])
                if even(blk, B_REFS, low, refs, 0):
                    if refs > 0:
                        fill_even(blk, B_REFS, low, refs + 1, 0)
                        i += LANES
                        continue
                    after = blk[row(block), B_NEXT]
                    blk[row(block), B_NEXT] = block - step
                    if even(blk, B_NEXT, low, low - step, 1):
                        fill_even(blk, B_REFS, low, 1, 0)
                        before = blk[row(block + step * (LANES - 1)), B_PREV]
                        blk[row(before), B_NEXT] = after
                        blk[row(after), B_PREV] = before
                        taken += LANES
                        i += LANES
                        continue
                    blk[row(block), B_NEXT] = after
        part = min(i + LANES, n)
        while i < part:
            b = row(line[row(i)])
            i += 1
            refs = blk[b, B_REFS]
            blk[b, B_REFS] = refs + 1
            if refs > 0:
                continue
            taken += 1
            before, after = blk[b, B_PREV], blk[b, B_NEXT]
            while i < part and line[row(i)] == before:  # it is in the queue, so nobody holds it
                b = row(line[row(i)])  # not `before`: that would have to wait for the load of the one before
                blk[b, B_REFS] = 1
                before = blk[b, B_PREV]
                taken += 1
                i += 1
            blk[row(before), B_NEXT] = after
            blk[row(after), B_PREV] = before
    g[G_FREE] -= taken


@njit(cache=False)
def give_back(blk, g, table, n, uncached_first):
    """A request gives up its `n` blocks, last first: `BlockPool.free_blocks`.

    Blocks that hold an identity go to the back of the free queue. Those without go to its front, in this order, from
    vLLM 0.24 on; before, to the back like the others.
    """
    end = blk.shape[0] - 1
    front = np.int64(end)
    last = np.int64(blk[end, B_PREV])
    freed = np.int64(0)
    i = np.int64(n)
    while i > 0:
        if i >= LANES:
            step = np.int64(step_of(table, i - LANES))
            if step != 0:
                lead, tail = np.int64(table[row(i - 1)]), np.int64(table[row(i - LANES)])
                low = lowest(tail, step)
                refs = np.int64(blk[row(low), B_REFS])
                same = even(blk, B_REFS, low, refs, 0)
                if same and refs > 1:
                    fill_even(blk, B_REFS, low, refs - 1, 0)
                    i -= LANES
                    continue
                if same and (not uncached_first or all_cached(blk, low)):
                    fill_even(blk, B_REFS, low, 0, 0)
                    fill_even(blk, B_NEXT, low, low - step, 1)
                    fill_even(blk, B_PREV, low, low + step, 1)
                    blk[row(last), B_NEXT] = lead
                    blk[row(lead), B_PREV] = last
                    last = tail
                    freed += LANES
                    i -= LANES
                    continue
        part = i - LANES if i > LANES else np.int64(0)
        while i > part:
            i -= 1
            block = np.int64(table[row(i)])
            b = row(block)
            refs = blk[b, B_REFS] - 1
            blk[b, B_REFS] = refs
            if refs > 0:
                continue
            if uncached_first and blk[b, B_IDENTITY] == NO_IDENTITY:
                blk[row(last), B_NEXT] = end
                blk[end, B_PREV] = last
                insert_free_after(blk, g, front, block)
                front = block
                last = np.int64(blk[end, B_PREV])
            else:
                blk[row(last), B_NEXT] = block
                blk[b, B_PREV] = last
                last = block
                freed += 1
    blk[row(last), B_NEXT] = end
    blk[end, B_PREV] = last
    g[G_FREE] += freed
