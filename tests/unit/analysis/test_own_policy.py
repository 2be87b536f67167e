"""The example of a policy of one's own: its README is true, and the policy does what it says."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay import replay
from unit.replay.policies.slow_driver import Pins, SlowPolicy, run_slow
from unit.replay.test_against_twins import random_workload
from unit.test_readme import fits, run

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples" / "own_policy"
README = (FOLDER / "README.md").read_text()
MINE = FOLDER / "mine.py"


def test_the_readme_is_true() -> None:
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.S | re.M)
    assert len(blocks) == 3
    for block in blocks:
        command, *shown = block.splitlines()
        assert command.startswith("$ ")
        done = run(command[2:], ROOT)
        assert done.returncode == 0, done.stderr
        assert fits(shown, done.stdout.splitlines()), done.stdout


def test_the_python_of_the_readme() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "protected-heads:heads=4" in done.stdout


def test_by_file_and_class(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    policies = f"{MINE}:ProtectedHeads,{MINE}:protected-heads:heads=2,{MINE}+second-touch"
    done = kvtrace_cli("replay", thrash, "--policy", policies, "--capacity", "100", "--csv")
    assert done.code == 0, done.err
    names = [row["policy"] for row in csv.DictReader(io.StringIO(done.out))]
    assert names == ["protected-heads", "protected-heads:heads=2", "protected-heads+second-touch"]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (f"{MINE}:Nobody", "where NAME is one of protected-heads"),
        (f"{MINE}:ProtectedHeads:heads=-1", "heads=-1 must be 0 or more"),
        (f"{MINE}:ProtectedHeads:tails=1", "no parameter 'tails'; its parameters are heads"),
        (f"{FOLDER}/yours.py:ProtectedHeads", "cannot read the policy file"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    kvtrace_cli: Callable[..., Any], thrash: Path, policy: str, message: str
) -> None:
    done = kvtrace_cli("replay", thrash, "--policy", policy, "--capacity", "100")
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


class SlowProtectedHeads(SlowPolicy):
    def __init__(self, is_head: set[int]) -> None:
        self.is_head = is_head
        self.idle: list[int] = []

    def insert(self, key: int, now: int) -> None:
        self.idle.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if not pinned:
            self.idle.remove(key)
            self.idle.append(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = next((block for block in self.idle if block not in self.is_head), self.idle[0])
        self.idle.remove(victim)
        return victim

    def pin(self, key: int) -> None:
        self.idle.remove(key)

    def unpin(self, key: int) -> None:
        self.idle.append(key)


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_it_evicts_heads_last(semantics: str) -> None:
    import random

    rng = random.Random(semantics)
    evictions = 0
    for _ in range(300):
        workload, largest = random_workload(rng)
        refs = workload.identities if semantics == "prefix" or workload.raw is None else workload.raw
        heads = {int(refs[at]) for start, stop in zip(workload.indptr, workload.indptr[1:], strict=False)
                 for at in range(start, min(stop, start + 2))}  # fmt: skip
        capacity = largest + rng.randint(0, 6)
        expected = run_slow(workload, lambda _, heads=heads: SlowProtectedHeads(heads), capacity, semantics)
        (row,) = replay(workload, f"{MINE}:ProtectedHeads:heads=2", capacity, semantics)
        assert (row["block_hits"], row["evictions"]) == (sum(expected.hits), expected.evictions)
        evictions += expected.evictions
    assert evictions > 300
