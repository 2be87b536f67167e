"""Sampled curves: what is drawn, that prefixes stay whole, and that the stated error is kept."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest

from kvtrace_replay import Workload, replay
from kvtrace_replay.curves.points import Exact
from kvtrace_replay.curves.sample import SAMPLE_SCHEMA, Sampled, parse_rate
from kvtrace_replay.curves.subset import some_blocks, some_requests
from kvtrace_replay.curves.units import LEAST_SHARED, chain_units, trunk_use
from kvtrace_traces.errors import UsageError
from unit.replay.test_against_twins import random_workload
from unit.replay.test_curves import zipf
from unit.replay.twins import make_workload, tokens_of


def chains_of(workload: Workload) -> list[list[int]]:
    return [workload.identities[a:b].tolist() for a, b in pairwise(workload.indptr.tolist())]


def renumbered(lists: list[list[int]]) -> list[list[int]]:
    names: dict[int, int] = {}
    return [[names.setdefault(block, len(names)) for block in chain] for chain in lists]


def chats(n_requests: int, seed: int, system_prompt: int = 0, one_off: float = 0.3) -> Workload:
    """Conversations that grow by some blocks a turn, 60 at a time, and requests that come once; all begin with the
    same blocks of a system prompt, if there is one."""
    rng = random.Random(seed)
    names: dict[tuple[int, int], int] = {}
    open_chats = [[i, 0] for i in range(60)]
    chains, next_chat = [], 60
    for _ in range(n_requests):
        if rng.random() < one_off:
            chat, length = next_chat, rng.randint(1, 20)
            next_chat += 1
        else:
            slot = rng.randrange(60)
            if rng.random() < 0.08:
                open_chats[slot] = [next_chat, 0]
                next_chat += 1
            open_chats[slot][1] += rng.randint(1, 6)
            chat, length = open_chats[slot]
        keys = [(-1, i) for i in range(system_prompt)] + [(chat, i) for i in range(length)]
        chains.append([names.setdefault(key, len(names)) for key in keys])
    return make_workload(chains)


def test_some_requests_against_a_twin() -> None:
    rng = random.Random(0)
    for _ in range(500):
        workload, _ = random_workload(rng)
        chosen = np.array([rng.random() < 0.5 for _ in range(workload.n_requests)], bool)
        part, originals = some_requests(workload, chosen)
        part.validate()
        kept = np.flatnonzero(chosen).tolist()
        expected = [chains_of(workload)[r] for r in kept]
        assert chains_of(part) == renumbered(expected)
        assert [[int(originals[i]) for i in chain] for chain in chains_of(part)] == expected
        for name in ("prompt_blocks", "hit_cap", "prompt_tokens", "last_tokens"):
            assert getattr(part, name).tolist() == getattr(workload, name)[kept].tolist()
        if workload.schedule is not None:
            assert part.schedule is not None
            events = [e for e in workload.schedule.tolist() if abs(e) - 1 in kept]
            assert part.schedule.tolist() == [(kept.index(abs(e) - 1) + 1) * (1 if e > 0 else -1) for e in events]


def test_every_array_of_a_workload_is_cut() -> None:
    """A request's arrays that come later to `Workload` must not be forgotten here."""
    workload = make_workload([[0], [1], [2]])
    optional = {f.name: np.arange(3, dtype=np.int64) for f in fields(Workload) if f.default is None}
    optional.pop("bytes_per_block")
    part, _ = some_requests(
        type(workload)(**{**{f.name: getattr(workload, f.name) for f in fields(Workload)}, **optional}),
        np.array([False, True, True]),
    )
    assert {name: getattr(part, name).tolist() for name in optional} == {name: [1, 2] for name in optional}


def test_some_blocks_against_a_twin() -> None:
    rng = random.Random(1)
    for _ in range(500):
        workload, _ = random_workload(rng)
        refs = workload.identities if workload.raw is None else workload.raw
        chosen = np.array([rng.random() < 0.5 for _ in range(int(refs.max(initial=-1)) + 1)], bool)
        part = some_blocks(workload, chosen)
        part.validate()
        places = [[p for p in range(a, b) if chosen[refs[p]]] for a, b in pairwise(workload.indptr.tolist())]
        assert chains_of(part) == renumbered([[int(refs[p]) for p in own] for own in places])
        tokens = [[tokens_of(workload, r, p) for p in own] for r, own in enumerate(places)]
        bounds = part.indptr.tolist()
        assert tokens == [[tokens_of(part, r, p) for p in range(bounds[r], bounds[r + 1])] for r in range(len(places))]


