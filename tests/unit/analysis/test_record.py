"""`kvtrace record` around commands that are no engines: what they see, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrace.cli.record import ByteCount, _summary, environment

SHOW = "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if k[:4] in ('KVTR', 'VLLM')}))"


def record(out: Path, *argv: str, options: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if not k.startswith(("KVTRACE_", "VLLM_"))}
    return subprocess.run(
        [sys.executable, "-m", "kvtrace", "record", "-o", str(out), *options, "--", *argv],
        capture_output=True, text=True, env={**base, **env}, input="from stdin", timeout=60, check=False,
    )  # fmt: skip


def test_environment_of_the_command(tmp_path: Path) -> None:
    options = ("--granule", "16", "--max-bytes", "1.5GiB")
    done = record(tmp_path / "a" / "b", sys.executable, "-c", SHOW, options=options)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "KVTRACE_OUT": str(tmp_path / "a" / "b"),
        "KVTRACE_GRANULE": "16",
        "KVTRACE_MAX_BYTES": str(1536 << 20),
    }


@pytest.mark.parametrize(
    ("given", "passed"),
    [("", "kvtrace"), ("other", "other,kvtrace"), ("kvtrace", "kvtrace"), ("a,kvtrace,b", "a,kvtrace,b")],
)
def test_plugin_list_names_kvtrace(tmp_path: Path, given: str, passed: str) -> None:
    done = record(tmp_path, sys.executable, "-c", SHOW, VLLM_PLUGINS=given)
    assert json.loads(done.stdout)["VLLM_PLUGINS"] == passed


def test_without_a_plugin_list_none_is_made() -> None:
    assert "VLLM_PLUGINS" not in environment({}, Path(), None, None)


def test_streams_are_the_commands_own(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdin.read()); print('err', file=sys.stderr); sys.exit(41)"
    done = record(tmp_path, sys.executable, "-c", code)
    assert done.returncode == 41
    assert done.stdout == "from stdin\n"
    assert done.stderr.startswith("err\n")


def test_likely_causes_when_nothing_was_recorded(tmp_path: Path) -> None:
    done = record(tmp_path, "true")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("kvtrace: no trace was recorded")
    assert [
        next(words for words in ("never started", "pip install --no-deps kvtrace", "VLLM_PLUGINS", "not installed")
             if words in line) for line in lines[1:]
    ] == ["never started", "pip install --no-deps kvtrace", "VLLM_PLUGINS", "not installed"]  # fmt: skip


def test_new_traces_are_named_and_old_ones_are_not(tmp_path: Path, thrash: Path) -> None:
    (tmp_path / "old.kvt").write_bytes(thrash.read_bytes())
    done = record(tmp_path, "cp", str(thrash), str(tmp_path / "new.kvt"))
    assert done.returncode == 0
    assert f"recorded {tmp_path / 'new.kvt'}" in done.stderr
    assert "requests" in done.stderr
    assert "old.kvt" not in done.stderr
    assert f"next: kvtrace info {tmp_path / 'new.kvt'}" in done.stderr


def test_a_trace_that_cannot_be_read_is_still_named(tmp_path: Path) -> None:
    done = record(tmp_path, "sh", "-c", f"echo broken > {tmp_path}/bad.kvt")
    assert done.returncode == 0
    assert "bad.kvt  7 B" in done.stderr


def test_killed_by_a_signal_is_128_and_its_number(tmp_path: Path) -> None:
    assert record(tmp_path, "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_command_not_found_is_127(tmp_path: Path) -> None:
    done = record(tmp_path / "fresh", "no-such-command-here")
    assert done.returncode == 127
    assert done.stderr == "kvtrace: error: no-such-command-here: command not found\n"
    assert not (tmp_path / "fresh").exists()


def test_command_not_executable_is_126(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("text")
    done = record(tmp_path, str(tmp_path / "plain"))
    assert done.returncode == 126
    assert done.stderr.count("\n") == 1


def test_unwritable_folder_is_2_before_the_command_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/kvtrace")):
        done = record(out, "touch", str(tmp_path / "started"))
        assert done.returncode == 2, out
        assert done.stderr.startswith("kvtrace: error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "started").exists()


def start(out: Path, code: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "kvtrace", "record", "-o", str(out), "--", sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


CATCH = """
import signal, sys, time
caught = []
for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, lambda s, f: caught.append(s))
print("ready", flush=True)
for _ in range(1500):  # not for ever, should the signal never come
    if caught: break
    time.sleep(0.01)
time.sleep(0.3)
print(*map(int, caught), flush=True)
sys.exit(5)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_to_us_alone_are_passed_on(tmp_path: Path, sent: signal.Signals) -> None:
    child = start(tmp_path, CATCH)
    child.send_signal(sent)
    out, _ = child.communicate(timeout=20)
    assert out == f"{int(sent)}\n"
    assert child.returncode == 5


def test_terminal_ctrl_c_reaches_the_command_once(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    argv = [sys.executable, "-m", "kvtrace", "record", "-o", str(tmp_path), "--", sys.executable, "-c", CATCH]
    code = f"import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv({argv[0]!r}, {argv!r})"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.write(leader, b"\x03")
    out, err = child.communicate(timeout=20)
    os.close(leader)
    os.close(follower)
    assert out == f"{int(signal.SIGINT)}\n"
    assert child.returncode == 5
    assert "Traceback" not in err


def test_the_command_keeps_its_signals(tmp_path: Path) -> None:
    """What we block while we wait must not stay blocked in the command."""
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    assert record(tmp_path, sys.executable, "-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "count"), [("1000", 1000), ("500MB", 500 * 10**6), ("10GiB", 10 << 30), ("1.5k", 1500), ("2g", 2 * 10**9)]
)
def test_sizes(text: str, count: int) -> None:
    assert ByteCount().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1XB", "1e400"])
def test_wrong_sizes(text: str, kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    assert kvtrace_cli("record", "-o", tmp_path, f"--max-bytes={text}", "--", "true").code == 2


def test_no_zombie_wait(tmp_path: Path) -> None:
    """A command that ends at once is noticed at once."""
    begin = time.monotonic()
    record(tmp_path, "true")
    assert time.monotonic() - begin < 5


def test_what_was_recorded_says_whether_it_is_whole(thrash: Path, tmp_path: Path) -> None:
    assert _summary(thrash).startswith("192 requests, 1,245 steps, ")
    assert "end record" not in _summary(thrash)
    (tmp_path / "killed.kvt").write_bytes(thrash.read_bytes()[:40_000])
    assert _summary(tmp_path / "killed.kvt").endswith(", no end record: its engine was killed, or is still running")
    damaged = bytearray(thrash.read_bytes())
    damaged[40_000] ^= 1
    (tmp_path / "damaged.kvt").write_bytes(damaged)
    assert _summary(tmp_path / "damaged.kvt").endswith(", incomplete: damage")
