"""What a query may take: of memory, and of the disk where the memory does not do.

A process has one folder for what DuckDB moves out of memory, and for what else is gone when it ends: an exit of any
kind removes it, but for SIGKILL. What that left behind, the next process removes: it knows by the lock that a living
process holds, in whatever container it lives.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import duckdb

PREFIX = "kvtrace-sql-"
LEAST_BYTES = 1 << 30
SHARE = 2  # of what is free, DuckDB takes the half: the rest is for the tables that it reads, which are not its own


@cache
def folder() -> Path:
    """The folder of this process, made when first asked for. Raises OSError where none can be made."""
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    atexit.register(_remove, made, os.getpid())
    lock = os.open(made / "new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)  # open, and locked, until the end
    fcntl.flock(lock, fcntl.LOCK_EX)
    (made / "new").rename(made / "lock")
    _sweep(made.parent)
    return made


def _remove(made: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked off
        shutil.rmtree(made, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove the folders whose processes are dead: nobody holds their lock."""
    for other in parent.glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), other.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other.parent, ignore_errors=True)


def bound(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Set what the queries of a connection may take, and where they put what does not fit. ``name``: the connection's
    own."""
    connection.execute(f"SET memory_limit = '{max(LEAST_BYTES, free_bytes() // SHARE)}B'")
    try:
        place = folder() / name
        room = shutil.disk_usage(place.parent).free // SHARE
    except OSError:  # nothing can be written: then only memory is left
        connection.execute("SET temp_directory = ''")
        return
    connection.execute(f"SET temp_directory = '{str(place).replace(chr(39), chr(39) * 2)}'")
    with contextlib.suppress(duckdb.CatalogException):  # DuckDB before 1.1 has no such setting
        connection.execute(f"SET max_temp_directory_size = '{room}B'")


def free_bytes() -> int:
    """Memory that is to be had without swapping, as the machine says, or the container where that is less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free
