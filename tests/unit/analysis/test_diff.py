"""`kvtrace diff`: pairs of simulated runs against plain Python, how requests are matched, and what the command says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace.diff import diff
from kvtrace.diff.match import match
from kvtrace.diff.summary import page
from kvtrace_replay.schedulers.log import write_run
from kvtrace_traces import cut, open_trace
from kvtrace_traces.engine_log import Chains
from simulation.cases import random_case
from simulation.kernel import as_recorded, as_settings


def slow_whys(trace: kvtrace.Trace, request: int, first: int, stop: int) -> list[tuple[Any, ...]]:
    """(position, reason, evicted_by, evicted_step, filled_by, filled_step) of blocks first to stop of a request, by
    following every event up to the one with which its first lookup began."""
    stride = trace.header["block_size"] // trace.header["granule"]
    chains = trace.chains()
    begin = int(chains.indptr[request])
    wanted = [int(chains.identities[begin + (i + 1) * stride - 1]) for i in range(first, stop)]
    (lookup, *_) = [
        row for row in trace.lookups.to_dicts() if row["request"] == request and not row["after_preemption"]
    ]
    holders: Counter[int] = Counter()
    evicted: dict[int, tuple[Any, ...]] = {}
    filled: dict[int, tuple[Any, ...]] = {}
    lost_by_reset: set[int] = set()
    for event in trace.block_events.to_dicts():
        taking = event["kind"] in ("allocate", "hit", "evict")
        if event["request"] == request and event["step"] == lookup["step"] and taking:
            break
        identity = event["identity"]
        if event["kind"] == "fill":
            holders[identity] += 1
            filled[identity] = (event["request"], event["step"])
            lost_by_reset.discard(identity)
        elif event["kind"] == "evict":
            holders[identity] -= 1
            evicted[identity] = (event["request"], event["step"])
        elif event["kind"] == "reset":
            lost_by_reset |= {identity for identity, n in holders.items() if n > 0}
            holders.clear()
    told = []
    for position, identity in enumerate(wanted, first):
        if identity not in filled:
            told.append((position, "not-yet", None, None, None, None))
        elif holders[identity] > 0:
            told.append((position, "not-taken", None, None, *filled[identity]))
        elif identity in lost_by_reset:
            told.append((position, "reset", None, None, *filled[identity]))
        else:
            told.append((position, "evicted", *evicted[identity], *filled[identity]))
    return told


def assert_right(a: kvtrace.Trace, b: kvtrace.Trace) -> Counter[str]:
    """Every row of the comparison of two runs of the same requests, against loops."""
    found = diff(a, b)
    seen: Counter[str] = Counter()
    rows_a, rows_b = a.requests.to_dicts(), b.requests.to_dicts()
    assert found.requests["request_a"].to_list() == [row["request"] for row in rows_a]
    for row, mine, theirs in zip(found.requests.to_dicts(), rows_a, rows_b, strict=True):
        assert row["request_b"] == theirs["request"]
        same = True
        for name in ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "finish_reason"):
            assert (row[f"{name}_a"], row[f"{name}_b"]) == (mine[name], theirs[name])
            same &= mine[name] == theirs[name]
        for side, trace in (("a", a), ("b", b)):
            later = [
                x for x in trace.lookups.to_dicts() if x["request"] == row[f"request_{side}"] and x["after_preemption"]
            ]
            assert row[f"cached_after_preemption_{side}"] == sum(x["tokens_hit"] for x in later)
            request = mine if side == "a" else theirs
            if request["finish_step"] is not None:
                assert row[f"steps_{side}"] == request["finish_step"] - request["arrival_step"] + 1
        same &= row["cached_after_preemption_a"] == row["cached_after_preemption_b"]
        assert row["different"] == (not same)
        if mine["cached_tokens"] is None or theirs["cached_tokens"] is None:
            continue
        change = theirs["cached_tokens"] - mine["cached_tokens"]
        assert row["hit_change"] == change
        seen["gained" if change > 0 else "lost" if change < 0 else "same"] += 1
        if not change:
            assert row["worse"] is None
            continue
        poorer, number = (b, row["request_b"]) if change < 0 else (a, row["request_a"])
        size = int(poorer.header["block_size"])
        low, high = sorted((mine["cached_tokens"], theirs["cached_tokens"]))
        wanted = slow_whys(poorer, number, low // size, -(-high // size))
        blocks = found.blocks.filter(pl.col("request_a") == row["request_a"]).to_dicts()
        names = ("position", "reason", "evicted_by", "evicted_step", "filled_by", "filled_step")
        assert [tuple(block[name] for name in names) for block in blocks] == wanted
        assert tuple(row[name] for name in names) == wanted[0]
        assert row["missed_blocks"] == len(wanted)
        assert row["evicted_blocks"] == sum(block[1] == "evicted" for block in wanted)
        seen.update(block[1] for block in wanted)
    assert found.equal == (not found.requests["different"].any())
    assert list(page(a, b, found, 3))
    return seen


def pair(seed: int, folder: Path) -> tuple[kvtrace.Trace, kvtrace.Trace]:
    """One random workload in two caches."""
    case = random_case(seed)
    settings = as_settings(case.settings)
    larger = replace(settings, num_blocks=2 * settings.num_blocks)
    paths = [folder / f"{seed}-{name}.kvt" for name in "ab"]
    for path, chosen in zip(paths, (settings, larger), strict=True):
        write_run(path, as_recorded(case), chosen)
    return kvtrace.open(paths[0]), kvtrace.open(paths[1])


def test_pairs_of_random_runs_equal_their_twins(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for seed in range(120):
        a, b = pair(seed, tmp_path)
        seen += assert_right(*((a, b) if seed % 2 else (b, a)))
        assert diff(a, a).equal
    assert seen["gained"] > 20
    assert seen["lost"] > 20
    assert seen["evicted"] > 50
    assert seen["not-yet"] > 0


def altered(trace: kvtrace.Trace, **frames: pl.DataFrame) -> kvtrace.Trace:
    """The trace with other tables."""
    trace.reader.__dict__.update(frames)
    return trace


def test_a_reset_and_a_cache_that_was_not_read_are_told(thrash: Path) -> None:
    whole, poorer = kvtrace.open(thrash), kvtrace.open(thrash)
    hit = whole.lookups.filter(~pl.col("after_preemption") & (pl.col("tokens_hit") > 100))["request"].to_list()[20]
    zero = pl.when(pl.col("request") == hit).then(0).otherwise(pl.col("cached_tokens")).cast(pl.Int32)
    altered(poorer, requests=whole.requests.with_columns(cached_tokens=zero))
    assert set(assert_right(whole, poorer)) == {"same", "lost", "not-taken"}
    events = whole.block_events
    step = whole.requests.filter(pl.col("request") == hit)["first_step"].item()
    before = events.filter(pl.col("step") < step - 1)
    reset = before.tail(1).with_columns(
        kind=pl.lit("reset").cast(events["kind"].dtype), block=pl.lit(None, pl.Int32), identity=pl.lit(None, pl.Int32),
        request=pl.lit(None, pl.Int32),
    )  # fmt: skip
    altered(poorer, block_events=pl.concat([before, reset, events.filter(pl.col("step") >= step - 1)]))
    assert "reset" in assert_right(whole, poorer)
    altered(poorer, block_events=events.clear())
    assert set(diff(whole, poorer).blocks["reason"]) == {"unknown"}


def test_what_was_cached_before_a_cut_counts_as_cached(thrash: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.kvt"
    with path.open("wb") as file:
        cut.cut_steps(open_trace(thrash), file, 600, None, uncached_first=True)
    whole, poorer = kvtrace.open(path), kvtrace.open(path)
    altered(poorer, requests=whole.requests.with_columns(cached_tokens=pl.col("cached_tokens") * 0))
    found = diff(whole, poorer)
    assert "not-taken" in set(found.blocks["reason"])
    old = found.blocks.filter((pl.col("reason") == "not-taken") & pl.col("filled_step").is_null())
    assert old.height, "some block was filled before the cut"


# ---------------------------------------------------------------- matching


class Fake:
    """A trace with names, prompt lengths and chains."""

    path = "fake.kvt"

    def __init__(self, names: list[str], prompts: list[int], chains: list[list[int]], granule: int = 4) -> None:
        n = len(names)
        columns = {"engine_index": [0] * n, "request": range(n), "request_id": names, "prompt_tokens": prompts}
        self.requests = pl.DataFrame(columns,
                                     schema_overrides={"request": pl.Int32, "prompt_tokens": pl.Int32})  # fmt: skip
        self.engines = [{"engine_index": 0, "block_size": granule, "granule": granule}]
        flat = [i for chain in chains for i in chain]
        hashes = sorted(set(flat))
        indptr = np.cumsum([0, *map(len, chains)]).astype(np.int64)
        self._chains = Chains(indptr, np.array([hashes.index(i) for i in flat], np.int32), np.array(hashes, np.uint64))

    def chains(self, index: int) -> Chains:
        return self._chains


def pairs(a: Fake, b: Fake, method: str | None = None) -> list[tuple[int, int, str]]:
    return match(a, b, 0, 0, method).rows()  # type: ignore[return-value]


def test_requests_are_matched_by_name_then_client_then_prompt_then_number() -> None:
    a = Fake(["x", "cmpl-y-0-aaaaaaaa", "p", "q", ""], [8, 8, 8, 9, 4], [[1, 2], [3, 4], [5, 6], [5, 6], [9]])
    b = Fake(["", "r", "cmpl-y-0-bbbbbbbb", "x", "s"], [4, 9, 8, 8, 8], [[9], [5, 6], [30, 40], [10, 20], [5, 6]])
    assert pairs(a, b) == [
        (0, 3, "request-id"),
        (1, 2, "client-id"),
        (2, 4, "prompt"),
        (3, 1, "prompt"),
        (4, 0, "prompt"),
    ]
    assert pairs(a, b, "request-id") == [(0, 3, "request-id")]
    twice = Fake(["k", "k", "k"], [8, 8, 8], [[1, 2]] * 3)
    assert pairs(twice, Fake(["k", "k"], [8, 8], [[1, 2]] * 2)) == [(0, 0, "request-id"), (1, 1, "request-id")]
    other_key = Fake(["m", "n"], [8, 7], [[100, 101], [102]])
    assert pairs(other_key, Fake(["o", "p"], [8, 8], [[1, 2], [3]])) == [(0, 0, "number")]
    with pytest.raises(kvtrace.KvtraceError, match="no request of"):
        pairs(other_key, Fake(["o", "p"], [1, 1], [[], []]))
    short = Fake(["a", "b"], [3, 3], [[], []])  # without a whole granule there is nothing to know a prompt by
    assert pairs(short, Fake(["c", "d"], [3, 3], [[], []])) == [(0, 0, "number"), (1, 1, "number")]


# ---------------------------------------------------------------- the command


def test_diff_on_the_command_line(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    same = kvtrace_cli("diff", thrash, thrash)
    assert same.code == 0
    assert "192 requests matched: 192 by request-id" in same.out
    assert same.out.count("the same") == 5
    part = tmp_path / "part.kvt"
    assert kvtrace_cli("cut", thrash, "--steps", ":400", "-o", part).code == 0
    done = kvtrace_cli("diff", thrash, part, "--json")
    assert done.code == 1
    rows = json.loads(done.out)
    assert len(rows) == kvtrace.open(part).requests.height
    assert "only in A" in done.err or len(rows) == 192
    rekeyed = tmp_path / "rekeyed.kvt"
    assert kvtrace_cli("cut", thrash, "--steps", ":", "--rekey", "-o", rekeyed).code == 0
    again = kvtrace_cli("diff", thrash, rekeyed, "--csv")
    assert (again.code, "192 by number" in again.err) == (0, True)
    blocks = tmp_path / "blocks.parquet"
    assert kvtrace_cli("diff", thrash, thrash, "--blocks", blocks).code == 0
    assert pl.read_parquet(blocks).height == 0
    assert kvtrace_cli("diff", thrash, thrash, "--blocks", blocks).code == 2


def test_what_cannot_be_compared_is_said(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, two_engines: Path, damaged: Path
) -> None:
    imported = toys.imported(1, tmp_path)
    for given, code, said in (
        ([thrash, imported.path], 1, "was imported"), ([thrash, two_engines], 2, "engines differ"),
        ([thrash, thrash, "--match", "luck"], 2, "--match luck is none of request-id"),
    ):  # fmt: skip
        done = kvtrace_cli("diff", *given)
        assert (done.code, said in done.err) == (code, True), done.err
    assert kvtrace_cli("diff", two_engines, two_engines).code == 0
    assert kvtrace_cli("diff", damaged, damaged).code == 3
    assert kvtrace_cli("diff", thrash, damaged).code == 1
