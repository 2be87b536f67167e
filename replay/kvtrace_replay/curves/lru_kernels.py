"""One pass over a workload, one kernel per kind of it: how many blocks an LRU cache needs for each hit.

Each adds up a histogram: `hits[c]` is the number of lookups that hit in a cache of c blocks and more, but in no smaller
one; `short[c]` the tokens that those of them lack which are not full blocks. `hits` is uint32 where that can hold the
number of references: it is written to at random, and with half the memory that is faster. What is given of the workload
is only read; beside it, memory grows with the number of distinct blocks alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.curves.stack import IN_LINE, NEVER, count_from, open_line, remove
from kvtrace_replay.structures.machine import prefetch
from kvtrace_replay.structures.slots import LOW, ONE, WORD, ZERO
from kvtrace_traces.compile import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Counts = U32 | I64

# How many references ahead memory is asked for: first the slot of a block, then the bits around that slot.
_SLOT_AHEAD, _BITS_AHEAD = 64, 24
# Within a request, the slots are near already.
_NEAR = 8
# Of the next request that much is asked for early.
_EARLY = 64
# Counts wait so long for their place in the histogram to come near.
_WAITING = np.uint64(64)


def new_counts(n_identities: int, n_refs: int, partial: bool) -> tuple[npt.NDArray[Any], I64]:
    """(hits, short) before any of `n_refs` lookups; `partial`: there are blocks that are not full."""
    hits = np.zeros(n_identities + 1, np.uint32 if n_refs < 2**32 else np.int64)
    return hits, np.zeros(n_identities + 1 if partial else 0, np.int64)


@njit(cache=False, forceinline=True)
def _ask_early(keys: I32, i: Any, stop: Any, last: U32, bits: U64) -> None:
    """Brings near what the references behind `keys[i]`, but none from `stop` on, will need."""
    if i + _SLOT_AHEAD < stop:
        prefetch(last, np.intp(np.uint32(keys[i + _SLOT_AHEAD])))
        ahead = last[np.intp(np.uint32(keys[i + _BITS_AHEAD]))]
        if ahead != NEVER:
            prefetch(bits, np.intp(np.uint64(ahead) >> WORD))


@njit
def object_kernel(
    refs: I32, indptr: I64, last_tokens: I32, block_size: int, first: int, end_request: int, first_counted: int,
    firsts: I32, lacking: I32, hits: Counts, short: I64,
    last: U32, bits: U64, lines: I16, nodes: I32, areas: I32,
) -> tuple[int, int, Any]:  # fmt: skip
    """`object` semantics, for the requests `first` to `end_request` - 1: every reference is a lookup. Those of requests
    from `first_counted` on are counted; an empty `short` says that every block is full.

    Writes the blocks that were not used before to `firsts`, in order, if it has room at all, and to `lacking`, where
    there is `short`, the tokens that such a reference lacks to a full block. Returns (how many it wrote, how many
    of them before the first request that counts, the next slot).
    """
    now = ZERO
    stop = indptr[end_request]
    waiting = np.zeros(_WAITING, np.int64)
    counted = ZERO
    found, uncounted = 0, 0
    for r in range(first, end_request):
        end = indptr[r + 1]
        if r == first_counted:
            uncounted = found
        for i in range(indptr[r], end):
            _ask_early(refs, i, stop, last, bits)
            key = np.intp(np.uint32(refs[i]))
            if last[key] != NEVER:
                slot = np.uint64(last[key])
                needed = count_from(slot, now, bits, lines, nodes, areas)
                remove(slot >> WORD, ONE << (slot & LOW), 1, bits, lines, nodes, areas)
                if r >= first_counted:
                    prefetch(hits, needed)
                    place = np.intp(counted % _WAITING)
                    if counted >= _WAITING:
                        hits[waiting[place]] += 1
                    waiting[place] = needed
                    counted += ONE
                    if short.size and i == end - 1:
                        short[needed] += block_size - last_tokens[r]
            elif firsts.size:
                firsts[found] = key
                if short.size:
                    lacking[found] = block_size - last_tokens[r] if i == end - 1 else 0
                found += 1
            last[key] = np.uint32(now)
            bits[now >> WORD] |= ONE << (now & LOW)
            now += ONE
            if now & IN_LINE == ZERO:
                now = open_line(now, last, bits, lines, nodes, areas)
    for i in range(min(counted, _WAITING)):
        hits[waiting[i]] += 1
    return found, (uncounted if first_counted < end_request else found), np.int64(now)


@njit
def earlier_kernel(
    keys: I32, above: I32, lacking: I32, uncounted: int, blocks: int, next_slot: int, hits: Counts, short: I64,
    last: U32, bits: U64, lines: I16, nodes: I32, areas: I32,
) -> tuple[int, int]:  # fmt: skip
    """Looks `keys`, the blocks that a later part of the references uses for the first time, up in the stack of an
    earlier part, which has `blocks` blocks and `next_slot` as its next one, and takes those that it finds out of it.

    `above`: how many other blocks were used since that earlier part, before each of `keys`. The first `uncounted` are
    not counted. What the stack does not have is left at the front of `keys`, `above` and `lacking`, to be looked up in
    the stack of the part before; returns (how many that is, how many of them are not counted).
    """
    now = np.uint64(next_slot)
    left, left_uncounted = 0, 0
    n = keys.size
    for i in range(n):
        _ask_early(keys, i, n, last, bits)
        key = np.intp(np.uint32(keys[i]))
        if last[key] != NEVER:
            slot = np.uint64(last[key])
            needed = np.int64(above[i]) + count_from(slot, now, bits, lines, nodes, areas)
            remove(slot >> WORD, ONE << (slot & LOW), 1, bits, lines, nodes, areas)
            last[key] = NEVER
            blocks -= 1
            if i >= uncounted:
                hits[needed] += 1
                if short.size:
                    short[needed] += lacking[i]
        else:
            keys[left], above[left] = key, above[i] + blocks
            if short.size:
                lacking[left] = lacking[i]
            left += 1
            left_uncounted += 1 if i < uncounted else 0
    return left, left_uncounted


@njit(cache=False, forceinline=True)
def use_again(
    refs: I32, start: int, stop: int, now: np.uint64, last: U32, bits: U64, lines: I16, nodes: I32, areas: I32
) -> np.uint64:  # fmt: skip
    """Moves the blocks `refs[start:stop]` to the top of the stack, the tail first. Returns the next slot.

    Blocks that were used together last time have neighbouring slots: all of a word are removed at once.
    """
    word, mask, count = ZERO, ZERO, 0
    for p in range(stop - 1, start - 1, -1):
        if p - _NEAR >= start:
            ahead = last[np.intp(np.uint32(refs[p - _NEAR]))]
            if ahead != NEVER:
                prefetch(bits, np.intp(np.uint64(ahead) >> WORD))
        key = np.intp(np.uint32(refs[p]))
        if last[key] != NEVER:
            slot = np.uint64(last[key])
            if slot >> WORD != word and count:
                remove(word, mask, count, bits, lines, nodes, areas)
                mask, count = ZERO, 0
            word = slot >> WORD
            mask |= ONE << (slot & LOW)
            count += 1
        last[key] = np.uint32(now)
        bits[now >> WORD] |= ONE << (now & LOW)
        now += ONE
        if now & IN_LINE == ZERO:
            if count:
                remove(word, mask, count, bits, lines, nodes, areas)
                mask, count = ZERO, 0
            now = open_line(now, last, bits, lines, nodes, areas)
    if count:
        remove(word, mask, count, bits, lines, nodes, areas)
    return now


@njit(cache=False, forceinline=True)
def look_up(
    refs: I32, start: int, stop: int, end: int, tokens_lacking: int, counted: bool, now: np.uint64, pinned: int,
    pins: I32, hits: Counts, short: I64, last: U32, bits: U64, lines: I16, nodes: I32, areas: I32,
) -> None:  # fmt: skip
    """Counts the lookup of `refs[start:stop]`, the first blocks of a chain that ends at `end`.

    A block hits where all blocks before it do, so it needs the deepest of them: in a chain the deepest is the block
    itself, since the tail is always used before the head. A pinned block is there whatever the capacity. The older a
    slot the deeper it lies, so that only slots older than all before are ranked; hits at one depth are counted at once.
    """
    deepest, oldest, alike = 0, NEVER, 0
    for p in range(start, stop):
        key = np.intp(np.uint32(refs[p]))
        if pins.size == 0 or pins[key] == 0:
            slot = last[key]
            if slot == NEVER:
                break
            if slot < oldest:
                if counted:
                    hits[deepest] += alike
                alike = 0
                if slot + np.uint32(1) == oldest:
                    deepest += 1  # used together last time: neighbours
                else:
                    deepest = pinned + count_from(np.uint64(slot), now, bits, lines, nodes, areas)
                oldest = slot
        alike += 1
        if counted and short.size and p == end - 1:
            short[deepest] += tokens_lacking
    if counted:
        hits[deepest] += alike


@njit
def import_kernel(
    refs: I32, indptr: I64, prompt_blocks: I32, hit_cap: I32, last_tokens: I32, block_size: int, first_counted: int,
    hits: Counts, short: I64,
    last: U32, bits: U64, lines: I16, nodes: I32, areas: I32,
) -> None:  # fmt: skip
    """`prefix` semantics where each request ends before the next begins."""
    now = ZERO
    no_pins = np.zeros(0, np.int32)
    n = refs.size
    for r in range(indptr.size - 1):
        start, end = indptr[r], indptr[r + 1]
        for p in range(end, min(2 * end - start, n)):  # the next request, if it is as long as this one
            prefetch(last, np.intp(np.uint32(refs[p])))
        stop = start + min(prompt_blocks[r], hit_cap[r])
        lacking = block_size - last_tokens[r]
        look_up(
            refs, start, stop, end, lacking, r >= first_counted, now, 0, no_pins,
            hits, short, last, bits, lines, nodes, areas,
        )  # fmt: skip
        now = use_again(refs, start, end, now, last, bits, lines, nodes, areas)


@njit
def recorded_kernel(
    refs: I32, indptr: I64, prompt_blocks: I32, hit_cap: I32, last_tokens: I32, block_size: int,
    events: I64, first_counted: int, pins: I32, hits: Counts, short: I64,
    last: U32, bits: U64, lines: I16, nodes: I32, areas: I32,
) -> int:  # fmt: skip
    """`prefix` semantics where requests overlap (`events` as in `prefix_driver`) and pin what they hold.

    Pinned blocks leave the stack and come back when the last request lets go of them. Counts the admissions from event
    `first_counted` on. `pins` int32[n_identities], all 0 at first. Returns the most blocks that were pinned at
    a time.

    Why this is exact from that capacity on: every missing block then finds a place, so the cache holds min(capacity,
    distinct blocks so far) blocks at any time; which of the unpinned ones it has lost depends only on the order in
    which they were let go. So they are the top of the stack, as many as the pinned ones leave room for.
    """
    now = ZERO
    pinned, most_pinned = 0, 0
    for e in range(events.size):
        if e + 1 < events.size:
            upcoming = abs(events[e + 1]) - 1
            for p in range(indptr[upcoming], min(indptr[upcoming + 1], indptr[upcoming] + _EARLY)):
                prefetch(last, np.intp(np.uint32(refs[p])))
                prefetch(pins, np.intp(np.uint32(refs[p])))
        r = abs(events[e]) - 1
        start, end = indptr[r], indptr[r + 1]
        middle = start + prompt_blocks[r]
        if events[e] > 0:
            stop = start + min(prompt_blocks[r], hit_cap[r])
            lacking = block_size - last_tokens[r]
            look_up(
                refs, start, stop, end, lacking, e >= first_counted, now, pinned, pins,
                hits, short, last, bits, lines, nodes, areas,
            )  # fmt: skip
            taken_from, taken_to = start, middle
        else:
            taken_from, taken_to = middle, end
        word, mask, count = ZERO, ZERO, 0
        for p in range(taken_from, taken_to):
            key = np.intp(np.uint32(refs[p]))
            if pins[key] == 0:
                pinned += 1
                if last[key] != NEVER:
                    slot = np.uint64(last[key])
                    last[key] = NEVER
                    if slot >> WORD != word and count:
                        remove(word, mask, count, bits, lines, nodes, areas)
                        mask, count = ZERO, 0
                    word = slot >> WORD
                    mask |= ONE << (slot & LOW)
                    count += 1
            pins[key] += 1
        if count:
            remove(word, mask, count, bits, lines, nodes, areas)
        most_pinned = max(most_pinned, pinned)
        if events[e] < 0:
            for p in range(end - 1, start - 1, -1):
                key = np.intp(np.uint32(refs[p]))
                pins[key] -= 1
                if pins[key] == 0:
                    pinned -= 1
                    last[key] = np.uint32(now)
                    bits[now >> WORD] |= ONE << (now & LOW)
                    now += ONE
                    if now & IN_LINE == ZERO:
                        now = open_line(now, last, bits, lines, nodes, areas)
    return most_pinned
