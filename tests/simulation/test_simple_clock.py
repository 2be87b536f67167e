"""The clock of the compiled scheduler with the simple connector against the plain one's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtrace_traces.errors import UsageError

from .cases import Case
from .kernel import by_arrival
from .kernel_offload import difference
from .kernel_simple import in_words, kernel_run, twin_in_words
from .offload_cases import offload_case, simple_case
from .test_offload_clock import costs_of
from .twin_offload_clock import OffloadTimes
from .twin_simple import Simple, SimpleRun
from .twin_simple_clock import CLOCK_RULES, simulate_timed
from .twin_words import CannotFinish

SEEDS = 40


def expected(
    case: Case, simple: Simple, seed: int, step_ns: int | None, without: str | None = None
) -> tuple[SimpleRun, OffloadTimes] | None:
    try:
        return simulate_timed(case.requests, case.settings, simple, *costs_of(seed), step_ns, without)
    except CannotFinish:
        return None


def differs(case: Case, run: Any, told: tuple[SimpleRun, OffloadTimes]) -> str:
    """The first difference: what happened, then when."""
    theirs, times = told
    if found := difference(in_words(case, run), twin_in_words(theirs)):
        return found
    order = by_arrival(case)
    gaps = np.repeat(run.clock.gaps[:, 0], run.clock.gaps[:, 1])
    for name, mine, others in (
        ("steps", run.clock.steps.tolist(), [list(step) for step in times.steps]),
        ("copies", run.transfer_ns.tolist(), times.copies),
        ("requests", run.clock.times.tolist(), [times.requests[number] for number in order]),
        ("gaps", np.sort(gaps).tolist(), sorted(times.gaps)),
        ("last output", run.clock.duration_ns, times.last),
    ):
        if mine != others:
            return f"{name}: {mine} instead of {others}"
    return ""


@pytest.mark.parametrize("lazy", [False, True], ids=["fill", "eviction"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("step_ns", [None, 50, 3000])
def test_times_are_those_of_the_twin(step_ns: int | None, asynchronous: bool, lazy: bool) -> None:
    """When each step and copy begins and ends, each request has its tokens, and, by time, all that follows from it."""
    wrong, loads = [], 0
    for seed in range(SEEDS):
        case, _ = offload_case(seed, asynchronous)
        simple = simple_case(seed, lazy)
        told = expected(case, simple, seed, step_ns)
        costs, copies = costs_of(seed)
        how: dict[str, Any] = {} if step_ns is None else {"step_ns": step_ns, "arrivals": "time"}
        try:
            run = kernel_run(case, simple, costs=costs, copies=copies, step_rows=True, **how)
        except UsageError:
            if told is not None:
                wrong.append(f"seed {seed}: the kernel never ends, the twin does")
            continue
        if told is None:
            wrong.append(f"seed {seed}: the twin never ends, the kernel does")
        elif found := differs(case, run, told):
            wrong.append(f"seed {seed}: {found}")
        loads += run.loaded_blocks
    assert not wrong, "\n".join(wrong)
    assert loads > 50


@pytest.mark.parametrize("rule", CLOCK_RULES)
def test_every_rule_of_the_clock_matters(rule: str) -> None:
    """Without one of its rules some run is another one: the comparison above would notice."""
    for seed in range(SEEDS):
        case, _ = offload_case(seed, bool(seed % 2))
        simple = simple_case(seed, False)
        with_it, without = (expected(case, simple, seed, 200, left_out) for left_out in (None, rule))
        if (with_it is None) != (without is None):
            return
        if with_it and without and (with_it[1] != without[1] or twin_in_words(with_it[0]) != twin_in_words(without[0])):
            return
    pytest.fail(f"no run of {SEEDS} depends on {rule}")


def test_all_of_a_call_are_one_copy() -> None:
    """Copies of a direction follow one another; those that begin together end together, and take what all their
    blocks cost."""
    several = 0
    for seed in range(SEEDS):
        case, _ = offload_case(seed, None)
        costs, copies = costs_of(seed)
        if not (copies.out + copies.block_out and copies.in_ + copies.block_in):
            continue  # copies that take nothing begin where others end
        try:
            run = kernel_run(
                case, simple_case(seed, bool(seed % 2)), costs=costs, copies=copies, step_ns=400, arrivals="time"
            )
        except UsageError:
            continue
        for load, once, each in ((0, copies.out, copies.block_out), (1, copies.in_, copies.block_in)):
            mine = (run.transfers[:, 1] == load) & (run.transfer_ns[:, 1] >= 0)
            before = 0
            for began in np.unique(run.transfer_ns[mine, 1]):
                together = mine & (run.transfer_ns[:, 1] == began)
                (ended,) = np.unique(run.transfer_ns[together, 2])
                assert ended - began == once + each * run.transfers[together, 3].sum()
                assert began >= before
                before = ended
                several += int(together.sum() > 1)
    assert several > 5
