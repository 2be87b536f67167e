"""`info`, `verify`, `import`, `export`: what they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
import kvtrace_replay.verify
from kvtrace_traces.schema import TABLES


def test_info_json_is_the_info_object(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    found = json.loads(kvtrace_cli("info", thrash, "--json").out)
    assert found == json.loads(json.dumps(kvtrace.open(thrash).info, default=str))
    assert {"engine", "block_size", "num_blocks", "granule", "requests", "steps", "dropped", "complete"} <= set(found)


def test_info_for_people(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    info = kvtrace.open(thrash).info
    out = kvtrace_cli("info", thrash).out
    assert f"{info['num_blocks']:,} blocks of {info['block_size']} tokens" in out
    assert f"{info['requests']:,}\n" in out


def test_verify_agrees(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("verify", thrash, "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["mismatches"] == 0
    assert found["checks"]
    assert " 0 mismatches" in kvtrace_cli("verify", thrash).out


def test_a_mismatch_is_1(kvtrace_cli: Callable[..., Any], thrash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = {"name": "hits", "rule": "r", "checked": 1000, "mismatches": 2, "first": "request 7", "skipped": None}
    wrong = {"requests": 5, "mismatches": 2, "checks": [check]}
    monkeypatch.setattr(kvtrace_replay.verify, "verify", lambda trace, allow_lossy: wrong)
    done = kvtrace_cli("verify", thrash)
    assert done.code == 1
    assert "BAD  hits  2 of 1,000 break the rule: r; request 7" in done.out
    assert kvtrace_cli("verify", thrash, "--json").code == 1


def test_lossy_traces_are_verified_only_when_asked(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    done = kvtrace_cli("verify", damaged)
    assert (done.code, done.out) == (3, "")
    assert "--allow-lossy" in done.err
    assert kvtrace_cli("verify", damaged, "--allow-lossy").code in (1, 3)


def test_import_then_replay(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1\n2\n1\n3\n1\n")
    out = tmp_path / "ids.kvt"
    assert kvtrace_cli("import", "ids", tmp_path / "ids.txt", "-o", out).code == 0
    row = json.loads(kvtrace_cli("replay", out, "--json").out)[0]
    assert (row["block_lookups"], row["block_hits"]) == (5, 2)
    assert kvtrace_cli("import", "ids", tmp_path / "ids.txt", "-o", out).code == 2
    assert kvtrace_cli("import", "ids", tmp_path / "ids.txt", "-o", out, "--force").code == 0
    assert "tokens a block" in kvtrace_cli("info", out).out


def test_bad_records(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    good = json.dumps({"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]})
    (tmp_path / "m.jsonl").write_text(f"{good}\nnonsense\n{good}\n")
    done = kvtrace_cli("import", "mooncake", tmp_path / "m.jsonl", "-o", tmp_path / "m.kvt")
    assert done.code == 1
    assert not (tmp_path / "m.kvt").exists()
    done = kvtrace_cli("import", "mooncake", tmp_path / "m.jsonl", "-o", tmp_path / "m.kvt", "--skip-bad")
    assert done.code == 3
    assert "1 bad records were left out" in done.err
    assert kvtrace.open(tmp_path / "m.kvt").info["requests"] == 2


def test_demo_of_an_import(kvtrace_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ids.txt").write_text("1\n2\n1\n")
    assert kvtrace_cli("import", "ids", "ids.txt", "-o", "ids.kvt").code == 0
    done = kvtrace_cli("demo", "ids.kvt")
    assert done.code == 0, done.err
    assert Path("kvtrace-demo.html").exists()


def test_unknown_formats_name_the_nearest(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    done = kvtrace_cli("import", "moncake", thrash, "-o", tmp_path / "x.kvt")
    assert done.code == 2
    assert "did you mean mooncake" in done.err
    done = kvtrace_cli("export", "parket", thrash, "-o", tmp_path / "x")
    assert done.code == 2
    assert "did you mean parquet" in done.err


def test_export_writes_every_table(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "tables"
    assert kvtrace_cli("export", "parquet", thrash, "-o", out).code == 0
    trace = kvtrace.open(thrash)
    for name in TABLES:
        if (out / f"{name}.parquet").exists():
            assert pl.read_parquet(out / f"{name}.parquet").height == getattr(trace, name).height
    assert (out / "block_events.parquet").exists()
    assert kvtrace_cli("export", "parquet", thrash, "-o", out).code == 2
    assert kvtrace_cli("export", "parquet", thrash, "-o", out, "--force").code == 0
