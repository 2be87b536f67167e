"""The order of the free queue that `verify` expects is that of the engine's version, by the one table of `families`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvtrace_replay import pool
from kvtrace_replay.schedulers.families import CHECKED, rules_of
from kvtrace_replay.schedulers.log import write_run
from kvtrace_traces import open_trace
from simulation.cases import random_case
from simulation.kernel import as_recorded, as_settings


@pytest.mark.parametrize(
    ("version", "cached", "uncached"),
    [
        ("0.10.0", False, False),
        ("0.23.0", False, False),
        ("0.24.0", True, True),
        ("0.26.0+cpu", True, True),
        ("0.27.0", True, False),
        ("0.27.1", True, False),
        ("0.28.0", True, True),
        ("0.32.0", True, True),
        ("0.40.0", True, True),
        ("0.9.2", None, None),
        ("0.1.dev1+g0123456", None, None),
        ("unknown", None, None),
        (None, None, None),
    ],
)
def test_where_blocks_without_identity_go(version: str | None, cached: bool | None, uncached: bool | None) -> None:
    header = {"engine_version": version}
    assert pool.uncached_first({**header, "prefix_caching": True}) is cached
    assert pool.uncached_first({**header, "prefix_caching": False}) is uncached


@pytest.mark.parametrize("version", CHECKED)
def test_every_version_follows_the_families(version: str) -> None:
    rules = rules_of(version)
    for caching, expected in ((True, rules.uncached_first), (False, rules.uncached_first_without_caching)):
        assert pool.uncached_first({"engine_version": version, "prefix_caching": caching}) is expected


def out_of_order(folder: Path, run_as: str, told_as: str, caching: bool) -> int:
    """Allocations out of order in runs with the rules of one version, in traces that name another."""
    wrong = 0
    for seed in range(8):
        case = random_case(seed, rules_of(run_as), policy="fcfs").with_settings(prefix_caching=caching)
        requests = as_recorded(case)
        requests = replace(requests, header={**requests.header, "engine_version": told_as})
        path = folder / f"{run_as}-{told_as}-{caching}-{seed}.kvt"
        write_run(path, requests, as_settings(case.settings))
        mismatches = pool.follow(open_trace(path)).mismatches
        wrong += int(mismatches[pool.C_ORDER])
        assert not mismatches[[c for c in range(len(pool.CHECKS)) if c != pool.C_ORDER]].any()
    return wrong


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("version", ["0.23.0", "0.26.0", "0.27.1", "0.28.0"])
def test_runs_of_a_version_are_in_its_order(tmp_path: Path, version: str, caching: bool) -> None:
    assert out_of_order(tmp_path, version, version, caching) == 0


@pytest.mark.parametrize(
    ("run_as", "told_as", "caching"),
    [("0.27.1", "0.28.0", False), ("0.26.0", "0.27.0", False), ("0.23.0", "0.24.0", True), ("0.28.0", "0.23.0", True)],
)
def test_the_order_of_another_version_is_noticed(tmp_path: Path, run_as: str, told_as: str, caching: bool) -> None:
    assert out_of_order(tmp_path, run_as, told_as, caching) > 0


def test_an_unknown_order_is_not_judged(tmp_path: Path) -> None:
    assert out_of_order(tmp_path, "0.28.0", "0.9.2", True) == 0
