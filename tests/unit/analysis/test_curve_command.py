"""`kvtrace curve` and `kvtrace.curve`: exact curves, estimates and working sets, by command and by call."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace.curves import working_set

KEYS = ["policy", "capacity_blocks", "block_hit_ratio", "token_hit_ratio", "semantics", "block_size", "method"]
SAMPLED = ["sample_rate", "block_hit_ratio_error", "token_hit_ratio_error"]


@pytest.mark.parametrize("semantics", ["object", "prefix", "radix"])
def test_every_point_is_what_a_replay_finds(thrash: Path, semantics: str) -> None:
    policies = ["lru"] if semantics == "radix" else ["lru", "fifo", "opt"]
    frame = kvtrace.curve(thrash, policy=policies, semantics=semantics)
    for policy in policies:
        rows = frame.filter(pl.col("policy") == policy)
        assert rows.height > 15
        capacities = rows["capacity_blocks"].to_list()
        assert capacities == sorted(capacities)
        replayed = kvtrace.replay(thrash, policy, capacities, semantics=semantics)
        for name in ("block_hits", "block_hit_ratio", "token_hits", "token_hit_ratio", "block_lookups", "requests"):
            assert rows[name].to_list() == replayed[name].to_list()
    # The last point holds all distinct blocks.
    most = kvtrace.replay(thrash, "lru", "inf", semantics=semantics)["block_hits"][0]
    assert frame.filter(pl.col("policy") == "lru")["block_hits"][-1] == most


def test_lru_is_told_from_one_pass(thrash: Path) -> None:
    objects = kvtrace.curve(thrash, semantics="object")
    assert set(objects["method"]) == {"one-pass"}
    prefix = kvtrace.curve(thrash)
    # Capacities that do not hold all that ran at a time are replayed.
    assert set(prefix["method"]) == {"one-pass", "replay"}
    assert prefix["capacity_blocks"][0] > 1
    assert set(kvtrace.curve(thrash, "fifo", semantics="object")["method"]) == {"replay"}


def test_all_points(thrash: Path) -> None:
    every = kvtrace.curve(thrash, semantics="object", points="all")
    assert every.height > 100
    assert every["block_hits"].is_sorted()
    assert every["block_hits"].n_unique() >= every.height - 1
    few = kvtrace.curve(thrash, semantics="object")
    reached = dict(every.select("capacity_blocks", "block_hits").iter_rows())
    for capacity, hits in few.select("capacity_blocks", "block_hits").iter_rows():
        assert hits == reached[max(c for c in reached if c <= capacity)]
    with pytest.raises(kvtrace.UsageError):
        kvtrace.curve(thrash, points="some")


def test_command_and_call_agree(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    args = ("--policy", "lru,fifo", "--capacity", "50%,inf,300", "--warmup", "0.25", "--block-size", "32,64")
    done = kvtrace_cli("curve", thrash, *args, "--json")
    rows = json.loads(done.out)
    assert done.code == 0
    assert set(KEYS) <= set(rows[0])
    called = kvtrace.curve(thrash, ["lru", "fifo"], ["50%", "inf", 300], [32, 64], warmup=0.25)
    assert called.to_dicts() == rows
    assert [row["capacity_blocks"] is None for row in rows[:3]] == [False, True, False]
    assert kvtrace_cli("curve", thrash, *args, "--csv").out.splitlines()[0] == ",".join(rows[0])


def test_a_sample_has_errors(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    args = ("--sample", "50%", "--policy", "lru,fifo", "--seed", "3")
    done = kvtrace_cli("curve", thrash, *args, "--json")
    rows = json.loads(done.out)
    assert set(KEYS + SAMPLED) <= set(rows[0])
    assert {row["method"] for row in rows} == {"sample"}
    called = kvtrace.curve(thrash, ["lru", "fifo"], sample=0.5, seed=3)
    assert called.to_dicts() == rows
    known = [row for row in rows if row["block_hit_ratio_error"] is not None]
    assert len(known) > 10
    exact = {
        (row["policy"], row["capacity_blocks"]): row["block_hit_ratio"]
        for row in kvtrace.curve(thrash, ["lru", "fifo"], sorted({row["capacity_blocks"] for row in known})).to_dicts()
    }
    inside = [
        abs(row["block_hit_ratio"] - exact[row["policy"], row["capacity_blocks"]]) <= row["block_hit_ratio_error"]
        for row in known
    ]
    assert sum(inside) > 0.7 * len(inside)
    text = kvtrace_cli("curve", thrash, *args)
    assert "estimated from a sample of 0.5" in text.err
    assert max(map(len, text.out.splitlines())) <= 100


def test_facts_stand_on_stderr(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("curve", thrash, "--capacity", "1,2,inf", "--warmup", "0.5")
    assert "open loop, prefix semantics" in done.err
    assert "after a warm-up of 50.00% of them" in done.err
    assert "a capacity of 1 blocks cannot hold the largest single request" in done.err
    assert "(2 points are so)" in done.err
    assert done.out.splitlines()[-1].split()[:2] == ["lru", "inf"]
    assert done.code == 0


def test_working_sets(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    rows = json.loads(kvtrace_cli("curve", thrash, "--working-set", "200ms", "--json").out)
    times = kvtrace.open(thrash).requests["arrival_ns"]
    assert sum(row["requests"] for row in rows) == len(times)
    assert [row["window"] for row in rows] == list(range(len(rows)))
    assert rows[0]["window_start_s"] == times.min() / 1e9
    assert len(rows) == (times.max() - times.min()) // 200_000_000 + 1
    assert rows == working_set(thrash, "200ms").to_dicts()
    whole = json.loads(kvtrace_cli("curve", thrash, "--working-set", "1h", "--json").out)
    assert len(whole) == 1
    assert whole[0]["distinct_blocks"] == kvtrace.curve(thrash)["capacity_blocks"][-1]
    assert whole[0]["distinct_tokens"] == whole[0]["distinct_blocks"] * whole[0]["block_size"]
    assert "1 windows; the largest working set is" in kvtrace_cli("curve", thrash, "--working-set", "1h").err
    by_request = json.loads(kvtrace_cli("curve", thrash, "--working-set", "50", "--json").out)
    assert [row["first_request"] for row in by_request] == list(range(0, len(times), 50))


def test_several_engines_get_a_column(two_engines: Path, thrash: Path) -> None:
    frame = kvtrace.curve(two_engines, capacity="inf")
    assert frame["engine_index"].to_list() == [0, 1]
    assert set(frame["block_hits"]) == set(kvtrace.curve(thrash, capacity="inf")["block_hits"])
    assert set(working_set(two_engines, "1h")["engine_index"]) == {0, 1}


def test_an_import(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000 * i, "input_length": 512 * len(ids) - 100, "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate([[0, 1, 2], [0, 1, 3], [4], [0, 1, 2]])
    ]
    source = tmp_path / "requests.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    trace = tmp_path / "requests.kvt"
    assert kvtrace_cli("import", "mooncake", source, "-o", trace).code == 0
    frame = kvtrace.curve(trace, points="all")
    # The second request finds 0 and 1; the last one 0 and 1 below 4 (3 blocks needed), and 2 below 3 as well (5).
    assert set(frame["method"]) == {"one-pass"}
    assert frame.select("capacity_blocks", "block_hits").rows() == [(3, 4), (5, 5)]
    # 1 and 2 are last blocks of nobody but 2, which lacks 100 tokens.
    assert frame["token_hits"].to_list() == [4 * 512, 5 * 512 - 100]
    sets = json.loads(kvtrace_cli("curve", trace, "--working-set", "2s", "--json").out)
    assert [(row["requests"], row["distinct_blocks"], row["distinct_tokens"]) for row in sets] == [
        (2, 4, 4 * 512 - 200), (2, 4, 4 * 512 - 200),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [("--policy", "nope"), ("--capacity", "many"), ("--block-size", "0"), ("--semantics", "nope"), ("--sample", "2"),
     ("--sample", "x"), ("--warmup", "1"), ("--working-set", "soon"), ("--points", "few"),
     ("--points", "all", "--sample", "0.1"), ("--points", "all", "--capacity", "10"), ("--sample", "1e-9"),
     ("--working-set", "1s", "--policy", "lru")],
)  # fmt: skip
def test_wrong_values_are_usage_errors(args: tuple[str, ...], kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("curve", thrash, *args)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("kvtrace: error: ")


def test_infinite_capacity_is_null(thrash: Path) -> None:
    assert kvtrace.curve(thrash, capacity=[math.inf])["capacity_blocks"].to_list() == [None]


def test_damaged_input_is_exit_3(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    assert kvtrace_cli("curve", damaged, "--capacity", "inf").code == 3


def test_parquet(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    path = tmp_path / "curve.parquet"
    assert kvtrace_cli("curve", thrash, "--parquet", path).code == 0
    assert pl.read_parquet(path).equals(kvtrace.curve(thrash))
