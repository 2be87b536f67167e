"""What must hold whatever the workload: one tier is the plain cache, classical results on two, conservation."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.cache.prepare import prepare
from kvtrace_replay.tiers import Tier, replay_tiers, runs
from unit.replay.test_against_twins import random_workload
from unit.replay.tiers.test_against_twin import random_tiers
from unit.replay.twins import make_workload

SHARED = (
    "policy", "capacity_blocks", "block_size", "semantics", "requests", "block_lookups", "block_hits",
    "block_hit_ratio", "token_lookups", "token_hits", "token_hit_ratio", "evictions", "pin_overflow_requests",
    "expired_blocks", "bypassed_blocks", "warmup", "why",
)  # fmt: skip
COMPILED = ("lru", "lru+second-touch", "fifo", "opt")


def random_import(rng: random.Random) -> tuple[Workload, int]:
    """A workload of chained identities, each request over before the next one comes."""
    numbers: dict[tuple[int, ...], int] = {}
    chains: list[tuple[int, ...]] = []
    for _ in range(rng.choice([2, 5, 20, 40])):
        base = rng.choice(chains) if chains and rng.random() < 0.6 else ()
        chains.append((*base[: rng.randint(0, 8)], *(rng.randrange(3) for _ in range(rng.randint(1, 4)))))
    ids = [[numbers.setdefault(chain[: i + 1], len(numbers)) for i in range(len(chain))] for chain in chains]
    return make_workload(ids, last_tokens=[rng.randint(1, 16) for _ in ids]), max(len(chain) for chain in ids)


def check_single_tier(policy: str, semantics: str, cases: int) -> None:
    rng = random.Random(f"{policy} {semantics}")
    for _ in range(cases):
        workload, largest = random_workload(rng)
        arrivals = np.cumsum([rng.choice([0, 10**9, 10**11]) for _ in range(workload.n_requests)]).astype(np.int64)
        workload = replace(workload, arrival_ns=arrivals)  # which `ttl` asks for
        capacity = rng.choice([largest, largest + 2, largest + 9, "1k", "inf"])
        warmup = rng.choice([0.0, 0.0, 0.3])
        (plain,) = replay(workload, policy, capacity, semantics, warmup=warmup)
        tier, total = replay_tiers(workload, [Tier("hbm", capacity, policy)], semantics, warmup=warmup)
        assert {name: tier[name] for name in SHARED} == {name: plain[name] for name in SHARED}
        assert total["block_hits"] == plain["block_hits"]
        assert tier["blocks_up"] == tier["blocks_down"] == 0 or plain["why"]


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize("policy", COMPILED)
def test_a_single_tier_is_the_plain_cache(policy: str, semantics: str) -> None:
    check_single_tier(policy, semantics, 100)


def check_below(policy: str, semantics: str, cases: int) -> None:
    """Nothing is lost or made of nothing in a lower tier, however it is filled."""
    rng = random.Random(f"below {policy} {semantics}")
    for _ in range(cases):
        workload, largest = random_import(rng)
        arrivals = np.cumsum([rng.choice([0, 10**9, 10**11]) for _ in range(workload.n_requests)]).astype(np.int64)
        workload = replace(workload, arrival_ns=arrivals)
        for write in ("through", "demote"):
            tiers = [Tier("hbm", largest), Tier("dram", rng.randint(1, largest + 4), policy, write=write)]
            row = replay_tiers(workload, tiers, semantics)[1]
            run = prepare(workload, semantics, 0.0)
            resident = int((runs._drive(runs._levels(workload, tiers, semantics), run).mask >> 1).sum())
            assert resident <= tiers[1].capacity
            assert row["blocks_down"] == resident + row["evictions"] + row["expired_blocks"]
            assert row["blocks_up"] == row["block_hits"]


def test_every_policy_uncompiled() -> None:
    code = (
        "from kvtrace_replay.policies import policies\n"
        "from unit.replay.tiers.test_laws import check_below, check_single_tier\n"
        "for entry in policies():\n"
        "    for semantics in ('object', 'prefix'):\n"
        "        if semantics in entry.semantics:\n"
        "            check_single_tier(entry.name, semantics, 12)\n"
        "            check_below(entry.name, semantics, 6)\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_exclusive_lru_tiers_are_one_lru_of_the_summed_capacity(n: int) -> None:
    """Wong and Wilkes, "My cache or yours? Making storage more exclusive", USENIX ATC 2002."""
    rng = random.Random(n)
    for _ in range(150):
        workload, _ = random_workload(rng)
        sizes = [rng.randint(1, 6) for _ in range(n)]
        tiers = [Tier(f"t{k}", size, mode="exclusive" if k else "nine") for k, size in enumerate(sizes)]
        rows = replay_tiers(workload, tiers, "object")
        (plain,) = replay(workload, "lru", sum(sizes), "object")
        assert rows[-1]["block_hits"] == plain["block_hits"]
        assert rows[-1]["token_hits"] == plain["token_hits"]
        assert rows[n - 1]["evictions"] == plain["evictions"]
        # Each of the upper tiers' blocks stands among the most recent of the one list.
        (upper,) = replay(workload, "lru", sizes[0], "object")
        assert rows[0]["block_hits"] == upper["block_hits"]


@pytest.mark.parametrize("mode", ["nine", "inclusive"])
@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_lru_tiers_written_through_are_the_lru_of_the_largest(semantics: str, mode: str) -> None:
    """What is used most recently is in every tier large enough for it (Mattson's inclusion), enforced or not."""
    rng = random.Random(f"{semantics} {mode}")
    for _ in range(200):
        workload, largest = random_import(rng)
        small = largest + rng.randint(0, 3)
        large = small + rng.randint(0, 12)
        rows = replay_tiers(workload, [Tier("hbm", small), Tier("dram", large, mode=mode)], semantics)
        (plain,) = replay(workload, "lru", large, semantics)
        assert rows[-1]["block_hits"] == plain["block_hits"]
        assert rows[-1]["token_hits"] == plain["token_hits"]
        assert rows[1]["evictions"] == plain["evictions"]
        assert rows[0]["invalidated_blocks"] == 0


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_an_infinite_tier_below_finds_all_that_an_infinite_cache_finds(semantics: str) -> None:
    rng = random.Random(semantics)
    for _ in range(100):
        workload, largest = random_import(rng)
        for below in (Tier("dram"), Tier("dram", mode="exclusive"), Tier("dram", write="demote")):
            rows = replay_tiers(workload, [Tier("hbm", largest), below], semantics)
            (plain,) = replay(workload, "lru", "inf", semantics)
            assert rows[-1]["block_hits"] == plain["block_hits"]


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_what_goes_in_comes_out_or_stays(semantics: str) -> None:
    rng = random.Random(f"conservation {semantics}")
    for _ in range(300):
        workload, largest = random_import(rng)
        tiers = random_tiers(rng, largest, ("lru",) * 4)[: rng.choice([2, 3])]
        rows = replay_tiers(workload, tiers, semantics, bytes_per_token=3)
        run = prepare(workload, semantics, 0.0)
        mask = runs._drive(runs._levels(workload, tiers, semantics), run).mask
        for k, (tier, row) in enumerate(zip(tiers, rows, strict=False)):
            resident = int((mask >> k & 1).sum())
            assert resident <= tier.capacity
            assert row["bytes_up"] == row["blocks_up"] * 3 * 16
            assert row["bytes_down"] == row["blocks_down"] * 3 * 16
            if k == 0:
                assert row["blocks_up"] == row["blocks_down"] == 0
            else:
                # An id names its whole prefix, so no request has it twice, and each hit is one block read.
                assert row["blocks_up"] == row["block_hits"]
            left = row["evictions"] + row["invalidated_blocks"]
            if k and tier.mode != "exclusive":
                assert row["blocks_down"] == left + resident
            if tier.mode == "exclusive":
                assert row["blocks_down"] >= left + resident
                assert not (mask[mask >> k & 1 == 1] & ((1 << k) - 1)).any()
        for name in ("block_hits", "token_hits", "blocks_up", "blocks_down", "evictions", "bytes_up"):
            assert rows[-1][name] == sum(row[name] for row in rows[:-1])
        if rows[-1]["block_lookups"]:
            assert rows[-1]["block_hit_ratio"] == pytest.approx(sum(row["block_hit_ratio"] for row in rows[:-1]))


def test_a_tier_added_below_finds_no_less() -> None:
    rng = random.Random(5)
    for _ in range(150):
        workload, largest = random_import(rng)
        tiers = [Tier("hbm", largest + 1), Tier("dram", largest + 4), Tier("ssd", largest + 9)]
        hits = [replay_tiers(workload, tiers[:n])[-1]["block_hits"] for n in (1, 2, 3)]
        assert hits == sorted(hits)


def test_a_warm_up_fills_the_tiers_and_counts_nothing() -> None:
    rng = random.Random(6)
    counted = 0
    for _ in range(150):
        workload, largest = random_import(rng)
        tiers = random_tiers(rng, largest, ("lru",) * 4)[:3]
        run = prepare(workload, "prefix", 0.0)
        hits = runs._drive(runs._levels(workload, tiers, "prefix"), run).request_hits
        total = replay_tiers(workload, tiers, warmup=0.5)[-1]
        skipped = workload.n_requests // 2
        assert total["block_hits"] == hits[skipped:].sum()
        assert total["requests"] == workload.n_requests - skipped
        counted += total["block_hits"]
    assert counted > 100


def test_the_hits_of_each_request_are_those_of_the_plain_cache() -> None:
    rng = random.Random(7)
    for _ in range(60):
        workload, largest = random_workload(rng)
        run = prepare(workload, "prefix", 0.0)
        found = runs._drive(runs._levels(workload, [Tier("hbm", largest + 3)], "prefix"), run)
        np.testing.assert_array_equal(found.request_hits, replay_requests(workload, "lru", largest + 3, "prefix"))
