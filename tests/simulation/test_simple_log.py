"""A simulated run with the simple connector, written as a trace: what is read from it is what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtrace_replay.schedulers.vllm_v1.offload import log as log_module
from kvtrace_replay.schedulers.vllm_v1.offload.log import write_offload_run
from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace
from kvtrace_traces.errors import UsageError

from .kernel import as_recorded, as_settings, by_arrival
from .kernel import in_words as trace_in_words
from .kernel_simple import as_tier, in_words
from .offload_cases import offload_case, simple_case
from .test_offload_log import BYTES, TIMED


@pytest.mark.parametrize("how", [{}, {**TIMED, "arrivals": "time"}], ids=["untimed", "by-time"])
def test_the_trace_tells_what_happened(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event, step, lookup, preemption and transfer, whose request is null where it is nobody's."""
    lines, moved = [], 0
    for seed in range(40):
        monkeypatch.setattr(log_module, "ROWS_AT_ONCE", 1 << 16 if seed % 3 else 40)
        case, _ = offload_case(seed, None)
        simple, path = simple_case(seed, bool(seed % 2)), tmp_path / f"{seed}.kvt"
        source = as_recorded(case, 50_000)
        source.header["bytes_per_block"] = BYTES
        try:
            run = write_offload_run(path, source, as_settings(case.settings), as_tier(simple), **how)
        except UsageError:
            continue
        trace, names, mine = open_trace(path), by_arrival(case), in_words(case, run)
        told = trace_in_words(trace, names)
        told["events"] = [row for row in told["events"] if row[1] not in ("store", "load")]
        # Within one call, those that load come first in a trace.
        wrong = [name for name in ("lookups", "preemptions") if sorted(told[name]) != sorted(mine[name])]
        wrong += ["events"] if told["events"] != mine["events"] else []
        steps = [(sorted(s[0]), s[1], s[2], s[3], s[5]) for s in mine["steps"]]
        wrong += ["steps"] if [tuple(row) for row in told["steps"]] != steps else []
        kinds = trace.block_events["kind"].is_in(["store", "load"])
        blocks = iter(trace.block_events.filter(kinds)["block"].to_list())
        columns = ("step", "kind", "request", "blocks", "tokens", "done_step", "bytes")
        transfers = [
            (step, kind, None if request is None else names[request], [next(blocks) for _ in range(many)], tokens or 0,
             done)
            for step, kind, request, many, tokens, done, size in trace.offloads.select(columns).rows()
            if size == many * BYTES
        ]  # fmt: skip
        wrong += ["transfers"] if transfers != mine["transfers"] else []
        wrong += [check["name"] for check in verify(trace)["checks"] if check["mismatches"]]
        wrong += [] if trace.complete and not trace.lossy else ["complete"]
        lines += [f"seed {seed}: {name}" for name in wrong]
        assert trace.header["inexact"] == ["kv-connector"]
        header = trace.header["offload"]
        if case.settings.prefix_caching:
            assert header["connector"] == "SimpleCPUOffloadConnector"
            assert (header["lazy_offload"], header["chunks"]) == (simple.lazy, simple.chunks)
        else:
            assert header is None
        moved += len(run.transfers)
    assert not lines, "\n".join(lines)
    assert moved > 200
