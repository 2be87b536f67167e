"""The compiled scheduler does on every case what its slow twin does: each step, lookup, preemption and block event.

By each of its ways: many steps at once or one by one, with a log, with rows of steps, or with neither. The twin is
judged by vLLM's own schedulers, see `test_twin_against_engines`.

0.10.0 is left out: its rule `late_hashes` is not in the compiled scheduler. It shows only where that version runs
asynchronously and output arrives after a preemption; 0.10.2 stands for the versions up to 0.11.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvtrace_replay.schedulers.families import rules_of
from kvtrace_traces.errors import UsageError
from kvtrace_traces.schema import FINISH_REASONS

from .cases import RARE, Case, aborted_after_empty_calls, random_case
from .kernel import by_arrival, difference, kernel_run, totals, twin_in_words
from .twin import simulate
from .twin_words import CannotFinish, Run

VERSIONS = ("0.10.2", "0.11.1", "0.16.0", "0.20.0", "0.24.0", "0.27.0", "0.28.0", "0.31.0", "0.32.0")
CHUNKS, CHUNK = 2, 24
#: Cases of 0.10.2 whose requests preempt each other for ever.
ENDLESS = (65, 66, 203, 245, 400, 488)


def seeds(version: str, chunk: int) -> range:
    """Others for every version and chunk."""
    start = 10_000 * (1 + VERSIONS.index(version)) + CHUNK * chunk
    return range(start, start + CHUNK)


def expected_totals(case: Case, run: Run) -> dict[str, Any]:
    """What `kernel.totals` must say where the twin did `run`, the rows of steps and the tokens left out."""
    kinds = [event[1] for event in run.events]
    after = [row for row in run.lookups if row[4]]
    hits = [sum(row[3] for row in run.lookups if row[1] == number) for number in range(len(case.requests))]
    rows = [
        [-1 if value is None else value for value in row[:4]]
        + [FINISH_REASONS.index(str(row[5])), hits[number]]
        for number, row in enumerate(run.requests)
    ]  # fmt: skip
    order = by_arrival(case)
    return {
        "steps": len(run.steps),
        "preemptions": len(run.preemptions),
        "evictions": kinds.count("evict"),
        "allocations": kinds.count("allocate"),
        "fills": kinds.count("fill"),
        "hit_tokens": sum(row[3] for row in run.lookups),
        "lookup_tokens": sum(row[2] for row in run.lookups),
        "hit_tokens_after": sum(row[3] for row in after),
        "lookup_tokens_after": sum(row[2] for row in after),
        "finished": len(case.requests),
        "guessed": 0,
        "requests": [rows[number] for number in order],
        "preempted": [run.requests[number][4] for number in order],
    }


def step_rows(run: Run) -> list[list[int]]:
    """The rows of steps, without the requests in prefill."""
    evictions = [0] * len(run.steps)
    for step, kind, *_ in run.events:
        if kind == "evict":
            evictions[step] += 1
    return [
        [len(scheduled), sum(tokens for _, tokens, _ in scheduled), running, waiting, free, len(preempted), empty, lost]
        for (scheduled, free, running, waiting, preempted, empty), lost in zip(run.steps, evictions, strict=True)
    ]


def wrong_rows(case: Case, run: Run, rows: list[list[int]]) -> str | None:
    """What is wrong with the kernel's rows of steps."""
    lost = {(step, request): tokens for step, request, _, tokens in run.preemptions}
    for number, (mine, theirs) in enumerate(zip(rows, step_rows(run), strict=True)):
        if mine[:7] + mine[8:] != theirs:
            return f"row {number}: {mine} instead of {theirs}"
        # One token past the prompt is decode, all else prefill. A victim that stays scheduled (up to 0.11.0) counts as
        # what it was scheduled as.
        prefill = sum(
            tokens > 1 or lost.get((number, request), computed) < case.requests[request].prompt
            for request, tokens, computed in run.steps[number][0]
        )
        if mine[7] != prefill:
            return f"row {number}: {mine[7]} requests in prefill instead of {prefill}"
    return None


