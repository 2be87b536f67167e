"""Writes the commits of a ``.kvt`` file so that they outlive the process. Standard library only.

A serving process is often ended by a signal that runs no exit hook, so what is only buffered is lost. The writer
therefore copies every commit into a shared mapping of the file: from then on the kernel owns the bytes, at the price
of a memory copy and without a system call. The mapping is a row of *windows*, allocated on disk ahead of time by
a background thread (``posix_fallocate``: a full disk is an error there, where a sparse mapping would kill the process
with SIGBUS). The serving thread never waits: without a window the commits queue up to a bound, then recording ends.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any
from zlib import crc32

from kvtrace_traces import wire
from kvtrace_traces.walk import block_events

WINDOW_BYTES = 1 << 20
WINDOWS_AHEAD = 4
QUEUE_BYTES = 64 << 20
RESERVE_BYTES = 1024  # kept free at the end of what is allocated, for the record of a loss
SEGMENT_BYTES = 4 << 30
CLOSE_SECONDS = 5.0
LEFT_WORDS = 2  # at the start of what :meth:`LogWriter.commit` takes
_HEAD = struct.Struct("=III")
_OPS_TAG = wire.tag(wire.OPS, 0, 0)


class Stopped(Exception):
    """The log cannot grow any more. ``reason`` is one of ``schema.LOSS_REASONS``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _File:
    """A file that grows by windows. The background thread allocates, truncates and closes; the owner only writes."""

    def __init__(self, path: str, window_bytes: int) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.window_bytes = window_bytes
        self.allocated = 0
        self.ahead: deque[mmap.mmap] = deque()

    def window(self) -> mmap.mmap:
        start = self.allocated
        os.posix_fallocate(self.fd, start, self.window_bytes)
        # Zeros again, into the page cache: the first store to a page of it then needs neither the file system's journal
        # nor, where the kernel keeps large folios, a fault of its own.
        os.pwrite(self.fd, bytes(self.window_bytes), start)
        self.allocated = start + self.window_bytes
        return mmap.mmap(self.fd, self.window_bytes, offset=start)

    def close(self, size: int) -> None:
        for window in self.ahead:
            window.close()
        os.ftruncate(self.fd, size)
        os.close(self.fd)


