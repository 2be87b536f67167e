"""Runs taken up under way: the compiled scheduler, its slow twin and what a cut tells of a run agree.

Three ways to the same state: the twin stopped before a step, the cut of a trace, and the run that goes on. The first
knows nothing of cuts.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay.pool import uncached_first
from kvtrace_replay.schedulers.families import VICTIM_STAYS_SCHEDULED, rules_of
from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_replay.verify_simulation import simulation
from kvtrace_traces import cut, open_trace
from kvtrace_traces.errors import UsageError

from . import twin
from .cases import Case, random_case
from .kernel import as_recorded, as_settings, as_start, difference, kernel_run, totals, twin_in_words
from .test_kernel import VERSIONS, expected_totals, step_rows
from .test_policies import PolicyPool, comparable
from .twin import simulate
from .twin_pool import Pool
from .twin_start import State, moved_to, simulate_and_stop, simulate_from, tail_in_words, tail_of
from .twin_words import CannotFinish, Run

RUNS, STEPS = 7, 4


def some_steps(steps: int, seed: int, count: int = STEPS) -> list[int]:
    return random.Random(seed).sample(range(1, steps), min(count, steps - 1)) if steps > 1 else []


def cases(version: str, count: int, base: int = 60_000) -> Iterator[tuple[int, Case, int]]:
    """Seed, case and how many steps it takes; those that end."""
    rules = rules_of(version)
    for seed in range(base + 1000 * VERSIONS.index(version), base + 1000 * VERSIONS.index(version) + count):
        case = random_case(seed, rules)
        stays = rules.priority_victim == VICTIM_STAYS_SCHEDULED and case.settings.async_scheduling
        if stays and case.settings.scheduling_policy == "priority":
            continue  # what such a victim has under way is in no log; vLLM itself fails there
        try:
            yield seed, case, len(simulate(case.requests, case.settings).steps)
        except CannotFinish:
            continue


def stopped(case: Case, step: int) -> tuple[Run, State] | None:
    """The whole run and the state before a step; None for runs of which no stretch holds whole steps: where a call
    preempts all and makes no step, its rows belong to the step to come, and what follows to the one before."""
    run, state = simulate_and_stop(case.requests, case.settings, step)
    steps = [event[0] for event in run.events]
    return (run, state) if state is not None and steps == sorted(steps) else None


def in_words(run: Run) -> dict[str, Any]:
    """As `twin_in_words`, without the first steps that lie before the begin."""
    told = twin_in_words(run)
    return {**told, "requests": [(None if row[0] is not None and row[0] < 0 else row[0], *row[1:])
                                 for row in told["requests"]]}  # fmt: skip


def expected(case: Case, run: Run) -> dict[str, Any]:
    """What `kernel.totals` must say of a run from a state: its first steps are told as in `in_words`."""
    return expected_totals(case, replace(run, requests=in_words(run)["requests"]))


def wrong_from(case: Case, run: Run, state: State, step: int) -> list[str]:
    """What is wrong with the runs from a state, the twin's and the compiled scheduler's, judged by the whole run."""
    tail, mine, numbers = tail_of(case, state, step)
    wanted = tail_in_words(run, step, numbers)
    again = simulate_from(tail.requests, tail.settings, mine)
    wrong = [difference(in_words(again), wanted)]
    source = as_start(tail, mine, as_recorded(tail))
    told = expected(tail, again)
    for fast in (True, False):
        wrong.append(difference(kernel_run(tail, fast, source), wanted))
        found = totals(tail, source, fast=fast)
        wrong += [f"{name}: {found[name]} instead of {value}" for name, value in told.items() if found[name] != value]
    rows = [row[:7] + row[8:] for row in totals(tail, source, step_rows=True)["rows"]]
    wrong += [f"rows {rows} instead of {step_rows(again)}"] if rows != step_rows(again) else []
    return [one for one in wrong if one]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_taken_up_goes_on_as_it_did(version: str) -> None:
    kinds: Counter[str] = Counter()
    for seed, case, steps in cases(version, RUNS):
        for step in some_steps(steps, seed):
            found = stopped(case, step)
            if found is None:
                continue
            assert wrong_from(case, *found, step) == [], (seed, step)
            state = found[1]
            kinds["states"] += 1
            kinds["under way"] += bool(state.under_way)
            kinds["preempted"] += any(told["preemptions"] for told in state.requests)
            kinds["waiting"] += bool(state.waiting)
    assert kinds["states"] > 2 * RUNS
    assert kinds["waiting"]


# ---------------------------------------------------------------- other settings


def changes(case: Case, state: State, r: random.Random) -> dict[str, Any]:
    """Other settings that a run in this state can go on at."""
    own, tail = (
        case.settings,
        [case.requests[n] for n, told in enumerate(state.requests) if told["status"] != "finished"],
    )
    longest = max(max(request.prompt + request.output for request in tail), 1)
    used = own.num_blocks - 1 - len(state.free)
    least = max(used, -(-longest // own.block_size)) + 1
    kinds = {
        "num_blocks": r.choice(
            [own.num_blocks + r.randint(1, 20), r.randint(min(least, own.num_blocks), own.num_blocks)]
        ),
        "max_num_seqs": r.choice([1, 2, own.max_num_seqs + 3]),
        "max_num_batched_tokens": own.max_num_batched_tokens + r.randint(1, 40),
        "scheduling_policy": r.choice(["fcfs", "priority"]),
        "async_scheduling": not own.async_scheduling,
        "long_prefill_token_threshold": r.choice([0, 1, 3]),
        "watermark": 0.1 if own.rules.watermark else 0.0,
    }
    if own.chunked_prefill and own.max_num_batched_tokens > 4:
        kinds["max_num_batched_tokens"] = r.randint(2, own.max_num_batched_tokens)
    return {name: kinds[name] for name in r.sample(sorted(kinds), r.randint(1, 3))}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_taken_up_at_other_settings(version: str) -> None:
    changed: Counter[str] = Counter()
    for seed, case, steps in cases(version, RUNS, 70_000):
        for step in some_steps(steps, seed):
            found = stopped(case, step)
            if found is None:
                continue
            told = changes(case, found[1], random.Random(seed + step))
            wrong = wrong_at(case, found[1], step, told)
            if wrong is None:
                continue
            assert wrong == [], (seed, step, told)
            changed.update(list(told))
    assert sum(changed.values()) > 2 * RUNS


def wrong_at(case: Case, state: State, step: int, told: dict[str, Any]) -> list[str] | None:
    """What is wrong with the compiled scheduler's run from a state at other settings, judged by the twin's; None where
    requests preempt each other for ever."""
    tail, mine, _ = tail_of(case, state, step)
    other = replace(tail, settings=replace(tail.settings, **told))
    source = as_start(tail, mine, as_recorded(tail))
    try:
        run = simulate_from(other.requests, other.settings, moved_to(mine, tail.settings, other.settings))
    except CannotFinish:
        with pytest.raises(UsageError, match="can never be served"):
            totals(other, source)
        return None
    wrong = [difference(kernel_run(other, fast, source), in_words(run)) for fast in (True, False)]
    wanted = expected(other, run)
    found = totals(other, source)
    wrong += [f"{name}: {found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value]
    return [one for one in wrong if one]


class LearningPool(PolicyPool):
    """A pool under a policy that takes up what is cached: idle blocks as used in the order of the free queue, then held
    ones; of several idle blocks with one identity the last of the queue is kept."""

    def learn(self) -> None:
        queue = list(self.free)
        for blocks in self.cached.values():
            idle = sorted((b for b in blocks if self.references[b] == 0), key=queue.index)
            for block in idle[: len(idle) - (len(idle) == len(blocks))]:
                blocks.remove(block)
                self.identity[block] = None
        self.order = [held for b in queue if (held := self.identity[b]) is not None]
        if self.policy == "fifo":
            self.order += [held for held, blocks in self.cached.items() if blocks and held not in self.order]


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_policy_takes_up_what_is_cached(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "Pool", LearningPool)
    monkeypatch.setattr(PolicyPool, "policy", policy)
    compared = evictions = 0
    for version in ("0.11.1", "0.32.0"):
        for seed, case, steps in cases(version, 4 * RUNS, 75_000):
            for step in some_steps(steps, seed, 2):
                monkeypatch.setattr(twin, "Pool", Pool)
                found = stopped(case, step)
                monkeypatch.setattr(twin, "Pool", LearningPool)
                if found is None:
                    continue
                tail, mine, _ = tail_of(case, found[1], step)
                source = as_start(tail, mine, as_recorded(tail))
                try:
                    theirs = in_words(simulate_from(tail.requests, tail.settings, mine))
                except (CannotFinish, ValueError):
                    continue
                for fast in (True, False):
                    told = kernel_run(tail, fast, source, policy=policy)
                    assert comparable(told) == comparable(theirs), (seed, step, fast)
                compared += 1
                evictions += sum(event[1] == "evict" for event in theirs["events"])
    assert compared > 4 * RUNS
    assert evictions > 100


# ---------------------------------------------------------------- cuts


def traced(case: Case, version: str, path: Path) -> Any:
    write_run(path, as_recorded(case, version=version), as_settings(case.settings))
    return open_trace(path)


def made(whole: Any, path: Path, first: int, stop: int | None = None) -> Any:
    with path.open("wb") as file:
        cut.cut_steps(whole, file, first, stop, uncached_first=uncached_first(whole.header))
    return open_trace(path)


def told_of(source: Any) -> dict[str, Any]:
    """A start in words: requests by their names, identities by their hashes, twins in the order of filling."""
    start, names = source.start, source.request_id.to_list()
    held: dict[int, list[int]] = {}
    for block, identity in zip(start.blocks.tolist(), start.identities.tolist(), strict=True):
        held.setdefault(int(source.hashes[identity]), []).append(block)
    due = bool(start.due)
    return {
        "running": [names[n] for n in start.running],
        "waiting": [names[n] for n in start.waiting],
        "requests": {
            names[n]: [
                *(int(getattr(start, name)[n]) for name in ("computed", "tokens", "cached", "preemptions", "filled")),
                bool(start.begun[n]), start.blocks_of(n).tolist(),
                int(start.under_way[n]), bool(start.gives[n]) and due,
            ]
            for n in range(start.n_requests)
        },
        "held": held,
        "queue": start.queue.tolist(),
        "since": (start.preempted, start.empty, start.due),
    }  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_tells_the_state_of_the_run(version: str, tmp_path: Path) -> None:
    """The state at the begin of a cut is that of the twin which stopped there, and its tail comes out again."""
    compared = 0
    for seed, case, steps in cases(version, RUNS, 80_000):
        whole = traced(case, version, tmp_path / f"{seed}.kvt")
        for step in some_steps(steps, seed):
            found = stopped(case, step)
            if found is None:
                continue
            tail, mine, _ = tail_of(case, found[1], step)
            part = made(whole, tmp_path / "part.kvt", step)
            source = recorded(part, carried=True)
            own = as_settings(case.settings)
            if source.start is None or source.start.untold(own):
                continue
            theirs = told_of(as_start(tail, mine, as_recorded(tail)))
            assert told_of(source) == theirs
            compared += 1
    assert compared > 2 * RUNS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_simulated_at_its_own_settings_comes_out_event_by_event(version: str, tmp_path: Path) -> None:
    kinds: Counter[str] = Counter()
    for seed, case, steps in cases(version, RUNS, 90_000):
        whole = traced(case, version, tmp_path / f"{seed}.kvt")
        if simulation(whole, whole.header)["mismatches"]:
            continue  # some random runs abort what never came, which a trace tells in another way
        for step in some_steps(steps, seed, 6):
            stop = None if step % 3 else min(step + 5, steps)
            part = made(whole, tmp_path / "part.kvt", step, stop)
            told = simulation(part, part.header)
            if told["skipped"]:
                assert "untold-state" in told["skipped"]
                kinds["skipped"] += 1
                continue
            assert told["mismatches"] == 0, (seed, step, told["first"])
            kinds["cuts"] += 1
            kinds["rows"] += told["checked"]
    assert kinds["cuts"] > 2 * RUNS
    assert kinds["skipped"] == 0 or not rules_of(version).unchunked_prompt_blocks
    assert kinds["rows"] > 100 * kinds["cuts"]
