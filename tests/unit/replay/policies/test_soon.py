"""`soon`: which blocks a policy is told of before they are asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import replay
from kvtrace_replay.cache.object_driver import FAR, NEAR
from kvtrace_replay.policies import find_policy, registry
from kvtrace_replay.policies.registry import load_policy_file
from unit.replay.twins import make_workload

POLICY = """
import numpy as np
from kvtrace_replay.policies import policy

MADE = []

@policy("told", summary="keeps what it is told", paper="none")
class Told:
    def setup(stream, capacity):
        MADE.append((np.zeros((2, stream.refs.size), np.int64), np.zeros(3, np.int64), np.zeros(capacity, np.int64)))
        return MADE[-1]

    def insert(key, now, told, counts, queue):
        queue[counts[2] % queue.size] = key
        counts[2] += 1

    def hit(key, pinned, now, told, counts, queue):
        pass

    def evict(key, now, pins, told, counts, queue):
        return queue[counts[2] % queue.size]

    def soon(key, near, pins, told, counts, queue):
        row = 1 if near else 0
        told[row, counts[row]] = key
        counts[row] += 1
"""


@pytest.fixture
def told_py(tmp_path: Path) -> Iterator[Path]:
    """A file with the policy, which is forgotten afterwards: other tests go through all policies."""
    file = tmp_path / "told.py"
    file.write_text(POLICY)
    yield file
    registry._policies.pop("told", None)


def test_each_reference_is_announced_twice_but_the_first_and_last(told_py: Path) -> None:
    rng = random.Random(3)
    refs = [rng.randrange(50) for _ in range(200)]
    numbers: dict[int, int] = {}
    keys = [numbers.setdefault(block, len(numbers)) for block in refs]
    workload = make_workload([keys[:7], keys[7:150], keys[150:]])
    name = load_policy_file(told_py)[0]
    rows = replay(workload, [f"{told_py}:Told", "fifo"], 10, "object")
    assert rows[0]["block_hits"] == rows[1]["block_hits"] > 0
    made = find_policy(name).setup.__globals__["MADE"]
    told, counts, _ = made[-1]
    n = len(keys) - FAR
    assert counts.tolist()[:2] == [n, n]
    assert np.array_equal(told[0, :n], keys[FAR:])
    assert np.array_equal(told[1, :n], keys[NEAR : NEAR + n])
