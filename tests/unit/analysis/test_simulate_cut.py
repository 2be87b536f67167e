"""`simulate` on cuts: from the snapshot on, at the trace's own settings and at others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace.simulations import simulate_trace, write_trace
from kvtrace_replay.pool import uncached_first
from kvtrace_replay.verify import verify
from kvtrace_traces import cut, open_trace
from kvtrace_traces.cut import follower
from kvtrace_traces.errors import KvtraceError, UsageError

FIRST = 300
TABLES = ("steps", "step_requests", "lookups", "preemptions", "block_events")


def made(source: Path, folder: Path, first: int = FIRST) -> Path:
    whole, path = open_trace(source), folder / f"{source.stem}-{first}.kvt"
    with path.open("wb") as file:
        cut.cut_steps(whole, file, first, None, uncached_first=uncached_first(whole.header))
    return path


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut that sees every request end."""
    from kvtrace import samples

    return made(samples.path("thrash"), tmp_path_factory.mktemp("cut"))


def test_rows_count_from_the_cut_on(end: Path) -> None:
    row = kvtrace.simulate(end, timing="none").row(0, named=True)
    trace = open_trace(end)
    lookups = trace.lookups
    assert row["exact"] is True
    assert row["requests"] == trace.requests.height
    assert row["steps"] == trace.steps.height
    assert row["preemptions"] == trace.preemptions.height
    assert row["evictions"] == trace.block_events.filter(pl.col("kind") == "evict").height
    assert (row["hit_tokens"], row["lookup_tokens"]) == (lookups["tokens_hit"].sum(), lookups["tokens_asked"].sum())


def test_requests_are_told_as_the_trace_tells_them(end: Path) -> None:
    told = simulate_trace(kvtrace.open(end), {}, timing="none").per_request()
    trace = open_trace(end)
    assert trace.snapshot() is not None
    for name in ("cached_tokens", "preemptions", "first_step", "last_step", "finish_step", "output_tokens"):
        assert told[name].to_list() == trace.requests[name].to_list(), name
    assert told["first_step"].null_count() > 5


def test_latencies_from_before_the_cut_are_not_told(end: Path) -> None:
    simulated = simulate_trace(kvtrace.open(end), {}, timing="a100-80gb:llama-3.1-8b")
    told = simulated.per_request()
    begun = open_trace(end).snapshot()
    assert begun is not None
    carried = len(begun.live)
    for name in ("ttft_s", "queue_s", "e2e_s", "itl_s"):
        assert told[name].head(carried).null_count() == carried
        assert told[name].slice(carried).null_count() == 0
    (row,) = simulated.frame().rows(named=True)
    assert row["duration_s"] > 0
    generated = sum(told["output_tokens"]) - sum(
        live.tokens - told["prompt_tokens"][live.request] for live in begun.live
    )
    assert row["output_tokens_per_s"] * row["duration_s"] == pytest.approx(generated)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_blocks": 260}, {"num_blocks": 197}, {"max_num_seqs": 4}, {"max_num_batched_tokens": 300},
     {"scheduling_policy": "priority"}, {"async_scheduling": True}, {"watermark": 0.1}, {"policy": "lru"}],
)  # fmt: skip
def test_a_run_from_a_cut_is_a_trace_with_a_snapshot(end: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    simulated = simulate_trace(kvtrace.open(end), settings, timing="none")
    write_trace(simulated, tmp_path / "out.kvt")
    out = open_trace(tmp_path / "out.kvt")
    assert out.snapshot() is not None
    checks = {check["name"]: check for check in verify(out)["checks"]}
    assert [check for check in checks.values() if check["mismatches"]] == []
    assert (checks["simulation"]["skipped"] is None) == ("policy" not in settings)
    assert checks["longest hit"]["checked"] > 50
    assert ("carried-state" in simulated.cells[0][1].why) == bool(settings)
    if not settings:
        for table in TABLES:
            mine, theirs = getattr(out, table), getattr(open_trace(end), table)
            kept = [name for name in mine.columns if not name.endswith("_ns") and name != "identity"]
            assert mine.select(kept).rows() == theirs.select(kept).rows(), table


def test_what_is_not_taken_over_is_refused_by_name(end: Path) -> None:
    trace = kvtrace.open(end)
    for settings, said in [
        ({"block_size": 64}, "--block-size 64: this trace begins with a run under way in blocks of 32"),
        ({"prefix_caching": False}, "--no-prefix-caching: this trace begins with a run under way with it"),
        ({"num_blocks": 120}, "requests hold 193 blocks where this trace begins, so --num-blocks must be at least 194"),
    ]:
        with pytest.raises(UsageError, match=said):
            simulate_trace(trace, settings, timing="none")
    rows = kvtrace.simulate(end, num_blocks=[120, 200], timing="none")
    assert rows["why"][0].startswith("--num-blocks 120: requests hold 193 blocks")
    assert rows["steps"].is_null().to_list() == [True, False]
    with pytest.raises(KvtraceError, match="begins with a run under way"):
        kvtrace.simulate(end, preemption="offload", cpu_offload=1000, timing="none")
    with pytest.raises(KvtraceError, match="begins with a run under way"):
        kvtrace.simulate(end, "vllm-v0")


def test_the_least_number_of_blocks_is_the_one_that_is_named(end: Path) -> None:
    assert kvtrace.simulate(end, num_blocks=194, timing="none")["steps"][0] > 0
    with pytest.raises(UsageError, match="at least 194"):
        kvtrace.simulate(end, num_blocks=193, timing="none")


def test_later_requests_come_as_long_after_the_first_call_as_they_did(end: Path) -> None:
    from kvtrace_replay.schedulers.recorded import recorded

    source = recorded(open_trace(end), carried=True)
    assert source.start is not None
    carried, trace = source.start.n_requests, open_trace(end)
    assert not source.due_ns[:carried].any()
    seen = (trace.requests["arrival_ns"] - trace.steps["start_ns"][0]).to_numpy()
    assert (source.due_ns[carried:] <= seen[carried:]).all()
    assert (source.due_ns[carried:] == seen[carried:]).any()
    rows = kvtrace.simulate(end, arrivals="time", rate=["x1", "x0.01", "50"], timing="a100-80gb:llama-3.1-8b")
    assert rows["duration_s"][1] > rows["duration_s"][0] > 0


def test_a_cut_of_an_older_format_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtrace import samples

    original = follower.live_words
    monkeypatch.setattr(follower, "live_words", lambda live: original([one._replace(tokens=None) for one in live]))
    old = made(samples.path("thrash"), tmp_path)
    with pytest.raises(KvtraceError, match=r"cut by an older kvtrace.*cut it anew"):
        kvtrace.simulate(old, timing="none")
    checks = {check["name"]: check for check in verify(open_trace(old))["checks"]}
    assert "older kvtrace" in checks["simulation"]["skipped"]
    assert all(check["mismatches"] == 0 for check in checks.values())
