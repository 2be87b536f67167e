"""The twin with a connector does what vLLM's own scheduler, connector and manager do, and each of its rules matters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from .cases import identities
from .judge import Endless
from .judge_offload import OffloadJudgeProcess
from .offload_cases import offload_case
from .twin_offload import simulate
from .twin_offload_words import RULES, Offload, OffloadRun
from .twin_words import CannotFinish, Request, Settings

FIELDS = ("tier", "transfers", "lookups", "preemptions", "steps", "events", "requests", "empty_after")
SEEDS = 200  # of each of synchronous and asynchronous scheduling
#: Broken rules that only steps under way at the same time can show.
ASYNCHRONOUS = ("under-way-waits", "frees-wait", "victims-wait")


def twin_run(seed: int, asynchronous: bool, broken: str | None = None) -> OffloadRun | None:
    """The twin's run of a case; None if it never ends."""
    case, offload = offload_case(seed, asynchronous)
    try:
        return simulate(case.requests, case.settings, offload, broken)
    except CannotFinish:
        return None


def difference(mine: OffloadRun | None, theirs: OffloadRun | None) -> str:
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
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("first", range(0, SEEDS, 100))
def test_the_twin_equals_vllm(first: int, asynchronous: bool, tiny_model: Path) -> None:
    """Same blocks stored, loaded and dropped from the tier, same hits, same steps: event by event."""
    wrong, counts = [], Counter[str]()
    with OffloadJudgeProcess() as judge:
        for seed in range(first, first + 100):
            case, offload = offload_case(seed, asynchronous)
            try:
                theirs = judge.offloaded(case, offload, str(tiny_model))
            except Endless:
                theirs = None
            if found := difference(twin_run(seed, asynchronous), theirs):
                wrong.append(f"seed {seed}: {found}, {offload}")
            if theirs is not None:
                counts.update(what for what, _ in theirs.tier)
                counts["preemptions"] += len(theirs.preemptions)
                counts["again"] += sum(after for *_, after in theirs.lookups)
            counts["endless"] += theirs is None
    assert not wrong, "\n".join(wrong)
    print(dict(counts))
    for what in ("store", "stored", "load", "loaded", "evict", "refuse", "preemptions", "again"):
        assert counts[what] > 40, counts
    assert counts["endless"] < 10


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_matters(rule: str) -> None:
    """With one rule broken some run is another one: the comparison above would notice."""
    asynchronous = rule in ASYNCHRONOUS
    for seed in range(2 * SEEDS):
        try:
            if difference(twin_run(seed, asynchronous, rule), twin_run(seed, asynchronous)):
                return
        except (AssertionError, KeyError, IndexError, ValueError):
            return
    pytest.fail(f"no run of {2 * SEEDS} depends on {rule}")


def test_a_tier_of_its_own_by_hand() -> None:
    """Two requests with one prefix of two blocks, a cache that keeps none of it: the second loads what was stored."""
    prompts = [tuple(range(10, 18)), tuple(range(50, 70)), (*range(10, 18), 99)]
    chains = identities(list(prompts), 4)
    requests = [
        Request(arrival_step=at, prompt=len(p), output=1, max_tokens=1, chain=chain)
        for at, p, chain in zip((0, 4, 8), prompts, chains, strict=True)
    ]
    settings = Settings(num_blocks=6, block_size=4, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=64)
    run = simulate(requests, settings, Offload(chunks=20, polls=1))
    first, second = chains[0]
    kinds = [(kind, request, len(blocks), tokens) for _, kind, request, blocks, tokens, _ in run.transfers]
    assert kinds == [("store", 0, 2, 0), ("store", 1, 5, 0), ("load", 2, 2, 8)]
    assert run.tier == [
        ("store", [first, second]), ("stored", [first, second]),
        ("store", list(chains[1])), ("stored", sorted(chains[1])),
        ("load", [first, second]), ("loaded", [first, second]),
    ]  # fmt: skip
    assert [row[3] for row in run.requests] == [0, 0, 8]
