"""Several tiers against their slow twin, on thousands of random workloads in all modes."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import Workload
from kvtrace_replay.cache.prepare import prepare
from kvtrace_replay.tiers import Tier, replay_tiers, runs
from unit.replay.policies.test_removal import TWINS
from unit.replay.test_against_twins import random_schedule, random_workload
from unit.replay.tiers.twin import Factory, TierTwin
from unit.replay.twins import make_workload

# As `TierTwin` has it.
POLICIES: dict[str, Factory] = {name: make for name, make in TWINS.items() if name not in ("lru", "fifo", "opt")}
NAMES = ("hbm", "dram", "ssd", "far")


def returning_workload(rng: random.Random) -> tuple[Workload, int]:
    """Requests that come back, or go on, after others: what a small top tier has lost and one below may have."""
    numbers: dict[tuple[int, ...], int] = {}
    chains: list[list[int]] = []
    past: list[tuple[int, ...]] = []
    content = rng.random() < 0.2
    for _ in range(rng.choice([6, 15, 30])):
        tokens = rng.choice(past) if past and rng.random() < 0.7 else ()
        if not tokens or rng.random() < 0.3:
            tokens = (*tokens, *(rng.randrange(9) for _ in range(rng.randint(1, 3))))[:7]
        past.append(tokens)
        keys = [tokens[i : i + 1] if content else tokens[: i + 1] for i in range(len(tokens))]
        chains.append([numbers.setdefault(key, len(numbers)) for key in keys])
    prompts = [rng.randint(0, len(chain)) if rng.random() < 0.3 else len(chain) for chain in chains]
    workload = make_workload(
        chains,
        prompt_blocks=prompts,
        hit_cap=[max(0, n - rng.choice([0, 0, 0, 1])) for n in prompts],
        schedule=random_schedule(rng, len(chains)) if rng.random() < 0.6 else None,
        last_tokens=[rng.randint(1, 16) for _ in chains],
    )
    return workload, max(len(set(chain)) for chain in chains)


def any_workload(rng: random.Random) -> tuple[Workload, int]:
    return (random_workload if rng.random() < 0.3 else returning_workload)(rng)


def random_tiers(rng: random.Random, least: int, policies: tuple[str, ...]) -> list[Tier]:
    """1 to 4 tiers that may stand together; the first holds `least` blocks or more."""
    tiers = [Tier(NAMES[0], least + rng.choice([0, 0, 1, 4]), policies[0], uses=rng.choice([None, None, None, 2]))]
    for name, policy in zip(NAMES[1:], policies[1:], strict=False):
        mode = rng.choice(["nine", "nine", "exclusive", "inclusive"])
        capacity = rng.choice([1, 2, 3, 5, 8, 12, 30])
        if mode == "inclusive":
            capacity += max(int(tier.capacity) for tier in tiers) - rng.choice([0, 1])
        tiers.append(
            Tier(
                name,
                capacity,
                policy,
                write=rng.choice(["through", "demote"]) if mode == "nine" else None,
                mode=mode,
                uses=rng.choice([None, None, 2, 3]) if mode != "inclusive" else None,
                promote=rng.random() < 0.8,
            )
        )
    return tiers


def check(
    workload: Workload, tiers: list[Tier], semantics: str, factories: dict[str, Factory] | None = None
) -> TierTwin:
    expected = TierTwin(workload, tiers, semantics, factories).run()
    rows = replay_tiers(workload, tiers, semantics)
    for level, row in zip(expected.levels, rows, strict=False):
        sums = dataclasses.asdict(level.sums)
        assert {name: row[name] for name in sums} == sums, (tiers, row["tier"])
    assert rows[0]["pin_overflow_requests"] == len(expected.overflows)
    run = prepare(workload, semantics, 0.0)
    found = runs._drive(runs._levels(workload, tiers, semantics), run)
    assert found.request_hits.tolist() == expected.request_hits
    held = np.array(
        [sum(1 << k for k in range(len(tiers)) if expected.has(k, b)) for b in range(run.stream.n_identities)]
    )
    assert found.mask.tolist() == held.tolist()
    return expected


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize(
    "policies",
    [
        ("lru", "lru", "lru", "lru"),
        ("lru", "fifo", "opt", "opt"),
        ("fifo", "lru", "lru", "lru"),
        ("opt", "opt", "fifo", "fifo"),
    ],
)
def test_thousands_of_random_workloads(policies: tuple[str, ...], semantics: str) -> None:
    rng = random.Random(f"{policies} {semantics}")
    alike = len(set(policies)) == 1
    for _ in range(800):
        workload, largest = any_workload(rng)
        tiers = random_tiers(rng, 1 if semantics == "object" else largest, policies)
        # Unused slots have the types of the last tier, so 3 and 4 tiers of these policies share a driver.
        check(workload, tiers[: rng.choice([1, 2, 3, 4] if alike else [3, 4])], semantics)


def check_giving_up(policy: str, semantics: str, cases: int) -> int:
    """`policy` in an exclusive tier, and above an inclusive one; returns how many blocks it gave up."""
    rng = random.Random(f"giving up {policy} {semantics}")
    given_up = 0
    for case in range(cases):
        workload, largest = any_workload(rng)
        n = workload.n_requests
        arrivals = np.cumsum([rng.choice([0, 1, 1, 2, 5]) for _ in range(n)]).astype(np.int64) * 10**9
        classes = np.array([rng.randrange(3) for _ in range(n)], np.int32)
        workload = dataclasses.replace(workload, arrival_ns=arrivals, request_class=classes)
        top = (1 if semantics == "object" else largest) + rng.choice([0, 0, 1, 4])
        room = rng.choice([1, 2, 3, 5, 8, 12, 30])
        promote = rng.random() < 0.7
        if case % 2:
            tiers = [Tier("hbm", top), Tier("dram", room, policy, mode="exclusive", promote=promote)]
        else:
            tiers = [Tier("hbm", top, policy), Tier("dram", top + rng.choice([0, 1, 4]), mode="inclusive")]
        twin = check(workload, tiers, semantics, dict(POLICIES))
        sums = twin.levels[1].sums
        given_up += twin.levels[0].sums.invalidated_blocks
        if case % 2:
            given_up += sums.blocks_down - sums.evictions - sums.expired_blocks - len(twin.levels[1].pins)
    return given_up


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize("policy", ["s3fifo", "lru-k"])
def test_hundreds_of_exclusive_and_inclusive_tiers(policy: str, semantics: str) -> None:
    assert check_giving_up(policy, semantics, 600) > 300


def test_every_policy_in_exclusive_and_inclusive_tiers_uncompiled() -> None:
    code = (
        "from unit.replay.policies.test_removal import TWINS\n"
        "from kvtrace_replay.policies import find_policy\n"
        "from unit.replay.tiers.test_against_twin import check_giving_up\n"
        "given_up = sum(\n"
        "    check_giving_up(policy, semantics, 30)\n"
        "    for policy in TWINS\n"
        "    for semantics in ('object', 'prefix')\n"
        "    if semantics in find_policy(policy).semantics\n"
        ")\n"
        "assert given_up > 500, given_up\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_random_cases_cover_what_they_are_for() -> None:
    rng = random.Random(1)
    seen = dict.fromkeys(
        ["hit below", "moved up", "copied down", "demoted", "refused", "invalidated", "read in place", "overflow"], 0
    )
    for _ in range(300):
        workload, largest = any_workload(rng)
        twin = TierTwin(workload, random_tiers(rng, largest, ("lru", "fifo", "lru")), "prefix").run()
        for level in twin.levels[1:]:
            sums, tier = level.sums, level.tier
            seen["hit below"] += sums.block_hits > 0
            seen["moved up"] += sums.blocks_up > 0 and tier.mode == "exclusive" and tier.promote
            seen["copied down"] += sums.blocks_down > 0 and not tier.demotes
            seen["demoted"] += sums.blocks_down > 0 and tier.demotes
            seen["refused"] += sums.bypassed_blocks > 0
            seen["read in place"] += sums.blocks_up > 0 and not tier.promote
        seen["invalidated"] += any(level.sums.invalidated_blocks for level in twin.levels)
        seen["overflow"] += bool(twin.overflows)
    assert min(seen.values()) > 10, seen
