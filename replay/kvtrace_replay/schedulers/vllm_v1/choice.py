"""Who is evicted: the engine's own free queue, or an eviction policy of the open loop in its place.

The operations on the pool depend on it, chosen by the type of a tag as in `cache.hooks`. With the engine's own rule
(`Native`) they are those of `blocks`. With a policy, its objects are identities:

- free blocks that hold none stand in the free queue and are handed out first, in the engine's order;
- an identity is pinned while a request holds one of its blocks; the policy chooses among the others;
- of several blocks with one identity one is kept: an idle one is forgotten when another is cached, the others when they
  are given up; they go to the free queue.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import overload

from kvtrace_replay.cache.hooks import evict, hit, insert, pin, unpin
from kvtrace_replay.schedulers.vllm_v1 import blocks as own
from kvtrace_replay.schedulers.vllm_v1.layout import (
    B_IDENTITY,
    B_NEXT,
    B_REFS,
    G_ALLOCATED,
    G_BAD_VICTIM,
    G_EVICTIONS,
    G_FREE,
    G_POLICY_CLOCK,
    NO_IDENTITY,
    P_LOG,
    P_UNCACHED_FIRST,
)
from kvtrace_replay.schedulers.vllm_v1.words import log_evict
from kvtrace_traces.compile import njit

ABSENT = -1  # pins of an identity that is not cached


class Native(NamedTuple):
    """The tag of the engine's own rule."""

    code: int


# ---------------------------------------------------------------- the engine's own rule


@njit(cache=False)
def _native_take(tag, pol, blk, first, g, key):
    return own.take_block(blk, first, g)


@njit(cache=False)
def _native_take_run(tag, pol, blk, first, g, chain, at, known, table, slot, start, stop):
    own.take_run(blk, first, g, table, slot, start, stop)


@njit(cache=False)
def _native_touch_run(tag, pol, blk, g, table, slot, n):
    own.touch_run(blk, g, table, slot, n)


@njit(cache=False)
def _native_remember(tag, pol, p, blk, first, g, block, identity, log):
    own.remember(blk, first, block, identity)


@njit(cache=False)
def _native_remember_run(tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log):
    own.remember_run(blk, first, table, slot, chain, at, start, stop)


@njit(cache=False)
def _native_give_back(tag, pol, p, blk, first, g, table, n, log):
    own.give_back(blk, g, table, n, p[P_UNCACHED_FIRST] != 0)


# ---------------------------------------------------------------- a policy: `pol` is (pins, eight arrays of its state)


@njit(cache=False)
def _policy_take(tag, pol, blk, first, g, key):
    block = blk[blk.shape[0] - 1, B_NEXT]
    if block != blk.shape[0] - 1:
        own.unlink_free(blk, g, block)
    else:
        pins = pol[0]
        victim = evict(
            tag, key, g[G_POLICY_CLOCK], pins, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8]
        )
        if victim < 0 or victim >= pins.shape[0] or pins[victim] != 0:
            g[G_BAD_VICTIM] = 1  # the run is void; go on with any, so that it ends
            victim = 0
            while victim < pins.shape[0] - 1 and pins[victim] != 0:
                victim += 1
            if pins[victim] != 0:
                return blk.shape[0] - 2  # nothing makes sense any more
        pins[victim] = ABSENT
        block = first[victim]
        own.forget(blk, first, block)
        g[G_EVICTIONS] += 1
        g[G_FREE] -= 1
    blk[block, B_REFS] = 1
    g[G_ALLOCATED] += 1
    return block


@njit(cache=False)
def _policy_take_run(tag, pol, blk, first, g, chain, at, known, table, slot, start, stop):
    for i in range(start, stop):
        key = np.int64(first.shape[0] - 1)
        if i < known:
            key = np.int64(chain[at + i])
        table[slot, i] = _policy_take(tag, pol, blk, first, g, key)


@njit(cache=False)
def _policy_touch_run(tag, pol, blk, g, table, slot, n):
    for i in range(n):
        _policy_touch(tag, pol, blk, g, table[slot, i])


