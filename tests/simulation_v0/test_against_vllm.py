"""The twin, and the compiled scheduler, do what vLLM 0.4.2 does: its own `LLMEngine.step`, `Scheduler` and
`BlockSpaceManagerV1`, from the Python files of its wheel (68 MB, fetched from the package index once per checkout).

`python -m simulation_v0.fuzz` does the same at any length.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cases import DEFECT_CASES, DEFECTS, REFERENCE_COUNTS, random_case, reference
from .fuzz import MODES, wrong
from .judge import Judge, Unavailable, unpack
from .kernel import difference
from .twin import Twin

pytestmark = pytest.mark.engine

# Read here, for inside the tests the environment has none of these.
SOURCES = Path(os.environ.get("KVTRACE_TEST_SOURCES") or Path(__file__).resolve().parents[2] / ".engines")
REQUIRED = os.environ.get("KVTRACE_TEST_ENGINE") == "required"
SEEDS = range(10_000, 10_070)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """vLLM 0.4.2; skips where it cannot be had, if that is allowed."""
    try:
        sources = unpack(SOURCES)
    except Unavailable as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))
    with Judge(sources) as process:
        yield process


@pytest.mark.parametrize("mode", MODES)
def test_random_runs(judge: Judge, mode: str) -> None:
    said, found = Counter[str](), []
    for seed in SEEDS:
        found += [f"seed {seed}, {one}" for one in wrong(random_case(seed, mode), judge, said)]
    assert not found, "\n".join(found)
    print(dict(said))
    # The real runs were worth comparing.
    assert said["requests"] > 10 * len(SEEDS)
    assert said["runs with preemption"] > len(SEEDS) / 3
    assert said["calls with several victims"] > 0
    assert said["recomputed"] > (10 * len(SEEDS) if mode == "recompute" else 0)
    assert (said["blocks swapped out"] > 10 * len(SEEDS)) == (mode != "recompute")
    if mode == "swap":
        assert min(said[name] for name in ("ended: swap-space", "runs that leak")) > 0


@pytest.mark.parametrize("name", DEFECT_CASES)
def test_defects(judge: Judge, name: str) -> None:
    """vLLM has them; and where its faulty functions are replaced, it does what the simulation does when mended."""
    for mend in (set(), {name}, {"no-return", "spare-block"}, set(DEFECTS)):
        assert wrong(DEFECT_CASES[name].with_settings(mend=frozenset(mend)), judge, Counter()) == []
    run = judge.run(DEFECT_CASES[name])
    if name in ("livelock", "swap-space"):
        assert run.ended == name
    else:
        assert run.ended == "done"
    assert run.leaked == (10 if name == "leak" else 0)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["mixed", "alike"])
def test_reference_runs(judge: Judge, name: str, mode: str) -> None:
    run = judge.run(reference(name).with_settings(preemption=mode))
    kinds = Counter(step[0] for step in run.steps)
    moved = [sum(blocks for step in run.steps for _, blocks in step[place]) for place in (3, 4)]
    recomputed = sum(len(step[2]) for step in run.steps)
    tokens = sum(amount for step in run.steps for _, amount in step[1])
    assert (len(run.steps), kinds["prefill"], recomputed, *moved, tokens) == REFERENCE_COUNTS[name, mode]


def test_it_is_0_4_2_that_judges(judge: Judge) -> None:
    """It tells a twin apart that lacks a rule which only some engine versions have."""
    case = reference("alike").with_settings(preemption="swap")
    theirs = judge.run(case)
    assert difference(Twin(case).run(), theirs) == ""
    for rule in ("prefill-alone", "spare-block", "victim-last", "swapped-first"):
        assert difference(Twin(case, rule).run(), theirs), rule
