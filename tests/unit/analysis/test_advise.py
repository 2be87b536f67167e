"""Advice rests on figures: every command that a finding names prints them, and they make its value."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples
from kvtrace.advice import advise, collect, confidence
from kvtrace.advice.case import Case
from kvtrace.advice.declare import Figure, advisers, worked
from kvtrace.advice.findings.knee import knee_of
from kvtrace.advice.findings.next_memory import step_blocks
from kvtrace.sql import Database

KINDS = {
    "next-memory", "knee", "slower-tier", "block-size", "policy", "recompute-or-copy", "unused-blocks",
    "fragmentation", "idle-blocks", "token-budget", "preemption",
}  # fmt: skip
_ADVISED: dict[str, pl.DataFrame] = {}


def advised(name: str) -> pl.DataFrame:
    """The findings about a sample, found once."""
    if name not in _ADVISED:
        _ADVISED[name] = advise(samples.path(name))
    return _ADVISED[name]


def printed(figure: dict[str, Any], run: Callable[..., Any], cache: dict[str, Any]) -> Any:
    """What the command of a figure prints where the figure says."""
    command = figure["command"]
    if command not in cache:
        words = shlex.split(command)
        assert words[0] == "kvtrace"
        assert words[-1] == "--json"
        done = run(*words[1:])
        assert done.code in (0, 3), done.err
        cache[command] = json.loads(done.out)
    where = json.loads(figure["where"])
    rows = [row for row in cache[command] if all(row[name] == value for name, value in where.items())]
    assert len(rows) == 1, (command, where)
    return rows[0][figure["column"]]


def check(frame: pl.DataFrame, run: Callable[..., Any]) -> None:
    """Every figure is printed by its command, and the formula over them gives the value."""
    cache: dict[str, Any] = {}
    for row in frame.iter_rows(named=True):
        assert row["figures"], row["kind"]
        assert row["command"] == row["figures"][0]["command"]
        assert row["uncertainty"]
        values = {}
        for figure in row["figures"]:
            found = printed(figure, run, cache)
            # DuckDB's threads add up in no fixed order: the last digit of a sum may be another.
            assert found == pytest.approx(figure["value"], rel=1e-12), (row["kind"], figure)
            values[figure["name"]] = found
        if row["formula"] is not None:
            assert math.isclose(eval(row["formula"], {}, values), row["value"]), row["kind"]
        if row["seconds"] is not None:
            assert math.isclose(row["seconds"], row["value"] * values["ns_per_prefill_token"] / 1e9)


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_commands_print_the_figures(name: str, kvtrace_cli: Callable[..., Any]) -> None:
    check(advised(name), kvtrace_cli)


def test_every_kind_of_finding_on_a_sample() -> None:
    frame = advised("thrash")
    assert set(frame["kind"]) == KINDS
    assert set(advisers()) == KINDS
    assert frame["rank"].to_list() == list(range(1, frame.height + 1))
    worth = [-1.0 if value is None else value for value in frame["worth_tokens"].to_list()]
    assert worth == sorted(worth, reverse=True)
    for row in frame.iter_rows(named=True):
        if row["low"] is not None and "halves" not in row["uncertainty"] and "half" not in row["uncertainty"]:
            assert row["low"] <= row["value"] <= row["high"], row["kind"]


def test_the_next_memory_by_hand() -> None:
    """A quarter more of 199 blocks, against two simulations; the text says the numbers."""
    rows = kvtrace.simulate(samples.path("thrash"), num_blocks=[200, 249])
    first = rows["hit_tokens"] - rows["hit_tokens_after_preemption"]
    finding = advised("thrash").filter(pl.col("kind") == "next-memory").row(0, named=True)
    assert finding["value"] == first[1] - first[0]
    assert f"{finding['value']:,.0f} more prompt tokens" in finding["text"]
    assert "closed loop" in finding["uncertainty"]
    assert step_blocks(199, None) == 49
    assert step_blocks(100_000, 1 << 20) == 1024


def test_copy_or_recompute_at_given_costs(kvtrace_cli: Callable[..., Any]) -> None:
    slow = advise(samples.path("thrash"), timing="h100:llama-3.1-8b")
    check(slow, kvtrace_cli)
    row = slow.filter(pl.col("kind") == "recompute-or-copy").row(0, named=True)
    assert {figure["name"] for figure in row["figures"]} == {"recompute_ns", "swap_ns", "preemptions"}
    done = kvtrace_cli("advise", samples.path("thrash"), "--timing", "no-such")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_imports_say_what_cannot_be_known(tmp_path: Path, kvtrace_cli: Callable[..., Any]) -> None:
    trace = toys.imported(3, tmp_path, requests=200)
    frame = advise(trace)
    check(frame, kvtrace_cli)
    assert set(frame["kind"]) <= {"knee", "policy", "unknown"}
    assert "cannot be known" in frame.filter(pl.col("kind") == "unknown")["text"].item()
    assert frame.filter(pl.col("kind") != "unknown")["uncertainty"].str.starts_with("open loop").all()


def test_too_few_requests_are_no_ground_for_advice(tmp_path: Path, kvtrace_cli: Callable[..., Any]) -> None:
    trace = toys.imported(3, tmp_path, requests=collect.LEAST_REQUESTS - 1)
    frame = advise(trace)
    check(frame, kvtrace_cli)
    assert frame["kind"].to_list() == ["too-few"]
    assert frame["value"].null_count() == 1


@pytest.mark.parametrize("seed", range(4))
def test_odd_traces_are_advised_on_or_said_to_be_too_few(
    seed: int, tmp_path: Path, kvtrace_cli: Callable[..., Any]
) -> None:
    check(advise(toys.toy(seed, tmp_path)), kvtrace_cli)
    busy = advise(toys.plain_toy(seed + 100, tmp_path, arrivals=0.6, steps=400))
    assert busy.height > 1 or busy["kind"].item() in ("too-few", "unknown")
    check(busy, kvtrace_cli)


def test_engines_are_advised_apart(two_engines: Path, kvtrace_cli: Callable[..., Any]) -> None:
    frame = advise(two_engines)
    assert frame["engine_index"].unique().sort().to_list() == [0, 1]
    check(frame, kvtrace_cli)


def test_on_the_command_line(thrash: Path, kvtrace_cli: Callable[..., Any]) -> None:
    done = kvtrace_cli("advise", thrash, "--commands")
    assert done.code == 0
    assert done.out.startswith("1. ")
    assert f"$ kvtrace simulate {thrash} --num-blocks 200,249 --json" in done.out
    rows = json.loads(kvtrace_cli("advise", thrash, "--json").out)
    assert {row["kind"] for row in rows} == KINDS
    missing = kvtrace_cli("advise", "no-such.kvt")
    assert (missing.code, missing.out) == (2, "")


def test_where_the_run_cannot_be_repeated_the_open_loop_is_named(
    damaged: Path, kvtrace_cli: Callable[..., Any]
) -> None:
    trace = kvtrace.open(damaged)
    check(advise(trace), kvtrace_cli)
    case = Case(trace, trace.engines[0], Database([trace]))
    assert case.open_because == "the trace is lossy"
    assert case.loop.startswith("open loop, since")


# ------------------------------------------------------------------------------------------------------- the parts


def test_formulas() -> None:
    figures = [Figure(name, value, "", "", name) for name, value in (("a", 6.0), ("b", 3.0))]
    assert worked("(a - b) / (a + b) * 3 + 1", figures) == 2.0
    with pytest.raises(KeyError):
        worked("c", figures)


def test_intervals_cover_what_they_should() -> None:
    """Of 400 made-up traces the true mean lies within in some 95 of 100: fewer with so few stretches, never 80."""
    rng = np.random.default_rng(5)
    within = 0
    for _ in range(400):
        low, high = confidence.interval(rng.exponential(3.0, 200))
        within += low <= 600 <= high
    assert 340 <= within <= 396
    low, high = confidence.interval(np.ones(100))
    assert low == high == 100
    low, high = confidence.interval(np.ones(100), np.full(100, 4))
    assert low == high == 0.25


def test_the_interval_of_a_slope() -> None:
    x = np.arange(300.0)
    assert confidence.slope_interval(x, 2 * x + 5) == pytest.approx((2, 2))
    low, high = confidence.slope_interval(x, 2 * x + np.random.default_rng(1).normal(0, 50, 300))
    assert low < 2 < high


def test_the_knee_of_a_bent_line() -> None:
    capacities = [10, 20, 30, 40, 50, 100]
    points = pl.DataFrame({"capacity_blocks": capacities, "token_hits": [0, 40, 80, 84, 88, 100]})
    assert knee_of(points) == 30
