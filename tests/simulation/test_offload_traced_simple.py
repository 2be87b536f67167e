"""What the tracer records of SimpleCPUOffloadConnector beside vLLM's own scheduler, on random cases."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvtrace_traces import open_trace

from .judge import Endless
from .judge_simple import SimpleJudgeProcess
from .offload_cases import offload_case
from .test_offload_traced import wrong
from .twin_simple import Simple

pytestmark = pytest.mark.engine

SEEDS = 60


def simple_case(seed: int, lazy: bool, asynchronous: bool) -> Simple:
    """The connector's settings for case number `seed`."""
    r = random.Random(f"simple {seed}")
    return Simple(
        chunks=r.choice([1, 2, 4, 8, 16, 16, 40, 40, 200]),
        lazy=lazy,
        polls=r.choice([0, 0, 0, 1, 1, 2, 4]),
        resets=() if asynchronous or r.random() < 0.7 else tuple(sorted(r.sample(range(60), 3))),
    )


def misnamed(trace: Any) -> tuple[list[str], int]:
    """Blocks that, loaded, were not given the identity with which the trace has them loaded; and how many were."""
    loaded: dict[int, int] = {}
    found, right = [], 0
    for kind, block, identity in trace.block_events.select("kind", "block", "identity").iter_rows():
        if kind == "load":
            loaded[block] = identity
        elif kind == "allocate":
            loaded.pop(block, None)
        elif kind == "fill" and block in loaded:
            expected = loaded.pop(block)
            right += expected == identity
            if expected != identity:
                found.append(f"block {block} loaded as {expected}, filled as {identity}")
    return found, right


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_traces_of_random_runs(asynchronous: bool, lazy: bool, tiny_model: Path, tmp_path: Path) -> None:
    """Each transfer with its request, blocks, tokens, first and last step; lookups, and cached tokens with loads."""
    lines: list[str] = []
    seen: Counter[str] = Counter()
    with SimpleJudgeProcess() as judge:
        for seed in range(SEEDS):
            case, _ = offload_case(seed, asynchronous)
            if not case.settings.prefix_caching or len({one.request_id for one in case.requests}) < len(case.requests):
                continue
            offload = simple_case(seed, lazy, asynchronous)
            folder = tmp_path / str(seed)
            try:
                run = judge.offloaded(case, offload, str(tiny_model), str(folder))
            except Endless:
                seen["endless"] += 1
                continue
            trace = open_trace(folder)
            others, same = misnamed(trace)
            lines += [f"seed {seed}: {line}" for line in [*wrong(trace, case, run), *others]]
            seen["same"] += same
            seen.update({"cases": 1, "evicted": run.evicted, "preemptions": len(run.preemptions), **run.kinds})
            for _, kind, _, blocks, _, done in run.transfers:
                seen.update({kind: len(blocks), "transfers": 1, "late": done is None})
    assert not lines, "\n".join(lines)
    # With too little room on the host a lazy connector can keep a large request out for good.
    assert seen["cases"] > 50
    assert seen["endless"] < 3
    assert min(seen[name] for name in ("evicted", "preemptions", "store", "load", "same")) > 50, seen
    stores = ("none",) if lazy else ("running", "finished")
    assert {name for name in ("running", "finished", "none") if seen[name]} == set(stores), seen
    assert asynchronous or seen["reset"] > 5, seen
    assert (seen["late"] > 0) == lazy, seen
