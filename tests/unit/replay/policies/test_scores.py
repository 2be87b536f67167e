"""The scored and learning policies against their slow twins, on thousands of random workloads, and alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.policies import find_policy
from kvtrace_traces.errors import UsageError
from unit.replay.policies import twins_scores as slow
from unit.replay.policies.slow_driver import SlowPolicy, check_policy
from unit.replay.test_against_twins import random_workload
from unit.replay.twins import make_workload

Factory = Callable[[int], SlowPolicy]
# How `--policy` names it -> its twin, given the workload and the semantics.
TWINS: dict[str, Callable[[Workload, str], Factory]] = {
    "lru-k": lambda w, s: lambda c: slow.SlowLruK(c, 2),
    "lru-k:k=1": lambda w, s: lambda c: slow.SlowLruK(c, 1),
    "lru-k:k=3": lambda w, s: lambda c: slow.SlowLruK(c, 3),
    "gdsf": lambda w, s: lambda c: slow.SlowGdsf(c, s == "object"),
    "random": lambda w, s: lambda c: slow.SlowRandom(c),
    "random:seed=7": lambda w, s: lambda c: slow.SlowRandom(c, 7),
    "hyperbolic:samples=3": lambda w, s: lambda c: slow.SlowHyperbolic(c, 3),
    "hyperbolic:seed=5": lambda w, s: lambda c: slow.SlowHyperbolic(c, 64, 5),
    "lecar": lambda w, s: lambda c: slow.SlowLeCaR(c),
    "lecar:rate=3,discount=0.5,seed=1": lambda w, s: lambda c: slow.SlowLeCaR(c, 3.0, 0.5, 1),
    "lirs": lambda w, s: lambda c: slow.SlowLirs(c),
    "lirs:hir=0.3,stack=1.2": lambda w, s: lambda c: slow.SlowLirs(c, 0.3, 1.2),
    "wtinylfu": lambda w, s: lambda c: slow.SlowWTinyLfu(c),
    "wtinylfu:window=0.3": lambda w, s: lambda c: slow.SlowWTinyLfu(c, 0.3),
    "vllm": lambda w, s: lambda c: slow.SlowVllm(c),
    "ttl:seconds=3": lambda w, s: lambda c: slow.SlowTtl(c, w, 3.0),
    "opt-bypass": lambda w, s: lambda c: slow.SlowOptBypass(c, (w.identities if w.raw is None else w.raw).tolist()),
}
CASES = [(policy, kind) for policy in TWINS for kind in find_policy(policy).semantics]


def timed(workload: Workload, rng: random.Random) -> Workload:
    """With arrivals that are a little out of order, some of them at the same time."""
    times = np.cumsum([rng.choice([0, 0, 1, 1, 2, 5]) for _ in range(workload.n_requests)])
    jitter = [rng.choice([0, 0, 0, 2]) for _ in range(workload.n_requests)]
    return replace(workload, arrival_ns=(times - jitter).astype(np.int64) * 1_000_000_000)


def busy_workload(rng: random.Random) -> tuple[Workload, int]:
    """Many one-block requests over few blocks: what adapts, halves or counts gets somewhere."""
    blocks = rng.choice([3, 6, 12, 40])
    skew = rng.choice([0.0, 0.5, 1.2])
    weights = [(i + 1) ** -skew for i in range(blocks)]
    refs = rng.choices(range(blocks), weights, k=rng.choice([100, 400]))
    refs[60:70] = range(10)  # a scan
    numbers: dict[int, int] = {}
    return make_workload([[numbers.setdefault(block, len(numbers))] for block in refs]), 1


@pytest.mark.parametrize(("policy", "semantics"), CASES)
def test_thousands_of_random_workloads(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics}")
    evictions = 0
    for case in range(600):
        workload, largest = busy_workload(rng) if case % 10 == 0 else random_workload(rng)
        workload = timed(workload, rng)
        least = 1 if semantics == "object" else largest
        capacity = rng.choice([least, least + 1, least + rng.randint(0, 8), least + rng.randint(0, 8), math.inf])
        evictions += check_policy(workload, policy, TWINS[policy](workload, semantics), capacity, semantics).evictions
    assert evictions > 300


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize("policy", [name for name in TWINS if name != "opt-bypass"])
def test_a_capacity_of_one(policy: str, semantics: str) -> None:
    chains = [[0], [1], [0], [0], [2], [1], [1]]
    workload = replace(make_workload(chains), arrival_ns=np.arange(7, dtype=np.int64) * 10**9)
    check_policy(workload, policy, TWINS[policy](workload, semantics), 1, semantics)


@pytest.mark.parametrize("policy", sorted(set(TWINS)))
def test_an_empty_workload(policy: str) -> None:
    workload = replace(make_workload([[]]), arrival_ns=np.zeros(1, np.int64))
    (row,) = replay(workload, policy, 5, "object")
    assert row["block_hits"] == 0


def test_lru_k_of_one_use_is_lru() -> None:
    rng = random.Random(1)
    for _ in range(50):
        workload, _ = busy_workload(rng)
        ours, lru = replay(workload, ["lru-k:k=1", "lru"], 5, "object")
        assert ours["block_hits"] == lru["block_hits"]


def test_vllm_is_lru_in_the_open_loop() -> None:
    rng = random.Random(2)
    for _ in range(100):
        workload, largest = random_workload(rng)
        for semantics in ("object", "prefix"):
            hits = [replay_requests(workload, name, largest + 2, semantics).tolist() for name in ("vllm", "lru")]
            assert hits[0] == hits[1]


# ------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("policy", ["random", "hyperbolic", "lecar"])
def test_a_seed_makes_the_run(policy: str) -> None:
    rng = np.random.default_rng(0)
    workload = make_workload(np.minimum(rng.zipf(1.3, (300, 5)), 400).tolist())
    hits = [replay(workload, f"{policy}:seed={seed}", 40, "object")[0]["block_hits"] for seed in (0, 0, 1, 2, 3)]
    assert hits[0] == hits[1]
    assert len(set(hits[1:])) > 1
    assert replay(workload, policy, 40, "object")[0]["block_hits"] == hits[0]


def test_draws_are_even() -> None:
    from kvtrace_replay.structures.sampling import draw, new_rng

    rng = new_rng(0)
    counts = np.bincount([draw(rng, 7) for _ in range(70_000)], minlength=7)
    assert counts.size == 7
    assert abs(counts - 10_000).max() < 400  # four standard deviations


# ------------------------------------------------------------------------------------------- opt-bypass


def fewest_misses(refs: list[int], capacity: int) -> int:
    """By trying everything: at each miss any block may go, or none and the missing one gets no place."""

    @cache
    def cost(at: int, resident: frozenset[int]) -> int:
        if at == len(refs):
            return 0
        key = refs[at]
        if key in resident:
            return cost(at + 1, resident)
        choices = [resident]
        if len(resident) < capacity:
            choices.append(resident | {key})
        choices += [resident - {victim} | {key} for victim in resident]
        return 1 + min(cost(at + 1, choice) for choice in choices)

    return cost(0, frozenset())


def test_opt_bypass_has_the_fewest_misses() -> None:
    rng = random.Random(3)
    better_than_opt = 0
    for _ in range(300):
        refs = [rng.randrange(rng.choice([3, 5, 7])) for _ in range(rng.randint(1, 16))]
        numbers: dict[int, int] = {}
        refs = [numbers.setdefault(block, len(numbers)) for block in refs]
        workload = make_workload([[block] for block in refs])
        for capacity in (1, 2, 3, 4):
            ours, opt = replay(workload, ["opt-bypass", "opt"], capacity, "object")
            assert len(refs) - ours["block_hits"] == fewest_misses(refs, capacity)
            better_than_opt += ours["block_hits"] > opt["block_hits"]
    assert better_than_opt > 50


def test_opt_bypass_has_no_meaning_with_prefixes() -> None:
    with pytest.raises(UsageError, match="no meaning in prefix semantics"):
        replay(make_workload([[0]]), "opt-bypass", 5, "prefix")


# ------------------------------------------------------------------------------------------- ttl


def at_seconds(chains: list[list[int]], seconds: list[int], **more: list[int]) -> Workload:
    return replace(make_workload(chains, **more), arrival_ns=np.array(seconds, np.int64) * 10**9)


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_ttl_drops_what_was_not_used_for_longer(semantics: str) -> None:
    workload = at_seconds([[0, 1], [0, 1], [0, 1], [0, 1]], [0, 300, 600, 901])
    (row,) = replay(workload, "ttl", math.inf, semantics)
    assert replay_requests(workload, "ttl", math.inf, semantics).tolist() == [0, 2, 2, 0]
    assert (row["expired_blocks"], row["evictions"]) == (2, 0)
    (row,) = replay(workload, "ttl:seconds=299.5", math.inf, semantics)
    assert row["block_hits"] == 0


def test_ttl_does_not_age_what_is_held() -> None:
    # Request 0 holds its blocks from second 0 until request 1 has begun, at second 1000.
    held = at_seconds([[0], [1], [0]], [0, 1000, 1200], schedule=[1, 2, -1, -2, 3, -3])
    assert replay_requests(held, "ttl", math.inf).tolist() == [0, 0, 1]
    let_go = at_seconds([[0], [1], [0]], [0, 1000, 1200], schedule=[1, -1, 2, -2, 3, -3])
    assert replay_requests(let_go, "ttl", math.inf).tolist() == [0, 0, 0]


def test_ttl_evicts_as_lru_where_room_is_short() -> None:
    workload = at_seconds([[0], [1], [0], [2], [0], [1]], [0, 1, 2, 3, 4, 5])
    (row,) = replay(workload, "ttl", 2, "object")
    assert (row["block_hits"], row["evictions"], row["expired_blocks"]) == (2, 2, 0)


def test_ttl_needs_times() -> None:
    with pytest.raises(UsageError, match="needs the times at which requests arrive"):
        replay(make_workload([[0]]), "ttl", 5)


# ------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("lru-k:k=0", "k=0 must lie between"),
        ("lru-k:k=65", "k=65 must lie between"),
        ("lirs:hir=0", "hir=0.0 must be a share"),
        ("lirs:hir=1", "hir=1.0 must be a share"),
        ("lirs:stack=0.5", "stack=0.5 must be a multiple"),
        ("wtinylfu:window=1", "window=1.0 must be a share"),
        ("hyperbolic:samples=0", "samples=0 must lie between"),
        ("hyperbolic:seed=-1", "seed=-1 must be"),
        ("random:seed=-1", "seed=-1 must be"),
        ("lecar:discount=0", "discount=0.0 must be above 0"),
        ("lecar:rate=-1", "rate=-1.0 must lie between"),
        ("ttl:seconds=0", "seconds=0.0 must be a time"),
    ],
)
def test_parameters_that_cannot_be(policy: str, message: str) -> None:
    workload = at_seconds([[0], [1]], [0, 1])
    with pytest.raises(UsageError, match=message):
        replay(workload, policy, 5)
