"""Logs made to do harm cost bounded time and memory, and never a crash or a read out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(tmp_path: Path, first: int, last: int, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "mutate.py"), str(first), str(last), str(tmp_path)],
        env={**os.environ, "POLARS_MAX_THREADS": "2", **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-3000:]}"
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("first", range(0, 3000, 1000))
def test_logs_that_check_out_and_make_no_sense(tmp_path: Path, first: int) -> None:
    run(tmp_path, first, first + 1000)


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    # Machine code with checks of its own must not get into the cache that others use.
    cache = tmp_path / "cache"
    cache.mkdir()
    run(tmp_path, 0, 400, NUMBA_BOUNDSCHECK="1", KVTRACE_CACHE_DIR=str(cache))
