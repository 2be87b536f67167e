"""The block pool: `vllm/v1/core/block_pool.py` and `FreeKVCacheBlockQueue` over arrays.

The free queue is a circular list through the rows of `blk`, whose last row is its end. The blocks cached with one
identity, where they are several, are a circular list too, from `first[identity]`, in the order in which they were
cached; the links of a block alone are 0, the null block.

Whole runs of blocks change hands at a time: a request takes, hits, fills and gives up many in a row, and those that
went into the queue together stand there together. So each function that takes a run goes through it once, keeps counts
in registers, and mends only the links at its ends. Rows are indexed by unsigned numbers, which saves the check for
indices below 0.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

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
    NO_IDENTITY,
)
from kvtrace_traces.compile import njit


@njit(cache=False, forceinline=True)
def row(number):
    """A block, identity or slot, never below 0, as an index."""
    return np.intp(np.uint32(number))


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
    for i in range(start, stop):
        remember(blk, first, table[slot, i], chain[at + i])


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
    evicted = np.int64(0)
    block = np.int64(blk[end, B_NEXT])
    i = np.int64(start)
    while i < stop:
        # Behind a block mostly stands the one with the next number, up or down. Going on with that number, not with the
        # link just loaded, lets the loads overlap.
        step = np.int64(blk[row(block), B_NEXT]) - block
        following = block
        while following == block and i < stop:
            b = row(block)
            following = np.int64(blk[b, B_NEXT])
            if blk[b, B_IDENTITY] != NO_IDENTITY:
                forget(blk, first, block)
                evicted += 1
            blk[b, B_REFS] = 1
            table[row(slot), row(i)] = block
            i += 1
            block += step
        block = following
    blk[end, B_NEXT] = block
    blk[row(block), B_PREV] = end
    g[G_FREE] -= stop - start
    g[G_ALLOCATED] += stop - start
    g[G_EVICTIONS] += evicted


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
    taken = np.int64(0)
    i = np.int64(0)
    while i < n:
        b = row(table[slot, i])
        i += 1
        refs = blk[b, B_REFS]
        blk[b, B_REFS] = refs + 1
        if refs > 0:
            continue
        taken += 1
        before, after = blk[b, B_PREV], blk[b, B_NEXT]
        while i < n and table[slot, i] == before:  # it is in the queue, so nobody holds it
            b = row(table[slot, i])  # not `before`: that would have to wait for the load of the one before
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
    front = np.int32(end)
    last = blk[end, B_PREV]
    freed = np.int64(0)
    for i in range(n - 1, -1, -1):
        block = table[i]
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
            last = blk[end, B_PREV]
        else:
            blk[row(last), B_NEXT] = block
            blk[b, B_PREV] = last
            last = block
            freed += 1
    blk[row(last), B_NEXT] = end
    blk[end, B_PREV] = last
    g[G_FREE] += freed
