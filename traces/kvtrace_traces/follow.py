"""Reads logs that are still being written: each look takes what was appended since the last one.

Files are opened for reading only and never mapped (a writer cuts its file to its length at the end; a mapping beyond
that would kill this process), no lock is taken, and nothing is read twice but the commit under way. The writer stores a
commit's body before its head, so a tag of zero is where the log ends for now. A head may be seen half stored: a commit
that does not check out is looked at again, and only when it has not changed by then it is damage.

Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces import wire
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.files import logs_of

CHUNK_BYTES = 1 << 18
MAX_BLOCKS = 1 << 27
_RESYNC_BYTES = 1 << 20  # searched per look for where a damaged log goes on


class Followed(NamedTuple):
    """A commit that was appended. ``gap``: something is missing just before it."""

    kind: int
    flags: int
    gap: bool
    body: bytes


class Segment:
    """One file of a log, as far as it was read. ``at``: bytes read; ``done``: its last commit was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.at = wire.PREFIX.size
        self.done = False
        self.damaged = 0
        self._seq = 0
        self._gap = False
        self._doubt: tuple[int, bytes] | None = None  # a commit that did not check out at the last look
        self._searched = 0  # no commit begins before it: the search behind damage goes on there

    def close(self) -> None:
        """Let go of the file. It stays as far read as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def waiting_bytes(self) -> int:
        """Bytes of the file that were not read, allocated ones included."""
        return 0 if self.done or self._fd < 0 else max(0, os.fstat(self._fd).st_size - self.at)

    def skip_to(self, at: int) -> None:
        """Go on with the first frame at or behind byte ``at``; nowhere if there is none."""
        at = max(self.at, at // 4 * 4)
        found = False
        while data := os.pread(self._fd, CHUNK_BYTES + wire.MAX_HEADER_BYTES, at):
            taken = 0
            while taken < min(len(data), CHUNK_BYTES):
                sure = found or data[taken + 3 : taken + 4] == b"K"
                commit = wire.read_commit(data, taken) if sure else "bad"
                found = isinstance(commit, wire.Commit)
                if not isinstance(commit, wire.Commit):
                    taken += 4
                elif commit.kind == wire.OPS and commit.flags & wire.KEY:
                    self.at, self._seq = at + taken, commit.seq
                    return
                else:
                    taken += wire.HEAD_BYTES + len(commit.body)
            at += taken

    def read(self) -> Iterator[Followed]:
        """The whole commits from where the last look ended. Stop taking them whenever that is enough."""
        while not self.done and self._fd >= 0:
            data = os.pread(self._fd, CHUNK_BYTES, self.at)
            taken = 0
            while True:
                commit = wire.read_commit(data, taken)
                if not isinstance(commit, wire.Commit):
                    break
                taken += wire.HEAD_BYTES + len(commit.body)
                self.at += wire.HEAD_BYTES + len(commit.body)
                yield self._followed(commit)
                if self.done:
                    return
            if taken:
                continue
            whole = self._larger(data) if commit == "cut" else None
            if whole is not None:
                self.at += wire.HEAD_BYTES + len(whole.body)
                yield self._followed(whole)
                continue
            if commit != "bad" or not self._damage(data):
                return

    def _followed(self, commit: wire.Commit) -> Followed:
        gap = self._gap or commit.seq != self._seq
        if gap and not self._gap:
            self.damaged += 1
        self._gap, self._seq, self._doubt = False, commit.seq + 1 & 0xFFFF, None
        self.done = commit.kind in (wire.END, wire.NEXT)
        return Followed(commit.kind, commit.flags, gap, commit.body)

    def _larger(self, data: bytes) -> wire.Commit | None:
        """A commit that is larger than what was read of it, if the file has it all by now."""
        if len(data) < wire.HEAD_BYTES:
            return None
        size = wire.HEAD_BYTES + wire.HEAD.unpack_from(data)[1]
        if size <= len(data) or self.at + size > os.fstat(self._fd).st_size:
            return None
        commit = wire.read_commit(os.pread(self._fd, size, self.at), 0)
        return commit if isinstance(commit, wire.Commit) else None

    def _damage(self, data: bytes) -> bool:
        """What to do where a commit does not check out. Whether the log goes on behind it, as far as was seen."""
        doubt = (self.at, data[: wire.HEAD_BYTES])
        if self._doubt != doubt:
            self._doubt, self._searched = doubt, self.at
            return False  # half stored, perhaps: look again
        data = os.pread(self._fd, _RESYNC_BYTES + CHUNK_BYTES, self._searched)
        for probe in range(4 if self._searched == self.at else 0, min(len(data), _RESYNC_BYTES), 4):
            if data[probe + 3 : probe + 4] == b"K" and isinstance(wire.read_commit(data, probe), wire.Commit):
                self.damaged += 1
                self._gap = True
                self.at = self._searched + probe
                return True
        self._searched += min(len(data), _RESYNC_BYTES) // 4 * 4 if len(data) > CHUNK_BYTES else 0
        return False


class Log:
    """The log of one engine: its segments in order. ``header``: of the first one read; ``ended``: its end was read."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.ended = False
        self._files: dict[int, Path] = {}
        self._number = -1
        self._open: Segment | None = None
        self._past = 0  # damage in segments that were left behind
        self._stuck = False

    @property
    def path(self) -> Path:
        """The file that is read now."""
        return self._files[max(self._number, min(self._files))]

    @property
    def damaged(self) -> int:
        """Stretches that did not check out."""
        return self._past + (self._open.damaged if self._open else 0)

    def add(self, number: int, path: Path) -> None:
        """A further segment. A second file with the same number is a copy, and is left out."""
        self._files.setdefault(number, path)

    def join(self, keep_bytes: int) -> None:
        """Before anything is read: leave out what was written before the last ``keep_bytes``, up to a frame."""
        if self._number >= 0 or self.waiting_bytes() <= keep_bytes:
            return
        last = max(self._files)
        try:
            segment = Segment(self._files[last])
        except OSError:
            return
        self._open, self._number = segment, last
        if segment.waiting_bytes() > keep_bytes:
            segment.skip_to(segment.waiting_bytes() - keep_bytes)

    def waiting_bytes(self) -> int:
        """Bytes that are there and were not read; what the writer has allocated ahead counts too."""
        later = sum(_size(path) for number, path in self._files.items() if number > self._number)
        return later + (self._open.waiting_bytes() if self._open else 0)

    def read(self) -> Iterator[Followed]:
        """What was appended since the last look, as far as the caller takes it."""
        gap = False
        while not self.ended:
            if self._open is None:
                following = min((n for n in self._files if n > self._number), default=None)
                if following is None:
                    return
                gap = gap or (self._number >= 0 and following != self._number + 1)
                try:
                    self._open = Segment(self._files[following])
                except OSError:
                    return  # gone, or not ours to read: nothing to follow
                self._number = following
            for commit in self._open.read():
                self._stuck = False
                self.ended = commit.kind == wire.END
                if commit.kind != wire.HEADER:
                    yield commit._replace(gap=commit.gap or gap)
                    gap = False
            if not self._open.done:
                # A writer goes on in the next segment only after the last commit of this one.
                if self._number + 1 not in self._files or not self._stuck:
                    self._stuck = self._number + 1 in self._files
                    return
                gap, self._stuck = True, False
            self._past += self._open.damaged
            self._open.close()
            self._open = None

    def writer_is_gone(self) -> bool:
        """Whether the process that wrote the log ran on this machine and does not any more."""
        pid = self.header.get("pid")
        if type(pid) is not int or pid <= 0 or self.header.get("host") != wire.host_id():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        return False

    def close(self) -> None:
        """Let go of the file that is open."""
        if self._open:
            self._open.close()


