"""Slots of time in a set of bits, numbered anew when they run out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.machine import bit_count, prefetch
from kvtrace_traces.compile import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

ONE, ZERO = np.uint64(1), np.uint64(0)
WORD, LOW = np.uint64(6), np.uint64(63)  # a slot's word of `bits`, as a shift; its bit in there, as a mask
_AHEAD = 16


@njit(cache=False)
def number_anew(stamps: U32, bits: U64, tail: np.uint64, never: np.uint32, first: np.uint64) -> np.uint64:
    """Gives the set bits from `tail` on the slots `first`, `first` + 1, ... in their order. Returns the next one.

    `stamps` uint32[n], the slot of each block: one that is below `tail`, or `never`, becomes `never`. `bits`
    uint64[n_words]: what is set below `tail` does not count. Modifies both.
    """
    before = np.zeros(bits.size, np.uint32)  # set bits in earlier words
    found = ZERO
    bits[tail >> WORD] &= ~ZERO << (tail & LOW)
    for word in range(np.intp(tail >> WORD), bits.size):
        before[word] = np.uint32(found)
        found += bit_count(bits[word])
    n = stamps.size
    for key in range(n):
        ahead = stamps[min(key + _AHEAD, n - 1)]
        if ahead != never:
            prefetch(bits, np.intp(np.uint64(ahead) >> WORD))
            prefetch(before, np.intp(np.uint64(ahead) >> WORD))
        stamp = stamps[key]
        slot = np.uint64(stamp)
        if stamp != never:
            own = bits[slot >> WORD] & ((ONE << (slot & LOW)) - ONE)
            number = first + np.uint64(before[slot >> WORD]) + bit_count(own)
            stamps[key] = np.uint32(number) if slot >= tail else never
    bits[:] = ZERO
    slot, end = first, first + found
    while slot < end:
        bits[slot >> WORD] |= ONE << (slot & LOW)
        slot += ONE
    return end
