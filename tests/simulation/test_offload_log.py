"""A simulated run with a tier, written as a trace: what is read from it is what happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v1.offload import log as log_module
from kvtrace_replay.schedulers.vllm_v1.offload.log import write_offload_run
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun
from kvtrace_replay.timing.costs import StepCosts, TransferCosts
from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace
from kvtrace_traces.errors import UsageError

from .cases import Case
from .kernel import NEVER, as_recorded, as_settings, by_arrival
from .kernel import in_words as trace_in_words
from .kernel_offload import as_tier, in_words
from .offload_cases import offload_case

BYTES = 4096
TIMED: dict[str, Any] = {"costs": StepCosts(100_000, 10, 1, 50, 2), "copies": TransferCosts(5, 40_000, 7, 90_000),
                         "step_rows": True}  # fmt: skip
#: Calls at one moment stand 1 ns after one another in a log, for its reader to know what was before what.
SLACK_NS = 200


def written(path: Path, seed: int, **options: Any) -> tuple[Case, OffloadRun, Any] | None:
    """A case's run, and the trace of it; None where the run never ends."""
    case, offload = offload_case(seed, None)
    source = as_recorded(case, 50_000)
    source.header["bytes_per_block"] = BYTES
    try:
        run = write_offload_run(path, source, as_settings(case.settings), as_tier(offload), **options)
    except UsageError:
        assert not path.exists()
        return None
    return case, run, open_trace(path)


def differences(case: Case, run: OffloadRun, trace: Any) -> list[str]:
    names = by_arrival(case)
    told, mine = trace_in_words(trace, names), in_words(case, run)
    events = [row for row in told["events"] if row[1] not in ("store", "load")]
    # Within one call, those that load come first in a trace.
    wrong = [name for name in ("lookups", "preemptions") if sorted(told[name]) != sorted(mine[name])]
    if events != mine["events"]:
        wrong.append("events")
    steps = [(sorted(s[0]), s[1], s[2], s[3], s[5]) for s in mine["steps"]]
    if [tuple(row) for row in told["steps"]] != steps:
        wrong.append("steps")
    requests = trace.requests.sort("request").select("first_step", "last_step", "finish_step", "preemptions").rows()
    if requests != [(r[0], r[1], r[2], r[4]) for r in (mine["requests"][name] for name in names)]:
        wrong.append("requests")
    found = trace.requests.sort("request").select("cached_tokens", "first_step").rows()
    for (cached, first), row in zip(found, (mine["requests"][name] for name in names), strict=True):
        # A request that was loaded for and then aborted has its lookup, and no step.
        if first is not None and cached != row[3]:
            wrong.append(f"cached tokens {cached} instead of {row[3]}")
    moved = trace.block_events.filter(trace.block_events["kind"].is_in(["store", "load"]))
    blocks = iter(moved["block"].to_list())
    columns = ("step", "kind", "request", "blocks", "tokens", "done_step", "bytes")
    transfers = [
        (step, kind, names[request], [next(blocks) for _ in range(many)], tokens or 0, done)
        for step, kind, request, many, tokens, done, size in trace.offloads.select(columns).rows()
        if size == many * BYTES
    ]
    if transfers != mine["transfers"]:
        wrong.append("transfers")
    hashes = trace.chains().hashes
    for request, identity in moved.select("request", "identity").rows():
        if identity is None or int(hashes[identity]) not in case.requests[names[request]].chain:
            wrong.append(f"a block of request {request} that is not of its chain")
            break
    return wrong


@pytest.mark.parametrize("how", [{}, TIMED, {**TIMED, "arrivals": "time"}], ids=["untimed", "timed", "by-time"])
def test_the_trace_tells_what_happened(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, moved = [], 0
    for seed in range(90):
        monkeypatch.setattr(log_module, "ROWS_AT_ONCE", 1 << 16 if seed % 2 else 40)
        done = written(tmp_path / f"{seed}.kvt", seed, **how)
        if done is None:
            continue
        case, run, trace = done
        assert trace.complete
        assert not trace.lossy
        lines += [f"seed {seed}: {line}" for line in differences(case, run, trace)]
        lines += [f"seed {seed}: {check['name']}: {check['first']}" for check in verify(trace)["checks"]
                  if check["mismatches"]]  # fmt: skip
        moved += len(run.transfers)
        assert trace.header["inexact"] == ["kv-connector"]
        if run.clock is None:
            continue
        if abs(trace.steps["end_ns"].to_numpy() - run.clock.steps[:, 1]).max(initial=0) > SLACK_NS:
            lines.append(f"seed {seed}: end_ns")
        for name, column in (("time_ns", 0), ("done_ns", 3)):
            if (
                len(run.transfers)
                and abs(trace.offloads[name].to_numpy() - run.transfer_ns[:, column]).max() > SLACK_NS
            ):
                lines.append(f"seed {seed}: {name}")
        if (trace.offloads["copy_ns"].to_numpy() != run.transfer_ns[:, 2] - run.transfer_ns[:, 1]).any():
            lines.append(f"seed {seed}: copy_ns")
        last = trace.requests.sort("request")["finish_ns"].to_numpy()
        ended = trace.requests.sort("request")["finish_reason"].cast(str).is_in(["stop", "length"]).to_numpy()
        if abs(last - run.clock.times[:, 3])[ended].max(initial=0) > SLACK_NS:
            lines.append(f"seed {seed}: finish_ns")
    assert not lines, "\n".join(lines)
    assert moved > 300


def test_requests_are_numbered_as_they_come(tmp_path: Path) -> None:
    """By time they may come in another order than they were recorded in."""
    case, offload = offload_case(5, False)
    source = as_recorded(case, 50_000)
    source = replace(source, due_ns=source.due_ns.max() - source.due_ns, abort_step=np.full(source.n_requests, NEVER))
    path = tmp_path / "run.kvt"
    run = write_offload_run(path, source, as_settings(case.settings), as_tier(offload), arrivals="time", **TIMED)
    trace = open_trace(path)
    assert not trace.lossy
    assert verify(trace)["mismatches"] == 0
    order = np.argsort(source.due_ns, kind="stable")
    told = trace.requests.sort("request")
    assert told["request_id"].to_list() == [source.request_id[int(i)] for i in order]
    assert told["first_step"].to_list() == run.requests[order, 0].tolist()
    assert told["prompt_tokens"].to_list() == source.prompt[order].tolist()
    chains, hashes = trace.chains(), source.hashes
    for number, request in enumerate(order):
        mine = chains.hashes[chains.identities[chains.indptr[number] : chains.indptr[number + 1]]]
        known = hashes[source.chain[source.chain_at[request] : source.chain_at[request + 1]]]
        assert mine[: len(known)].tolist() == known.tolist()


def test_nothing_is_overwritten_or_left(tmp_path: Path) -> None:
    path = tmp_path / "run.kvt"
    path.write_text("mine")
    case, offload = offload_case(5, False)
    with pytest.raises(UsageError, match="exists"):
        write_offload_run(path, as_recorded(case), as_settings(case.settings), as_tier(offload))
    assert path.read_text() == "mine"
