"""Reads on in a trace, and says what it finds: the engines, and how each of their logs stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from kvtrace.top.engine import Engine
from kvtrace_traces import wire
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.follow import Follower, Log

KEEP_BYTES = 64 << 20
_LOOK_AT_CLOCK = 64  # commits
_QUIET_S = 2.0
_ALLOCATED_BYTES = 8 << 20  # more than a writer allocates ahead


class Watched(NamedTuple):
    """An engine and its log. `behind`: the last look ended before it had read all."""

    engine: Engine
    log: Log
    behind: bool = False

    @property
    def status(self) -> str:
        """How the log stands, in a few words."""
        if self.log.ended:
            return "ended"
        left = self.log.waiting_bytes()
        if self.behind and left > _ALLOCATED_BYTES:
            return f"reading, {left / 2**20:,.0f} MiB to go"
        if self.log.writer_is_gone():
            return "killed: no end record"
        quiet = self._quiet_s()
        return "recording" if quiet is None or quiet < _QUIET_S else f"recording, nothing new for {quiet:,.0f} s"

    def _quiet_s(self) -> float | None:
        """Seconds since the last step, where the log is written on this machine, by this start of its clock."""
        begun = self.log.header.get("clock_monotonic_ns")
        if type(begun) is not int or self.log.header.get("host") != wire.host_id():
            return None
        return (time.monotonic_ns() - begun - self.engine.totals.time_ns) / 1e9


class Watch:
    """A trace that may still be written. `engines`, in order of their starts; `notes`: files that are left out."""

    def __init__(self, path: Path, window_s: float = 10.0, keep_bytes: int | None = KEEP_BYTES) -> None:
        """`keep_bytes`: of a longer log the beginning is left out; None: of none."""
        self.path = path
        self._keep_bytes = keep_bytes
        self.engines: list[Watched] = []
        self._window_s = window_s
        self._follower = Follower(path)

    @property
    def notes(self) -> list[str]:
        """What is left out, and why."""
        return self._follower.notes

    def look(self, seconds: float | None = None) -> None:
        """Read what was appended since the last look, for at most so many `seconds`; the next look goes on there.

        Raises KvtraceError for what is no recorded trace."""
        self._follower.look()
        for log in self._follower.logs[len(self.engines) :]:
            if log.header.get("source") == "import":
                raise KvtraceError(
                    f"{self.path} is an import, in which nothing runs: try `kvtrace info` or `kvtrace stats`"
                )
            if self._keep_bytes is not None:
                log.join(self._keep_bytes)
            self.engines.append(Watched(Engine(log.header, self._window_s), log))
        until = None if seconds is None else time.monotonic() + seconds
        # Each gets its share of the time that is left, so that no engine waits for another one's long log.
        self.engines = [
            watched._replace(behind=_read(watched, _share(until, len(self.engines) - i)))
            for i, watched in enumerate(self.engines)
        ]

    def close(self) -> None:
        """Let go of all files."""
        self._follower.close()


def _share(until: float | None, among: int) -> float | None:
    """When to stop, for the first of so many that share the time."""
    if until is None:
        return None
    now = time.monotonic()
    return now + max(0.0, until - now) / among


def _read(watched: Watched, until: float | None) -> bool:
    """Read on until `until`; whether that was not enough. Some commits are read even when it is past."""
    for n, commit in enumerate(watched.log.read(), 1):
        watched.engine.take(commit)
        if until is not None and n % _LOOK_AT_CLOCK == 0 and time.monotonic() >= until:
            return True
    return False
