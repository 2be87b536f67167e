"""An LRU stack that tells how deep a block lies: time slots, of which the latest of each block is live.

Every use of a block takes the next slot and makes the block's earlier slot dead. A block's depth, the least
capacity that still holds it, is the number of live slots from its own on. So the stack is a set of bits with a fast
rank, and what makes it fast is where the counting stops:

    512 slots are a line    bits of a cache line, counted by population count
    64 lines are a node     `lines` holds, per line, its live slots
    32 nodes are an area    `nodes` holds, per node, its live slots
    all areas               `areas` holds, per area, its live slots

A rank adds up what lies behind the slot in its line, its node, its area and among all areas: some vector instructions
each, without branches. A removal lowers one number a level. Slots are taken in order, and a line counts as full of live
slots as soon as its first one is next, so that taking one sets a bit and no more; a rank takes off those still to come.
When the slots run out, live ones are renumbered from 0: with three slots a block this happens so rarely that it costs
little.

A Fenwick tree over the slots (Bennett and Kruskal, "LRU stack processing", IBM J. Res. Dev. 19(4), 1975; Almasi,
Cascaval and Padua, MSP 2002) needs some twenty dependent steps where this needs none.

State arrays, made by `new_stack`:
    last    uint32[n_identities], the live slot of each block, NEVER where it has none
    bits    uint64[n_slots / 64], live slots
    lines   int16[64 * n_nodes]
    nodes   int32[32 * n_areas]
    areas   int32[n_areas, rounded up to 32]
The next slot travels as a plain number, `now` (uint64).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.memory import aligned_zeros
from kvtrace_replay.structures.slots import ONE, WORD, ZERO, number_anew
from kvtrace_replay.structures.sums import WORDS, lanes, ones_from, sum_behind
from kvtrace_traces.compile import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]

NEVER = np.uint32(2**32 - 1)
_LINES, _NODES = lanes(np.int16), lanes(np.int32)  # of a node; of an area
SLOTS_PER_LINE = 64 * WORDS
SLOTS_PER_AREA = SLOTS_PER_LINE * _LINES * _NODES
_MOST_SLOTS = 2**32 - SLOTS_PER_LINE  # so that NEVER is no slot
_SLOTS_PER_BLOCK = 3  # more hit the caches less, fewer are renumbered more often

# As shifts of a slot; all are powers of two.
LINE, NODE, AREA = (
    np.uint64(slots.bit_length() - 1) for slots in (SLOTS_PER_LINE, SLOTS_PER_LINE * _LINES, SLOTS_PER_AREA)
)
IN_LINE = np.uint64(SLOTS_PER_LINE - 1)


def new_stack(n_identities: int, slots_per_block: int = _SLOTS_PER_BLOCK) -> tuple[U32, U64, I16, I32, I32]:
    """(last, bits, lines, nodes, areas) of an empty stack over blocks 0..n_identities-1."""
    # A line more than there are blocks: after a renumbering there is always a free slot.
    wanted = min(max(slots_per_block * n_identities, n_identities + 1, 1), _MOST_SLOTS - SLOTS_PER_LINE)
    n_lines = wanted // SLOTS_PER_LINE + 1
    n_nodes = -(-n_lines // _LINES)
    n_areas = -(-n_nodes // _NODES)
    bits = aligned_zeros(n_lines * WORDS, np.uint64)
    lines = aligned_zeros(n_nodes * _LINES, np.int16)
    nodes = aligned_zeros(n_areas * _NODES, np.int32)
    areas = aligned_zeros(-(-n_areas // _NODES) * _NODES, np.int32)
    lines[0] = nodes[0] = areas[0] = SLOTS_PER_LINE
    return np.full(n_identities, NEVER, np.uint32), bits, lines, nodes, areas


@njit(cache=False, forceinline=True)
def count_from(slot: np.uint64, now: np.uint64, bits: U64, lines: I16, nodes: I32, areas: I32) -> int:
    """Live slots from `slot` on, itself included if it is live."""
    line, node, area = slot >> LINE, slot >> NODE, slot >> AREA
    found = ones_from(bits, np.intp(line << (LINE - WORD)), np.intp(slot & IN_LINE))
    found += sum_behind(lines, np.intp(node << (NODE - LINE)), np.intp(line - (node << (NODE - LINE))))
    found += sum_behind(nodes, np.intp(area << (AREA - NODE)), np.intp(node - (area << (AREA - NODE))))
    for start in range(0, areas.size, _NODES):
        found += sum_behind(areas, start, np.intp(area) - start)
    to_come = np.int64(SLOTS_PER_LINE) - np.int64(now & IN_LINE)
    return found - (to_come if line != now >> LINE else np.int64(0))


@njit(cache=False, forceinline=True)
def remove(word: np.uint64, mask: np.uint64, count: int, bits: U64, lines: I16, nodes: I32, areas: I32) -> None:
    """Makes the live slots `mask`, `count` of them, of word number `word` dead. Modifies the arrays."""
    bits[word] &= ~mask
    slot = word << WORD
    lines[slot >> LINE] -= np.int16(count)
    nodes[slot >> NODE] -= np.int32(count)
    areas[slot >> AREA] -= np.int32(count)


@njit(cache=False, forceinline=True)
def open_line(now: np.uint64, last: U32, bits: U64, lines: I16, nodes: I32, areas: I32) -> np.uint64:
    """To be called when `now` has reached the start of a line: counts it as full, or renumbers where there is no line
    any more. Returns the next slot."""
    if now >> WORD == np.uint64(bits.size):
        return _renumber(last, bits, lines, nodes, areas)
    _credit(now, lines, nodes, areas)
    return now


@njit(cache=False, forceinline=True)
def _credit(slot: np.uint64, lines: I16, nodes: I32, areas: I32) -> None:
    lines[slot >> LINE] += np.int16(SLOTS_PER_LINE)
    nodes[slot >> NODE] += np.int32(SLOTS_PER_LINE)
    areas[slot >> AREA] += np.int32(SLOTS_PER_LINE)


@njit(cache=False)
def _renumber(last: U32, bits: U64, lines: I16, nodes: I32, areas: I32) -> np.uint64:
    """Gives the live slots the numbers 0, 1, ... in their order; returns the next one."""
    now = np.uint64(number_anew(last, bits, ZERO, NEVER, ZERO))
    lines[:] = 0
    nodes[:] = 0
    areas[:] = 0
    for line in range((now >> LINE) + ONE):
        _credit(np.uint64(line) << LINE, lines, nodes, areas)
    return now