class LogWriter:
    """A ``.kvt`` log under construction.

    ``stem``: path without ``.kvt``; the first file is ``<stem>.kvt``, rotated ones ``<stem>.1.kvt`` and so on, each
    created exclusively (:class:`FileExistsError`). ``header``: JSON object; ``segment`` is added. ``max_bytes``: bound
    of the whole log. Not thread-safe but for its own background thread: one thread calls it.
    """

    def __init__(
        self,
        stem: str,
        header: dict[str, Any],
        max_bytes: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._stem = stem
        self._header = header
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._window_bytes = window_bytes
        self._segment = 0
        self._seq = 0
        self._done_bytes = 0  # of finished segments
        self.commits = 0
        self.pid = os.getpid()
        self._error: OSError | None = None
        self._wake = threading.Event()
        self._closing = False
        self._abandoned = False
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._base = 0  # file offset of the window
        self._pos = 0  # offset in the window
        self._limit = 0
        self._flags = 0  # of the next commit; the limit is 0 then
        self._retired: deque[tuple[_File, int]] = deque()
        self._next: _File | None = None
        self._next_window: mmap.mmap | None = None
        first = self._head_bytes()
        if max_bytes is not None and max_bytes < first + RESERVE_BYTES:
            raise Stopped("max-bytes", f"the bound of {max_bytes:,} bytes leaves no room for more than a header")
        self._file = _File(stem + ".kvt", window_bytes)
        try:
            self._window = self._file.window()
            while first + RESERVE_BYTES > self._room():
                self._file.ahead.append(self._file.window())
            self._begin_segment()
        except BaseException:
            os.close(self._file.fd)
            os.unlink(self._file.path)
            raise
        self._set_limit()
        self._thread = threading.Thread(target=self._allocate, name="kvtrace-writer", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- the serving thread

    def write(self, flags: int, body: bytes) -> None:
        """Commit operations (length a multiple of 4). Raises :class:`Stopped` when the log cannot take them."""
        self.flag(flags)
        self.commit(array("I", bytes(4 * LEFT_WORDS) + body))

    def flag(self, flags: int) -> None:
        """The next commit has these flags."""
        if flags:
            self._flags = flags
            self._limit = 0

    def commit(self, words: array[int]) -> int:
        """Commit operations, if there are any, and take them out of ``words``, whose first :data:`LEFT_WORDS` words are
        ours and stay. Returns how many commits there were.

        This runs in every step in the serving thread: the common case is written out, with the fewest calls and copies.
        The words that are ours take the tag and the length, so that the checksum needs no bytes but these; all of it
        is stored four bytes on, where the operations belong, and then the head over what is not in its place.
        """
        size = 4 * len(words) - 8
        start = self._pos
        end = start + 12 + size
        if end > self._limit or not size:
            if size:
                self._write_slowly(wire.OPS, self._flags, words[LEFT_WORDS:].tobytes())
                if self._flags:
                    self._flags = 0
                    if not self._queue:
                        self._set_limit()
                del words[LEFT_WORDS:]
            return self.commits
        seq = self._seq
        words[0] = tag = _OPS_TAG | seq & 0xFFFF
        words[1] = size
        window = self._window
        window[start + 4 : end] = words
        window[start : start + 12] = _HEAD.pack(tag, size, crc32(words))  # last: see the invariant in ``wire``
        del words[2:]
        self._pos = end
        self._seq = seq + 1
        self.commits = commits = self.commits + 1
        return commits

    def _write_slowly(self, kind: int, flags: int, body: bytes) -> None:
        if self._closing:
            raise Stopped("bug", f"{self.path}: written to after it was closed")
        size = wire.HEAD_BYTES + len(body)
        if self._max_bytes is not None and self.total_bytes + size + RESERVE_BYTES > self._max_bytes:
            raise Stopped("max-bytes", f"the log reached its bound of {self._max_bytes:,} bytes")
        data = wire.head(kind, flags, self._seq, body) + body
        if self._queue or size + RESERVE_BYTES > self._room():
            if self._error is not None:
                raise Stopped("disk", f"{self._file.path}: {self._error.strerror}")
            if self._queued + size > QUEUE_BYTES:
                raise Stopped("stalled", f"{self._file.path}: the disk took nothing for {self._queued:,} bytes")
            self._queue.append(data)
            self._queued += size
            self._limit = 0  # in order: what comes next queues too
        else:
            self._store(data)
        self._seq += 1
        self.commits += 1
        self._drain()

    def rotate(self) -> bool:
        """Go on in the next segment if this one is full and the next is ready. The caller writes a frame next."""
        if self.segment_bytes < self._segment_bytes or self._queue or self._next_window is None:
            return False
        first = self._head_bytes()
        if self._room() < wire.HEAD_BYTES + RESERVE_BYTES or first + RESERVE_BYTES > self._window_bytes:
            return False
        if self._max_bytes is not None and self.total_bytes + wire.HEAD_BYTES + first + RESERVE_BYTES > self._max_bytes:
            return False  # the next commits will say so
        self._write_slowly(wire.NEXT, 0, b"")
        size = self.segment_bytes
        self._window.close()
        self._retired.append((self._file, size))
        self._done_bytes += size
        assert self._next is not None
        self._file, self._window = self._next, self._next_window
        self._next, self._next_window = None, None
        self._base = self._pos = 0
        self._seq = 0
        self._segment += 1
        self._begin_segment()
        self._set_limit()
        self._wake.set()
        return True

    def lose(self, loss: dict[str, Any]) -> None:
        """Record a loss, in the room that is kept for it. Commits that still wait for the disk are part of it: they
        are given up, and added to ``commits`` and ``events``."""
        waiting = list(self._queue)
        self._queue.clear()
        self._queued = 0
        self._seq -= len(waiting)
        loss = dict(loss)
        if waiting:
            loss["commits"] += len(waiting)
            loss["events"] += sum(block_events(data[wire.HEAD_BYTES :]) for data in waiting)
        body = _json(loss)
        while wire.HEAD_BYTES + len(body) > RESERVE_BYTES and loss["detail"]:
            loss["detail"] = loss["detail"][: len(loss["detail"]) // 2]
            body = _json(loss)
        if wire.HEAD_BYTES + len(body) <= self._room():
            self._store(wire.head(wire.LOSS, 0, self._seq, body) + body)
            self._seq += 1
        self._limit = 0

    def close(self, end: dict[str, Any] | None) -> None:
        """Write the end record, and let the background thread cut the file to its length and close it. Idempotent.

        Waits a moment for a disk that lags; what it does not take by then is recorded as lost. With ``end`` None (a
        recording that failed while the engine serves) nothing is written and nobody waits.
        """
        if self._closing:
            return
        if end is not None:
            self._await_disk()
        if end is not None and self._queue:
            reason = "stalled" if self._error is None else "disk"
            at = end.get("time_ns", 0)
            self.lose({"reason": reason, "time_ns": at, "commits": 0, "events": 0, "detail": "at the end"})
        elif end is not None:
            body = _json(end)
            if wire.HEAD_BYTES + len(body) <= self._room():
                self._store(wire.head(wire.END, 0, self._seq, body) + body)
        self._closing = True
        self._limit = 0
        self._wake.set()
        if end is not None:
            self._thread.join(
                timeout=CLOSE_SECONDS
            )  # where the disk hangs, the file stays as a killed process leaves it

    def abandon(self) -> None:
        """In a forked child: forget the log without touching the parent's file."""
        self._abandoned = True
        self._closing = True
        self._limit = 0
        self._queue.clear()

    def _await_disk(self) -> None:
        until = time.monotonic() + CLOSE_SECONDS
        while self._queue and self._error is None and time.monotonic() < until:
            self._wake.set()
            time.sleep(0.005)
            self._drain()

    @property
    def segment_bytes(self) -> int:
        """Bytes written to the current segment."""
        return self._base + self._pos

    @property
    def total_bytes(self) -> int:
        """Bytes written to all segments, queued ones included."""
        return self._done_bytes + self._base + self._pos + self._queued

    @property
    def path(self) -> str:
        """The file that is written now."""
        return self._file.path

    def _begin_segment(self) -> None:
        self._store(wire.prefix())
        body = self._header_body()
        self._store(wire.head(wire.HEADER, 0, self._seq, body) + body)
        self._seq += 1

    def _header_body(self) -> bytes:
        return _json({**self._header, "log_format": wire.FORMAT, "segment": self._segment})

    def _head_bytes(self) -> int:
        """Bytes at the start of each segment. The segment's number may have a few digits more than now."""
        return wire.PREFIX.size + wire.HEAD_BYTES + len(self._header_body()) + 16

    def _room(self) -> int:
        return self._window_bytes - self._pos + len(self._file.ahead) * self._window_bytes

    def _store(self, data: bytes) -> None:
        """Copy ``data`` on, across windows; the caller has seen that there is room. Head last: see ``wire``."""
        start, size = self._pos, len(data)
        if start + size <= self._window_bytes:
            self._window[start + wire.HEAD_BYTES : start + size] = data[wire.HEAD_BYTES :]
            self._window[start : start + min(size, wire.HEAD_BYTES)] = data[: wire.HEAD_BYTES]
            self._pos = start + size
            return
        windows = [self._window]
        pieces = []
        at, offset = 0, start
        while at < size:
            if offset == self._window_bytes:
                windows.append(self._file.ahead.popleft())
                self._base += self._window_bytes
                offset = 0
            n = min(size - at, self._window_bytes - offset)
            pieces.append((windows[-1], offset, at, n))
            at, offset = at + n, offset + n
        for window, offset, at, n in reversed(pieces):
            window[offset : offset + n] = data[at : at + n]
        self._window, self._pos = windows[-1], pieces[-1][1] + pieces[-1][3]
        self._set_limit()
        for window in windows[:-1]:
            window.close()
        self._wake.set()

    def _set_limit(self) -> None:
        """Where in the window :meth:`commit` has to look closer."""
        self._limit = 0 if self._flags else self._window_bytes - RESERVE_BYTES
        if self._max_bytes is not None:
            self._limit = min(self._limit, self._max_bytes - RESERVE_BYTES - self._done_bytes - self._base)

    def _drain(self) -> None:
        if not self._queue:
            return
        while self._queue and len(self._queue[0]) + RESERVE_BYTES <= self._room():
            data = self._queue.popleft()
            self._queued -= len(data)
            self._store(data)
        if self._queue:
            self._limit = 0  # which storing may have raised
        else:
            self._set_limit()
        self._wake.set()

    # ---------------------------------------------------------------- the background thread

    def _allocate(self) -> None:
        try:
            while not self._closing:
                while self._retired:
                    retired, size = self._retired.popleft()
                    retired.close(size)
                file = self._file
                if self._next_window is None and file.allocated >= self._segment_bytes:
                    following = _File(f"{self._stem}.{self._segment + 1}.kvt", self._window_bytes)
                    self._next = following
                    self._next_window = following.window()
                # A queued commit may be larger than all windows kept ahead.
                while (
                    len(file.ahead) < WINDOWS_AHEAD + self._queued // self._window_bytes
                    and not self._closing
                    and not self._beyond_bound(file)
                ):
                    file.ahead.append(file.window())
                self._wake.wait(None if not self._queue else 0.05)
                self._wake.clear()
        except OSError as error:
            self._error = error
        # After an error what is allocated can still be filled, and the loss recorded: close only when told to.
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
        if self.pid == os.getpid() and not self._abandoned:
            self._close_files()

    def _close_files(self) -> None:
        try:
            self._window.close()
            for file, size in self._retired:
                file.close(size)
            self._file.close(self.segment_bytes)
            if self._next is not None:
                self._next.close(0)
                os.unlink(self._next.path)
        except OSError as error:
            self._error = error

    def _beyond_bound(self, file: _File) -> bool:
        if self._max_bytes is None:
            return False
        return self._done_bytes + file.allocated >= self._max_bytes


def _json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return text + b" " * (-len(text) % 4)


def write_file(path: str, header: dict[str, Any], bodies: Callable[[], Any], end: Callable[[], dict[str, Any]]) -> int:
    """Write a whole log at once (an import, a simulated run): no mapping, no thread.

    ``bodies()`` yields ``(flags, body)`` of OPS commits; ``end()`` is asked last. Returns the bytes written. The file
    is created exclusively and removed again if anything fails.
    """
    with open(path, "xb") as file:
        try:
            seq = 0

            def put(kind: int, flags: int, body: bytes) -> None:
                nonlocal seq
                file.write(wire.head(kind, flags, seq, body))
                file.write(body)
                seq += 1

            file.write(wire.prefix())
            put(wire.HEADER, 0, _json({**header, "log_format": wire.FORMAT, "segment": 0}))
            for flags, body in bodies():
                put(wire.OPS, flags, body)
            put(wire.END, 0, _json(end()))
            return file.tell()
        except BaseException:
            os.unlink(path)
            raise
