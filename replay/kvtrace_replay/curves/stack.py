"""An LRU stack that tells how deep a block lies: time slots, of which the latest of each block is live.

Every use of a block takes the next slot and makes the block's earlier slot dead. A block's depth, the least
capacity that still holds it, is the number of live slots from its own on. So the stack is a set of bits with a fast
rank, and what makes it fast is where the counting stops:

    512 slots are a line    bits of a cache line, counted by population count
    64 lines are a node     `lines` holds, per line, the live slots of its node before it
    64 nodes are an area    `nodes` holds, per node, the live slots of its area before it
    all areas               `areas` holds, per area, all live slots before it

A rank reads one entry a level. A removal lowers the later entries of one node and of one area: two or four vector
instructions each, without branches. Slots are taken in order, so entries of lines still to come are unset until the
first of their slots is taken. When the slots run out, live ones are renumbered from 0: with three slots a
block this happens so rarely that it costs next to nothing.

A Fenwick tree over the slots (Bennett and Kruskal, "LRU stack processing", IBM J. Res. Dev. 19(4), 1975; Almasi,
Cascaval and Padua, MSP 2002) needs some twenty dependent steps where this needs three.

State arrays, made by `new_stack`:
    last    uint32[n_identities], the live slot of each block, NEVER where it has none
    bits    uint64[n_slots / 64], live slots
    lines   int16[64 * n_nodes]
    nodes   int32[64 * n_areas]
    areas   int64[n_areas]
The next slot and the number of live ones travel as plain numbers, `now` (uint64) and `live` (int64).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.machine import bit_count, prefetch
from kvtrace_replay.structures.memory import aligned_zeros
from kvtrace_traces.compile import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

NEVER = np.uint32(2**32 - 1)
SLOTS_PER_LINE, SLOTS_PER_NODE, SLOTS_PER_AREA = 512, 512 * 64, 512 * 64 * 64
_MOST_SLOTS = 2**32 - SLOTS_PER_LINE  # so that NEVER is no slot
_SLOTS_PER_BLOCK = 3  # more hit the caches less, fewer are renumbered more often

ONE, ZERO = np.uint64(1), np.uint64(0)
WORD, LINE, NODE, AREA = np.uint64(6), np.uint64(9), np.uint64(15), np.uint64(21)  # as shifts of a slot
LOW = np.uint64(63)
IN_LINE = np.uint64(SLOTS_PER_LINE - 1)
WORDS_SHIFT = np.uint64(3)  # words per line
FAN_SHIFT = np.uint64(6)


def new_stack(n_identities: int, slots_per_block: int = _SLOTS_PER_BLOCK) -> tuple[U32, U64, I16, I32, I64]:
    """(last, bits, lines, nodes, areas) of an empty stack over blocks 0..n_identities-1."""
    # A line more than there are blocks: after a renumbering there is always a free slot.
    wanted = min(max(slots_per_block * n_identities, n_identities + 1, 1), _MOST_SLOTS - SLOTS_PER_LINE)
    n_lines = wanted // SLOTS_PER_LINE + 1
    n_nodes = -(-n_lines // 64)
    n_areas = -(-n_nodes // 64)
    return (
        np.full(n_identities, NEVER, np.uint32),
        aligned_zeros(n_lines * 8, np.uint64),
        aligned_zeros(n_nodes * 64, np.int16),
        aligned_zeros(n_areas * 64, np.int32),
        np.zeros(n_areas, np.int64),
    )


@njit(cache=False, forceinline=True)
def count_before(slot: np.uint64, bits: U64, lines: I16, nodes: I32, areas: I64) -> int:
    """Live slots before `slot`."""
    line = slot >> LINE
    start = line << WORDS_SHIFT
    own = (slot >> WORD) - start
    found = bit_count(bits[start + own] & ((ONE << (slot & LOW)) - ONE))
    for i in range(8):
        word = np.uint64(i)
        # Counted whether wanted or not: eight words in one vector instruction, and no branch.
        ones = bit_count(bits[start + word])
        found += ones if word < own else ZERO
    return np.int64(found) + np.int64(lines[line]) + np.int64(nodes[slot >> NODE]) + areas[slot >> AREA]


@njit(cache=False, forceinline=True)
def remove(
    word: np.uint64, mask: np.uint64, count: int, now: np.uint64, bits: U64, lines: I16, nodes: I32, areas: I64
) -> None:  # fmt: skip
    """Makes the live slots `mask`, `count` of them, of word number `word` dead. Modifies the arrays."""
    bits[word] &= ~mask
    line = word >> WORDS_SHIFT
    node = line >> FAN_SHIFT
    at = node << FAN_SHIFT
    own_line, fewer_lines = np.int16(line & LOW), np.int16(count)
    for i in range(64):
        lines[at + np.uint64(i)] -= fewer_lines if np.int16(i) > own_line else np.int16(0)
    if node != now >> NODE:  # else all later nodes are still to come
        area = node >> FAN_SHIFT
        at = area << FAN_SHIFT
        own_node, fewer_nodes = np.int32(node & LOW), np.int32(count)
        for i in range(64):
            nodes[at + np.uint64(i)] -= fewer_nodes if np.int32(i) > own_node else np.int32(0)
        for i in range(area + ONE, (now >> AREA) + ONE):
            areas[i] -= count


@njit(cache=False, forceinline=True)
def open_line(now: np.uint64, live: int, last: U32, bits: U64, lines: I16, nodes: I32, areas: I64) -> np.uint64:
    """To be called when `now` has reached the start of a line: sets its counts, or renumbers where there is no
    line any more. Returns the next slot."""
    line = now >> LINE
    if (line << WORDS_SHIFT) == np.uint64(bits.size):
        return _renumber(live, last, bits, lines, nodes, areas)
    before = line - ONE
    full = np.int64(0)
    for i in range(8):
        full += np.int64(bit_count(bits[(before << WORDS_SHIFT) + np.uint64(i)]))
    full += lines[before]
    if line & LOW:
        lines[line] = full
        return now
    lines[line] = 0
    node = line >> FAN_SHIFT
    full += nodes[node - ONE]
    if node & LOW:
        nodes[node] = full
        return now
    nodes[node] = 0
    area = node >> FAN_SHIFT
    areas[area] = areas[area - ONE] + full
    return now


@njit(cache=False)
def _renumber(live: int, last: U32, bits: U64, lines: I16, nodes: I32, areas: I64) -> np.uint64:
    """Gives the live slots the numbers 0, 1, ... in their order; returns the next one."""
    n = last.size
    for key in range(n):
        ahead = last[min(key + 16, n - 1)]
        if ahead != NEVER:
            prefetch(bits, np.intp(np.uint64(ahead) >> WORD))
        if last[key] != NEVER:
            last[key] = np.uint32(count_before(np.uint64(last[key]), bits, lines, nodes, areas))
    now = np.uint64(live)
    bits[:] = ZERO
    for word in range(now >> WORD):
        bits[word] = ~ZERO
    if now & LOW:
        bits[now >> WORD] = (ONE << (now & LOW)) - ONE
    for line in range(live // SLOTS_PER_LINE + 1):
        lines[line] = line % 64 * SLOTS_PER_LINE
    for node in range(live // SLOTS_PER_NODE + 1):
        nodes[node] = node % 64 * SLOTS_PER_NODE
    for area in range(live // SLOTS_PER_AREA + 1):
        areas[area] = area * SLOTS_PER_AREA
    return now
