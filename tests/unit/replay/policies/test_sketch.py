"""The counting filter against its slow twin, also where counts outgrow a byte."""

from __future__ import annotations

import random

import numpy as np

from kvtrace_replay.structures.sketch import (
    _place,
    new_sketch,
    sketch_add,
    sketch_estimate,
    sketch_halve,
    sketch_hashes,
    sketch_magic,
)
from unit.replay.policies.slow_sketch import Sketch


def test_random_counts_of_all_sizes() -> None:
    rng = random.Random(0)
    hashes = sketch_hashes(40)
    wide_ones = 0
    for _ in range(60):
        entries = rng.choice([1, 2, 5, 30])
        counters, wide = new_sketch(entries)
        magic = sketch_magic(counters)
        twin = Sketch(entries)
        assert counters.size == wide.size == len(twin.counters)
        most = rng.choice([1, 5, 300])
        for _ in range(200):
            key, times = rng.randrange(40), rng.randint(1, most)
            a, b = hashes[key]
            if rng.random() < 0.03:
                sketch_halve(counters, wide)
                twin.halve()
            # A place that a block has twice is counted twice.
            assert sketch_add(counters, wide, magic, a, b, times) == twin.count(key)
            for _ in range(times):
                twin.add(key)
            key = rng.randrange(40)
            assert sketch_estimate(counters, wide, magic, *hashes[key]) == twin.count(key)
        wide_ones += int((counters == 255).sum())
    assert wide_ones > 100


def test_a_counter_stops() -> None:
    counters, wide = new_sketch(30)
    magic = sketch_magic(counters)
    a, b = sketch_hashes(1)[0]
    assert [sketch_add(counters, wide, magic, a, b, 40_000) for _ in range(3)] == [0, 40_000, 65_535]
    assert sketch_estimate(counters, wide, magic, a, b) == 65_535
    for halved in (32_767, 16_383):
        sketch_halve(counters, wide)
        assert sketch_estimate(counters, wide, magic, a, b) == halved


def test_places_are_remainders() -> None:
    rng = np.random.default_rng(0)
    for size in [10, 20, 64, 1_423_457, 2**31 - 1, *rng.integers(10, 2**31, 200)]:
        magic = np.uint64((2**64 - 1) // int(size) + 1)
        for at in [0, 1, 2**32 - 1, int(size) - 1, int(size), *rng.integers(0, 2**32, 20)]:
            assert _place(np.uint32(at), magic, np.uint64(size)) == int(at) % int(size)
