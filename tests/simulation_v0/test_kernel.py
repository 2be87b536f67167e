"""The compiled scheduler does on every case what its slow twin does, call by call. The twin is judged by vLLM 0.4.2's
own code, see `test_against_vllm`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v0 import run as run_module
from kvtrace_replay.schedulers.vllm_v0.layout import ENDS, STEP_COLUMNS
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, compile_v0, simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import DEFECTS
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_traces.errors import UsageError

from . import cases
from .cases import REFERENCE_COUNTS, random_case, reference
from .fuzz import MODES, tell
from .kernel import difference, kernel_run, requests, settings, simulated
from .twin import RULES, Twin

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm-v0-semantics.md"
CHUNKS, CHUNK = 3, 40


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_equals_the_twin(mode: str, chunk: int) -> None:
    wrong, said = [], Counter[str]()
    for seed in range(CHUNK * chunk, CHUNK * (chunk + 1)):
        case = random_case(seed, mode)
        expected = Twin(case).run()
        said.update(tell(expected, case))
        if found := difference(kernel_run(case), expected):
            wrong.append(f"seed {seed}: {found}")
    assert not wrong, "\n".join(wrong)
    # The cases are worth comparing.
    assert said["runs with preemption"] > CHUNK / 4
    assert said["recomputed"] > CHUNK or mode == "swap"
    assert (said["blocks swapped out"] > CHUNK) == (mode != "recompute")
    assert said["calls with several victims"] > 0, said


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["mixed", "alike"])
def test_reference_runs(name: str, mode: str) -> None:
    run = simulated(reference(name).with_settings(preemption=mode))
    tokens = run.prefill_tokens + run.decode_tokens
    told = (run.calls, run.prefill_steps, run.recomputes, run.blocks_swapped_out, run.blocks_swapped_in, tokens)
    assert told == REFERENCE_COUNTS[name, mode]


def counts(run: RunV0) -> dict[str, Any]:
    """What a run says whatever of it is kept."""
    kept = {"rows", "moves", "scheduled", "seconds", "settings"}
    return {
        field.name: np.asarray(getattr(run, field.name)).tolist() for field in fields(RunV0) if field.name not in kept
    }


@pytest.mark.parametrize("seed", range(12))
def test_what_is_kept_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do buffers that fill up."""
    case = random_case(seed)
    costs = None if case.costs is None else StepCosts(*case.costs)
    bare = simulate_v0(requests(case), settings(case), costs=costs, by_time=costs is not None)
    rows = simulate_v0(requests(case), settings(case), costs=costs, by_time=costs is not None, step_rows=True)
    detail = simulated(case)
    monkeypatch.setattr(run_module, "ROWS", 3)
    monkeypatch.setattr(run_module, "MOVES", 1)
    monkeypatch.setattr(run_module, "SCHEDULED", 0)
    pieces = simulated(case)
    assert counts(bare) == counts(rows) == counts(detail) == counts(pieces)
    assert bare.rows.size == bare.moves.size == rows.scheduled.size == 0
    assert (rows.rows == detail.rows).all()
    for name in ("rows", "moves", "scheduled"):
        assert getattr(detail, name).tolist() == getattr(pieces, name).tolist()


def test_totals_are_those_of_the_calls() -> None:
    for seed in range(40):
        run = simulated(random_case(seed))
        columns = run.step_columns()
        assert run.calls == len(run.rows)
        kinds = Counter(columns["kind"])
        assert (run.prefill_steps, run.decode_steps, run.idle_calls) == (
            kinds["prefill"], kinds["decode"], kinds["idle"],
        )  # fmt: skip
        assert run.steps == run.prefill_steps + run.decode_steps == (columns["requests"] > 0).sum()
        for total, column in (
            (run.recomputes, "recomputed"), (run.swaps, "swapped_out"), (run.prefill_tokens, "prefill_tokens"),
            (run.decode_tokens, "decode_rows"), (run.blocks_swapped_in, "blocks_swapped_in"),
            (run.blocks_swapped_out, "blocks_swapped_out"), (run.dropped, "ignored"),
        ):  # fmt: skip
            assert total == columns[column].sum(), column
        # Every token is sampled by a prefill or a decode, and computed once, but for the last, or again.
        assert run.output_tokens == columns["requests"].sum()
        assert (run.work == run.rows[:, -6:]).all()


