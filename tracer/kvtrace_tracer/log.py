"""The recorder's end of the log: a buffer of 32-bit words, committed when a step is under way and when it ends."""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Callable

from kvtrace_traces import wire
from kvtrace_traces.schema import EXT_OPS, LOSS_REASONS
from kvtrace_traces.writer import LEFT_WORDS, LogWriter, Stopped

FRAME_BYTES = 1 << 19
_EXT = 15
_logger = logging.getLogger("vllm.kvtrace")


class Log:
    """Where hooks append operations (``words``) and what makes them durable (:meth:`commit`).

    Knows nothing of the engine, so that an engine can be freed while its log is still open. ``events`` counts the block
    rows that were emitted, ``committed`` those of them that are durable. ``words`` begins with words that the writer
    fills in; hooks only append.
    """

    def __init__(self, writer: LogWriter, clock_ns: int, on_stop: Callable[[], None]) -> None:
        self.words = array("I", bytes(4 * LEFT_WORDS))
        self.events = 0
        self.closed = False
        self._writer = writer
        self._clock_ns = clock_ns
        self._on_stop = on_stop
        self._since_key = 0
        self.committed = 0
        self.write = writer.commit

    def ext(self, name: str, *words: int) -> None:
        """Append one of the rarer operations."""
        self.words.append(_EXT | (EXT_OPS[name].code | len(words) << 8) << 4)
        self.words.extend(words)

    def begin_frame(self) -> None:
        """The operations appended next start a frame. Only right after a commit."""
        self._writer.flag(wire.KEY)
        self._since_key = self._writer.total_bytes

    def commit(self) -> None:
        """Hand the operations so far to the kernel. Raises :class:`Stopped` when the log is full."""
        self.write(self.words)
        self.committed = self.events

    def frame_is_due(self) -> bool:
        """Whether a frame is due, which then has to be what is logged next. Right after a commit."""
        if self._writer.total_bytes - self._since_key <= FRAME_BYTES:
            return False
        self._writer.rotate()
        return True

    def fail(self, error: BaseException) -> None:
        """End recording after an error of the disk or of ours: one line in the server's log, serving goes on."""
        if self.closed:
            return
        self.closed = True
        reason = error.reason if isinstance(error, Stopped) else "bug"
        assert reason in LOSS_REASONS
        detail = str(error) if reason != "bug" else f"{type(error).__name__}: {error}"
        try:
            self._on_stop()
            del self.words[LEFT_WORDS:]
            loss = {
                "reason": reason,
                "time_ns": time.monotonic_ns() - self._clock_ns,
                "commits": 1,
                "events": self.events - self.committed,
                "detail": detail[:400],
            }
            self._writer.lose(loss)
            self._writer.close(None)
        except Exception as second:
            detail = f"{detail}; then {type(second).__name__}: {second}"
        _logger.error("kvtrace: recording ended (%s): %s. Serving goes on.", reason, detail)
        _logger.debug("kvtrace: where it happened", exc_info=error)

    def close(self) -> None:
        """Commit what is left, write the end record and close the file. Idempotent; never raises."""
        if self.closed:
            return
        if self._writer.pid != os.getpid():
            self.abandon()
            return
        try:
            self.commit()
            self.closed = True
            self._on_stop()
            now = time.monotonic_ns() - self._clock_ns
            self._writer.close({"time_ns": now, "commits": self._writer.commits, "events": self.events})
        except Exception as error:
            self.fail(error)

    def abandon(self) -> None:
        """In a forked child: the log belongs to the parent."""
        self.closed = True
        self._writer.abandon()
        self._on_stop()
