"""The classic policies against their slow twins, on thousands of random workloads in both semantics."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from kvtrace_replay import Workload, replay
from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.policies import Stream, find_policy
from kvtrace_traces.errors import UsageError
from unit.replay.policies.slow_driver import SlowPolicy, check_policy
from unit.replay.policies.twins_queues import TWINS, Clock, S3Fifo, Slru, TwoQ
from unit.replay.test_against_twins import random_schedule, random_workload
from unit.replay.twins import make_workload

SEMANTICS = ["object", "prefix"]


def is_strict(workload: Workload, capacity: float, semantics: str) -> bool:
    return semantics == "object" and capacity < distinct_blocks(workload, semantics)


def twin_of(policy: str, workload: Workload, capacity: float, semantics: str) -> Callable[[int], SlowPolicy]:
    return lambda size: TWINS[policy](size, is_strict(workload, capacity, semantics))


def capacity_for(rng: random.Random, semantics: str, largest: int) -> float:
    least = 1 if semantics == "object" else largest
    return rng.choice([least, least + 1, least + rng.randint(0, 8), least + 20, math.inf])


def long_workload(rng: random.Random) -> tuple[Workload, int]:
    """A few hundred requests to few chains, some of them much wanted, and its largest request in blocks."""
    n_chains = rng.choice([3, 10, 40, 100])
    chains: list[list[int]] = []
    blocks = 0
    for _ in range(n_chains):
        shared = rng.choice(chains)[: rng.randint(0, 4)] if chains and rng.random() < 0.5 else []
        fresh = rng.randint(1, 5)
        chains.append([*shared, *range(blocks, blocks + fresh)])
        blocks += fresh
    skew = rng.choice([0.0, 1.0, 2.0])
    weights = [(i + 1) ** -skew for i in range(n_chains)]
    n_requests = rng.choice([100, 300])
    drawn = rng.choices(range(n_chains), weights, k=n_requests)
    if rng.random() < 0.3:  # another set of favourites in the second half
        drawn[n_requests // 2 :] = [n_chains - 1 - i for i in drawn[n_requests // 2 :]]
    requests = [chains[i] for i in drawn]
    workload = make_workload(
        requests,
        prompt_blocks=[rng.randint(0, len(chain)) if rng.random() < 0.5 else len(chain) for chain in requests],
        schedule=random_schedule(rng, n_requests) if rng.random() < 0.6 else None,
    )
    return workload, max(len(chain) for chain in requests)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_thousands_of_random_workloads(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics}")
    hits = evictions = 0
    for _ in range(600):
        workload, largest = random_workload(rng)
        capacity = capacity_for(rng, semantics, largest)
        outcome = check_policy(workload, policy, twin_of(policy, workload, capacity, semantics), capacity, semantics)
        hits += sum(outcome.hits)
        evictions += outcome.evictions
    assert evictions > 500
    assert hits > 500


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_long_random_workloads(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics} long")
    hits = evictions = 0
    for _ in range(40):
        workload, largest = long_workload(rng)
        capacity = largest + rng.choice([0, 1, 5, 15, 40, 80])
        outcome = check_policy(workload, policy, twin_of(policy, workload, capacity, semantics), capacity, semantics)
        hits += sum(outcome.hits)
        evictions += outcome.evictions
    assert evictions > 1000
    assert hits > 1000


def bursts(rng: random.Random) -> Workload:
    """Few blocks, one a request, each asked for many times in a row: counts grow high, and high ones are evicted."""
    requests: list[list[int]] = []
    for _ in range(rng.randint(5, 25)):
        requests += [[rng.randrange(6)]] * rng.choice([1, 16, 20, 40])
    return make_workload(requests, schedule=random_schedule(rng, len(requests)) if rng.random() < 0.7 else None)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_bursts(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics} bursts")
    for _ in range(100):
        workload, capacity = bursts(rng), rng.randint(1, 4)
        check_policy(workload, policy, twin_of(policy, workload, capacity, semantics), capacity, semantics)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_parameters(semantics: str) -> None:
    twins: dict[str, Callable[[int, bool], SlowPolicy]] = {
        "clock:bits=3": lambda size, strict: Clock(size, most=7),
        "s3fifo:small=0.5,ghost=0.3": lambda size, strict: S3Fifo(size, 0.5, 0.3, strict),
        "s3fifo:small=0.3,ghost=2": lambda size, strict: S3Fifo(size, 0.3, 2.0, strict),
        "s3fifo:small=0.4,threshold=1": lambda size, strict: S3Fifo(size, 0.4, strict=strict, threshold=1),
        "2q:a_in=0.6,a_out=0.2": lambda size, strict: TwoQ(size, 0.6, 0.2, strict),
        "2q:a_in=0.5,a_out=3": lambda size, strict: TwoQ(size, 0.5, 3.0, strict),
        "slru:segments=2": lambda size, strict: Slru(size, 2, strict),
        "slru:segments=1": lambda size, strict: Slru(size, 1, strict),
    }
    rng = random.Random(semantics)

    def check(policy: str, workload: Workload, capacity: float) -> None:
        strict = is_strict(workload, capacity, semantics)
        check_policy(workload, policy, lambda size: twins[policy](size, strict), capacity, semantics)

    for policy in twins:
        for _ in range(150):
            workload, largest = random_workload(rng)
            check(policy, workload, capacity_for(rng, semantics, largest))
        for _ in range(5):
            workload, largest = long_workload(rng)
            check(policy, workload, largest + rng.choice([0, 5, 20]))


@pytest.mark.parametrize(
    "policy",
    [
        *["clock:bits=0", "clock:bits=9", "s3fifo:small=0", "s3fifo:small=1", "s3fifo:ghost=-1", "s3fifo:threshold=4"],
        *["2q:a_in=0", "2q:a_in=1.5", "2q:a_out=-0.1", "slru:segments=0", "slru:segments=17"],
    ],
)
def test_parameters_out_of_range_are_refused(policy: str) -> None:
    with pytest.raises(UsageError, match=policy.replace(":", ": ")):
        replay(make_workload([[0, 1], [0]]), policy, 1, "object")


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_a_cache_of_one_block_and_an_empty_trace(policy: str, semantics: str) -> None:
    (row,) = replay(make_workload([[0], [0], [1], [0], [0]]), policy, 1, semantics)
    keeps_nothing = semantics == "object" and policy in ("s3fifo", "2q", "slru")
    assert row["block_hits"] == (0 if keeps_nothing else 2)
    (row,) = replay(make_workload([[], []]), policy, 1, semantics)
    assert row["block_hits"] == 0


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_where_all_fits_every_repeated_block_hits(policy: str, semantics: str) -> None:
    workload = make_workload([[0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    for capacity in (5, 6, math.inf):
        (row,) = replay(workload, policy, capacity, semantics)
        assert (row["block_hits"], row["evictions"]) == (11, 0)


class CountedPins:
    """Holds of each block, and how often a policy looked at one."""

    def __init__(self, pins: np.ndarray) -> None:
        self.pins = pins
        self.looks = 0

    def __getitem__(self, block: int) -> int:
        self.looks += 1
        return int(self.pins[block])


@pytest.mark.parametrize("policy", sorted(TWINS))
def test_a_hold_costs_one_look(policy: str) -> None:
    """Evictions among a few free blocks do not walk over the thousand held ones each time."""
    held, free, rounds = 1000, 4, 500
    entry = find_policy(policy)
    stream = Stream(
        refs=np.arange(held + free + rounds, dtype=np.int32),
        indptr=np.array([0, held + free + rounds], np.int64),
        prompt_blocks=np.array([held + free + rounds], np.int32),
        events=np.zeros(0, np.int64),
        n_identities=held + free + rounds,
        semantics="prefix",
    )
    state = entry.state(stream, held + free)
    do = entry.functions
    counted = CountedPins(np.full(stream.n_identities, -1, np.int32))

    def place(block: int, holds: int) -> None:
        do["insert"](block, block, *state)
        counted.pins[block] = holds
        if "pin" in do:
            do["pin"](block, *state)
        if holds == 0 and "unpin" in do:
            do["unpin"](block, *state)

    for block in range(held + free):
        place(block, 1 if block < held else 0)
    for block in range(held + free, stream.n_identities):
        victim = int(do["evict"](block, block, counted, *state))
        assert counted.pins[victim] == 0
        counted.pins[victim] = -1
        place(block, 0)
    assert counted.looks <= held + 3 * rounds