class Follower:
    """Finds the logs of a trace: a ``.kvt`` file with its further segments, or a folder, in which logs may appear.

    ``logs``: those found so far, by run; ``notes``: files that are left out, and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs: list[Log] = []
        self.notes: list[str] = []
        self._runs: dict[str, Log] = {}
        self._known: set[Path] = set()

    def look(self) -> None:
        """Find new files. Raises :class:`KvtraceError` where the trace is gone, or its one file is no log."""
        if not self.path.exists():
            raise KvtraceError(f"{self.path} does not exist")
        folder = self.path.is_dir()
        for path in logs_of(self.path):
            if path in self._known:
                continue
            try:
                header = read_header(path)
            except KvtraceError as error:
                if not folder:
                    raise
                self.notes.append(str(error))
                self._known.add(path)
                continue
            if header is None:
                continue
            self._known.add(path)
            run = str(header.get("run_id", path))
            if run not in self._runs:
                if self._runs and not folder:
                    self.notes.append(f"{path.name} beside it is of another run, and left out")
                    continue
                self._runs[run] = Log(header)
                self.logs.append(self._runs[run])
            self._runs[run].add(int(header.get("segment", 0)), path)

    def close(self) -> None:
        """Let go of all files."""
        for log in self.logs:
            log.close()


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a log; None while its writer has not written it. Raises :class:`KvtraceError` for other files."""
    try:
        with path.open("rb") as file:
            start = file.read(wire.PREFIX.size + wire.HEAD_BYTES)
            if not start.strip(b"\0") or (len(start) < wire.PREFIX.size and wire.prefix().startswith(start)):
                return None
            wire.check_prefix(start[: wire.PREFIX.size], str(path))
            length = int.from_bytes(start[wire.PREFIX.size + 4 : wire.PREFIX.size + 8], "little")
            if start[wire.PREFIX.size : wire.PREFIX.size + 4].strip(b"\0") and length <= wire.MAX_HEADER_BYTES:
                start += file.read(length)
    except OSError as error:
        raise KvtraceError(f"{path}: {error.strerror}") from None
    commit = wire.read_commit(start, wire.PREFIX.size)
    if commit in ("end", "cut"):
        return None
    try:
        if not isinstance(commit, wire.Commit) or commit.kind != wire.HEADER:
            raise ValueError("it does not check out")
        header: dict[str, Any] = json.loads(commit.body)
        for name, least in (("block_size", 1), ("granule", 1), ("num_blocks", 0)):
            if type(header[name]) is not int or not least <= header[name] <= MAX_BLOCKS:
                raise ValueError(f"{name} is {str(header[name])[:40]}")
        if type(header.get("segment", 0)) is not int:
            raise ValueError("segment is no number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KvtraceError(f"{path}: its header does not read as one ({error}): the file is damaged") from None
    return header


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
