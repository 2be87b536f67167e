"""A counting Bloom filter: how often a block was counted, from above, in a few counters that all blocks share.

The filter of libCacheSim's W-TinyLFU (0.3.5, `dataStructure/minimalIncrementCBF.c`), so that results can be compared
with it: sized for an error of 0.001 at `entries` blocks; each block has ten of the counters, at the places a + i b
(modulo 2^32, then the number of counters), with a and b the low halves of XXH64 of the block's id as eight bytes
under two seeds. Adding increments all ten; the estimate is the least of them; `halve` halves all, so that old counts
fade. A counter stops at 65,535 (there they have 32 bits), far above what decides between two blocks that may both go.
XXH64: Y. Collet, xxHash specification 0.1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

Counters = npt.NDArray[np.uint16]
Hashes = npt.NDArray[np.uint32]

FULL = 0xFFFF  # where a counter stops
PLACES = 10  # ceil(ln 2 * counters for each entry)
_COUNTERS_PER_ENTRY = -math.log(0.001) / 0.480453013918201  # ln(2)^2
_SEEDS = (0x12345678, 0x12344321)


def new_sketch(entries: int) -> Counters:
    """All zero, uint16[number of counters]."""
    needed = math.ceil(_COUNTERS_PER_ENTRY * entries)
    return np.zeros(needed if needed >= PLACES else 2 * PLACES, np.uint16)


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
def sketch_add(counters: Counters, a: int, b: int, times: int) -> int:
    """Counts the block of hashes `a` and `b` (uint32) so many times; modifies `counters`; returns its estimate."""
    # 32-bit arithmetic throughout: it wraps around as it must, and its division is the quick one.
    at, size = a, np.uint32(counters.size)
    least: Any = np.int64(FULL)
    for _ in range(PLACES):
        place = np.intp(at % size)
        count: Any = min(np.int64(counters[place]) + times, FULL)
        counters[place] = count
        least = min(least, count)
        at = np.uint32(at + b)  # type: ignore[assignment]
    return least


@njit(cache=False)
def sketch_estimate(counters: Counters, a: int, b: int) -> int:
    """How often the block of these hashes was counted, or more."""
    at, size, least = a, np.uint32(counters.size), np.uint16(FULL)
    for _ in range(PLACES):
        least = min(least, counters[np.intp(at % size)])
        at = np.uint32(at + b)  # type: ignore[assignment]
    return np.int64(least)  # type: ignore[return-value]


@njit(cache=False)
def sketch_halve(counters: Counters) -> None:
    """Halves all counts; modifies `counters`."""
    for at in range(counters.size):
        counters[at] >>= np.uint16(1)
