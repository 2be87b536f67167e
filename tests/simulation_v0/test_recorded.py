"""A recorded trace, served by vLLM 0.4.2's rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

import kvtrace
from kvtrace_replay.schedulers.imported import requests_reaching
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_replay.schedulers.vllm_v0.requests import requests_of
from kvtrace_replay.schedulers.vllm_v0.run import simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import settings_of
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_traces.errors import KvtraceError, UsageError

SAMPLE = Path(__file__).resolve().parents[2] / "traces" / "samples" / "thrash.kvt"
COSTS = StepCosts(100_000, prefill_token=1000, decode_row=1000, block_in=5000, block_out=5000)


@pytest.fixture(scope="module")
def source() -> Any:
    return recorded(kvtrace.open(SAMPLE))


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("arrivals", ["all", "step", "time"])
def test_all_that_was_recorded_is_served(source: Any, arrivals: str, preemption: str) -> None:
    settings = settings_of(source.header, preemption=preemption)
    run = simulate_v0(source, settings, arrivals=arrivals, costs=COSTS if arrivals == "time" else None)
    assert (run.ended, run.finished) == ("done", source.n_requests)
    assert (run.tokens == source.stop).all()
    assert run.output_tokens == int((source.stop - source.prompt).sum())
    assert (run.recomputes > 0) == (preemption == "recompute")
    assert (run.swaps > 0) == (preemption == "swap")
    assert (run.duration_ns is None) == (arrivals != "time")


def test_time_needs_costs(source: Any) -> None:
    with pytest.raises(UsageError, match="--arrivals time"):
        simulate_v0(source, settings_of(source.header), arrivals="time")
    with pytest.raises(UsageError, match="--arrivals never"):
        simulate_v0(source, settings_of(source.header), arrivals="never")


def test_aborts_and_lengths(source: Any) -> None:
    steps = np.full(source.n_requests, -2, np.int32)
    steps[:3] = [-1, 0, 7]
    most = source.most.copy()
    stop = source.stop.copy()
    stop[4], most[4] = 2048, 9999  # the model's length ended it
    stop[5] = source.prompt[5]  # it had no output
    changed = replace(source, abort_step=steps, abort_ns=source.arrival_ns + 1_000_000, stop=stop, most=most)
    told = requests_of(changed, "step")
    assert told.abort is not None
    assert told.abort.tolist()[:4] == [0, 1, 8, -1]
    assert told.output[4] == 9999 - source.prompt[4]
    assert told.output[5] == 1
    timed = requests_of(changed, "time")
    assert timed.abort is not None
    assert timed.arrival is not None
    assert (timed.abort - timed.arrival)[:3].tolist() == [1_000_000] * 3
    assert timed.abort[3] == -1
    assert timed.arrival.min() == 0


def test_lengths_alone(source: Any) -> None:
    """As an import has them: without steps and chains."""
    table = kvtrace.open(SAMPLE).requests
    header = {**source.header, "source": "import", "reuse_known": False}

    def of(requests: pl.DataFrame, timed: bool = False) -> Any:
        trace = SimpleNamespace(path="lengths.kvt", requests=requests, engines=[header])
        return requests_reaching(trace, 0, "time" if timed else "all", shares=False)

    settings = settings_of(source.header, preemption="swap")
    run = simulate_v0(of(table), settings)
    assert (run.told[:, :7] == simulate_v0(source, settings).told[:, :7]).all()
    timed = simulate_v0(of(table, True), settings, arrivals="time", costs=COSTS)
    assert (timed.ended, timed.finished) == ("done", len(table))
    assert (timed.request_columns()["first_token_ns"] > of(table, True).due_ns).all()
    with pytest.raises(UsageError, match="--arrivals step"):
        requests_reaching(SimpleNamespace(path="lengths.kvt", requests=table, engines=[header]), 0, "step")
    with pytest.raises(KvtraceError, match="has lengths and no blocks"):
        requests_reaching(SimpleNamespace(path="lengths.kvt", requests=table, engines=[header]), 0, "all")
    for column, timed_too in (("output_tokens", False), ("arrival_ns", True)):
        at = pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(pl.col(column)).alias(column)
        with pytest.raises(KvtraceError, match=f"request 3 of lengths.kvt has no {column}"):
            of(table.with_columns(at), timed_too)
    assert of(table.clear(), True).prompt.size == 0
