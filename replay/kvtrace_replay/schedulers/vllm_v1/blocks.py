"""The block pool: `vllm/v1/core/block_pool.py` and `FreeKVCacheBlockQueue` over arrays.

The free queue is a circular list through the rows of `blk`, whose last row is its end. The blocks cached with one
identity are a circular list too, from `first[identity]`, in the order in which they were cached.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

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


@njit(cache=False)
def unlink_free(blk, g, block):
    """Take `block` off the free queue."""
    before, after = blk[block, B_PREV], blk[block, B_NEXT]
    blk[before, B_NEXT] = after
    blk[after, B_PREV] = before
    g[G_FREE] -= 1


@njit(cache=False)
def append_free(blk, g, block):
    """Put `block` at the back of the free queue, to be handed out last."""
    end = blk.shape[0] - 1
    last = blk[end, B_PREV]
    blk[block, B_PREV] = last
    blk[block, B_NEXT] = end
    blk[last, B_NEXT] = block
    blk[end, B_PREV] = block
    g[G_FREE] += 1


@njit(cache=False)
def insert_free_after(blk, g, before, block):
    """Put `block` behind `before` in the free queue."""
    after = blk[before, B_NEXT]
    blk[block, B_PREV] = before
    blk[block, B_NEXT] = after
    blk[before, B_NEXT] = block
    blk[after, B_PREV] = block
    g[G_FREE] += 1


@njit(cache=False)
def remember(blk, first, block, identity):
    """`block` becomes cached: `BlockHashToBlockMap.insert`."""
    blk[block, B_IDENTITY] = identity
    if identity < 0:
        return
    head = first[identity]
    if head < 0:
        first[identity] = block
        blk[block, B_TWIN_NEXT] = block
        blk[block, B_TWIN_PREV] = block
    else:
        last = blk[head, B_TWIN_PREV]
        blk[last, B_TWIN_NEXT] = block
        blk[block, B_TWIN_PREV] = last
        blk[block, B_TWIN_NEXT] = head
        blk[head, B_TWIN_PREV] = block


@njit(cache=False)
def forget(blk, first, block):
    """`block` is cached no more: `BlockPool._maybe_evict_cached_block`."""
    identity = blk[block, B_IDENTITY]
    blk[block, B_IDENTITY] = NO_IDENTITY
    if identity < 0:
        return
    after = blk[block, B_TWIN_NEXT]
    if after == block:
        first[identity] = -1
        return
    before = blk[block, B_TWIN_PREV]
    blk[before, B_TWIN_NEXT] = after
    blk[after, B_TWIN_PREV] = before
    if first[identity] == block:
        first[identity] = after


@njit(cache=False)
def take_block(blk, first, g):
    """Hand out the front of the free queue, evicting what it holds: `BlockPool.get_new_blocks`."""
    block = blk[blk.shape[0] - 1, B_NEXT]
    unlink_free(blk, g, block)
    if blk[block, B_IDENTITY] != NO_IDENTITY:
        forget(blk, first, block)
        g[G_EVICTIONS] += 1
    blk[block, B_REFS] = 1
    g[G_ALLOCATED] += 1
    return block


@njit(cache=False)
def touch(blk, g, block):
    """A request hits `block`: `BlockPool.touch`."""
    if blk[block, B_REFS] == 0:
        unlink_free(blk, g, block)
    blk[block, B_REFS] += 1


@njit(cache=False)
def give_back(blk, g, table, n, uncached_first):
    """A request gives up its `n` blocks, last first: `BlockPool.free_blocks`.

    Blocks that hold an identity go to the back of the free queue. Those without go to its front, in this order, from
    vLLM 0.24 on; before, to the back like the others.
    """
    front = blk.shape[0] - 1
    for i in range(n - 1, -1, -1):
        block = table[i]
        refs = blk[block, B_REFS] - 1
        blk[block, B_REFS] = refs
        if refs == 0:
            if uncached_first and blk[block, B_IDENTITY] == NO_IDENTITY:
                insert_free_after(blk, g, front, block)
                front = block
            else:
                append_free(blk, g, block)
