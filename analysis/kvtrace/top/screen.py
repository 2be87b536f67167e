"""The terminal while `kvtrace top` runs: its own screen, keys without Enter, and everything put back at the end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType

ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, no cursor
LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_ENDS = (signal.SIGTERM, signal.SIGHUP)


class Screen:
    """Draws frames and reads keys. Use it in `with terminal():`."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno() if _is_terminal(sys.stdin) else None

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            size = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            return 80, 24
        return (size.columns or 80), (size.lines or 24)

    def draw(self, lines: list[str]) -> None:
        """Replace what is on the screen, without a flicker."""
        body = "\r\n".join(line + _CLEAR_LINE for line in lines)
        sys.stdout.write(_HOME + body + _CLEAR_BELOW)
        sys.stdout.flush()

    def key(self, seconds: float) -> str:
        """Wait so long for a key; empty if none came."""
        if self._keys is None:
            time.sleep(max(0.0, seconds))
            return ""
        ready, _, _ = select.select([self._keys], [], [], max(0.0, seconds))
        if not ready:
            return ""
        data = os.read(self._keys, 64)
        if not data:  # the terminal went away
            raise KeyboardInterrupt
        return data.decode("utf-8", "replace")


@contextlib.contextmanager
def terminal() -> Iterator[Screen]:
    """A screen of our own; whatever ends it, the terminal is as it was before."""
    screen = Screen()
    stdin = sys.stdin.fileno() if _is_terminal(sys.stdin) else None
    before = termios.tcgetattr(stdin) if stdin is not None else None
    handlers = {number: signal.signal(number, _leave) for number in _ENDS}
    try:
        if stdin is not None:
            tty.setcbreak(stdin)
        sys.stdout.write(ENTER)
        sys.stdout.flush()
        yield screen
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(LEAVE)
            sys.stdout.flush()
        if stdin is not None and before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
