"""The clock of the compiled scheduler with a tier against the plain one's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v1.offload import run as run_module
from kvtrace_replay.timing.costs import StepCosts, TransferCosts
from kvtrace_traces.errors import UsageError

from .cases import Case
from .kernel import by_arrival
from .kernel_offload import difference, in_words, kernel_run, twin_in_words
from .offload_cases import offload_case
from .twin_offload_clock import CLOCK_RULES, OffloadTimes, simulate_timed
from .twin_offload_words import Offload, OffloadRun
from .twin_words import CannotFinish

SEEDS = 250


def costs_of(seed: int) -> tuple[StepCosts, TransferCosts]:
    """Whole numbers, so that sums are exact in any order; copies free, quick, and slower than steps."""
    r = random.Random(f"offload clock {seed}")
    steps = StepCosts(r.choice([1, 100, 1000]), *(r.choice([0, 1, 7, 40]) for _ in range(4)))
    return steps, TransferCosts(*(r.choice([0, 0, 3, 50, 700, 20_000]) for _ in range(4)))


def expected(
    case: Case, offload: Offload, seed: int, step_ns: int | None, without: str | None = None
) -> tuple[OffloadRun, OffloadTimes] | None:
    try:
        return simulate_timed(case.requests, case.settings, offload, *costs_of(seed), step_ns, without)
    except CannotFinish:
        return None


def differs(case: Case, run: Any, told: tuple[OffloadRun, OffloadTimes]) -> str:
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


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("step_ns", [None, 50, 3000])
def test_times_are_those_of_the_twin(step_ns: int | None, asynchronous: bool) -> None:
    """When each step and copy begins and ends, each request has its tokens, and, by time, all that follows from it."""
    wrong, loads, waits = [], 0, 0
    for seed in range(SEEDS):
        case, offload = offload_case(seed, asynchronous)
        told = expected(case, offload, seed, step_ns)
        costs, copies = costs_of(seed)
        how: dict[str, Any] = {} if step_ns is None else {"step_ns": step_ns, "arrivals": "time"}
        try:
            run = kernel_run(case, offload, costs=costs, copies=copies, step_rows=True, **how)
        except UsageError:
            if told is not None:
                wrong.append(f"seed {seed}: the kernel never ends, the twin does")
            continue
        if told is None:
            wrong.append(f"seed {seed}: the twin never ends, the kernel does")
        elif found := differs(case, run, told):
            wrong.append(f"seed {seed}: {found}")
        loads += run.loaded_blocks
        waits += int((run.transfer_ns[:, 3] > run.transfer_ns[:, 2]).sum())
    assert not wrong, "\n".join(wrong)
    assert loads > 200
    assert waits > 100 or step_ns is None


@pytest.mark.parametrize("rule", CLOCK_RULES)
def test_every_rule_of_the_clock_matters(rule: str) -> None:
    """Without one of its rules some run is another one: the comparison above would notice."""
    for seed in range(SEEDS):
        case, offload = offload_case(seed, bool(seed % 2))
        with_it, without = (expected(case, offload, seed, 200, left_out) for left_out in (None, rule))
        if (with_it is None) != (without is None):
            return
        if with_it and without and (with_it[1] != without[1] or twin_in_words(with_it[0]) != twin_in_words(without[0])):
            return
    pytest.fail(f"no run of {SEEDS} depends on {rule}")


def test_full_buffers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(0, 60, 5):
        case, offload = offload_case(seed, None)
        costs, copies = costs_of(seed)
        kept: dict[str, Any] = {"step_ns": 500, "arrivals": "time", "costs": costs, "copies": copies, "step_rows": True}
        try:
            roomy = kernel_run(case, offload, **kept)
        except UsageError:
            continue
        monkeypatch.setattr(run_module, "_FIRST_ROOM", 1)
        narrow = kernel_run(case, offload, **kept)
        monkeypatch.undo()
        for one, other in zip((roomy.rows, roomy.transfer_ns, roomy.log), (narrow.rows, narrow.transfer_ns, narrow.log),
                              strict=True):  # fmt: skip
            assert (one == other).all()
        assert roomy.clock is not None
        assert narrow.clock is not None
        assert roomy.clock.gaps[:, 1].sum() == narrow.clock.gaps[:, 1].sum()


def test_the_clock_alone_decides_nothing() -> None:
    """With arrivals by step a timed run is the untimed one."""
    for seed in range(60):
        case, offload = offload_case(seed, None)
        costs, copies = costs_of(seed)
        try:
            timed = kernel_run(case, offload, costs=costs, copies=copies)
        except UsageError:
            continue
        assert not difference(in_words(case, timed), in_words(case, kernel_run(case, offload)))


def test_laws_of_time() -> None:
    """A copy takes what its blocks cost; those of one direction do not overlap; nobody computes before it is loaded."""
    moved = 0
    for seed in range(0, SEEDS, 3):
        case, offload = offload_case(seed, None)
        costs, copies = costs_of(seed)
        try:
            run = kernel_run(case, offload, costs=costs, copies=copies, step_rows=True, step_ns=400, arrivals="time")
        except UsageError:
            continue
        assert run.clock is not None
        for load, once, each in ((0, copies.out, copies.block_out), (1, copies.in_, copies.block_in)):
            mine = run.transfers[:, 1] == load
            blocks, (planned, began, ended, heard) = run.transfers[mine, 3], run.transfer_ns[mine].T
            assert (ended - began == once + each * blocks).all()
            order = np.argsort(began, kind="stable")
            assert (began[order][1:] >= ended[order][:-1]).all()
            assert (planned <= began).all()
            assert (heard >= ended).all()
            moved += int(blocks.sum())
            assert blocks.sum() == (run.loaded_blocks if load else run.stored_blocks)
        assert run.rows[:, 0].sum() >= run.steps
        begin, end = run.clock.steps.T
        assert (begin[1:] >= begin[:-1]).all()
        assert (np.diff(end) >= 0).all()
        assert (end - begin >= costs.call).all()
        arrived, first_step, first, last = run.clock.times.T
        ran = first_step >= 0
        assert (first_step[ran] >= arrived[ran]).all()
        assert (last >= first).all()
        # Who loads at its first admission computes after that.
        for (_, load, request, *_), (*_, heard_ns) in zip(
            run.transfers.tolist(), run.transfer_ns.tolist(), strict=True
        ):
            if load and run.preempted[request] == 0 and ran[request]:
                assert first_step[request] >= heard_ns
        assert run.clock.duration_ns == (end.max() if len(end) else 0)
    assert moved > 1000


def one_case() -> tuple[Case, Offload]:
    return offload_case(4, False)


@pytest.mark.parametrize(
    ("copies", "words"),
    [
        (TransferCosts(0, float("inf"), 0, 0), "bandwidth above 0"),
        (TransferCosts(0, 0, 0, float("nan")), "bandwidth above 0"),
        (TransferCosts(-1, 0, 0, 0), "not negative"),
        (TransferCosts(0, 0, 0, 1e18), "more than the hour"),
        (None, "--link"),
    ],
)
def test_links_that_cannot_be(copies: TransferCosts | None, words: str) -> None:
    case, offload = one_case()
    with pytest.raises(UsageError, match=words):
        kernel_run(case, offload, arrivals="time", costs=StepCosts(1000), copies=copies)


def test_slow_and_fast_links() -> None:
    """The slower the link, the later all is done; one without costs and one of an hour a block come to an end."""
    case, offload = one_case()
    took = []
    for each in (0, 1000, 10**6, 3600 * 10**9):
        run = kernel_run(
            case, offload, arrivals="time", costs=StepCosts(1000), copies=TransferCosts(0, each, 0, each), step_ns=10
        )
        assert run.finished == len(case.requests)
        assert run.clock is not None
        took.append(run.clock.duration_ns)
    assert took == sorted(took)
    assert took[0] < took[2]
    assert kernel_run(case, offload, costs=StepCosts(1000), copies=TransferCosts(0, 0, 0, 0)).clock is not None


def test_a_request_by_hand() -> None:
    """Two requests with one prefix of two blocks, and a cache that keeps none of it: what the second waits for."""
    from .cases import identities
    from .twin_words import Request, Settings

    prompts = [tuple(range(10, 18)), tuple(range(50, 70)), (*range(10, 18), 99)]
    chains = identities(list(prompts), 4)
    requests = [
        Request(arrival_step=at, prompt=len(p), output=1, max_tokens=1, chain=chain)
        for at, p, chain in zip((0, 4, 8), prompts, chains, strict=True)
    ]
    settings = Settings(num_blocks=6, block_size=4, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64)
    run = kernel_run(
        Case(settings, requests, []), Offload(chunks=20), arrivals="time", step_ns=1000,
        costs=StepCosts(100, prefill_token=10), copies=TransferCosts(5, 20, 7, 30),
    )  # fmt: skip
    assert run.clock is not None
    # Steps of 8, 20 and 1 tokens: 180, 300 and 110 ns. A finished request's step has the stores of its chunks planned
    # in it: they begin with the call after it, which is empty; at 180 two blocks go out, in 45 ns; at 4300 five.
    # The third comes at 8000; its call, empty, begins a load of two blocks, 67 ns, and its step begins where that ends.
    assert run.clock.times.tolist() == [[0, 0, 180, 180], [4000, 4000, 4300, 4300], [8000, 8067, 8177, 8177]]
    assert run.transfer_ns.tolist() == [[0, 180, 225, 225], [4000, 4300, 4405, 4405], [8000, 8000, 8067, 8067]]
    assert run.clock.duration_ns == 8177
