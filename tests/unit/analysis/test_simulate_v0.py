"""`kvtrace simulate --engine vllm-v0`: the old engine on the command line and from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_replay.schedulers.vllm_v0.run import simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import settings_of

GRID = ("--engine", "vllm-v0", "--preemption", "recompute,swap", "--num-blocks", "60,200", "--swap-space", "1")


def test_a_grid_is_what_the_simulator_gives(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, *GRID, "--json")
    assert done.code == 0
    rows = json.loads(done.out)
    assert [(row["num_blocks"], row["preemption"]) for row in rows] == [
        (60, "recompute"), (60, "swap"), (200, "recompute"), (200, "swap"),
    ]  # fmt: skip
    source = recorded(kvtrace.open(thrash))
    for row in rows:
        chosen = settings_of(source.header, 1.0, num_gpu_blocks=row["num_blocks"], preemption=row["preemption"])
        run = simulate_v0(source, chosen)
        for name in ("steps", "recomputes", "swaps", "blocks_swapped_out", "recomputed_tokens", "finished", "ended"):
            assert row[name] == getattr(run, name)
        assert (row["engine"], row["exact"], row["why"], row["hit_tokens"]) == ("vllm-v0", False, "other-engine", None)
        assert row["preemptions"] == run.recomputes + run.swaps > 0
        assert row["num_cpu_blocks"] == chosen.num_cpu_blocks
    assert "vLLM 0.4.2's rules" in done.err
    assert "defect spare-block" in done.err


def test_by_request_and_by_call(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    requests, calls = tmp_path / "r.parquet", tmp_path / "c.parquet"
    done = kvtrace_cli("simulate", thrash, *GRID, "--per-request", requests, "--per-step", calls, "--json")
    assert done.code == 0
    by_request, by_call = pl.read_parquet(requests), pl.read_parquet(calls)
    for row in json.loads(done.out):
        mine = (pl.col("num_blocks") == row["num_blocks"]) & (pl.col("preemption") == row["preemption"])
        assert by_request.filter(mine)["request"].to_list() == list(range(192))
        assert by_call.filter(mine & (pl.col("kind") != "idle")).height == row["steps"]
        assert by_call.filter(mine & (pl.col("kind") == "prefill")).height == row["prefill_steps"]


def test_from_python_and_mended(thrash: Path) -> None:
    plain, mended = (
        kvtrace.simulate(thrash, engine="vllm-v0", num_blocks=100, mend=mend).row(0, named=True)
        for mend in ((), ("spare-block",))
    )
    assert "spare-block" in plain["defects"]
    assert mended["defects"] is None
    assert mended["recomputes"] < plain["recomputes"]


def test_an_import_is_served_too(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "m.jsonl"
    lines = [{"timestamp": i, "input_length": 900, "output_length": 40, "hash_ids": [i, i + 1]} for i in range(30)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert kvtrace_cli("import", "mooncake", source, "-o", tmp_path / "m.kvt").code == 0
    done = kvtrace_cli("simulate", tmp_path / "m.kvt", "--engine", "vllm-v0")
    assert (done.code, "give --num-blocks" in done.err) == (2, True)
    done = kvtrace_cli("simulate", tmp_path / "m.kvt", "--engine", "vllm-v0", "--num-blocks", "20", "--json")
    assert done.code == 0
    (row,) = json.loads(done.out)
    assert (row["requests"], row["finished"], row["ended"], row["max_num_batched_tokens"]) == (30, 30, "done", 2048)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preemption sawp", "--preemption sawp is none of"),
        ("--victim first", "--victim first is none of"),
        ("--mend bugs", "no defect is called bugs"),
        ("--swap-space -1", "--swap-space -1.0 must be GiB"),
        ("--arrivals never", "--arrivals never is none of"),
        ("--rate x", "--rate x: write x2"),
        ("--rate x2 --arrivals all", "--rate is of --arrivals time"),
        ("--swap-overlap 2", "0<=x<=1"),
        ("--prefix-caching", "--prefix-caching is no setting of vLLM 0.4.2"),
        ("--policy lru", "--policy is no setting of vLLM 0.4.2"),
        ("-o out.kvt", "-o writes runs of vLLM V1 only"),
    ],
)
def test_wrong_values(words: str, message: str, kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, "--engine", "vllm-v0", *words.split())
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preemption swap", "--engine vllm-v0 also swaps"),
        ("--preemption offload", "--preemption offload needs --cpu-offload"),
        ("--cpu-offload 100", "are of --preemption offload"),
        ("--preemption offload --cpu-offload lots", "--cpu-offload"),
        ("--preemption offload --cpu-offload 100 --offload-policy fifo", "--offload-policy fifo is none of lru, arc"),
        ("--swap-space 4", "--swap-space is of --engine vllm-v0"),
        ("--swap-overlap 0.5", "--pageable and --swap-overlap are of --engine vllm-v0"),
        ("--pageable", "--pageable and --swap-overlap are of --engine vllm-v0"),
        ("--mend leak", "--mend is of --engine vllm-v0"),
    ],
)
def test_the_new_engine_takes_none_of_it(
    words: str, message: str, kvtrace_cli: Callable[..., Any], thrash: Path
) -> None:
    done = kvtrace_cli("simulate", thrash, *words.split())
    assert (done.code, message in done.err) == (2, True)
