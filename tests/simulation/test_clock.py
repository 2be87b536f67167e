"""The compiled scheduler's clock against the plain one's."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v1 import run as run_module
from kvtrace_replay.schedulers.vllm_v1.run import simulate_run
from kvtrace_replay.timing.costs import StepCosts

from .cases import Case, random_case
from .kernel import as_recorded, as_settings, by_arrival, totals
from .twin_clock import Times, simulate_timed
from .twin_words import CannotFinish, Request, Run, Settings


def costs_of(seed: int) -> StepCosts:
    """Whole numbers, so that sums are exact in any order."""
    r = random.Random(seed)
    return StepCosts(r.choice([1, 100, 1000]), *(r.choice([0, 1, 7, 40]) for _ in range(4)))


def expected(case: Case, costs: StepCosts, step_ns: int | None) -> tuple[Run, Times] | None:
    try:
        return simulate_timed(case.requests, case.settings, costs, step_ns)
    except CannotFinish:
        return None


def compare(case: Case, costs: StepCosts, step_ns: int | None, **options: bool) -> int:
    """Everything that is timed, and, where time decides, the run itself. Returns how many tokens were compared."""
    told = expected(case, costs, step_ns)
    if told is None:
        return 0
    run, times = told
    mine = simulate_run(
        as_recorded(case, step_ns or 1000),
        as_settings(case.settings),
        arrivals="step" if step_ns is None else "time",
        costs=costs,
        **options,
    )
    assert mine.clock is not None
    assert mine.steps == len(run.steps)
    assert mine.preemptions == len(run.preemptions)
    assert mine.hit_tokens == sum(hit for _, _, _, hit, _ in run.lookups)
    order = by_arrival(case)
    assert mine.clock.times.tolist() == [times.requests[number] for number in order]
    gaps = np.repeat(mine.clock.gaps[:, 0], mine.clock.gaps[:, 1])
    assert np.sort(gaps).tolist() == sorted(times.gaps)
    assert mine.clock.duration_ns == times.now
    if options.get("step_rows"):
        assert mine.clock.steps.tolist() == [list(step) for step in times.steps]
    return len(gaps)


@pytest.mark.parametrize("step_ns", [None, 50, 3000])
@pytest.mark.parametrize("fast", [True, False])
def test_times_are_those_of_the_twin(step_ns: int | None, fast: bool) -> None:
    compared = 0
    for seed in range(150):
        compared += compare(random_case(seed), costs_of(seed), step_ns, fast=fast, step_rows=seed % 3 == 0)
    assert compared > 10_000


def test_full_buffers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "GAPS", 1)
    monkeypatch.setattr(run_module, "STEP_ROWS", 2)
    compared = 0
    for seed in range(40):
        compared += compare(random_case(seed), costs_of(seed), 500, step_rows=seed % 2 == 0)
    assert compared > 2_000


def test_the_clock_alone_decides_nothing() -> None:
    """With arrivals by step, a timed run is the untimed one."""
    for seed in range(60):
        case = random_case(seed)
        if expected(case, costs_of(seed), None) is not None:
            assert totals(case) == totals(case, costs=costs_of(seed))


def test_a_slower_engine_meets_later_arrivals() -> None:
    """Time decides: at 1 ns a call each request has gone when the next comes, at 10 ms all run together."""
    requests = [Request(arrival_step=i, prompt=4, output=5, max_tokens=5, chain=()) for i in range(4)]
    case = Case(Settings(num_blocks=50), requests, [])
    steps = [
        simulate_run(as_recorded(case, 1000), as_settings(case.settings), arrivals="time", costs=StepCosts(call)).steps
        for call in (1, 10_000_000)
    ]
    assert steps == [4 * 5, 1 + 5]
