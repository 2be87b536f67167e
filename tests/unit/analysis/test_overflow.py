"""What a query moves out of memory is gone when its process is, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from kvtrace import overflow

# Puts its blocks together in a table that one GiB cannot hold, and never ends.
HEAVY = (
    "SELECT count(*) FROM (SELECT a.n, b.n, row_number() OVER (ORDER BY hash(a.n, b.n)) AS r "
    "FROM (SELECT unnest(range(100000)) AS n) a, (SELECT unnest(range(100000)) AS n) b) WHERE r > 5"
)


def begun(trace: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A query under way, with a folder of its own under `folder`."""
    code = "from kvtrace import overflow; overflow.SHARE = 1 << 60; from kvtrace.cli import main; main()"
    command = [sys.executable, "-c", code, "sql", str(trace), HEAVY]
    running = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folder)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(f"{overflow.PREFIX}*/lock")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # into the query
    return running


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_of_a_query_that_is_ended(thrash: Path, tmp_path: Path, number: int, code: int) -> None:
    running = begun(thrash, tmp_path)
    running.send_signal(number)
    assert running.wait(60) == code
    assert list(tmp_path.glob(f"{overflow.PREFIX}*")) == []


def test_what_a_killed_process_left_is_removed_by_the_next(thrash: Path, tmp_path: Path) -> None:
    running = begun(thrash, tmp_path)
    (left,) = tmp_path.glob(f"{overflow.PREFIX}*")
    overflow._sweep(tmp_path)
    assert left.exists()  # its process lives
    running.kill()
    running.wait(60)
    assert left.exists()
    (other := tmp_path / f"{overflow.PREFIX}other").mkdir()  # one that is just being made
    overflow._sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_bounds_follow_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connection = duckdb.connect()
    monkeypatch.setattr(overflow, "folder", lambda: tmp_path)
    monkeypatch.setattr(overflow, "free_bytes", lambda: 6 << 30)
    overflow.bound(connection, "mine")
    told = "SELECT current_setting('memory_limit'), current_setting('temp_directory')"
    assert connection.execute(told).fetchall() == [("3.0 GiB", str(tmp_path / "mine"))]
    monkeypatch.setattr(overflow, "free_bytes", lambda: 1000)
    overflow.bound(connection, "mine")
    assert connection.execute(told).fetchall() == [("1.0 GiB", str(tmp_path / "mine"))]


def test_without_a_place_to_write_there_is_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise OSError

    monkeypatch.setattr(overflow, "folder", none)
    connection = duckdb.connect()
    overflow.bound(connection, "mine")
    assert connection.execute("SELECT current_setting('temp_directory'), 41 + 1").fetchall() == [("", 42)]


def test_free_memory_is_told() -> None:
    assert 1 << 20 < overflow.free_bytes() < 1 << 50
