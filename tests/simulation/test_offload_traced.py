"""What the tracer records of the connector beside vLLM's own scheduler, sync and async, on random cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace

from .cases import Case
from .judge import Endless
from .judge_offload import OffloadJudgeProcess
from .offload_cases import offload_case
from .twin_offload_words import OffloadRun

pytestmark = pytest.mark.engine
SEEDS = 60


def wrong(trace: Any, case: Case, run: OffloadRun) -> list[str]:
    """The differences between a trace and what the judge wrote down."""
    found = [f"verify: {check['name']}: {check['first']}" for check in verify(trace)["checks"] if check["mismatches"]]
    if not trace.complete:
        found.append(f"incomplete: {trace.warnings}")
    numbers = {one.request_id: number for number, one in enumerate(case.requests)}
    names = [numbers[name] for name in trace.requests.sort("request")["request_id"]]
    columns = ("step", "kind", "request", "blocks", "tokens", "done_step")
    moved = trace.block_events.filter(trace.block_events["kind"].is_in(["store", "load"]))
    blocks = iter(moved.select("block", "identity").rows())
    mine = []
    for step, kind, request, many, tokens, done in trace.offloads.select(columns).rows():
        told = [next(blocks) for _ in range(many)]
        if any(identity is None for _, identity in told):
            found.append(f"a block without identity in step {step}")
        whose = None if request is None else names[request]
        mine.append((step, kind, whose, [block for block, _ in told], tokens or 0, done))
    if mine != run.transfers:
        at = next((i for i, (a, b) in enumerate(zip(mine, run.transfers, strict=False)) if a != b), -1)
        found.append(f"transfer {at}: {mine[at : at + 1]} instead of {run.transfers[at : at + 1]}")
    lookup = ("step", "request", "tokens_asked", "tokens_hit", "after_preemption")
    looked = sorted((s, names[r], *rest) for s, r, *rest in trace.lookups.select(lookup).rows())
    if looked != sorted(run.lookups):
        found.append("lookups differ")
    cached = dict(trace.requests.select("request", "cached_tokens", "first_step").rows_by_key("request", unique=True))
    for request, (tokens, first) in cached.items():
        row = run.requests[names[request]]
        # Of one that was aborted while it was loaded, vLLM tells nothing.
        if first is not None and (tokens, first) != (row[3], row[0]):
            found.append(f"request {request}: cached {tokens}, first step {first}: {row}")
    return found


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_traces_of_random_runs(asynchronous: bool, tiny_model: Path, tmp_path: Path) -> None:
    """Each transfer with its request, blocks, tokens, first and last step; lookups, and cached tokens with loads."""
    lines, moved = [], {"store": 0, "load": 0}
    with OffloadJudgeProcess() as judge:
        for seed in range(SEEDS):
            case, offload = offload_case(seed, asynchronous)
            if not case.settings.prefix_caching or len({one.request_id for one in case.requests}) < len(case.requests):
                continue
            folder = tmp_path / str(seed)
            try:
                run = judge.offloaded(case, offload, str(tiny_model), str(folder))
            except Endless:
                continue
            lines += [f"seed {seed}: {line}" for line in wrong(open_trace(folder), case, run)]
            for _, kind, _, blocks, _, _ in run.transfers:
                moved[kind] += len(blocks)
    assert not lines, "\n".join(lines)
    assert min(moved.values()) > 100, moved
