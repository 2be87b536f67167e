"""A counting Bloom filter: how often a block was counted, from above, in a few counters that all blocks share.

The filter of libCacheSim's W-TinyLFU (0.3.5, `dataStructure/minimalIncrementCBF.c`), so that results can be compared
with it: sized for an error of 0.001 at `entries` blocks; each block has ten of the counters, at the places a + i b
(modulo 2^32, then the number of counters), with a and b the low halves of XXH64 of the block's id as eight bytes
under two seeds. Adding increments all ten; the estimate is the least of them; `halve` halves all, so that old counts
fade. A counter stops at 65,535 (there they have 32 bits), far above what decides between two blocks that may both go.
Few counters are high, so each has a byte, which more of a processor's cache holds; from 255 on, it stands in the array
`wide` instead, and the byte says so. XXH64: Y. Collet, xxHash specification 0.1.

Ten divisions would be most of the work, so a place is found by multiplying: D. Lemire, O. Kaser, N. Kurz, "Faster
remainder by direct computation", Software: Practice and Experience 49(6), 2019. `magic` is the constant that this takes
for a number of counters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.machine import prefetch
from kvtrace_traces.compile import njit

Counters = npt.NDArray[np.uint8]
Wide = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint32]

FULL = 0xFFFF  # where a counter stops
IS_WIDE = 0xFF  # of `counters`: what is counted stands in `wide`
PLACES = 10  # ceil(ln 2 * counters for each entry)
_COUNTERS_PER_ENTRY = -math.log(0.001) / 0.480453013918201  # ln(2)^2
_SEEDS = (0x12345678, 0x12344321)


def new_sketch(entries: int) -> tuple[Counters, Wide]:
    """All zero: (counters uint8, wide uint16), each of the number of counters."""
    needed = math.ceil(_COUNTERS_PER_ENTRY * entries)
    size = needed if needed >= PLACES else 2 * PLACES
    return np.zeros(size, np.uint8), np.zeros(size, np.uint16)


def sketch_magic(counters: Counters) -> int:
    """The constant for this many counters, as an int64 of the same bits."""
    return int(np.array([(2**64 - 1) // counters.size + 1], np.uint64).view(np.int64)[0])


def sketch_hashes(n_identities: int) -> Hashes:
    """uint32[n_identities, 2], a and b of each id. Read-only."""
    ids = np.arange(n_identities, dtype=np.uint64)
    hashes = np.stack([_xxh64(ids, seed).astype(np.uint32) for seed in _SEEDS], axis=1)
    hashes = np.ascontiguousarray(hashes)
    hashes.setflags(write=False)
    return hashes


def _xxh64(ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """XXH64 of each id as eight bytes, the low one first. Multiplication wraps around, as it must."""
    one, two, three, four, five = (
        np.uint64(prime)
        for prime in (
            11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261,
        )
    )  # fmt: skip

    def rotated(words: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.uint64]:
        return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))

    word = np.full(ids.size, seed + 8 + int(five), np.uint64)
    word ^= rotated(ids * two, 31) * one
    word = rotated(word, 27) * one + four
    word ^= word >> np.uint64(33)
    word *= two
    word ^= word >> np.uint64(29)
    word *= three
    word ^= word >> np.uint64(32)
    return word


@njit(cache=False)
def _place(at: Any, magic: Any, size: Any) -> Any:
    """`at` (uint32) modulo `size`, both multiplications in 64 bits: the upper half of a product of 96."""
    fraction = magic * np.uint64(at)
    low = (fraction & np.uint64(0xFFFFFFFF)) * size >> np.uint64(32)
    return np.intp((fraction >> np.uint64(32)) * size + low >> np.uint64(32))


@njit(cache=False)
def _add_wide(counters: Counters, wide: Wide, place: Any, times: int) -> int:
    """`sketch_add` to a counter that is wide, or will be; returns what it was."""
    before: Any = np.int64(wide[place]) if counters[place] == IS_WIDE else np.int64(counters[place])
    counters[place] = IS_WIDE
    wide[place] = min(before + times, FULL)
    return before


@njit(cache=False)
def sketch_add(counters: Counters, wide: Wide, magic: int, a: int, b: int, times: int) -> int:
    """Counts the block of hashes `a` and `b` (uint32) so many times; modifies the arrays. Returns the estimate that it
    had before."""
    at: Any = a
    least: Any = np.int64(FULL)
    for _ in range(PLACES):
        place = _place(at, np.uint64(magic), np.uint64(counters.size))
        before: Any = np.int64(counters[place])
        if before + times < IS_WIDE:
            counters[place] = before + times
        else:
            before = _add_wide(counters, wide, place, times)
        least = min(least, before)
        at = np.uint32(at + b)  # wraps around, as it must
    return least


@njit(cache=False)
def sketch_estimate(counters: Counters, wide: Wide, magic: int, a: int, b: int) -> Any:
    """How often the block of these hashes was counted, or more."""
    at: Any = a
    least = np.uint8(IS_WIDE)
    for _ in range(PLACES):
        least = min(least, counters[_place(at, np.uint64(magic), np.uint64(counters.size))])
        at = np.uint32(at + b)
    if least < IS_WIDE:
        return np.int64(least)
    at = a
    most = np.uint16(FULL)
    for _ in range(PLACES):  # all are wide
        most = min(most, wide[_place(at, np.uint64(magic), np.uint64(counters.size))])
        at = np.uint32(at + b)
    return np.int64(most)


@njit(cache=False)
def sketch_prefetch(counters: Counters, magic: int, a: int, b: int) -> None:
    """Asks for the counters of these hashes to be brought near."""
    at: Any = a
    for _ in range(PLACES):
        prefetch(counters, _place(at, np.uint64(magic), np.uint64(counters.size)))
        at = np.uint32(at + b)


@njit(cache=False)
def sketch_halve(counters: Counters, wide: Wide) -> None:
    """Halves all counts; modifies the arrays."""
    for at in range(counters.size):
        if counters[at] < IS_WIDE:
            counters[at] >>= np.uint8(1)
            continue
        half = wide[at] >> np.uint16(1)
        if half < IS_WIDE:
            counters[at] = half
        else:
            wide[at] = half