def wrong_tokens(case: Case, run: Run, tokens: list[int]) -> str | None:
    """What is wrong with the tokens at the end; those of aborted requests the twin does not tell."""
    for number, mine in zip(by_arrival(case), tokens, strict=True):
        request = case.requests[number]
        most = min(request.prompt + request.output, case.settings.max_model_len)
        if run.requests[number][5] != "abort" and mine != most:
            return f"request {number}: {mine} tokens instead of {most}"
    return None


def refused(case: Case) -> list[str]:
    """The ways in which the kernel does not refuse an endless case."""
    wrong = []
    for fast in (True, False):
        for name, way in (("with a log", kernel_run), ("without", totals)):
            try:
                way(case, fast=fast)
            except UsageError:
                continue
            wrong.append(f"the twin never ends, the kernel does, fast={fast}, {name}")
    return wrong


def compared(case: Case) -> tuple[list[str], Run | None]:
    """What is wrong with the kernel on a case; and the twin's run, None if it never ends."""
    try:
        run = simulate(case.requests, case.settings)
    except CannotFinish:
        return refused(case), None
    wrong: list[str | None] = []
    expected = expected_totals(case, run)
    for fast in (True, False):
        wrong.append(difference(kernel_run(case, fast), twin_in_words(run)))
        for rows in (True, False):
            told = totals(case, fast=fast, step_rows=rows)
            wrong += [
                f"{name}: {told[name]} instead of {value}, fast={fast}, rows={rows}"
                for name, value in expected.items()
                if told[name] != value
            ]
            wrong.append(wrong_tokens(case, run, told["tokens"]))
            wrong.append(wrong_rows(case, run, told["rows"]) if rows else None)
    return [one for one in wrong if one], run


def all_compared(cases: dict[int, Case]) -> list[Run]:
    """Fails, with all that is wrong, unless the kernel equals the twin on all cases; the runs that end."""
    wrong, runs = [], []
    for seed, case in cases.items():
        found, run = compared(case)
        wrong += [f"seed {seed}: {one}" for one in found]
        if run is not None:
            runs.append(run)
    assert not wrong, "\n".join(wrong)
    return runs


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernel_equals_the_twin(version: str, chunk: int) -> None:
    runs = all_compared({seed: random_case(seed, rules_of(version)) for seed in seeds(version, chunk)})
    # The cases are worth comparing.
    kinds = {event[1] for run in runs for event in run.events}
    assert kinds == {"allocate", "hit", "fill", "free", "evict"}
    assert sum(len(run.steps) for run in runs) > 50 * CHUNK
    assert sum(len(run.preemptions) for run in runs) > CHUNK


@pytest.mark.parametrize("version", [v for v in VERSIONS if rules_of(v).watermark])
def test_the_kernel_equals_the_twin_on_rare_cases(version: str) -> None:
    runs = all_compared({seed: random_case(seed, rules_of(version), policy="priority") for seed in RARE})
    assert all(run.preemptions for run in runs)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_kinds_of_settings_apart(policy: str, asynchronous: bool) -> None:
    """Each kind often enough, whatever the other tests happen to draw."""
    runs = all_compared({seed: random_case(seed, asynchronous=asynchronous, policy=policy) for seed in range(12)})
    assert any(run.preemptions for run in runs)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_aborts_after_calls_without_tokens(asynchronous: bool) -> None:
    cases = {
        seed: aborted_after_empty_calls(random_case(seed, asynchronous=asynchronous), seed) for seed in range(700, 780)
    }
    runs = all_compared(cases)
    at_once = [
        simulate([replace(one, abort_calls=0) for one in case.requests], case.settings) for case in cases.values()
    ]
    # It matters which of the calls after a step an abort comes before.
    assert sum(run != other for run, other in zip(runs, at_once, strict=True)) > 3


@pytest.mark.parametrize("seed", ENDLESS)
def test_what_never_ends_is_refused(seed: int) -> None:
    case = random_case(seed, rules_of("0.10.2"))
    with pytest.raises(CannotFinish):
        simulate(case.requests, case.settings)
    assert refused(case) == []
    with pytest.raises(UsageError, match="can never be served"):
        totals(case)
