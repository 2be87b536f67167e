"""`kvtrace replay` and `kvtrace.replay`: the same rows, by command and by call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace

KEYS = [
    "policy", "capacity_blocks", "block_size", "semantics", "requests", "block_lookups", "block_hits",
    "block_hit_ratio", "token_lookups", "token_hits", "token_hit_ratio", "evictions", "seconds",
]  # fmt: skip


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_command_and_call_agree(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("replay", thrash, "--policy", "lru,fifo", "--capacity", "50%,inf", "--json")
    rows = json.loads(done.out)
    assert done.code == 0
    assert [(row["policy"], row["capacity_blocks"] is None) for row in rows] == [
        ("lru", False), ("lru", True), ("fifo", False), ("fifo", True),
    ]  # fmt: skip
    assert set(KEYS) <= set(rows[0])
    called = kvtrace.replay(thrash, policy=["lru", "fifo"], capacity=["50%", "inf"])
    assert without_seconds(called.to_dicts()) == without_seconds(rows)


def test_scalars_and_an_open_trace(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    frame = kvtrace.replay(trace, policy="lru", capacity=50, semantics="object")
    assert frame.height == 1
    assert frame["capacity_blocks"][0] == 50
    assert frame["semantics"][0] == "object"


def test_default_capacities_are_the_runs_own_and_inf(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    assert kvtrace.replay(trace)["capacity_blocks"].to_list() == [trace.header["num_blocks"] - 1, None]


def test_block_sizes(thrash: Path) -> None:
    size = kvtrace.open(thrash).header["granule"]
    frame = kvtrace.replay(thrash, block_size=[size, 2 * size], capacity="inf")
    assert frame["block_size"].to_list() == [size, 2 * size]
    with pytest.raises(kvtrace.UsageError):
        kvtrace.replay(thrash, block_size=size + 1)


def test_facts_stand_on_stderr(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("replay", thrash, "--capacity", "1,inf")
    header = kvtrace.open(thrash).header
    assert "open loop, prefix semantics" in done.err
    assert "tokens looked up by" in done.err
    assert f"the engine itself, {header['num_blocks'] - 1:,} blocks, first admissions" in done.err
    assert "a capacity of 1 blocks cannot hold the largest single request" in done.err
    assert done.out.splitlines()[-1].split()[:2] == ["lru", "inf"]
    assert max(map(len, done.out.splitlines())) <= 100


def test_several_engines_get_a_column(two_engines: Path, thrash: Path) -> None:
    frame = kvtrace.replay(two_engines, capacity="inf")
    assert frame["engine_index"].to_list() == [0, 1]
    single = kvtrace.replay(thrash, capacity="inf")["block_hits"][0]
    assert frame["block_hits"].to_list() == [single, single]


def test_several_traces_get_a_column(kvtrace_cli: Callable[..., Any], thrash: Path, cut: Path) -> None:
    rows = json.loads(kvtrace_cli("replay", thrash, cut, "--capacity", "inf", "--json").out)
    assert [row["trace"] for row in rows] == [thrash.stem, cut.stem]


@pytest.mark.parametrize(
    "args",
    [("--policy", "lru,nope"), ("--capacity", "many"), ("--block-size", "7,x"), ("--block-size", "0"),
     ("--semantics", "nope"), ("--policy", ",")],
)  # fmt: skip
def test_wrong_values_are_usage_errors(args: tuple[str, str], kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("replay", thrash, *args)
    assert done.code == 2
    assert done.out == ""


def test_policies_are_listed(kvtrace_cli: Callable[..., Any]) -> None:
    rows = json.loads(kvtrace_cli("policies", "--json").out)
    assert {"lru", "fifo", "opt"} <= {row["name"] for row in rows}
    assert all(row["summary"] and row["paper"] for row in rows)
    text = kvtrace_cli("policies").out
    assert all(row["paper"] in text for row in rows)


def test_figures_by_request(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "requests.parquet"
    words = ("replay", thrash, "--policy", "lru,fifo", "--capacity", "100,199", "--semantics", "prefix,object")
    done = kvtrace_cli(*words, "--per-request", out, "--json")
    assert done.code == 0
    assert "found no room for all their blocks beside those in use" in done.err
    cells = ["policy", "capacity_blocks", "semantics"]
    frame = pl.read_parquet(out)
    summed = frame.group_by(cells).agg(
        pl.len(), pl.col("block_lookups", "block_hits", "token_lookups", "pin_overflow").sum()
    )
    rows = {tuple(row[name] for name in cells): row for row in json.loads(done.out)}
    assert len(rows) == summed.height == 8
    for row in summed.iter_rows(named=True):
        told = rows[tuple(row[name] for name in cells)]
        assert row["len"] == told["requests"]
        assert row["pin_overflow"] == told["pin_overflow_requests"]
        assert all(row[name] == told[name] for name in ("block_lookups", "block_hits", "token_lookups"))
    prefix = frame.filter(pl.col("semantics") == "prefix").group_by(cells).agg(pl.col("token_hits").sum())
    for row in prefix.iter_rows(named=True):
        assert row["token_hits"] == rows[tuple(row[name] for name in cells)]["token_hits"]
    assert frame.filter(pl.col("semantics") == "object")["token_hits"].null_count() == 4 * 192
    assert kvtrace_cli(*words, "--per-request", out).code == 2  # it exists
    assert kvtrace_cli(*words, "--per-request", tmp_path / "r.txt").code == 2


def test_a_mooncake_file_as_it_is_gives_the_table_of_its_import(
    kvtrace_cli: Callable[..., Any], tmp_path: Path
) -> None:
    ids = [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 6], [5, 7], [1, 2, 4]]
    rows = [
        {"timestamp": 9 * i, "input_length": 512 * len(blocks) - 3, "output_length": 4, "hash_ids": blocks}
        for i, blocks in enumerate(ids)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kvtrace_cli("import", "mooncake", path, "-o", tmp_path / "trace.kvt").code == 0
    grid = ("--policy", "lru,fifo", "--capacity", "3,inf", "--semantics", "prefix,object", "--json")
    done = kvtrace_cli("replay", path, *grid)
    assert done.code == 0
    assert f"{path} is read as mooncake" in done.err
    its = kvtrace_cli("replay", tmp_path / "trace.kvt", *grid)
    assert without_seconds(json.loads(done.out)) == without_seconds(json.loads(its.out))
    frames = [
        kvtrace.replay(of, policy=["lru", "fifo"], capacity=[3, "inf"], semantics=["prefix", "object"]).drop("seconds")
        for of in (path, tmp_path / "trace.kvt")
    ]
    assert frames[0].equals(frames[1])
    assert kvtrace.curve(path).equals(kvtrace.curve(tmp_path / "trace.kvt"))
    path.write_text(path.read_text() + '{"timestamp": 1, "input_length": -1, "output_length": 4, "hash_ids": [1]}\n')
    done = kvtrace_cli("replay", path, *grid)
    assert done.code == 1
    assert "trace.jsonl, line 7: input_length is -1" in done.err


def test_more_tokens_hit_than_there_are_have_no_ratio(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text(
        '{"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1, 2, 3, 4]}\n' * 3
    )
    assert kvtrace_cli("import", "mooncake", tmp_path / "short.jsonl", "-o", tmp_path / "short.kvt").code == 0
    for command in (("replay",), ("replay", "--tier", "hbm:10", "--tier", "dram:20"), ("curve",)):
        capacity = () if "--tier" in command else ("--capacity", "10")
        done = kvtrace_cli(*command, *capacity, tmp_path / "short.kvt", "--json")
        assert done.code == 0, done.err
        row = json.loads(done.out)[-1]
        assert row["token_hits"] > row["token_lookups"] == 300
        assert row["token_hit_ratio"] is None
        assert row["block_hit_ratio"] == 8 / 12
        assert row["why"].startswith("more tokens were hit than looked up")
        assert row["why"] in done.err
