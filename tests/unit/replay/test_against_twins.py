"""The compiled drivers against their slow twins, on thousands of random workloads."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.structures import recency
from kvtrace_traces.errors import KvtraceError, UsageError
from unit.replay.twins import make_workload, twin

POLICIES = ["lru", "fifo", "opt"]
SEMANTICS = ["object", "prefix"]


def random_workload(rng: random.Random) -> tuple[Workload, int]:
    """A small workload of any kind, and its largest request in distinct blocks."""
    chained = rng.random() < 0.6
    n_requests = rng.choice([1, 2, 3, 5, 8, 15, 30])
    alphabet = rng.randint(1, 4) if chained else rng.randint(1, 25)
    numbers: dict[tuple[int, ...], int] = {}
    chains: list[list[int]] = []
    contents: list[int] = []
    tails: list[tuple[int, ...]] = [()]
    for _ in range(n_requests):
        base = rng.choice(tails) if rng.random() < 0.5 else ()
        tokens = (*base, *(rng.randrange(alphabet) for _ in range(rng.randint(0, 6))))[:12]
        tails.append(tokens)
        # Chained identities name the whole prefix; content ids name the block alone and may repeat in a
        # request.
        keys = [tokens[: i + 1] if chained else (tokens[i],) for i in range(len(tokens))]
        chains.append([numbers.setdefault(key, len(numbers)) for key in keys])
        contents += tokens
    prompts = [rng.randint(0, len(c)) if rng.random() < 0.7 else len(c) for c in chains]
    seen: dict[int, int] = {}
    raw = [seen.setdefault(content, len(seen)) for content in contents]
    workload = make_workload(
        chains,
        prompt_blocks=prompts,
        hit_cap=[max(0, n - rng.choice([0, 0, 1, 3])) for n in prompts],
        schedule=random_schedule(rng, n_requests) if rng.random() < 0.6 else None,
        raw=raw if rng.random() < 0.3 else None,
        last_tokens=[rng.randint(1, 16) for _ in chains],
    )
    return workload, max([1, *(len(set(chain)) for chain in chains)])


def random_schedule(rng: random.Random, n_requests: int) -> list[int]:
    waiting = list(range(1, n_requests + 1))
    if rng.random() < 0.3:
        rng.shuffle(waiting)
    running: list[int] = []
    schedule = []
    most = rng.choice([1, 2, 4, 30])
    while waiting or running:
        if waiting and len(running) < most and (not running or rng.random() < 0.5):
            running.append(waiting.pop(0))
            schedule.append(running[-1])
        else:
            schedule.append(-running.pop(rng.randrange(len(running))))
    never_ends = {r for r in range(1, n_requests + 1) if rng.random() < 0.05}
    return [entry for entry in schedule if -entry not in never_ends]


def check(workload: Workload, policy: str, semantics: str, capacity: float) -> None:
    expected = twin(workload, policy, capacity, semantics)
    (row,) = replay(workload, policy, capacity, semantics)
    assert replay_requests(workload, policy, capacity, semantics).tolist() == expected.hits
    assert row["block_hits"] == sum(expected.hits)
    assert row["token_hits"] == expected.token_hits
    assert row["evictions"] == expected.evictions
    assert row["pin_overflow_requests"] == len(expected.overflows)
    assert row["why"] is None


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("policy", POLICIES)
def test_thousands_of_random_workloads(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics}")
    for _ in range(1500):
        workload, largest = random_workload(rng)
        least = 1 if semantics == "object" else largest
        capacity = rng.choice([least, least + 1, least + rng.randint(0, 8), least + 20, math.inf])
        check(workload, policy, semantics, capacity)


@pytest.mark.parametrize("policy", ["lru", "vllm"])
def test_an_import_is_replayed_by_time_stamps_as_by_its_events(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that end before the next begins; with a warm-up, and so few slots that they often run out."""
    monkeypatch.setattr(recency, "_SLOTS_PER_BLOCK", 1)
    rng = random.Random(f"stamps {policy}")
    evictions = 0
    for case in range(150):
        workload, _ = random_workload(rng)
        if case % 3 == 0:
            chains = [[rng.randrange(40) for _ in range(rng.randint(0, 6))] for _ in range(200)]
            numbers: dict[int, int] = {}
            chains = [[numbers.setdefault(block, len(numbers)) for block in chain] for chain in chains]
            workload = make_workload(chains, prompt_blocks=[rng.randint(0, len(chain)) for chain in chains])
        n = workload.n_requests
        events = np.array([e for r in range(1, n + 1) for e in (r, -r)], np.int64)
        told, untold = replace(workload, schedule=events), replace(workload, schedule=None)
        largest = max([1, *(len(set(workload.identities[a:b].tolist())) for a, b in pairwise(workload.indptr))])
        capacity = rng.choice([largest, largest + rng.randint(0, 9), math.inf])
        share = rng.choice([0.0, 0.3, 0.9])
        rows = [replay(w, policy, capacity, warmup=share)[0] for w in (told, untold)]
        for row in rows:
            del row["seconds"]
        assert rows[0] == rows[1]
        assert (replay_requests(told, policy, capacity) == replay_requests(untold, policy, capacity)).all()
        evictions += rows[0]["evictions"]
    assert evictions > 1000


