"""The writer keeps its promises: nothing committed is lost, nothing waits, and what cannot be written is said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import generate
import pytest
import slow_commits
import slow_reader
from compare import assert_same
from test_recovery import stated

from kvtrace_traces import Trace, open_trace, wire, writer
from kvtrace_traces.writer import LogWriter, Stopped

HERE = Path(__file__).parent
SETTINGS = generate.Settings(seed=21, steps=300, frame_commits=10, arrivals=0.8)


def header() -> dict[str, Any]:
    return generate.header(SETTINGS)


def fill(log: LogWriter, bodies: list[tuple[int, bytes]]) -> tuple[int, Stopped | None]:
    """Write until the log stops. How many commits it took, and why it stopped."""
    for i, (flags, body) in enumerate(bodies):
        try:
            log.write(flags, body)
        except Stopped as stopped:
            return i, stopped
    return len(bodies), None


def events_of(bodies: list[tuple[int, bytes]]) -> int:
    return sum(writer.block_events(body) for _, body in bodies)


def settle(log: LogWriter) -> None:
    """Wait until the writer's own thread has cut the file to its length, unless the disk of the test hangs."""
    log._thread.join(timeout=2)


def stop(log: LogWriter, stopped: Stopped, bodies: list[tuple[int, bytes]], taken: int) -> None:
    """What the tracer does when the log stops: the commit that was refused is lost."""
    log.lose({"reason": stopped.reason, "time_ns": 1, "commits": 1, "events": events_of(bodies[taken : taken + 1]),
              "detail": str(stopped)})  # fmt: skip
    log.close(None)
    settle(log)


def assert_stopped(path: Path, reason: str, bodies: list[tuple[int, bytes]], taken: int) -> Trace:
    """The log reads up to where it stopped, and its loss makes up the rest of what was handed to it."""
    trace = open_trace(path)
    assert trace.damaged_frames == 0
    assert not trace.complete
    assert trace.losses["reason"].to_list() == [reason]
    assert_same(trace, slow_reader.read([path.read_bytes()]))
    assert stated(trace) + trace.dropped == events_of(bodies[: taken + 1])
    return trace


