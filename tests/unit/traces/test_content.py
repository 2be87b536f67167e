"""Content ids against plain Python: which imports have them, and the prefix identities made of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtrace_traces.content import chain, many_parents

MASK = (1 << 64) - 1


def plain_many_parents(requests: list[list[int]]) -> bool:
    """Some id has come after two others, or after one and first."""
    before: dict[int, set[int | None]] = {}
    for ids in requests:
        for place, one in enumerate(ids):
            before.setdefault(one, set()).add(ids[place - 1] if place else None)
    return any(len(parents) > 1 for parents in before.values())


def split_mix(value: int) -> int:
    """The output function of SplitMix64 on its state one step further."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def plain_chain(requests: list[list[int]], hashes: list[int]) -> list[int]:
    made = []
    for ids in requests:
        so_far = 0x9E3779B97F4A7C15
        for one in ids:
            so_far = split_mix(so_far ^ hashes[one])
            made.append(so_far)
    return made


def drawn(r: random.Random, unique: int) -> list[list[int]]:
    """Requests: half of the time of prefix ids (each always after the same), else of any ids."""
    if r.random() < 0.5:
        return [[r.randrange(unique) for _ in range(r.randrange(5))] for _ in range(r.randrange(6))]
    parent = [r.randrange(-1, one) for one in range(unique)]
    requests = []
    for _ in range(r.randrange(6)):
        ids, one = [], r.randrange(unique)
        while one >= 0:
            ids.append(one)
            one = parent[one]
        requests.append(ids[::-1])
    return requests


def csr(requests: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    indptr = np.cumsum([0, *map(len, requests)]).astype(np.int64)
    return indptr, np.array([one for ids in requests for one in ids], np.int32)


def test_content_is_told_from_prefixes() -> None:
    r, found = random.Random(7), []
    for _ in range(3000):
        unique = r.randrange(1, 9)
        requests = drawn(r, unique)
        found.append(plain_many_parents(requests))
        assert many_parents(*csr(requests), unique) == found[-1], requests
    assert 500 < sum(found) < 2500


def test_a_chain_is_its_hash_by_hand() -> None:
    r = random.Random(8)
    for _ in range(1000):
        unique = r.randrange(1, 9)
        hashes = [r.randrange(1 << 64) for _ in range(unique)]
        requests = drawn(r, unique)
        indptr, identities = csr(requests)
        chained = np.empty(len(identities), np.uint64)
        chain(indptr, identities, np.array(hashes, np.uint64), chained)
        assert chained.tolist() == plain_chain(requests, hashes)


@pytest.mark.parametrize(("first", "second", "same"), [([1, 2], [1, 2], True), ([1, 2], [2, 2], False)])
def test_one_id_after_others_is_another_prefix(first: list[int], second: list[int], same: bool) -> None:
    indptr, identities = csr([first, second])
    chained = np.empty(4, np.uint64)
    chain(indptr, identities, np.arange(10, 13, dtype=np.uint64), chained)
    assert (chained[1] == chained[3]) == same
