"""`+second-touch`: a block gets a place only at its second miss, or its `uses`-th, whatever the policy is."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.policies import find_policy
from kvtrace_traces.errors import UsageError
from unit.replay.policies import twins_scores as slow
from unit.replay.policies.slow_driver import PolicyFactory, check_policy
from unit.replay.test_against_twins import random_workload
from unit.replay.twins import make_workload

TWINS: dict[str, PolicyFactory] = {
    "lru": slow.SlowVllm,
    "lru-k": lambda capacity: slow.SlowLruK(capacity, 2),
    "lirs": slow.SlowLirs,
    "wtinylfu": slow.SlowWTinyLfu,
    "random": slow.SlowRandom,
}


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize("policy", sorted(TWINS))
def test_thousands_of_random_workloads(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics}")
    bypassed = evictions = 0
    for _ in range(300):
        workload, largest = random_workload(rng)
        least = 1 if semantics == "object" else largest
        uses = rng.choice([1, 2, 2, 2, 3, 5])
        name = f"{policy}+second-touch" if uses == 2 else f"{policy}+second-touch:uses={uses}"
        capacity = rng.choice([least, least + 1, least + rng.randint(0, 6), math.inf])
        outcome = check_policy(workload, name, TWINS[policy], capacity, semantics)
        bypassed += outcome.bypassed
        evictions += outcome.evictions
        if uses == 1:
            assert outcome.bypassed == 0
    assert min(bypassed, evictions) > 300


def misses_before_placement(workload: Workload, uses: int) -> int:
    """Of an infinite cache in `object` semantics: every block is bypassed at its first misses."""
    refs = (workload.identities if workload.raw is None else workload.raw).tolist()
    return sum(min(refs.count(block), uses - 1) for block in set(refs))


@pytest.mark.parametrize("uses", [2, 3, 4])
def test_without_evictions_a_block_misses_as_often_as_it_says(uses: int) -> None:
    rng = random.Random(uses)
    for _ in range(100):
        workload, _ = random_workload(rng)
        for policy in ("lru", "fifo", "opt", "gdsf", "vllm"):
            (row,) = replay(workload, f"{policy}+second-touch:uses={uses}", math.inf, "object")
            assert row["bypassed_blocks"] == misses_before_placement(workload, uses)


def test_one_hit_wonders_push_nobody_out() -> None:
    chains = [[0], [0], [1], [2], [3], [4], [0]]
    workload = make_workload(chains)
    assert replay_requests(workload, "lru", 1, "object").tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert replay_requests(workload, "lru+second-touch", 1, "object").tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_misses_are_remembered_after_an_eviction() -> None:
    """The count of misses is of the whole run: a block evicted once is placed again at its next miss."""
    workload = make_workload([[0], [0], [1], [1], [0], [0]])
    assert replay_requests(workload, "lru+second-touch", 1, "object").tolist() == [0, 0, 0, 0, 0, 1]


def test_with_prefixes_a_gap_ends_the_hit() -> None:
    # The second request places 0 and 1; block 2 is new, and is placed by the third; the fourth hits all.
    workload = make_workload([[0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert replay_requests(workload, "lru+second-touch", 9).tolist() == [0, 0, 2, 3]
    # A block placed behind one that was not is no hit until that one is there.
    workload = make_workload([[5, 1], [6, 1], [5, 1], [5, 1]])
    assert replay_requests(workload, "lru+second-touch", 9).tolist() == [0, 0, 0, 2]


def test_how_it_is_written() -> None:
    assert find_policy("lru+second-touch").called == "lru+second-touch"
    assert find_policy("LRU+Second-Touch:uses=2").called == "lru+second-touch"
    assert find_policy("second-touch").called == "lru+second-touch"
    assert find_policy("second-touch:uses=3").called == "lru+second-touch:uses=3"
    assert find_policy("lru-k:k=3+second-touch:uses=4").called == "lru-k:k=3+second-touch:uses=4"
    assert find_policy("lru+second-touch:uses=1").called == "lru"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lru+third-touch", "no admission is called 'third-touch'"),
        ("lru+", "no admission is called ''"),
        ("lru+second-touch:uses=0", "uses=0 must lie between 1 and 255"),
        ("lru+second-touch:uses=256", "uses=256 must lie between 1 and 255"),
        ("lru+second-touch:uses=two", "must read uses=NUMBER"),
        ("second-touch:times=2", "no parameter 'times'; its parameters are uses"),
    ],
)
def test_what_cannot_be(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_policy(name)


def test_the_rows_of_a_sweep_tell_them_apart() -> None:
    workload = make_workload(np.random.default_rng(0).integers(0, 40, (50, 4)).tolist())
    rows = replay(workload, ["lru", "lru+second-touch", "second-touch:uses=3"], [10, 20], "object")
    assert [row["policy"] for row in rows[::2]] == ["lru", "lru+second-touch", "lru+second-touch:uses=3"]
    assert rows[0]["bypassed_blocks"] == 0 < rows[2]["bypassed_blocks"] < rows[4]["bypassed_blocks"]