def test_time_stamps_in_object_semantics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warm-up, which drives the kernel twice, and so few slots that blocks are often numbered anew."""
    monkeypatch.setattr(recency, "_SLOTS_PER_BLOCK", 1)
    rng = random.Random("stamps")
    evictions = 0
    for case in range(200):
        workload, _ = random_workload(rng)
        if case % 2:
            chains = [[rng.randrange(60) for _ in range(rng.randint(0, 9))] for _ in range(300)]
            workload = make_workload(chains, last_tokens=[rng.randint(1, 16) for _ in chains])
        capacity = rng.choice([1, 2, rng.randint(1, 50), math.inf])
        check(workload, "lru", "object", capacity)
        expected = twin(workload, "lru", capacity, "object")
        share = rng.choice([0.3, 0.9])
        (row,) = replay(workload, "lru", capacity, "object", warmup=share)
        assert row["block_hits"] == sum(expected.hits[workload.skipped(share) :])
        evictions += expected.evictions
    assert evictions > 10_000


def test_a_request_longer_than_all_the_slots_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recency, "_MOST_SLOTS", 128)
    drawn = random.Random(2)
    numbers: dict[int, int] = {}
    chain = [numbers.setdefault(block, len(numbers)) for block in (drawn.randrange(20) for _ in range(3000))]
    workload = make_workload([chain])
    for capacity in (1, 7, 20):
        check(workload, "lru", "object", capacity)
    with pytest.raises(KvtraceError, match="too long: 107 can be replayed"):
        replay(workload, "lru", 20, "prefix")


def test_an_import_that_begins_with_more_than_the_cache_has() -> None:
    """What is carried in may be larger than the cache; by its events, stated or not, it is the same."""
    workload = replace(make_workload([list(range(40)), [0, 1], [2, 3], [0, 1], [39], [2, 3]]), carried=1)
    events = np.array([e for r in range(1, 7) for e in (r, -r)], np.int64)
    for policy in ("lru", "fifo"):
        for capacity in (3, 5):
            told = replay_requests(replace(workload, schedule=events), policy, capacity)
            assert replay_requests(workload, policy, capacity).tolist() == told.tolist()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(POLICIES),
    semantics=st.sampled_from(SEMANTICS),
    room=st.integers(0, 12),
)
def test_any_random_workload(seed: int, policy: str, semantics: str, room: int) -> None:
    workload, largest = random_workload(random.Random(seed))
    check(workload, policy, semantics, (1 if semantics == "object" else largest) + room)


@settings(max_examples=400, deadline=None)
@given(
    chains=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    concurrent=st.booleans(),
    room=st.integers(0, 4),
    policy=st.sampled_from(POLICIES),
    data=st.data(),
)
def test_any_chains_shrinkable(
    chains: list[list[int]],
    order: random.Random,
    concurrent: bool,
    room: int,
    policy: str,
    data: st.DataObject,
) -> None:
    prompts = [data.draw(st.integers(0, len(chain))) for chain in chains]
    workload = make_workload(
        chains,
        prompt_blocks=prompts,
        schedule=random_schedule(order, len(chains)) if concurrent else None,
    )
    largest = max([1, *(len(set(chain)) for chain in chains)])
    check(workload, policy, "prefix", largest + room)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_warm_up_counts_only_the_requests_after_it(semantics: str) -> None:
    rng = random.Random(f"warm {semantics}")
    cut = 0
    for _ in range(400):
        workload, largest = random_workload(rng)
        capacity = (1 if semantics == "object" else largest) + rng.randint(0, 6)
        share = rng.choice([0.0, 0.25, 0.5, 0.99, rng.random()])
        expected = twin(workload, "lru", capacity, semantics)
        order = range(workload.n_requests)
        if semantics == "prefix" and workload.schedule is not None:
            order = [entry - 1 for entry in workload.schedule.tolist() if entry > 0]
        counted = list(order)[int(share * workload.n_requests) :]
        (row,) = replay(workload, "lru", capacity, semantics, warmup=share)
        assert row["block_hits"] == sum(expected.hits[r] for r in counted)
        lookups = np.diff(workload.indptr) if semantics == "object" else workload.prompt_blocks
        assert row["block_lookups"] == sum(int(lookups[r]) for r in counted)
        assert row["requests"] == len(counted)
        assert row["evictions"] <= expected.evictions
        cut += row["block_hits"] < sum(expected.hits)
    assert cut > 20


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan, math.inf])
def test_a_warm_up_that_cannot_be(share: float) -> None:
    with pytest.raises(UsageError, match="must be a share of the requests"):
        replay(make_workload([[0]]), "lru", 5, warmup=share)


def test_the_random_workloads_cover_what_they_are_for() -> None:
    rng = random.Random(0)
    seen = dict.fromkeys(["overflow", "eviction", "duplicate", "unfinished", "capped", "output hit"], 0)
    for _ in range(300):
        workload, largest = random_workload(rng)
        outcome = twin(workload, "lru", largest, "prefix")
        chains = [workload.identities[a:b].tolist() for a, b in pairwise(workload.indptr)]
        events = workload.schedule
        seen["overflow"] += bool(outcome.overflows)
        seen["eviction"] += bool(outcome.evictions)
        seen["duplicate"] += any(len(set(chain)) < len(chain) for chain in chains)
        seen["unfinished"] += events is not None and len(events) < 2 * workload.n_requests
        seen["capped"] += (np.array(outcome.hits) == workload.hit_cap).any() and outcome.token_hits > 0
        seen["output hit"] += (workload.prompt_blocks < np.diff(workload.indptr)).any()
    assert min(seen.values()) > 20, seen
