"""Compares the twin with vLLM's own scheduler: `python -m simulation.fuzz_twin --version 0.32.0 --cases 300`.

To be run in the environment with vLLM's CPU build, from the folder tests, with replay and traces on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

from engine_support.models import tiny_llama
from kvtrace_replay.schedulers.families import VICTIM_STAYS_SCHEDULED, rules_of

from .cases import RARE, Case, random_case
from .judge import Endless, JudgeError, JudgeProcess, unpack
from .twin import simulate
from .twin_words import CannotFinish, Run


def difference(mine: Run, theirs: Run) -> str:
    """Say where two runs differ first, or nothing."""
    for one in fields(Run):
        a, b = getattr(mine, one.name), getattr(theirs, one.name)
        if a == b:
            continue
        if not isinstance(a, list):
            return f"{one.name}: twin {a}, vLLM {b}"
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return f"{one.name}[{at}] of {len(a)}, {len(b)}: twin {a[at : at + 3]}, vLLM {b[at : at + 3]}"
    return ""


def compare(case: Case, judge: JudgeProcess, model: str | None, counts: Counter[str]) -> str:
    """Run `case` on both; return the difference."""
    try:
        mine = simulate(case.requests, case.settings)
    except CannotFinish:
        mine = None
    try:
        theirs = judge.run(case, model)
    except Endless:
        theirs = None
    counts["runs"] += 1
    if mine is None or theirs is None:
        counts["endless"] += mine is theirs
        return "" if mine is theirs else f"twin {'endless' if mine is None else 'ends'}, vLLM does not agree"
    counts["steps"] += len(mine.steps)
    counts["events"] += len(mine.events)
    counts["preemptions"] += len(mine.preemptions)
    counts["lookups"] += len(mine.lookups)
    return difference(mine, theirs)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="0.32.0")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--sources", type=Path, default=Path("/tmp/vllm-sources"))
    parser.add_argument("--installed", action="store_true", help="the installed vLLM, by way of StubEngine")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--policy", choices=["fcfs", "priority"])
    parser.add_argument("--rare", action="store_true", help="the cases of cases.RARE, for versions from 0.24 on")
    arguments = parser.parse_args()
    rules = rules_of(arguments.version)
    old = rules.priority_victim == VICTIM_STAYS_SCHEDULED
    ties = rules.unchunked_prompt_blocks  # ties of the priority queue may raise before
    model = str(tiny_llama(arguments.sources / "tiny")) if arguments.installed else None
    counts: Counter[str] = Counter()
    start = time.monotonic()
    with JudgeProcess(None if arguments.installed else unpack(arguments.version, arguments.sources)) as judge:
        for seed in RARE if arguments.rare else range(arguments.start, arguments.start + arguments.cases):
            policy = "priority" if arguments.rare else arguments.policy
            case = random_case(seed, rules, False if arguments.sync else None, policy, ties)
            try:
                wrong = compare(case, judge, model, counts)
            except JudgeError as error:
                wrong = "vLLM raised: " + str(error).strip()[-600:]
                if old and case.settings.scheduling_policy == "priority" and wrong.endswith("AssertionError"):
                    counts["vLLM fails its own assertion"] += 1
                    wrong = ""
            if wrong:
                counts["mismatches"] += 1
                kind = ("async " if case.settings.async_scheduling else "sync ") + case.settings.scheduling_policy
                print(f"seed {seed} ({kind}): {wrong}", flush=True)
    print(arguments.version, dict(counts), f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
