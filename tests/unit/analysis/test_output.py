"""The output options that all tables share."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kvtrace import people
from kvtrace.cli.output import Output, replacing
from kvtrace_traces.errors import KvtraceError, UsageError

QUERY = "SELECT kind, count(*) AS events FROM block_events GROUP BY kind ORDER BY kind"


def test_json_csv_and_parquet_agree(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    rows = json.loads(kvtrace_cli("sql", thrash, QUERY, "--json").out)
    assert rows
    assert set(rows[0]) == {"kind", "events"}
    text = kvtrace_cli("sql", thrash, QUERY, "--csv").out
    assert [{**row, "events": int(row["events"])} for row in csv.DictReader(io.StringIO(text))] == rows
    done = kvtrace_cli("sql", thrash, QUERY, "--parquet", tmp_path / "t.parquet")
    assert (done.code, done.out) == (0, "")
    assert pl.read_parquet(tmp_path / "t.parquet").to_dicts() == rows


def test_empty_json_is_an_empty_list(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert json.loads(kvtrace_cli("sql", thrash, "SELECT * FROM steps WHERE false", "--json").out) == []


def test_json_has_no_nan_or_infinity(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    query = "SELECT 'nan'::DOUBLE AS a, 'inf'::DOUBLE AS b, ['-inf'::DOUBLE, 1] AS c, {'x': 'nan'::DOUBLE} AS d"
    out = kvtrace_cli("sql", thrash, query, "--json").out
    assert json.loads(out) == [{"a": None, "b": None, "c": [None, 1.0], "d": {"x": None}}]


def test_csv_carries_lists_as_json(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert kvtrace_cli("sql", thrash, "SELECT [1, 2] AS a, 3 AS b", "--csv").out == 'a,b\n"[1, 2]",3\n'


def test_nothing_is_overwritten_without_force(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.parquet"
    target.write_text("mine")
    done = kvtrace_cli("sql", thrash, QUERY, "--parquet", target)
    assert done.code == 2
    assert "--force" in done.err
    assert target.read_text() == "mine"
    assert kvtrace_cli("sql", thrash, QUERY, "--parquet", target, "--force").code == 0
    assert pl.read_parquet(target).height > 0
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_one_format_at_a_time(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert kvtrace_cli("sql", thrash, QUERY, "--json", "--csv").code == 2


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.write_text("old")

    def fail_half_way() -> None:
        with replacing(target, force=True) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["t"]


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "new", force=False) as part:
        part.write_text("x")
    (tmp_path / "usual").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "usual")]
    assert modes[0] == modes[1]


def test_unusable_targets_are_named(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "no" / "t"):
        with pytest.raises(UsageError, match=target.name if target == tmp_path else "no"), replacing(target, True):
            pass
    with pytest.raises(KvtraceError, match="cannot write"), replacing(Path("/proc/kvtrace-test"), force=False):
        pass


def test_table_for_people() -> None:
    frame = pl.DataFrame(
        {
            "policy": ["lru", None],
            "capacity_blocks": [12345, None],
            "block_hit_ratio": [0.12345, math.nan],
            "step": [12345, 6],
            "seconds": [0.0123, 250.0],
        }
    )
    text, hidden = people.render(frame, people.Style(cells={"capacity_blocks": people.capacity}))
    assert hidden == 0
    assert text.splitlines() == [
        "                   block",
        "        capacity     hit",
        "policy    blocks   ratio   step   seconds",
        "──────  ────────  ──────  ─────  ────────",
        "lru       12,345  12.35%  12345   12.3 ms",
        "-            inf       -      6  4.17 min",
    ]


def test_long_tables_say_what_they_leave_out(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(pl.DataFrame({"n": range(people.MAX_ROWS + 5)}))
    done = capsys.readouterr()
    assert len(done.out.splitlines()) == people.MAX_ROWS + 2
    assert "the first 1,000 of 1,005 rows" in done.err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00001234, "0.00001234"), (1.5, "1.500"), (12.345678, "12.35"), (123456.0, "123,456")],
)
def test_floats(value: float, text: str) -> None:
    assert people.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1e-5, "10 µs"), (0.25, "250 ms"), (3.0, "3 s"), (600.0, "10 min"), (9000.0, "2.5 h")]
)
def test_durations(value: float, text: str) -> None:
    assert people.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 << 30, "3.0 GiB"), (None, "-")])
def test_sizes(value: int | None, text: str) -> None:
    assert people.size(value) == text


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": ""}, False), ({"TERM": "dumb"}, False)])
def test_colour_only_on_a_terminal(env: dict[str, str], coloured: bool, thrash: Path) -> None:
    leader, follower = os.openpty()
    base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    subprocess.run(
        [sys.executable, "-m", "kvtrace", "sql", str(thrash), "SELECT 1 AS a"],
        stdout=follower, stdin=subprocess.DEVNULL, env={**base, **env}, check=True,
    )  # fmt: skip
    assert (b"\x1b[" in os.read(leader, 65536)) is coloured
    os.close(leader)
    os.close(follower)


def test_no_colour_in_a_pipe(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert "\x1b" not in kvtrace_cli("sql", thrash, "SELECT 1 AS a").out


@pytest.mark.parametrize(
    "command",
    [
        "export csv IN -o OUT", "cut IN --requests 0-5 -o OUT", "report IN -o OUT", "simulate IN -o OUT",
        "replay IN --parquet OUT", "stats IN --parquet OUT", "sql IN 'SELECT 1' --parquet OUT",
        "diff IN IN --parquet OUT",
    ],
)  # fmt: skip
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_input_is_never_overwritten(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, command: str, force: tuple[str, ...]
) -> None:
    source, link = tmp_path / "run.kvt", tmp_path / "link.kvt"
    source.write_bytes(thrash.read_bytes())
    link.symlink_to(source)
    words = [{"IN": str(source), "OUT": str(link)}.get(word, word) for word in shlex.split(command)]
    done = kvtrace_cli(*words, *force)
    assert done.code == 2
    assert "link.kvt is what is read: give the output another name" in done.err
    assert source.read_bytes() == thrash.read_bytes()
    assert link.is_symlink()


def test_outputs_among_the_inputs_are_replaced(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    (tmp_path / "run.kvt").write_bytes(thrash.read_bytes())
    for command in (("report", tmp_path, "-o"), ("stats", tmp_path, "--parquet")):
        assert kvtrace_cli(*command, tmp_path / command[0]).code == 0
        assert kvtrace_cli(*command, tmp_path / command[0], "--force").code == 0
    done = kvtrace_cli("cut", tmp_path, "--requests", "0-5", "-o", tmp_path / "run.kvt", "--force")
    assert done.code == 2
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "a.json").write_text('{"id": 1, "requests": [{"t": 0, "in": 5, "hash_ids": [1]}]}')
    for force in ((), ("--force",)):
        done = kvtrace_cli("import", "kv-cache-tester", tmp_path / "talks", "-o", tmp_path / "talks" / "a.kvt", *force)
        assert done.code == 0, done.err
