"""`kvtrace top` as its user sees it: frames, keys, a terminal that is left as it was."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtrace.top import render
from kvtrace.top.engine import Engine
from kvtrace.top.render import Look, frame
from kvtrace.top.watch import Watch, Watched
from kvtrace_traces import wire
from kvtrace_traces.follow import Log

CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def watched(path: Path) -> Watched:
    watch = Watch(path)
    watch.look()
    watch.close()
    return watch.engines[0]


def empty(**header: Any) -> Watched:
    known = {"block_size": 16, "granule": 16, "num_blocks": 0, "run_id": "x", **header}
    return Watched(Engine(known), Log(known))


@pytest.mark.parametrize("width", [1, 20, 40, 79, 80, 81, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 16, 24, 60])
@pytest.mark.parametrize("colour", [False, True])
def test_no_line_is_longer_and_no_frame_higher(width: int, height: int, colour: bool, thrash: Path) -> None:
    for shown in (watched(thrash), empty(), empty(num_blocks=9, model="x" * 300, engine="\x1b[2J")):
        lines = frame("a/long/name" * 20, shown, width, height, Look(colour), "engine 1 (2 of 3), ", "q quit")
        assert 0 < len(lines) <= height
        for line in lines:
            plain = CODES.sub("", line)
            assert len(plain) <= width
            assert plain.isprintable()
            assert colour or "\x1b" not in line


def test_a_frame_says_what_the_trace_holds(thrash: Path) -> None:
    lines = frame("thrash.kvt", watched(thrash), 80, 24, Look())
    text = "\n".join(lines)
    assert lines[0].startswith("kvtrace top  thrash.kvt")
    assert lines[0].endswith("ended")
    assert "199 blocks of 32 tokens = 6,368 tokens" in text
    assert "192 finished" in text
    figures = {line[:22].strip(): line[22:].split() for line in lines}
    assert figures["hit ratio (tokens)"][-1] == "48.8%"  # 40,416 of 82,902
    assert figures["preemptions"][-1] == "26"
    assert figures["evictions"][-1] == "1,640"
    assert "an estimate from all chains" in text
    assert "half: 43.2%   as it is: 50.3%   double: 59.8%   (99, 199, 398 blocks)" in text
    assert any(re.fullmatch(r"[0-9a-f]{16} +36 +94% +≥8 +≥256", line) for line in lines)
    bar = next(line for line in lines if line.startswith("blocks"))
    assert len(bar) == 79


def test_plain_terminals_get_ascii(thrash: Path) -> None:
    for line in frame("thrash é", watched(thrash), 80, 24, Look(plain=True)):
        assert line.isascii()
        assert len(line) <= 80


@pytest.mark.parametrize("parts", [(0, 0, 10), (1, 0, 999), (3, 3, 3), (0, 0, 0), (1, 1, 100_000), (500, 499, 1)])
def test_shares_of_the_bar(parts: tuple[int, ...]) -> None:
    cells = render._shares(list(parts), 60)
    assert sum(cells) == (60 if sum(parts) else 0)
    for part, own in zip(parts, cells, strict=True):
        assert (own > 0) == (part > 0)
        assert abs(own - 60 * part / max(1, sum(parts))) <= 2


def test_a_sampled_curve_says_its_rate(thrash: Path) -> None:
    shown = watched(thrash)
    shown.engine.curve.rate = 0.0625
    assert "an estimate from 6.25% of the chains" in "\n".join(frame("t", shown, 80, 24, Look()))


def test_losses_are_said(thrash: Path) -> None:
    shown = watched(thrash)
    shown.engine.losses += ["disk: full", "a part of the log is missing"]
    assert "incomplete: 2 losses, the last: a part of the log is missing" in "\n".join(
        frame("t", shown, 80, 24, Look())
    )


# ---------------------------------------------------------------- the command


def test_once(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("top", thrash, "--once")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert len(done.out.splitlines()) <= 24
    assert kvtrace_cli("top", thrash).out == done.out  # no terminal: as with --once


def test_the_frame_in_the_docs(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/timelines.md").read_text()
    shown = text.split("$ kvtrace top traces/samples/thrash.kvt --once --window 1\n")[1].split("```")[0]
    assert kvtrace_cli("top", thrash, "--once", "--window", "1").out == shown


def test_the_window(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    assert "last 0.5 s" in kvtrace_cli("top", thrash, "--once", "--window", "0.5").out


def test_several_engines(kvtrace_cli: Callable[..., Any], two_engines: Path) -> None:
    done = kvtrace_cli("top", two_engines, "--once")
    assert done.code == 0
    assert "engine 0 (1 of 2), tiny-llama" in done.out
    assert "engine 1 (2 of 2), tiny-llama" in done.out


def test_a_log_without_its_end(kvtrace_cli: Callable[..., Any], cut: Path) -> None:
    done = kvtrace_cli("top", cut, "--once")
    assert done.code == 0
    assert done.out.splitlines()[0].endswith(("recording", "killed: no end record"))


def test_a_writer_that_is_gone(tmp_path: Path, thrash: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    log = Log({"pid": child.pid, "host": wire.host_id()})
    assert log.writer_is_gone()
    assert not Log({"pid": os.getpid(), "host": wire.host_id()}).writer_is_gone()
    assert not Log({"pid": child.pid, "host": "another"}).writer_is_gone()
    assert not Log({"pid": "1", "host": wire.host_id()}).writer_is_gone()
    assert Watched(watched(thrash).engine, log).status == "killed: no end record"


def test_damage_is_exit_code_3(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    done = kvtrace_cli("top", damaged, "--once")
    assert done.code == 3
    assert "incomplete" in done.out


@pytest.mark.parametrize("content", ["", "not a log, whatever its name says it is", "\x89KVT"])
def test_what_is_no_log(kvtrace_cli: Callable[..., Any], content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.kvt"
    path.write_text(content, "latin-1")
    done = kvtrace_cli("top", path, "--once")
    assert done.code == 1
    assert done.err.startswith("kvtrace: error: ")
    assert len(done.err.splitlines()) == 1


def test_bad_usage(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    assert kvtrace_cli("top", tmp_path / "none").code == 2
    assert kvtrace_cli("top", thrash, "--interval", "0").code == 2
    done = kvtrace_cli("top", tmp_path, "--once")
    assert done.code == 1
    assert "holds no log yet: start a server with `kvtrace record" in done.err


def test_an_import(kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "m.jsonl"
    source.write_text(json.dumps({"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}) + "\n")
    assert kvtrace_cli("import", "mooncake", source, "-o", tmp_path / "m.kvt").code == 0
    done = kvtrace_cli("top", tmp_path / "m.kvt", "--once")
    assert done.code == 1
    assert "is an import, in which nothing runs" in done.err


# ---------------------------------------------------------------- in a terminal


class Terminal:
    """The command in a terminal of 80 columns."""

    def __init__(self, *args: object, rows: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.out = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvtrace", "top", *map(str, args)], stdin=self.slave, stdout=self.slave,
            stderr=self.slave, start_new_session=True, env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def read_until(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.out:
            assert time.monotonic() < until, self.out
            if select.select([self.master], [], [], 0.2)[0]:
                self.out += os.read(self.master, 1 << 16).decode("utf-8", "replace")

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        while select.select([self.master], [], [], 0)[0]:
            self.out += os.read(self.master, 1 << 16).decode("utf-8", "replace")
        return code

    def is_restored(self) -> bool:
        shown = self.out.rfind("\x1b[?25h") > self.out.rfind("\x1b[?25l") >= 0
        back = self.out.rfind("\x1b[?1049l") > self.out.rfind("\x1b[?1049h") >= 0
        return shown and back and termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.mark.parametrize("how", ["q", "\x03", "\x04", "SIGINT", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_as_it_was(how: str, thrash: Path) -> None:
    terminal = Terminal(thrash, "--interval", "0.2")
    try:
        terminal.read_until("hot prefixes")
        assert termios.tcgetattr(terminal.slave) != terminal.before
        if how.startswith("SIG"):
            os.kill(terminal.process.pid, getattr(signal, how))
        else:
            terminal.press(how)
        code = terminal.end()
        assert code == {"SIGTERM": 128 + signal.SIGTERM, "SIGHUP": 128 + signal.SIGHUP}.get(how, 0)
        assert terminal.is_restored()
        assert "Traceback" not in terminal.out
    finally:
        terminal.close()


def test_it_follows_a_folder_and_switches_engines(two_engines: Path, tmp_path: Path) -> None:
    folder = tmp_path / "live"
    folder.mkdir()
    terminal = Terminal(folder, "--interval", "0.1")
    try:
        terminal.read_until("waiting for an engine to start")
        data = {path.name: path.read_bytes() for path in sorted(two_engines.iterdir())}
        first, second = data
        half = len(data[first]) // 2
        (folder / first).write_bytes(data[first][:half])
        terminal.read_until("hot prefixes")
        with (folder / first).open("ab") as file:
            file.write(data[first][half:])
        terminal.read_until("192")
        terminal.read_until("ended")
        (folder / second).write_bytes(data[second])
        terminal.read_until("engine 1 (2 of 2)")
        terminal.press("\t")
        terminal.read_until("engine 0 (1 of 2)")
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_restored()
    finally:
        terminal.close()


def test_a_trace_that_goes_away(thrash: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.kvt"
    path.write_bytes(thrash.read_bytes())
    terminal = Terminal(path, "--interval", "0.1")
    try:
        terminal.read_until("hot prefixes")
        path.unlink()
        assert terminal.end() == 1
        assert terminal.is_restored()
        assert "does not exist" in terminal.out
    finally:
        terminal.close()
