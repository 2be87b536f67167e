"""`kvtrace cut` on the command line: ways to say what, and nothing left where it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace.cli.cut import requests_of, time_ns
from kvtrace_traces.errors import UsageError


def test_a_cut_reads_verifies_and_replays(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.kvt"
    done = kvtrace_cli("cut", thrash, "--steps", "100:300", "-o", out)
    assert (done.code, done.out) == (0, "")
    assert "wrote steps 100 to 299 with 104 requests, 40 of them under way at its begin" in done.err
    assert kvtrace_cli("verify", out).code == 0
    assert kvtrace_cli("info", out).code == 0
    assert kvtrace_cli("replay", out, "--capacity", "64", "--json").code == 0
    assert kvtrace_cli("stats", out, "--json").code == 0
    assert kvtrace_cli("simulate", out, "--timing", "none", "-o", tmp_path / "again.kvt").code == 0
    assert kvtrace.open(tmp_path / "again.kvt").reader.snapshot() is not None
    again = kvtrace_cli("cut", thrash, "--steps", "100:300", "-o", out)
    assert (again.code, "--force overwrites it" in again.err) == (2, True)
    assert kvtrace_cli("cut", thrash, "--requests", "3,7-9,100-", "-o", out, "--force").code == 0
    assert kvtrace.open(out).requests.height == 4 + 92
    refused = kvtrace_cli("simulate", out)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "chosen-requests" in refused.err
    assert kvtrace_cli("verify", out).code == 0
    assert kvtrace_cli("replay", out, "--capacity", "64", "--json").code == 0
    listed = tmp_path / "list.txt"
    listed.write_text("3 7-9\n100-\n")
    assert kvtrace_cli("cut", thrash, "--requests", f"@{listed}", "-o", tmp_path / "b.kvt").code == 0
    assert kvtrace.open(tmp_path / "b.kvt").requests.equals(kvtrace.open(out).requests)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "choose one"), (["--steps", "1:2", "--from", "1s"], "choose one"), (["--steps", "7"], "is no range"),
        (["--steps", "5:5"], "are none"), (["--steps", "9999:"], "not there"), (["--from", "soon"], "is no time"),
        (["--from", "1h"], "no step"), (["--requests", "5-3"], "is not there"), (["--requests", "192"], "is not there"),
        (["--requests", "x"], "no request number"),
        (["--requests", ","], "names none"), (["--requests", "@none"], "@none"),
        (["--steps", "1:2", "--engine", "4"], "engines 0"),
    ],
)  # fmt: skip
def test_wrong_questions_leave_nothing(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    done = kvtrace_cli("cut", thrash, *given, "-o", tmp_path / "out.kvt")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_cut_leaves_nothing(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtrace_traces.cut.output import Output

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "end", stop)
    out = tmp_path / "out.kvt"
    out.write_bytes(b"before")
    assert kvtrace_cli("cut", thrash, "--steps", "1:9", "-o", out, "--force").code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.kvt"]
    assert out.read_bytes() == b"before"


def test_engines_are_cut_one_at_a_time(kvtrace_cli: Callable[..., Any], two_engines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.kvt"
    done = kvtrace_cli("cut", two_engines, "--steps", "10:20", "-o", out)
    assert (done.code, "choose one with --engine" in done.err) == (2, True)
    assert kvtrace_cli("cut", two_engines, "--steps", "10:20", "--engine", "1", "-o", out).code == 0
    made = kvtrace.open(out)
    assert made.steps["engine_index"].unique().to_list() == [1]
    assert kvtrace_cli("verify", out).code == 0


def test_a_damaged_trace_is_said_to_be(
    kvtrace_cli: Callable[..., Any], damaged: Path, cut: Path, tmp_path: Path
) -> None:
    assert kvtrace_cli("cut", damaged, "--steps", "1:50", "-o", tmp_path / "a.kvt").code == 3
    done = kvtrace_cli("cut", cut, "--steps", "1:", "-o", tmp_path / "b.kvt")
    assert (done.code, "has no end record" in done.err) == (0, True)


def test_times_are_read() -> None:
    header = {"clock_wall_ns": 1_795_242_139_191_090_610}
    for text, ns in (
        ("1.5s", 15 * 10**8),
        ("2m", 120 * 10**9),
        ("250ms", 25 * 10**7),
        ("3", 3 * 10**9),
        (".5h", 18 * 10**11),
    ):
        assert time_ns(text, {}) == ns
    assert time_ns("2026-11-21T06:22:20Z", header) == time_ns("2026-11-21T07:22:20+01:00", header) == 808_909_390
    assert time_ns("2026-11-21T06:22:20", header) == 808_909_390
    for known in ({}, {**header, "clock": "logical"}):
        with pytest.raises(UsageError, match="time of day"):
            time_ns("2026-11-21", known)


def test_lists_are_read() -> None:
    assert requests_of("3, 1-2,2", 9).tolist() == [1, 2, 3]
    assert np.array_equal(requests_of("7-", 9), [7, 8])
