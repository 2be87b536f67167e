"""How commands end: exit codes, one line of error, quiet pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrace.cli import info
from kvtrace.cli.main import cli


def test_done_is_0(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("info", thrash)
    assert done.code == 0
    assert done.err == ""


def test_no_trace_is_1_with_one_line(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "not.kvt").write_bytes(b"something else, longer than a header")
    done = kvtrace_cli("info", tmp_path / "not.kvt")
    assert done.code == 1
    assert done.err.startswith("kvtrace: error: ")
    assert done.err.count("\n") == 1


def test_wrong_usage_is_2(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    for args in (["info"], ["info", "nowhere.kvt"], ["info", thrash, "--nope"], ["sql", thrash, "SELEC 1"]):
        done = kvtrace_cli(*args)
        assert done.code == 2, args
        assert done.err.startswith("kvtrace: error: "), args
        assert done.out == ""


def test_damage_is_3_and_still_gives_data(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    done = kvtrace_cli("sql", damaged, "SELECT count(*) AS n FROM steps", "--csv")
    assert done.code == 3
    assert done.out.startswith("n\n")
    assert int(done.out.split()[1]) > 0
    assert str(damaged) in done.err


def test_missing_end_record_is_a_note(kvtrace_cli: Callable[..., Any], cut: Path) -> None:
    done = kvtrace_cli("info", cut)
    assert done.code == 0
    assert f"kvtrace: {cut}: " in done.err


def test_unexpected_error_is_one_line(
    kvtrace_cli: Callable[..., Any], thrash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr(info, "page", burst)
    done = kvtrace_cli("info", thrash, KVTRACE_DEBUG="")
    assert done.code == 1
    assert done.err == "kvtrace: error: ZeroDivisionError: a bug of two lines (KVTRACE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("KVTRACE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", str(thrash)])


def test_closed_pipe_ends_quietly(thrash: Path) -> None:
    line = f"{sys.executable} -m kvtrace sql {thrash} 'SELECT * FROM block_events' --json"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} | head -n 1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device to write to")
@pytest.mark.parametrize("words", [["info"], ["stats", "--csv"]])
def test_a_full_disk_is_one_line(words: list[str], thrash: Path) -> None:
    command = [sys.executable, "-m", "kvtrace", words[0], str(thrash), *words[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "kvtrace: error: cannot write the output: no space left on the device"
    assert "Traceback" not in done.stderr


def test_an_empty_query(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("sql", thrash, "")
    assert (done.code, done.out) == (2, "")
    assert "the query is empty" in done.err


def test_no_folder_to_write_into(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    for words in (("export", "csv", thrash, "-o"), ("simulate", thrash, "-o"), ("report", thrash, "-o")):
        done = kvtrace_cli(*words, tmp_path / "nowhere" / "out.kvt")
        assert done.code == 2, words
        assert "there is no folder" in done.err


def test_ctrl_c_is_130_in_one_line(thrash: Path) -> None:
    query = "SELECT count(*) FROM range(100000000) a, range(1000000) b WHERE a.range % 7 = b.range % 5"
    child = subprocess.Popen(
        [sys.executable, "-m", "kvtrace", "sql", str(thrash), query], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "KVTRACE_DEBUG": ""},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(4)  # long enough to be in the query; a Ctrl-C during compilation may get lost there
            child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=5)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1] == "kvtrace: interrupted"
    assert "Traceback" not in err


def test_version(kvtrace_cli: Callable[..., Any]) -> None:
    import kvtrace

    assert kvtrace_cli("--version").out == f"kvtrace {kvtrace.__version__}\n"
