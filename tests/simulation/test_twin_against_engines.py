"""The twin, and the compiled scheduler, do what vLLM's own schedulers do: the installed one, and older ones.

Older versions are run from the Python files of their wheels, fetched from the package index once per checkout
(10 to 115 MB each). One version for each way to order freed blocks, to choose victims and to admit; for each release
between two changes of `families`, `python -m simulation.fuzz_twin --version V` does the same at any length.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay.schedulers.families import NEWEST, VICTIM_STAYS_SCHEDULED, rules_of
from kvtrace_traces.errors import UsageError

from .cases import RARE, Case, aborted_after_empty_calls, random_case
from .fuzz_twin import compare
from .judge import Endless, JudgeError, JudgeProcess, Unavailable, unpack
from .kernel import difference, kernel_run, twin_in_words
from .twin_words import Settings

pytestmark = pytest.mark.engine

# Read here, for inside the tests the environment has none of these.
SOURCES = Path(os.environ.get("KVTRACE_TEST_SOURCES") or Path(__file__).resolve().parents[2] / ".engines")
REQUIRED = os.environ.get("KVTRACE_TEST_ENGINE") == "required"
OLDER = ("0.10.2", "0.12.0", "0.20.0", "0.27.0")
KINDS = [(policy, asynchronous) for policy in ("fcfs", "priority") for asynchronous in (False, True)]
#: Seeds of each kind, and of these how many the kernel is held to directly.
INSTALLED, EACH, DIRECTLY = 15, 10, 2


def sources(version: str) -> Path:
    """The Python files of a version; skips where they cannot be had, if that is allowed."""
    try:
        return unpack(version, SOURCES)
    except Unavailable as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))


def kernel_words(case: Case, more: dict[str, Any]) -> dict[str, Any] | None:
    """The kernel's run; None if it never ends."""
    try:
        return kernel_run(case, **more)
    except UsageError:
        return None


def kernel_wrong(case: Case, judge: JudgeProcess, model: str | None, **more: Any) -> str:
    """What the kernel does otherwise than vLLM's scheduler, or nothing; `more`: settings that the twin lacks."""
    try:
        theirs = twin_in_words(judge.run(case, model, more))
    except Endless:
        theirs = None
    mine = kernel_words(case, more)
    if mine is None or theirs is None:
        return "" if mine is theirs else f"the kernel {'never ends' if mine is None else 'ends'}, vLLM does not agree"
    return difference(mine, theirs) or ""


def judged(
    cases: Iterable[tuple[str, Case, bool]], judge: JudgeProcess, model: str | None = None, may_fail: bool = False
) -> Counter[str]:
    """Fails, with all that is wrong, unless twin (and kernel, where asked) equal the judge; returns what happened.

    `may_fail`: vLLM's scheduler may break its own assertion under the priority policy, which is counted.
    """
    counts: Counter[str] = Counter()
    wrong = []
    for name, case, directly in cases:
        try:
            found = [compare(case, judge, model, counts)]
            if directly:
                found.append(kernel_wrong(case, judge, model))
                counts["directly"] += 1
        except JudgeError as error:
            broken = str(error).strip().endswith("AssertionError")
            if not (may_fail and broken and case.settings.scheduling_policy == "priority"):
                raise
            counts["vLLM broke its own assertion"] += 1
            continue
        wrong += [f"{name}: {one}" for one in found if one]
    assert not wrong, "\n".join(wrong)
    print(dict(counts))
    return counts


def test_the_installed_version(tiny_model: Path) -> None:
    """By way of vLLM's own configuration."""
    cases = [
        (f"{policy}, async={asynchronous}, seed {seed}", random_case(seed, NEWEST, asynchronous, policy), n < DIRECTLY)
        for policy, asynchronous in KINDS
        for n, seed in enumerate(range(500, 500 + INSTALLED))
    ]
    cases += [(f"rare, seed {seed}", random_case(seed, policy="priority"), False) for seed in RARE[:4]]
    cases += [
        (f"aborts between empty calls, seed {seed}", aborted_after_empty_calls(random_case(seed), seed), False)
        for seed in range(600, 600 + INSTALLED)
    ]
    with JudgeProcess() as judge:
        counts = judged(cases, judge, str(tiny_model))
    assert counts["runs"] == len(cases)
    assert counts["directly"] == len(KINDS) * DIRECTLY
    assert counts["preemptions"] > len(cases)


def beyond_the_twin(seed: int, settings: Settings) -> dict[str, Any]:
    """One of the settings that only the newest versions have, at a value that vLLM starts with."""
    rng = random.Random(seed)
    match seed % 3:
        case 0:
            return {"long_prefill_token_threshold_adaptive": True}
        case 1:
            return {"max_num_active_seqs": rng.randint(1, settings.max_num_seqs)}
        case _:
            least = settings.max_num_seqs if settings.chunked_prefill else settings.max_model_len
            return {"max_num_scheduled_tokens": rng.randint(least, max(settings.max_num_batched_tokens, least))}


def test_settings_that_the_twin_does_not_have(tiny_model: Path) -> None:
    """The kernel directly against the installed version."""
    wrong, changed = [], Counter[str]()
    with JudgeProcess() as judge:
        for seed in range(48):
            case = random_case(seed)
            more = beyond_the_twin(seed, case.settings)
            if found := kernel_wrong(case, judge, str(tiny_model), **more):
                wrong.append(f"seed {seed}, {more}: {found}")
            changed[next(iter(more))] += kernel_words(case, more) != kernel_words(case, {})
    assert not wrong, "\n".join(wrong)
    assert len(changed) == 3
    assert min(changed.values()) > 0, changed


@pytest.mark.parametrize("version", OLDER)
def test_older_versions(version: str) -> None:
    rules = rules_of(version)
    ties = rules.unchunked_prompt_blocks  # before, ties of the priority queue may raise
    start = 1000 * (1 + OLDER.index(version))
    cases = [
        (
            f"{policy}, async={asynchronous}, seed {seed}",
            random_case(seed, rules, asynchronous, policy, ties),
            n < DIRECTLY,
        )
        for policy, asynchronous in KINDS
        for n, seed in enumerate(range(start, start + EACH))
    ]
    old = rules.priority_victim == VICTIM_STAYS_SCHEDULED
    with JudgeProcess(sources(version)) as judge:
        counts = judged(cases, judge, may_fail=old)
    assert counts["vLLM broke its own assertion"] <= (len(cases) // 8 if old else 0)
    assert counts["runs"] + counts["vLLM broke its own assertion"] == len(cases)
    assert counts["preemptions"] > len(cases)
    assert counts["endless"] <= 2


def test_old_sources_are_not_the_installed_ones() -> None:
    """The rules of another version are noticed, so it is the version's own scheduler that judges."""
    told_apart = 0
    with JudgeProcess(sources("0.12.0")) as judge:
        for seed in range(1000, 1006):
            case = random_case(seed, rules_of("0.12.0"), policy="fcfs")
            other = case.with_settings(rules=NEWEST)
            told_apart += compare(other, judge, None, Counter()) != ""
    assert told_apart > 2
