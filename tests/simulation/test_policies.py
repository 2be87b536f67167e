"""Eviction policies in the engine's own pool: the compiled scheduler does what its slow twin does with a plain pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_replay.schedulers.settings import own_settings
from kvtrace_replay.schedulers.sweep import policy_called
from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace
from kvtrace_traces.errors import UsageError

from . import twin, twin_words
from .cases import random_case
from .kernel import kernel_run, twin_in_words
from .twin_pool import Pool

CASES = range(60_000, 60_060)
SAMPLE = Path(__file__).parents[2] / "traces" / "samples" / "thrash.kvt"


class PolicyPool(Pool):
    """A pool whose victims a policy chooses: blank blocks first, then the identity that `rank` puts first.

    `fifo`: the identity cached longest ago; `lru`: the one whose last user left longest ago. An identity is in use
    while some block that holds it is; of several blocks with it one is kept.
    """

    policy = "lru"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.order: list[int] = []  # identities: by insertion (fifo), or by the end of their last use (lru)

    def take(self, request: int, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            blank = next((block for block in self.free if self.identity[block] is None), None)
            if blank is None:
                victim = next(i for i in self.order if self._idle(i))
                self.order.remove(victim)
                (blank,) = self.cached.pop(victim)
                self.emit("evict", request, blank, victim)
                self.identity[blank] = None
            del self.free[blank]
            self.references[blank] = 1
            self.emit("allocate", request, blank, None)
            taken.append(blank)
        return taken

    def fill(self, request: int, block: int, identity: int) -> None:
        holders = self.cached.setdefault(identity, [])
        if holders and self._idle(identity):
            (idle,) = holders
            self._drop(idle)
            self.free.move_to_end(idle, last=False)
        elif not holders and self.policy == "fifo":
            self.order.append(identity)
        super().fill(request, block, identity)

    def give_up(self, request: int, table: Sequence[int]) -> None:
        front: list[int] = []
        for block in reversed(table):
            identity = self.identity[block]
            self.references[block] -= 1
            self.emit("free", request, block, identity)
            if self.references[block] > 0:
                continue
            self.free[block] = None
            if identity is not None and self.cached[identity] == [block]:
                if self.policy == "lru":
                    if identity in self.order:
                        self.order.remove(identity)
                    self.order.append(identity)
                continue
            if identity is not None:
                self._drop(block)
            if self.uncached_first:
                front.append(block)
        for block in reversed(front):
            self.free.move_to_end(block, last=False)

    def _idle(self, identity: int) -> bool:
        return all(self.references[block] == 0 for block in self.cached[identity])

    def _drop(self, block: int) -> None:
        identity = self.identity[block]
        assert identity is not None
        self.cached[identity].remove(block)
        self.identity[block] = None
        self.emit("evict", -1, block, identity)


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """A run without who caused an eviction, which the log does not say where a block is not handed out at once, and
    with its events sorted: the log has the fills of an allocation after what else they bring about."""
    events = [(step, kind, None if kind == "evict" else request, *rest) for step, kind, request, *rest in run["events"]]
    return {**run, "events": sorted(events, key=repr)}


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_policy_drives_the_pool(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "Pool", PolicyPool)
    monkeypatch.setattr(PolicyPool, "policy", policy)
    evictions = duplicates = 0
    for seed in CASES:
        case = random_case(seed)
        try:
            theirs = twin_in_words(twin.simulate(case.requests, case.settings))
        except (twin_words.CannotFinish, ValueError):
            continue
        for fast in (True, False):
            mine = kernel_run(case, fast, policy=policy)
            assert comparable(mine) == comparable(theirs), f"case {seed}, fast={fast}"
        evictions += sum(event[1] == "evict" for event in theirs["events"])
        duplicates += sum(event[1] == "evict" and event[2] == -1 for event in theirs["events"])
    assert evictions > 100
    assert duplicates > 10


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_run_with_a_policy_is_a_trace_that_verifies(policy: str, tmp_path: Path) -> None:
    source = recorded(open_trace(SAMPLE))
    settings = own_settings(source.header).changed_to(num_blocks=150, policy=policy)
    run = write_run(tmp_path / "run.kvt", source, settings)
    trace = open_trace(tmp_path / "run.kvt")
    assert trace.block_events.filter(pl.col("kind") == "evict").height == run.evictions > 500
    skipped = [check["name"] for check in verify(trace)["checks"] if check["skipped"]]
    wrong = [check for check in verify(trace)["checks"] if check["mismatches"]]
    assert not wrong
    assert skipped == ["free queue order"]


def test_what_cannot_drive_it_is_refused() -> None:
    with pytest.raises(UsageError, match="references still to come"):
        policy_called("opt")
    with pytest.raises(UsageError, match="did you mean"):
        policy_called("fifoo")
    assert policy_called("VLLM") == "vllm"
