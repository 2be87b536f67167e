"""length-aware, workload-aware and cost-aware against slow twins."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import random
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_traces.errors import UsageError
from unit.replay.policies.slow_driver import Pins, SlowPolicy, check_policy
from unit.replay.policies.test_radix import check, lru_rank, random_tree_workload, some_capacity
from unit.replay.policies.twins_radix import BlockTree, Path, Uses
from unit.replay.test_against_twins import random_workload
from unit.replay.twins import make_workload


def workload_of_any_kind(rng: random.Random) -> tuple[Workload, int]:
    """With arrival times and classes, as often as not."""
    workload, largest = random_tree_workload(rng) if rng.random() < 0.5 else random_workload(rng)
    n = workload.n_requests
    arrival = np.cumsum([rng.choice([0, 10**6, 10**9, 7 * 10**9]) for _ in range(n)]).astype(np.int64)
    return dataclasses.replace(
        workload,
        arrival_ns=arrival if rng.random() < 0.7 else None,
        request_class=np.array([rng.randrange(3) for _ in range(n)], np.int32) if rng.random() < 0.7 else None,
    ), largest


class _Facts(SlowPolicy):
    """Keeps of each resident block when it was last used, and where."""

    def __init__(self, workload: Workload, semantics: str) -> None:
        self.workload = workload
        self.semantics = semantics
        bounds = workload.indptr.tolist()
        self.where = [(r, p - bounds[r]) for r in range(workload.n_requests) for p in range(bounds[r], bounds[r + 1])]
        self.clock = 0
        self.stamp: dict[int, int] = {}

    def stamped(self, key: int) -> None:
        self.clock += 1
        self.stamp[key] = self.clock

    def candidates(self, pins: Pins) -> list[int]:
        return [key for key, holds in pins.items() if holds == 0]

    def unpin(self, key: int) -> None:
        self.stamped(key)

    def remove(self, key: int) -> None:
        pass  # it looks at what is resident


class SlowLengthAware(_Facts):
    def __init__(self, workload: Workload, semantics: str) -> None:
        super().__init__(workload, semantics)
        self.uses: dict[int, int] = {}
        self.depth: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        self.uses[key] = 0
        self.hit(key, False, now)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.uses[key] += 1
        self.depth[key] = self.where[now][1]
        self.stamped(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        return min(self.candidates(pins), key=lambda k: (self.uses[k], -self.depth[k], self.stamp[k]))


class SlowWorkloadAware(_Facts):
    def __init__(self, workload: Workload, semantics: str, life_s: float, samples: int) -> None:
        super().__init__(workload, semantics)
        self.life_s, self.samples = life_s, samples
        self.now_ns = -(2**63)
        self.used_ns: dict[int, int] = {}
        self.of: dict[int, int] = {}
        self.depth: dict[int, int] = {}
        self.uses: list[int] = []  # the class of each use
        self.reuses: list[tuple[int, float]] = []  # class, seconds

    def begin(self, request: int, now: int) -> None:
        arrival = self.workload.arrival_ns
        self.now_ns = max(self.now_ns, request * 10**9 if arrival is None else int(arrival[request]))

    def insert(self, key: int, now: int) -> None:
        self.hit(key, False, now)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        request, self.depth[key] = self.where[now]
        if key in self.of:
            self.reuses.append((self.of[key], (self.now_ns - self.used_ns[key]) * 1e-9))
        classes = self.workload.request_class
        self.of[key] = 0 if classes is None else int(classes[request])
        self.uses.append(self.of[key])
        self.used_ns[key] = self.now_ns
        if not pinned:
            self.stamped(key)

    def unpin(self, key: int) -> None:
        super().unpin(key)
        self.used_ns[key] = self.now_ns

    def log_chance(self, key: int) -> float:
        idle_s = (self.now_ns - self.used_ns[key]) * 1e-9
        times = [seconds for of, seconds in self.reuses if of == self.of[key]]
        uses = self.uses.count(self.of[key])
        if len(times) < self.samples:
            times, uses = [seconds for _, seconds in self.reuses], len(self.uses)
        if not times:
            return -idle_s
        mean = max(functools.reduce(operator.add, times) / len(times), 1e-3)  # sum() rounds in another way
        chance = math.log(len(times) / uses) + math.log(-math.expm1(-round(self.life_s * 1e6) * 1e-6 / mean))
        return chance - idle_s * (1 / mean)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        heads: dict[int, int] = {}
        for k in sorted(self.candidates(pins), key=lambda k: self.stamp[k]):
            heads.setdefault(self.of[k], k)
        return min(heads.values(), key=lambda k: (self.log_chance(k), -self.depth[k], self.stamp[k]))


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_length_aware_on_random_workloads(semantics: str) -> None:
    rng = random.Random(f"length {semantics}")
    for _ in range(400):
        workload, largest = workload_of_any_kind(rng)
        capacity = some_capacity(rng, 1 if semantics == "object" else largest)
        check_policy(workload, "length-aware", lambda _, w=workload: SlowLengthAware(w, semantics), capacity, semantics)


def test_length_aware_in_a_tree() -> None:
    def rank(path: Path, uses: Uses, tree: BlockTree) -> Any:
        return (uses.count, -len(path), uses.released)

    rng = random.Random("length radix")
    for _ in range(600):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        check(workload, "length-aware", capacity, BlockTree(workload, capacity, rank).run())


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_workload_aware_on_random_workloads(semantics: str) -> None:
    rng = random.Random(f"workload {semantics}")
    for _ in range(400):
        workload, largest = workload_of_any_kind(rng)
        capacity = some_capacity(rng, 1 if semantics == "object" else largest)
        life_s, samples = rng.choice([0.5, 60.0, 5.0]), rng.choice([1, 3, 16])
        name = f"workload-aware:life_s={life_s},samples={samples}"

        def slow(_: int, w: Workload = workload, life_s: float = life_s, samples: int = samples) -> SlowPolicy:
            return SlowWorkloadAware(w, semantics, life_s, samples)

        check_policy(workload, name, slow, capacity, semantics)


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_with_one_class_workload_aware_is_lru(semantics: str) -> None:
    rng = random.Random(5)
    for _ in range(100):
        workload, largest = workload_of_any_kind(rng)
        workload = dataclasses.replace(workload, request_class=None)
        rows = replay(workload, ["lru", "workload-aware"], largest + rng.randint(0, 6), semantics)
        assert rows[0]["block_hits"] == rows[1]["block_hits"]
        assert rows[0]["evictions"] == rows[1]["evictions"]


def test_a_class_that_is_never_reused_is_evicted_first() -> None:
    # Class 0 comes back every other request, class 1 never; the cache holds two of the three blocks.
    chains = [[0], [1], [0], [2], [0], [3], [0]]
    workload = dataclasses.replace(make_workload(chains), request_class=np.array([0, 1, 0, 1, 0, 1, 0], np.int32))
    hits = replay_requests(workload, "workload-aware:samples=1", 2, "prefix")
    assert hits.tolist() == [0, 0, 1, 0, 1, 0, 1]


def cost_aware_twin(workload: Workload, capacity: float, alpha: float, even_tokens: float) -> BlockTree:
    floor = 0

    def released(path: Path, uses: Uses, tree: BlockTree) -> None:
        uses.more = floor + round(2**20 * (1 + alpha * float((len(path) - 1) * workload.block_size) / even_tokens))

    def evicted(path: Path, uses: Uses, tree: BlockTree) -> None:
        nonlocal floor
        floor = max(floor, uses.more)

    def rank(path: Path, uses: Uses, tree: BlockTree) -> Any:
        return (uses.more, uses.released)

    return BlockTree(workload, capacity, rank, released, evicted)


def test_cost_aware_on_random_workloads() -> None:
    rng = random.Random("cost")
    for _ in range(600):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        alpha, even = rng.choice([0.0, 1.0, 3.5]), rng.choice([1.0, 40.0, 300.0, 32768.0])
        expected = cost_aware_twin(workload, capacity, alpha, even).run()
        check(workload, f"cost-aware:alpha={alpha},even_tokens={even}", capacity, expected)


def test_without_weight_cost_aware_is_lru() -> None:
    rng = random.Random(6)
    for _ in range(150):
        workload, largest = random_tree_workload(rng)
        capacity = some_capacity(rng, largest)
        check(workload, "cost-aware:alpha=0", capacity, BlockTree(workload, capacity, lru_rank).run())


def test_cost_aware_keeps_the_deep_one() -> None:
    # Used once each, the long path first. LRU drops its end for [3]; cost-aware drops the short one.
    workload = make_workload([[0, 1, 2], [9], [3], [0, 1, 2]], block_size=16)
    assert replay_requests(workload, "lru", 4, "radix").tolist() == [0, 0, 0, 2]
    assert replay_requests(workload, "cost-aware:even_tokens=16", 4, "radix").tolist() == [0, 0, 0, 3]


def test_length_aware_drops_the_end_of_the_long_one() -> None:
    workload = make_workload([[0, 1, 2], [9], [3], [9]], block_size=16)
    assert replay_requests(workload, "lru", 4, "prefix").tolist() == [0, 0, 0, 1]
    assert replay_requests(workload, "length-aware", 4, "prefix").tolist() == [0, 0, 0, 1]
    workload = make_workload([[9], [0, 1, 2], [3], [9]], block_size=16)
    assert replay_requests(workload, "lru", 4, "prefix").tolist() == [0, 0, 0, 0]
    assert replay_requests(workload, "length-aware", 4, "prefix").tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("policy", "semantics", "part"),
    [
        ("cost-aware:alpha=-1", "radix", "alpha"),
        ("cost-aware:even_tokens=0", "radix", "even_tokens"),
        ("cost-aware", "prefix", "runs in radix"),
        ("workload-aware:life_s=0", "prefix", "life_s"),
        ("workload-aware:samples=0", "prefix", "samples"),
        ("workload-aware", "radix", "runs in object, prefix"),
        ("sglang-slru:threshold=0", "radix", "threshold"),
        ("sglang-priority:as_written=2", "radix", "as_written"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(policy: str, semantics: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        replay(make_workload([[0]]), policy, 1, semantics)
    assert "\n" not in str(caught.value)