def test_requests_that_share_blocks_are_drawn_together() -> None:
    workload = chats(3000, 0)
    units = chain_units(workload, 0.3, 0)
    assert units.trunk_blocks == 0
    sampled = Sampled(workload, "lru", "prefix", 0.3)
    sample = sampled.parts[0].exact.workload
    drawn = units.hashes < np.uint64(int(0.3 * 2**64))
    assert sample.n_requests == drawn.sum()
    roots = {chain[0]: bool(taken) for chain, taken in zip(chains_of(workload), drawn, strict=True)}
    assert all(roots[chain[0]] == taken for chain, taken in zip(chains_of(workload), drawn, strict=True))
    # So at an infinite cache the sample misses just its distinct blocks, and halves are made of whole units, too.
    (row,) = replay(sample, "lru", math.inf, "prefix")
    assert row["block_lookups"] - row["block_hits"] == sample.n_identities
    assert 0.2 < sample.n_requests / workload.n_requests < 0.4
    halves = [part.exact.workload.n_requests for part in sampled.parts[1:]]
    assert all(0.3 < half / sample.n_requests < 0.7 for half in halves)


def test_trunk_use_against_a_twin() -> None:
    rng = random.Random(3)
    for _ in range(500):
        workload, _ = random_workload(rng)
        trunk = np.array([rng.random() < 0.7 for _ in range(workload.n_identities)], bool)
        warmup = rng.choice([0.0, 0.5])
        seen: set[int] = set()
        used = [0, 0, 0, 0]
        for r, chain in enumerate(chains_of(workload)):
            hit = True
            for i, block in enumerate(chain[: int(workload.prompt_blocks[r])]):
                if not trunk[block]:
                    break
                tokens = tokens_of(workload, r, int(workload.indptr[r]) + i)
                hit = hit and block in seen and i < workload.hit_cap[r]
                seen.add(block)
                if r >= int(warmup * workload.n_requests):
                    used = [a + b for a, b in zip(used, (1, tokens, hit, hit * tokens), strict=True)]
        assert list(trunk_use(workload, trunk, warmup)) == used


def kept(workload: Workload, policy: str, semantics: str, rate: float, seeds: range) -> tuple[float, float, float]:
    """(share of points within their stated error, mean distance from the exact ratio, mean stated error)."""
    exact = Exact(workload, policy, semantics)
    inside, distances, errors = [], [], []
    for seed in seeds:
        sampled = Sampled(workload, policy, semantics, rate, seed=seed)
        points = sampled.default_points()[::3]
        truth = exact.at(points)
        frame = sampled.at(points)
        assert frame["why"].null_count() == frame.height
        for kind in ("block", "token"):
            for found, error, right in zip(
                frame[f"{kind}_hit_ratio"], frame[f"{kind}_hit_ratio_error"], truth[f"{kind}_hit_ratio"], strict=True
            ):
                inside.append(abs(found - right) <= error)
                distances.append(abs(found - right))
                errors.append(error)
    return float(np.mean(inside)), float(np.mean(distances)), float(np.mean(errors))


@pytest.mark.parametrize(
    ("policy", "semantics", "rate", "system_prompt"),
    [("lru", "prefix", 0.2, 0), ("lru", "prefix", 0.2, 12), ("fifo", "prefix", 0.3, 0), ("lru", "object", 0.1, 0),
     ("fifo", "object", 0.2, 5), ("opt", "object", 0.2, 0)],
)  # fmt: skip
def test_the_stated_error_is_kept(policy: str, semantics: str, rate: float, system_prompt: int) -> None:
    workload = chats(8000, 1, system_prompt)
    share, distance, error = kept(workload, policy, semantics, rate, range(6))
    assert share > 0.8
    assert distance < 0.04
    assert error < 0.12


def test_zipf_objects() -> None:
    refs = zipf(300_000, 20_000, 1.0, 0)
    share, distance, _ = kept(make_workload(refs.reshape(-1, 10).tolist()), "lru", "object", 0.1, range(6))
    assert share > 0.8
    assert distance < 0.05


def test_a_shared_system_prompt_is_told_apart() -> None:
    """All chains have one root: sampling by it would take all or nothing."""
    workload = chats(8000, 2, system_prompt=12)
    sampled = Sampled(workload, "lru", "prefix", 0.2)
    assert sampled.units.trunk_blocks == 12
    assert 0.1 < sampled.parts[0].exact.workload.n_requests / workload.n_requests < 0.3
    frame = sampled.at([5, 12, 400, math.inf])
    assert "cannot hold the 12 that most requests share" in frame["why"][0]
    assert frame["block_hit_ratio"][1] is None
    exact = Exact(workload, "lru", "prefix").at([math.inf])["block_hit_ratio"][0]
    assert abs(frame["block_hit_ratio"][3] - exact) < 0.02


