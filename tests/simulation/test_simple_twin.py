"""The twin with the simple connector does what vLLM's own scheduler and connector do, and each of its rules matters."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from .cases import Case, identities
from .judge import Endless
from .judge_simple import SimpleJudgeProcess
from .offload_cases import offload_case, simple_case
from .twin_simple import RULES, Simple, SimpleRun, simulate
from .twin_words import CannotFinish, Request, Settings

FIELDS = ("transfers", "host", "lookups", "preemptions", "steps", "events", "requests", "empty_after", "evicted")
SEEDS = 20
KINDS = [(asynchronous, lazy) for asynchronous in (False, True) for lazy in (False, True)]


def twin_run(case: Case, simple: Simple, broken: str | None = None) -> SimpleRun | None:
    """The twin's run of a case; None if it never ends."""
    try:
        return simulate(case.requests, case.settings, simple, broken)
    except CannotFinish:
        return None


def difference(mine: SimpleRun | None, theirs: SimpleRun | None) -> str:
    """The first difference between two runs, or nothing."""
    if mine is None or theirs is None:
        return "" if mine is theirs else f"the twin {'never ends' if mine is None else 'ends'}, vLLM does not agree"
    for name in FIELDS:
        a, b = getattr(mine, name), getattr(theirs, name)
        if a != b and isinstance(a, list):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"{name}[{at}]: {a[at : at + 1]} instead of {b[at : at + 1]}"
        if a != b:
            return f"{name}: {a} instead of {b}"
    return ""


@pytest.mark.engine
def test_the_twin_equals_vllm(tiny_model: Path) -> None:
    """Same blocks stored and loaded, same blocks of the host, same hits, steps and block events, one by one."""
    wrong, counts = [], Counter[str]()
    with SimpleJudgeProcess() as judge:
        for seed, (asynchronous, lazy) in itertools.product(range(SEEDS), KINDS):
            case, _ = offload_case(seed, asynchronous)
            names = {one.request_id for one in case.requests}
            if not case.settings.prefix_caching or len(names) < len(case.requests):
                continue  # the connector does nothing; or requests that vLLM would not take
            simple = simple_case(seed, lazy)
            try:
                theirs = judge.offloaded(case, simple, str(tiny_model))
            except Endless:
                theirs = None
            if found := difference(twin_run(case, simple), theirs):
                wrong.append(f"seed {seed}: {found}, {simple}")
            counts["endless"] += theirs is None
            if theirs is not None:
                counts.update({"cases": 1, "preemptions": len(theirs.preemptions), "evicted": theirs.evicted})
                for _, kind, _, blocks, *_ in theirs.transfers:
                    counts[f"{kind} {'lazy' if lazy else 'eager'}"] += len(blocks)
    assert not wrong, "\n".join(wrong)
    assert counts["cases"] > 50
    kinds = [f"{kind} {way}" for kind in ("store", "load") for way in ("lazy", "eager")]
    assert min(counts[name] for name in ("preemptions", "evicted", *kinds)) > 50, counts
    assert counts["endless"] < 3


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_matters(rule: str) -> None:
    """With one rule broken some run is another one: the comparison above would notice."""
    for seed in range(60):
        for asynchronous, lazy in KINDS:
            case, _ = offload_case(seed, asynchronous)
            if not case.settings.prefix_caching:
                continue
            simple = simple_case(seed, lazy)
            try:
                if difference(twin_run(case, simple, rule), twin_run(case, simple)):
                    return
            except (AssertionError, KeyError, IndexError, ValueError):
                return
    pytest.fail(f"no run depends on {rule}")


def small() -> tuple[list[Request], Settings]:
    """Two requests with one prefix of two blocks, and one between them that leaves nothing of it in the cache."""
    prompts = [tuple(range(10, 18)), tuple(range(50, 70)), (*range(10, 18), 99)]
    chains = identities(list(prompts), 4)
    requests = [
        Request(arrival_step=at, prompt=len(p), output=1, max_tokens=1, chain=chain)
        for at, p, chain in zip((0, 4, 8), prompts, chains, strict=True)
    ]
    return requests, Settings(num_blocks=6, block_size=4, max_num_seqs=1, max_num_batched_tokens=8, max_model_len=64)


def test_stored_on_fill_by_hand() -> None:
    """What a request filled goes out with the next call that it is in, or with the one after its end."""
    requests, settings = small()
    run = simulate(requests, settings, Simple(chunks=20, lazy=False))
    told = [(step, kind, request, blocks, tokens) for step, kind, request, blocks, tokens, _ in run.transfers]
    assert told == [
        (1, "store", 0, [1, 2], 0),
        (2, "store", 1, [3, 4], 0), (3, "store", 1, [5, 1], 0), (4, "store", 1, [2], 0),
        (4, "load", 2, [4, 3], 8),
        # What was loaded is on the host already, and the last block is not full.
    ]  # fmt: skip
    assert [row[3] for row in run.requests] == [0, 0, 8]


def test_stored_on_eviction_by_hand() -> None:
    """Nothing goes out while it is in use; then what stands next in the free queue, four blocks of it in each call."""
    requests, settings = small()
    run = simulate(requests, settings, Simple(chunks=20, lazy=True))
    first, second = requests[0].chain
    stored = [blocks for _, kind, _, blocks, *_ in run.transfers if kind == "store"]
    assert run.transfers[0][1] == "store"
    assert sorted(stored[0]) == [1, 2]
    assert {event[2] for event in run.host if event[0] == "cache"} >= {first, second}
    assert [row[3] for row in run.requests] == [0, 0, 8]
