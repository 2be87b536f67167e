"""`kvtrace simulate` with a clock: arrivals at times, rates, imports, and what it says of latency."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import kvtrace
from kvtrace_replay.schedulers.arrivals import at_rate
from kvtrace_replay.schedulers.latencies import request_times, summary, weighted_quantile
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_traces.errors import UsageError

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "mooncake_small.jsonl"
SAMPLES = ROOT / "traces" / "samples"


@pytest.fixture(scope="module")
def chat() -> Path:
    return SAMPLES / "chat.kvt"


@pytest.fixture(scope="module")
def source(chat: Path) -> Any:
    return recorded(kvtrace.open(chat).reader)


def row_of(done: Any) -> dict[str, Any]:
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    return dict(row)


def test_the_row_is_made_of_its_requests(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    """And the trace that -o writes tells the same latencies."""
    out, each = tmp_path / "timed.kvt", tmp_path / "r.parquet"
    row = row_of(kvtrace_cli("simulate", chat, "--arrivals", "time", "--json", "-o", out, "--per-request", each))
    told = pl.read_parquet(each)
    for name in ("ttft", "e2e", "queue"):
        assert row[f"{name}_mean_s"] == pytest.approx(told[f"{name}_s"].mean())
        for share in (50, 90, 99):
            assert row[f"{name}_p{share}_s"] == told[f"{name}_s"].quantile(share / 100, "higher")
    assert row["output_tokens_per_s"] == pytest.approx(told["output_tokens"].sum() / row["duration_s"])
    assert row["duration_s"] == pytest.approx((told["arrival_s"] + told["e2e_s"]).max() - told["arrival_s"].min())
    assert kvtrace_cli("verify", out).code == 0
    seen = kvtrace.open(out).sql("SELECT request, ttft_ns / 1e9 AS ttft_s, queue_ns / 1e9 AS queue_s FROM latencies")
    both = told.join(seen, on="request", suffix="_seen")
    assert both.height == told.height
    for name in ("ttft_s", "queue_s"):
        assert np.abs(both[name] - both[f"{name}_seen"]).max() < 1e-5


def test_recorded_times_come_out_again(kvtrace_cli: Callable[..., Any], chat: Path) -> None:
    """With costs learnt from it, a run at its own setting and times takes about as long as it took."""
    row = row_of(kvtrace_cli("simulate", chat, "--arrivals", "time", "--json"))
    steps = kvtrace.open(chat).steps
    took = (steps["end_ns"].max() - steps["start_ns"].min()) / 1e9
    assert row["duration_s"] == pytest.approx(took, rel=0.1)
    assert (row["exact"], row["why"]) == (False, "timing-model")


def test_rates(source: Any) -> None:
    twice = at_rate(source, "x2")
    assert np.abs(twice.due_ns * 2 - source.due_ns).max() <= 1
    poisson = at_rate(source, "8/s", seed=3)
    assert (np.argsort(poisson.due_ns, kind="stable") == np.argsort(source.due_ns, kind="stable")).all()
    assert np.array_equal(poisson.due_ns, at_rate(source, 8, seed=3).due_ns)
    assert not np.array_equal(poisson.due_ns, at_rate(source, 8, seed=4).due_ns)
    many = np.mean([np.diff(np.sort(at_rate(source, 8, seed=seed).due_ns)).mean() for seed in range(200)])
    assert many == pytest.approx(1e9 / 8, rel=0.05)
    for wrong in ("x0", "-1", "two", "x2/s", "nan", ""):
        with pytest.raises(UsageError, match="--rate"):
            at_rate(source, wrong)


def test_a_list_of_rates_is_a_column(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    done = kvtrace_cli("simulate", chat, "--rate", "x1,x4", "--json", "--per-request", out)
    rows = json.loads(done.out)
    assert [row["rate"] for row in rows] == ["x1", "x4"]
    assert {row["arrivals"] for row in rows} == {"time"}
    assert rows[0]["ttft_p50_s"] < rows[1]["ttft_p50_s"]
    assert pl.read_csv(out)["rate"].unique(maintain_order=True).to_list() == ["x1", "x4"]
    again = kvtrace.simulate(chat, rate=["x1", "x4"])
    assert again["ttft_p50_s"].to_list() == [row["ttft_p50_s"] for row in rows]


def test_imports(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    made = tmp_path / "small.kvt"
    assert kvtrace_cli("import", "mooncake", EXAMPLE, "-o", made).code == 0
    args = ("simulate", made, "--num-blocks", "500", "--json")
    bare = row_of(kvtrace_cli(*args))
    assert (bare["arrivals"], bare["duration_s"], bare["why"]) == ("all", None, "no-engine")
    assert (bare["max_num_seqs"], bare["async_scheduling"], bare["prefix_caching"]) == (256, True, True)
    timed = row_of(kvtrace_cli(*args, "--arrivals", "time", "--timing", "h100:llama-3.1-8b"))
    assert timed["ttft_p50_s"] > 0
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    assert timed["duration_s"] >= (lines[-1]["timestamp"] - lines[0]["timestamp"]) / 1000
    # An unbounded cache hits what an earlier prompt left, its last token's block never.
    seen: set[int] = set()
    hits = 0
    for line in lines:
        ids = line["hash_ids"][: line["input_length"] // 512]
        most = (line["input_length"] - 1) // 512
        found = 0
        while found < min(most, len(ids)) and ids[found] in seen:
            found += 1
        hits += found * 512
        seen.update(ids)
    large = ("--num-blocks", "100k", "--max-num-seqs", "1", "--max-num-batched-tokens", "100k")
    assert row_of(kvtrace_cli("simulate", made, *large, "--json"))["hit_tokens"] == hits
    out = tmp_path / "run.kvt"
    assert kvtrace_cli(*args, "-o", out).code == 0
    assert kvtrace_cli("verify", out).code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "an import has no cache of its own: give --num-blocks"),
        ("--num-blocks 500 --arrivals step", 2, "is an import and has no steps; choose all or time"),
        ("--num-blocks 500 --arrivals time", 1, "--timing"),
        ("--num-blocks 500 --block-size 16", 2, "granule of 512"),
        ("--num-blocks 3", 2, "can never serve request"),
    ],
)
def test_what_an_import_cannot(
    words: str, code: int, message: str, kvtrace_cli: Callable[..., Any], tmp_path: Path
) -> None:
    made = tmp_path / "small.kvt"
    assert kvtrace_cli("import", "mooncake", EXAMPLE, "-o", made).code == 0
    done = kvtrace_cli("simulate", made, *words.split(), KVTRACE_DEBUG="")
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert done.err.count("\n") <= 2


def test_the_old_engine_in_time(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    each = tmp_path / "r.parquet"
    done = kvtrace_cli(
        "simulate", thrash, "--engine", "vllm-v0", "--preemption", "recompute,swap,hybrid", "--timing",
        "a100-40gb:llama-2-7b", "--json", "--per-request", each,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["preemption"]: row for row in json.loads(done.out)}
    assert rows["recompute"]["recomputes"] > 0 == rows["recompute"]["swaps"]
    assert rows["swap"]["swaps"] > 0
    told = pl.read_parquet(each)
    for name, row in rows.items():
        mine = told.filter(pl.col("preemption") == name)
        assert row["ttft_mean_s"] == pytest.approx(mine["ttft_s"].mean())
        assert row["itl_mean_s"] > 0
    page = kvtrace_cli("simulate", thrash, "--engine", "vllm-v0", "--preemption", "swap", "--timing", "none")
    assert page.code == 0
    slow = kvtrace.simulate(thrash, "vllm-v0", preemption="swap", timing="a100-40gb:llama-2-7b", overlap=1.0)
    assert slow["duration_s"][0] <= rows["swap"]["duration_s"]


def test_quantiles_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        values = rng.integers(0, 9, rng.integers(1, 12)).astype(float)
        weights = rng.integers(1, 5, values.size)
        all_of_them = np.sort(np.repeat(values, weights))
        for share in (0.01, 0.5, 0.9, 0.99, 1.0):
            at = max(int(np.ceil(share * all_of_them.size - 1e-9)) - 1, 0)
            assert weighted_quantile(values, weights, share) == all_of_them[at]
    assert weighted_quantile(np.zeros(0), np.zeros(0, np.int64), 0.5) is None


def test_requests_that_never_were() -> None:
    times = np.array([[0, 10, 20, 50], [5, -1, -1, -1]], np.int64)
    told = request_times(times, np.array([4, 0]))
    assert told["itl_s"].tolist()[0] == pytest.approx(1e-8)
    assert np.isnan([told[name][1] for name in ("queue_s", "ttft_s", "itl_s", "e2e_s")]).all()
    row = summary(times, np.array([[10, 3]]), 50, 7, np.array([4, 0]))
    assert row["ttft_p99_s"] == 2e-8
    assert row["total_tokens_per_s"] == pytest.approx(11 / 50e-9)


def test_host_memory_beside_recomputation(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    args = ("--preemption", "recompute,offload", "--cpu-offload", "100,2000", "--offload-policy", "lru,arc")
    done = kvtrace_cli("simulate", thrash, *args, "--json", "--per-request", tmp_path / "r.parquet")
    assert done.code == 0, done.err
    plain, *tiers = json.loads(done.out)
    assert (plain["preemption"], plain["cpu_offload_blocks"], plain["loaded_tokens"]) == ("recompute", None, None)
    asked = [(row["preemption"], row["cpu_offload_blocks"], row["offload_policy"]) for row in tiers]
    assert asked == [("offload", blocks, policy) for blocks in (100, 2000) for policy in ("lru", "arc")]
    assert all("transfer-time" in row["why"] and row["duration_s"] is None for row in tiers)
    small, large = tiers[0], tiers[2]
    assert 0 < small["loaded_tokens"] < large["loaded_tokens"]
    assert large["tier_evictions"] == 0 < small["tier_evictions"]
    told = pl.read_parquet(tmp_path / "r.parquet").filter(
        (pl.col("cpu_offload_blocks") == 2000) & (pl.col("offload_policy") == "lru")
    )
    assert told["loaded_blocks"].sum() == large["loaded_blocks"]
    assert told["preemptions"].sum() == large["preemptions"]
    own = kvtrace.simulate(thrash, preemption="offload", cpu_offload=2000)
    assert own["loaded_tokens"].to_list() == [large["loaded_tokens"]]