def test_the_clock_is_what_calls_cost() -> None:
    costs = StepCosts(1000, 7, 0.5, 30, 2, 11, 13)
    seen = 0
    for seed in range(20):
        case = random_case(seed, "swap")
        run = simulate_v0(requests(case), settings(case), costs=costs, by_time=costs is not None, step_rows=True)
        took = (run.work * costs.array()[1:7]).sum(axis=1) + costs.call
        columns = run.step_columns()
        assert (columns["end_ns"] - columns["start_ns"] == took.astype(np.int64)).all()
        assert (columns["start_ns"][1:] >= columns["end_ns"][:-1]).all()
        told = run.request_columns()
        ended = np.isin(told["end"], ("finished", "model-length"))
        for name, at, of in (("first_token_ns", "first_step", True), ("last_token_ns", "last_step", ended)):
            sampled = (told[name] >= 0) & (told["tokens"] > requests(case).prompt) & of
            assert (told[name][sampled] == columns["end_ns"][told[at][sampled]]).all()
            seen += int(sampled.sum())
        assert run.duration_ns == (columns["end_ns"][-1] if run.calls else run.duration_ns)
    assert seen > 100


def test_when_tokens_come() -> None:
    """Who is scheduled has a token when the call ends; the time between two of them is a gap."""
    costs = StepCosts(1000, 7, 0.5, 30, 2, 11, 13, overlap=0.5)
    seen = 0
    for seed in range(30):
        case = random_case(seed, ("recompute", "swap")[seed % 2])
        run = simulate_v0(requests(case), settings(case), costs=costs, by_time=seed % 3 > 0, detail=True)
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        begun: dict[int, int] = {}
        gaps, at = [], 0
        columns = run.step_columns()
        for many, start, end in zip(columns["requests"], columns["start_ns"], columns["end_ns"], strict=True):
            for request in run.scheduled[at : at + many, 0].tolist():
                if request in last:
                    gaps.append(end - last[request])
                last[request] = end
                first.setdefault(request, end)
                begun.setdefault(request, start)
            at += many
        assert np.sort(np.repeat(run.gaps[:, 0], run.gaps[:, 1])).tolist() == sorted(gaps)
        for request, (arrived, *rest) in enumerate(run.times.tolist()):
            assert rest == [times.get(request, -1) for times in (begun, first, last)]
            assert arrived <= begun.get(request, arrived)
        seen += len(gaps)
    assert seen > 1000


def test_copies_may_run_beside_computing() -> None:
    case = random_case(1, "swap")

    def took(overlap: float) -> None:
        costs = StepCosts(1000, 7, block_in=500, block_out=700, overlap=overlap)
        run = simulate_v0(requests(case), settings(case), costs=costs, step_rows=True)
        columns, work = run.step_columns(), run.work
        computing, copying = 1000 + 7 * work[:, 0], 500 * work[:, 4] + 700 * work[:, 5]
        assert copying.any()
        both = computing + copying - overlap * np.minimum(computing, copying)
        assert (columns["end_ns"] - columns["start_ns"] == both).all()

    took(0.0)
    took(1.0)
    with pytest.raises(UsageError, match="overlap"):
        took(1.5)


def test_times_are_left_out_where_calls_have_no_costs() -> None:
    run = simulated(cases.DEFECT_CASES["livelock"])
    assert run.duration_ns is None
    assert not [name for name in (*run.step_columns(), *run.request_columns()) if name.endswith("_ns")]


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_rule_is_noticed(rule: str) -> None:
    for seed in range(CHUNK * CHUNKS):
        case = random_case(seed)
        mine = kernel_run(case)
        try:
            if difference(mine, Twin(case, rule, limit=len(mine.steps) + 10).run()):
                return
        except (AssertionError, ValueError):  # without the rule its own bookkeeping may not hold together
            return
    pytest.fail(f"no case tells the twin without {rule} apart")


def test_rules_and_defects_are_documented() -> None:
    text = DOCS.read_text()
    assert re.findall(r"^- \*\*`([a-z-]+)`\*\*", text, re.MULTILINE) == list(RULES)
    defects = text.split("\n## Defects\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", defects, re.MULTILINE) == list(DEFECTS)
    assert [name for name in (*ENDS, *STEP_COLUMNS[-6:]) if f"`{name}`" not in text] == []


def test_it_compiles_ahead() -> None:
    compile_v0()
    assert set(DEFECTS) == set(cases.DEFECTS) == set(cases.DEFECT_CASES)
