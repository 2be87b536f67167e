"""`kvtrace import` and `kvtrace export`: what they say, and how they end."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvtrace.cli.import_ import command as import_command
from kvtrace.cli.main import cli
from kvtrace_traces import exporters, importers, open_trace


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def kvtrace(*args: str) -> tuple[int, str]:
    """Exit code, and what was said on stderr."""
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    done = CliRunner(**apart).invoke(cli, args)
    return done.exit_code, "".join(line for line in done.stderr.splitlines(True) if "compiling" not in line)


def test_a_log_of_lengths_says_that_reuse_is_unknown() -> None:
    Path("a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    code, said = kvtrace("import", "azure", "a.csv", "-o", "a.kvt")
    assert code == 0
    assert "reuse is unknown: this format has times and lengths alone" in said
    assert "next: kvtrace replay" not in said
    assert open_trace("a.kvt").header["reuse_known"] is False


def test_ids_of_content_are_said_to_be_chained() -> None:
    rows = [{"timestamp": "1", "input_length": 9, "hash_ids": {"sys_prompt": ids}} for ids in ([1, 2], [2, 1])]
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = kvtrace("import", "ragpulse", "r.jsonl", "-o", "r.kvt")
    assert code == 0
    assert "its ids name content (one stands under several parents): prefixes are chained from them" in said
    assert "2 requests have another number of ids than their prompt has blocks" in said


def test_bad_records_times_that_run_backwards_and_names_of_columns() -> None:
    Path("c.csv").write_text("ts,obj\n5,1\n3,2\n,3\n4,-1\n")
    code, said = kvtrace("import", "csv", "c.csv", "-o", "c.kvt", "--columns", "id=obj,time_s=ts")
    assert code == 1
    assert (
        said == "kvtrace: error: c.csv, line 5: -1 is not between 0 and 2^64-1 (--skip-bad leaves such records out)\n"
    )
    code, said = kvtrace("import", "csv", "c.csv", "-o", "c.kvt", "--columns", "id=obj,time_s=ts", "--skip-bad")
    assert code == 3
    assert "1 requests have no arrival time" in said
    assert "1 requests arrived before the one above them; the order of the file is kept" in said
    assert "1 bad records were left out, the first: line 5: -1 is not between" in said
    code, said = kvtrace("import", "csv", "c.csv", "-o", "d.kvt", "--columns", "id")
    assert code == 2
    assert "write OURS=THEIRS,... as in id=obj,time_s=ts" in said


@pytest.mark.parametrize("format", ["mooncake", "csv", "oracle-general"])
def test_there_and_back(format: str) -> None:
    Path("m.jsonl").write_text('{"timestamp": 2000, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]}\n' * 3)
    assert kvtrace("import", "mooncake", "m.jsonl", "-o", "m.kvt")[0] == 0
    code, said = kvtrace("export", format, "m.kvt", "-o", "out")
    assert (code, said.splitlines()[0]) == (0, "kvtrace: wrote out")
    *_, hint = said.splitlines()
    assert hint.endswith("kvtrace import csv out --block-size 512") == (format == "csv")
    size = hint.split()[-2:] if format == "csv" else []
    assert kvtrace("export", format, "m.kvt", "-o", "out")[0] == 2
    code, said = kvtrace("import", format, "out", "-o", "again.kvt", *size)
    assert code == 0
    assert "references 6" in said
    assert ("block size 512" in said) == (format != "oracle-general")


def test_every_format_is_in_the_help() -> None:
    help = import_command.help or ""
    assert [name for name in importers.formats() if name not in help] == []
    assert {"mooncake", "bailian", "kv-cache-tester", "lmcache", "openai", "sharegpt", "azure", "burstgpt",
            "oracle-general", "csv", "ids", "ragpulse"} == set(importers.formats())  # fmt: skip


def test_every_format_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs/import.md").read_text()
    assert [name for name in [*importers.formats(), *exporters.formats()] if f"`{name}`" not in text] == []
