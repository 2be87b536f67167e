"""The slow twin of `structures.sketch`: a list of whole numbers, every use counted at once."""

from __future__ import annotations

import math


def xxh64(number: int, seed: int) -> int:
    """XXH64 of a number as eight bytes (xxHash specification 0.1)."""
    p1, p2, p3, p4, p5 = (
        11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261,
    )  # fmt: skip
    mask = 2**64 - 1

    def rotated(word: int, bits: int) -> int:
        return (word << bits | word >> (64 - bits)) & mask

    word = (seed + p5 + 8) & mask
    word ^= rotated(number * p2 & mask, 31) * p1 & mask
    word = (rotated(word, 27) * p1 + p4) & mask
    word ^= word >> 33
    word = word * p2 & mask
    word ^= word >> 29
    word = word * p3 & mask
    return word ^ word >> 32


class Sketch:
    def __init__(self, entries: int) -> None:
        per_entry = -math.log(0.001) / math.log(2) ** 2
        size = math.ceil(per_entry * entries)
        self.counters = [0] * (size if size >= 10 else 20)
        self.known: dict[int, list[int]] = {}

    def places(self, key: int) -> list[int]:
        if key not in self.known:
            a, b = xxh64(key, 0x12345678) % 2**32, xxh64(key, 0x12344321) % 2**32
            self.known[key] = [(a + i * b) % 2**32 % len(self.counters) for i in range(10)]
        return self.known[key]

    def add(self, key: int) -> None:
        for place in self.places(key):
            self.counters[place] = self.counters[place] + 1

    def count(self, key: int) -> int:
        return min(self.counters[place] for place in self.places(key))

    def halve(self) -> None:
        self.counters = [count // 2 for count in self.counters]