@njit(cache=False)
def _policy_touch(tag, pol, blk, g, block):
    key, pins = blk[block, B_IDENTITY], pol[0]
    hit(tag, key, pins[key] > 0, g[G_POLICY_CLOCK], pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
    g[G_POLICY_CLOCK] += 1
    if pins[key] == 0:
        pin(tag, key, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
        g[G_FREE] -= 1
    pins[key] += 1
    blk[block, B_REFS] += 1


@njit(cache=False)
def _policy_remember(tag, pol, p, blk, first, g, block, identity, log):
    if identity < 0:
        own.remember(blk, first, block, identity)
        return
    pins, now = pol[0], g[G_POLICY_CLOCK]
    if pins[identity] == ABSENT:
        insert(tag, identity, now, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
        pin(tag, identity, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
        pins[identity] = 0
    else:
        pinned = pins[identity] > 0
        hit(tag, identity, pinned, now, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
        if not pinned:  # its block that nobody holds gives way to this one
            pin(tag, identity, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
            idle = first[identity]
            _drop(p, blk, first, g, idle, log)
            own.insert_free_after(blk, g, blk.shape[0] - 1, idle)
            g[G_FREE] -= 1  # it was free before
    own.remember(blk, first, block, identity)
    g[G_POLICY_CLOCK] += 1
    pins[identity] += 1


@njit(cache=False)
def _policy_remember_run(tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log):
    for i in range(start, stop):
        _policy_remember(tag, pol, p, blk, first, g, table[slot, i], chain[at + i], log)


@njit(cache=False)
def _drop(p, blk, first, g, block, log):
    """A block's identity is forgotten, though nobody needs the block yet."""
    own.forget(blk, first, block)
    g[G_EVICTIONS] += 1
    if p[P_LOG]:
        log_evict(log, g, block)


@njit(cache=False)
def _policy_give_back(tag, pol, p, blk, first, g, table, n, log):
    front, pins = blk.shape[0] - 1, pol[0]
    for i in range(n - 1, -1, -1):
        block = table[i]
        key = blk[block, B_IDENTITY]
        blk[block, B_REFS] -= 1
        if key >= 0:
            pins[key] -= 1
        if blk[block, B_REFS] > 0:
            continue
        if key >= 0 and own.alone(blk, block):
            unpin(tag, key, pol[1], pol[2], pol[3], pol[4], pol[5], pol[6], pol[7], pol[8])
            g[G_FREE] += 1
            continue
        if key != NO_IDENTITY:  # a duplicate, or tokens that nobody can ask for again
            _drop(p, blk, first, g, block, log)
        if p[P_UNCACHED_FIRST]:
            own.insert_free_after(blk, g, front, block)
            front = block
        else:
            own.append_free(blk, g, block)


# ---------------------------------------------------------------- by the tag


def _chosen(tag: Any, native: Any, by_policy: Any) -> Any:
    return native if tag.instance_class is Native else by_policy


def take_block(tag, pol, blk, first, g, key):
    """Hand out a block, which is to hold `key` (the last identity of the trace where that is not known)."""
    return (_native_take if isinstance(tag, Native) else _policy_take)(tag, pol, blk, first, g, key)


def take_run(tag, pol, blk, first, g, chain, at, known, table, slot, start, stop):
    """Hand out blocks for `table[slot, start:stop]`; entry i is to hold `chain[at + i]` where i < `known`."""
    chosen = _native_take_run if isinstance(tag, Native) else _policy_take_run
    chosen(tag, pol, blk, first, g, chain, at, known, table, slot, start, stop)


def touch_run(tag, pol, blk, g, table, slot, n):
    """A request takes a reference to the first `n` blocks of `table[slot]`, which are cached."""
    (_native_touch_run if isinstance(tag, Native) else _policy_touch_run)(tag, pol, blk, g, table, slot, n)


def remember(tag, pol, p, blk, first, g, block, identity, log):
    """A block that a request holds becomes cached."""
    (_native_remember if isinstance(tag, Native) else _policy_remember)(
        tag, pol, p, blk, first, g, block, identity, log
    )


def remember_run(tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log):
    """The blocks `table[slot, start:stop]` become cached; entry i as `chain[at + i]`."""
    chosen = _native_remember_run if isinstance(tag, Native) else _policy_remember_run
    chosen(tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log)


def give_back(tag, pol, p, blk, first, g, table, n, log):
    """A request gives up its `n` blocks, last first."""
    chosen = _native_give_back if isinstance(tag, Native) else _policy_give_back
    chosen(tag, pol, p, blk, first, g, table, n, log)


@overload(take_block)
def _take_block(tag, pol, blk, first, g, key):
    chosen = _chosen(tag, _native_take, _policy_take)
    return lambda tag, pol, blk, first, g, key: chosen(tag, pol, blk, first, g, key)


@overload(take_run)
def _take_run(tag, pol, blk, first, g, chain, at, known, table, slot, start, stop):
    chosen = _chosen(tag, _native_take_run, _policy_take_run)
    return lambda tag, pol, blk, first, g, chain, at, known, table, slot, start, stop: chosen(
        tag, pol, blk, first, g, chain, at, known, table, slot, start, stop
    )


@overload(touch_run)
def _touch_run(tag, pol, blk, g, table, slot, n):
    chosen = _chosen(tag, _native_touch_run, _policy_touch_run)
    return lambda tag, pol, blk, g, table, slot, n: chosen(tag, pol, blk, g, table, slot, n)


@overload(remember)
def _remember(tag, pol, p, blk, first, g, block, identity, log):
    chosen = _chosen(tag, _native_remember, _policy_remember)
    return lambda tag, pol, p, blk, first, g, block, identity, log: chosen(
        tag, pol, p, blk, first, g, block, identity, log
    )


@overload(remember_run)
def _remember_run(tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log):
    chosen = _chosen(tag, _native_remember_run, _policy_remember_run)
    return lambda tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log: chosen(
        tag, pol, p, blk, first, g, table, slot, chain, at, start, stop, log
    )


@overload(give_back)
def _give_back(tag, pol, p, blk, first, g, table, n, log):
    chosen = _chosen(tag, _native_give_back, _policy_give_back)
    return lambda tag, pol, p, blk, first, g, table, n, log: chosen(tag, pol, p, blk, first, g, table, n, log)
