"""`kvtrace simulate --preemption offload` with a clock: what it says of requests, steps and copies, and its trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace_replay.timing.models import timing_for, with_link

TIER = ("--preemption", "offload", "--cpu-offload", "2000")


@pytest.mark.parametrize("arrivals", ["step", "time"])
def test_rows_requests_steps_and_trace_are_of_one_run(
    arrivals: str, kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path
) -> None:
    out, requests, steps = tmp_path / "o.kvt", tmp_path / "r.parquet", tmp_path / "s.parquet"
    done = kvtrace_cli(
        "simulate", thrash, *TIER, "--link", "1GB/s", "--arrivals", arrivals, "--json", "-o", out,
        "--per-request", requests, "--per-step", steps,
    )  # fmt: skip
    assert done.code == 0, done.err
    (row,), each, step = json.loads(done.out), pl.read_parquet(requests), pl.read_parquet(steps)
    assert row["why"] == {"step": "transfer-time", "time": "timing-model"}[arrivals]
    for name in ("ttft", "e2e", "queue"):
        assert row[f"{name}_mean_s"] == pytest.approx(each[f"{name}_s"].mean())
        assert row[f"{name}_p90_s"] == each[f"{name}_s"].quantile(0.9, "higher")
    assert row["output_tokens_per_s"] == pytest.approx(each["output_tokens"].sum() / row["duration_s"])
    assert step.height == row["steps"]
    assert step["evictions"].sum() <= row["evictions"]
    assert step["preempted"].sum() == each["preemptions"].sum() == row["preemptions"]
    # Bytes moved are blocks moved.
    size = kvtrace.open(thrash).reader.header["bytes_per_block"]
    for kind in ("stored", "loaded"):
        assert step[f"{kind}_blocks"].sum() == each[f"{kind}_blocks"].sum() == row[f"{kind}_blocks"] > 0
        assert step[f"{kind}_bytes"].sum() == row[f"{kind}_bytes"] == row[f"{kind}_blocks"] * size
    assert step["tier_blocks"].max() <= row["stored_blocks"]
    assert (step["end_ns"] > step["start_ns"]).all()
    assert step["prefill_tokens"].sum() < step["tokens"].sum()

    trace = kvtrace.open(out)
    moved = trace.offloads.group_by("kind").agg(pl.col("blocks", "bytes").sum())
    told = {str(kind): (blocks, size) for kind, blocks, size in moved.rows()}
    assert told == {
        kind: (row[f"{name}_blocks"], row[f"{name}_bytes"]) for kind, name in (("store", "stored"), ("load", "loaded"))
    }
    assert trace.offloads["done_ns"].null_count() == 0
    # A copy of a byte takes a nanosecond.
    assert (trace.offloads["copy_ns"] == trace.offloads["bytes"]).all()
    seen = trace.sql("SELECT request, ttft_ns / 1e9 AS ttft_s, queue_ns / 1e9 AS queue_s FROM latencies")
    both = each.join(seen, on="request", suffix="_seen")
    assert both.height == each.height
    assert (both["ttft_s"] - both["ttft_s_seen"]).abs().max() < 1e-5
    assert trace.steps.height == row["steps"]
    assert kvtrace_cli("verify", out).code == 0
    header = trace.reader.header
    assert header["offload"]["chunks"] == 2000
    assert header["inexact"] == ["kv-connector"]


def test_a_faster_link_serves_sooner(thrash: Path) -> None:
    """By time, the same requests with a link of three speeds; over the slowest a load takes longer than to compute."""
    rows = [
        kvtrace.simulate(thrash, preemption="offload", cpu_offload=2000, arrivals="time", link=link).row(0, named=True)
        for link in ("100GB/s", "1GB/s", "1MB/s")
    ]
    means = [row["ttft_mean_s"] for row in rows]
    assert means[0] <= means[1] < means[2]
    plain = kvtrace.simulate(thrash, arrivals="time").row(0, named=True)
    assert means[0] < plain["ttft_mean_s"] < means[2]


def test_a_profile_has_the_link(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    """In a file, or beside it: the same."""
    profile = with_link(timing_for(kvtrace.open(thrash).reader), "h100")
    profile.save(tmp_path / "p.toml")
    rows = []
    for given in (("--timing", tmp_path / "p.toml"), ("--link", "h100"), ("--link", tmp_path / "p.toml")):
        done = kvtrace_cli("simulate", thrash, *TIER, "--arrivals", "time", "--json", *given)
        assert done.code == 0, done.err
        rows.append({name: value for name, value in json.loads(done.out)[0].items() if name != "seconds"})
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["ttft_p50_s"] > 0


def test_rates(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, *TIER, "--link", "h100", "--rate", "x1,x4", "--json")
    assert done.code == 0, done.err
    once, four = json.loads(done.out)
    assert (once["rate"], four["rate"]) == ("x1", "x4")
    assert four["queue_mean_s"] > once["queue_mean_s"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--arrivals", "time"), 1, "--link GPU"),
        (("--timing", "NOLINK"), 1, "--link GPU"),
        (("--arrivals", "time", "--timing", "none"), 2, "--timing"),
        (("--timing", "none", "--link", "h100"), 2, "--timing none"),
        (("--link", "0GB/s"), 2, "more than 0"),
        (("--link", "fast"), 2, "there is no GPU 'fast'"),
        (("--link", "0.0000001MB/s", "--arrivals", "time"), 2, "more than the hour"),
        (("--link", "h100", "--num-blocks", "5"), 2, "--num-blocks 31 or more"),
        (("--link", "h100", "--cpu-offload", "16tok"), 2, "comes to 0 blocks"),
        (("--link", "h100", "--victim", "first"), 2, "--victim"),
        (("--link", "h100", "--rate", "x2", "--arrivals", "all"), 2, "--rate is of --arrivals time"),
        (("--link", "h100", "--engine", "sglang"), 2, "--engine sglang"),
    ],
)
def test_what_cannot_be(
    options: tuple[str, ...], code: int, words: str, kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.toml"
    timing_for(kvtrace.open(thrash).reader).save(bare)
    given = [str(bare) if option == "NOLINK" else option for option in options]
    done = kvtrace_cli("simulate", thrash, *TIER, *given)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if "error:" in line]
    assert len(errors) == 1


def test_a_grid_says_what_cannot_be(thrash: Path) -> None:
    found = kvtrace.simulate(
        thrash, preemption="offload", cpu_offload=["16tok", 2000], num_blocks=[5, 200], link="h100"
    )
    assert found["steps"].is_null().to_list() == [True, True, True, False]
    assert found["ttft_p50_s"].is_null().to_list() == [True, True, True, False]


def test_without_a_link_there_are_no_times(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    done = kvtrace_cli("simulate", thrash, *TIER, "--json", "--per-step", tmp_path / "s.parquet")
    assert json.loads(done.out)[0]["duration_s"] is None
    assert "--link GPU" in done.err
    assert "start_ns" not in pl.read_parquet(tmp_path / "s.parquet").columns