@pytest.fixture(scope="module")
def bodies() -> list[tuple[int, bytes]]:
    return generate.play(SETTINGS)[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_recording_and_says_so(small_disk: Path, bodies: list[tuple[int, bytes]]) -> None:
    log = LogWriter(str(small_disk / "log"), header(), window_bytes=65536)
    many = bodies + [(0, bodies[-1][1] * 2)] * 100_000
    taken, stopped = fill(log, many)
    assert stopped is not None
    assert stopped.reason == "disk"
    assert "No space left" in str(stopped)
    stop(log, stopped, many, taken)
    (log_file,) = small_disk.glob("*.kvt")
    trace = open_trace(log_file)
    assert trace.losses["reason"][0] == "disk"
    assert trace.block_events.height


@pytest.mark.parametrize("settle", [True, False])
def test_a_disk_that_fills_up(
    tmp_path: Path, bodies: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch, settle: bool
) -> None:
    real, room = os.posix_fallocate, [6]

    def fallocate(*args: int) -> None:
        if not settle:
            time.sleep(0.02)  # the error comes while commits queue
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    log = LogWriter(str(tmp_path / "log"), header(), window_bytes=4096)
    taken, stopped = 0, None
    for taken, (flags, body) in enumerate(bodies):  # noqa: B007
        try:
            log.write(flags, body)
        except Stopped as error:
            stopped = error
            break
        time.sleep(0.001)
    assert stopped is not None
    assert stopped.reason == "disk"
    stop(log, stopped, bodies, taken)
    assert_stopped(tmp_path / "log.kvt", "disk", bodies, taken)


def test_a_read_only_folder_is_an_error_before_anything_is_hooked(tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        LogWriter("/proc/log", header())
    with pytest.raises(FileNotFoundError):
        LogWriter(str(tmp_path / "missing" / "log"), header())


def test_a_log_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "log.kvt").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        LogWriter(str(tmp_path / "log"), header())
    with pytest.raises(FileExistsError):
        writer.write_file(str(tmp_path / "log.kvt"), header(), lambda: iter(()), dict)
    assert (tmp_path / "log.kvt").read_bytes() == b"mine"


def test_a_stalled_disk_never_makes_the_caller_wait(
    tmp_path: Path, bodies: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, hang = os.posix_fallocate, threading.Event()
    log_thread = threading.get_ident()

    def fallocate(*args: int) -> None:
        if threading.get_ident() != log_thread:
            hang.wait()
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(writer, "QUEUE_BYTES", 50_000)
    monkeypatch.setattr(writer, "CLOSE_SECONDS", 0.05)
    log = LogWriter(str(tmp_path / "log"), header(), window_bytes=4096)
    slowest, stopped, taken = 0.0, None, 0
    tracemalloc.start()
    for taken, (flags, body) in enumerate(bodies * 50):  # noqa: B007
        begun = time.perf_counter()
        try:
            log.write(flags, body)
        except Stopped as error:
            stopped = error
            break
        slowest = max(slowest, time.perf_counter() - begun)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stopped is not None
    assert stopped.reason == "stalled"
    assert slowest < 0.5  # a wait for the disk would last for ever
    assert held < 50_000 * 4
    stop(log, stopped, bodies * 50, taken)
    assert_stopped(tmp_path / "log.kvt", "stalled", bodies * 50, taken)
    hang.set()


def test_a_disk_that_lags_loses_nothing_and_keeps_the_order(
    tmp_path: Path, bodies: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.posix_fallocate

    def fallocate(*args: int) -> None:
        time.sleep(0.003)
        real(*args)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    log = LogWriter(str(tmp_path / "log"), header(), window_bytes=4096)
    for i, (flags, body) in enumerate(bodies):
        log.write(flags, body)
        time.sleep(0.001 if i % 40 == 0 else 0)
    log.close({"time_ns": 0, "commits": len(bodies), "events": events_of(bodies)})
    found = list(wire.commits((tmp_path / "log.kvt").read_bytes()))
    assert [c.body for c in found[1:-1]] == [body for _, body in bodies]
    assert open_trace(tmp_path / "log.kvt").complete


@pytest.mark.parametrize("bound", [3000, 5000, 20_000, 50_000])
@pytest.mark.parametrize("segment", [8192, 1 << 30])
def test_a_bound_is_never_exceeded(tmp_path: Path, bodies: list[tuple[int, bytes]], bound: int, segment: int) -> None:
    log = LogWriter(str(tmp_path / "log"), header(), max_bytes=bound, segment_bytes=segment, window_bytes=4096)
    taken, stopped = 0, None
    for taken, (flags, body) in enumerate(bodies):  # noqa: B007
        try:
            if flags:
                log.rotate()
            log.write(flags, body)
        except Stopped as error:
            stopped = error
            break
        time.sleep(0.0005)
    assert stopped is not None
    assert stopped.reason == "max-bytes"
    stop(log, stopped, bodies, taken)
    files = sorted(tmp_path.glob("*.kvt"), key=lambda f: f.stat().st_mtime_ns)
    assert sum(f.stat().st_size for f in files) <= bound
    trace = open_trace(tmp_path)
    assert trace.losses["reason"].to_list() == ["max-bytes"]
    assert not trace.damaged_frames
    assert not trace.complete
    assert not trace.warnings  # the loss says why there is no end
    assert stated(trace) + trace.dropped == events_of(bodies[: taken + 1])


def test_a_bound_that_a_header_fills_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="bound"):
        LogWriter(str(tmp_path / "log"), header(), max_bytes=500)
    assert not list(tmp_path.iterdir())


def test_a_loss_with_a_long_story_still_fits(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "log"), header(), window_bytes=4096)
    log.lose({"reason": "bug", "time_ns": 0, "commits": 1, "events": 3, "detail": "é" * 400})
    log.close(None)
    settle(log)
    trace = open_trace(tmp_path / "log.kvt")
    assert trace.dropped == 3
    assert trace.losses["detail"][0].startswith("ééé")


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    log = LogWriter(str(tmp_path / "log"), header(), window_bytes=1 << 16)
    body = bytes(4096)
    tracemalloc.start()
    for i in range(2000):
        log.write(0, body)
        if i % 16 == 0:
            time.sleep(0.001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    log.close({"time_ns": 0, "commits": 2000, "events": 0})  # waits for a disk that lags
    settle(log)
    assert (tmp_path / "log.kvt").stat().st_size > 2000 * 4096
    assert peak < 2_000_000


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path, bodies: list[tuple[int, bytes]]) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import generate
from kvtrace_tracer.log import Log
from kvtrace_traces.writer import LogWriter
bodies = generate.play(generate.Settings(seed=21, steps=20, frame_commits=10, arrivals=0.8))[0]
writer = LogWriter({str(tmp_path / "log")!r}, generate.header(generate.Settings(seed=21)), window_bytes=4096)
log = Log(writer, 0, lambda: None)
os.register_at_fork(after_in_child=log.abandon)
def put(flags, body):
    if flags: log.begin_frame()
    log.words.frombytes(body)
    log.events += 0
    log.commit()
for flags, body in bodies[:10]: put(flags, body)
child = os.fork()
if child == 0:
    for flags, body in bodies[10:15]:
        try: put(flags, body)
        except Exception: pass
    log.close()
    os._exit(0)
os.waitpid(child, 0)
for flags, body in bodies[10:]: put(flags, body)
log.close()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    found = list(wire.commits((tmp_path / "log.kvt").read_bytes()))
    expected = generate.play(generate.Settings(seed=21, steps=20, frame_commits=10, arrivals=0.8))[0]
    assert [c.body for c in found[1:-1]] == [body for _, body in expected]
    assert found[-1].kind == wire.END


KILLED = f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import generate
from kvtrace_traces.writer import LogWriter
settings = generate.Settings(seed=21, steps=300, frame_commits=10, arrivals=0.8)
bodies = generate.play(settings)[0]
log = LogWriter(sys.argv[1], generate.header(settings), segment_bytes=8192, window_bytes=4096)
os.write(1, b"!")
for i, (flags, body) in enumerate(bodies):
    if flags and i:
        until = time.monotonic() + 1
        while log.segment_bytes >= 8192 and not log.rotate() and time.monotonic() < until:
            time.sleep(0.0002)
    log.write(flags, body)
    if not log._queue:
        os.write(1, b".")
    time.sleep(0.0005)
time.sleep(60)
"""


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_process_loses_nothing_that_it_committed(
    tmp_path: Path, bodies: list[tuple[int, bytes]], seed: int
) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "log")], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        time.sleep(random.Random(seed).random() * 0.4)
        child.send_signal(signal.SIGKILL)
        committed = child.stdout.read().count(b".")
    trace = open_trace(tmp_path)
    files = sorted(tmp_path.glob("*.kvt"), key=lambda f: (len(f.name), f.name))
    data = [f.read_bytes() for f in files]
    data = [d for d in data if any(d[:16])]
    read = [c.body for d in data for c in slow_commits.commits_of(d) if c.kind == wire.OPS]
    assert len(read) >= committed
    assert read == [body for _, body in bodies[: len(read)]]
    assert_same(trace, slow_reader.read(data))
    assert not trace.damaged_frames
    assert not trace.lossy
    assert not trace.complete
    assert trace.warnings


def test_closing_twice_and_writing_after_it(tmp_path: Path, bodies: list[tuple[int, bytes]]) -> None:
    log = LogWriter(str(tmp_path / "log"), header())
    log.write(*bodies[0])
    log.close({"events": events_of(bodies[:1])})
    log.close({"events": 0})
    with pytest.raises(Stopped):
        log.write(*bodies[1])
    assert open_trace(tmp_path / "log.kvt").complete


def test_write_file_removes_what_it_could_not_finish(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[int, bytes]]:
        yield 1, b"\0" * 4
        raise RuntimeError("source ended")

    with pytest.raises(RuntimeError):
        writer.write_file(str(tmp_path / "log.kvt"), header(), failing, dict)
    assert not list(tmp_path.iterdir())


def test_a_header_says_which_format_it_is_of(tmp_path: Path) -> None:
    LogWriter(str(tmp_path / "log"), header()).close({})
    (first, _) = wire.commits((tmp_path / "log.kvt").read_bytes())
    assert json.loads(first.body)["log_format"] == wire.FORMAT