def test_the_trunk_ends_where_few_share() -> None:
    workload = chats(4000, 3, one_off=0.0)
    units = chain_units(workload, 1e-6, 0)
    through = np.bincount(workload.identities)
    assert units.trunk_blocks == (through > 4000 // 2**5).sum()  # 4000 / 64 is below the least share
    assert LEAST_SHARED * 4000 <= 4000 // 2**5


def test_few_groups_state_no_error() -> None:
    workload = make_workload([[c, c + 1] for _ in range(50) for c in range(0, 20, 2)])
    frame = Sampled(workload, "lru", "prefix", 0.5).at([20])
    assert frame["block_hit_ratio"].null_count() == 0
    assert frame["block_hit_ratio_error"][0] is None
    assert "no error is stated: the sample holds about 5.0 independent groups" in frame["why"][0]


def test_capacities_too_small_for_the_sample_say_so() -> None:
    workload = chats(4000, 4)
    sampled = Sampled(workload, "lru", "prefix", 0.2)
    largest = max(map(len, chains_of(workload)))
    frame = sampled.at([largest, 10 * largest])
    assert frame["block_hit_ratio"][0] is None
    assert "take a higher rate" in frame["why"][0]
    assert frame["why"][1] is None
    assert frame.schema == SAMPLE_SCHEMA


@pytest.mark.parametrize(
    ("policy", "least"), [("s3fifo", 20), ("2q", 4), ("slru", 4), ("slru:segments=6", 6), ("lru", 1)]
)
def test_a_scaled_cache_that_places_nothing_tells_nothing(policy: str, least: int) -> None:
    workload = make_workload(zipf(60_000, 8_000, 0.8, 1).reshape(-1, 10).tolist())
    sampled = Sampled(workload, policy, "object", 0.1)
    frame = sampled.at([least * 10 - 10, least * 10, least * 20])
    exact = Exact(workload, policy, "object").at([least * 10, least * 20])["block_hit_ratio"]
    assert frame["block_hit_ratio"].is_null().to_list() == [True, False, False]
    assert ("too few" in frame["why"][0]) == (policy != "lru")
    assert frame["block_hit_ratio_error"].is_null().to_list() == [True, True, False]
    assert frame["block_hit_ratio"][2] == pytest.approx(exact[1], abs=2 * frame["block_hit_ratio_error"][2])
    assert sampled.default_points()[0] == least * 20


def test_a_seed_draws_the_same_again() -> None:
    workload = chats(3000, 5)
    frames = [Sampled(workload, "lru", "prefix", 0.3, seed=seed).at([2000]) for seed in (1, 1, 2)]
    assert frames[0].equals(frames[1])
    assert not frames[0].equals(frames[2])


def test_warm_up_is_left_out() -> None:
    workload = chats(8000, 6)
    points = [3000, 20_000]
    exact = Exact(workload, "lru", "prefix", 0.5).at(points)
    frame = Sampled(workload, "lru", "prefix", 0.3, warmup=0.5).at(points)
    for name in ("requests", "block_lookups", "token_lookups"):
        assert frame[name].to_list() == exact[name].to_list()
    for found, error, right in zip(
        frame["block_hit_ratio"], frame["block_hit_ratio_error"], exact["block_hit_ratio"], strict=True
    ):
        assert abs(found - right) <= error < 0.15
    # A cache that is warm from the start: what comes once a request in the first half is no miss in the second.
    twice = make_workload([*chains_of(workload)[:3000], *chains_of(workload)[:3000]])
    warm = Sampled(twice, "lru", "prefix", 0.3, warmup=0.5).at([math.inf])
    assert warm["block_hit_ratio"].to_list() == [1.0]


@pytest.mark.parametrize(("text", "rate"), [("0.01", 0.01), ("1%", 0.01), (0.5, 0.5), (".5", 0.5), ("1e-3", 0.001)])
def test_rates(text: str | float, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["0", "1", "100%", "-0.1", "nan", "many", "", 2])
def test_what_is_no_rate(text: str | float) -> None:
    with pytest.raises(UsageError, match="must lie between 0 and 1"):
        parse_rate(text)


def test_an_empty_sample_is_an_error() -> None:
    with pytest.raises(UsageError, match="take a higher rate"):
        Sampled(make_workload([[0, 1], [0, 1]]), "lru", "prefix", 1e-9)
