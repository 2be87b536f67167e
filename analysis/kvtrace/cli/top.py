"""`kvtrace top`: what a server's KV cache does, while it does it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note
from kvtrace.cli.traces import DAMAGED, TRACE

if TYPE_CHECKING:
    from kvtrace.top.render import Look
    from kvtrace.top.watch import Watch

_WIDTH, _HEIGHT = 80, 24
_READING_SHARE = 0.5  # of the time between two frames


@click.command(
    "top",
    epilog=examples(
        "kvtrace top traces/samples/thrash.kvt --once",
        "kvtrace top traces/samples/thrash.kvt --once --window 0.5",
    ),
)
@click.argument("trace", type=TRACE)
@click.option("--once", is_flag=True, help="Print one frame and end; so without a terminal.")
@click.option("--all", "from_start", is_flag=True, help="Read a log of more than 64 MiB from its beginning.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="SECONDS",
              help="Time between two frames.")  # fmt: skip
@click.option("--window", type=click.FloatRange(0.01, 3600), default=10.0, show_default=True, metavar="SECONDS",
              help="How much of the trace the figures of now are over.")  # fmt: skip
def command(trace: Path, once: bool, from_start: bool, interval: float, window: float) -> int:
    """Watch a trace that is still being written.

    TRACE is a log, or the folder that engines write to. q or Ctrl-C ends it; Tab shows the next engine. It only reads,
    and only what was appended since the last frame.
    """
    from kvtrace.top.watch import KEEP_BYTES, Watch

    watch = Watch(trace, window, None if from_start else KEEP_BYTES)
    try:
        if once or not sys.stdout.isatty():
            return _once(watch)
        return _live(watch, interval)
    finally:
        watch.close()


def _once(watch: Watch) -> int:
    from kvtrace.top.render import frame
    from kvtrace_traces.errors import KvtraceError

    for _ in range(3):  # what was half stored at the first look is whole at the next, or damaged
        watch.look()
    if not watch.engines:
        raise KvtraceError(
            f"{watch.path} holds no log yet: start a server with `kvtrace record -o {watch.path} -- COMMAND`"
        )
    look = _look()
    for i, watched in enumerate(watch.engines):
        if i:
            click.echo()
        for line in frame(str(watched.log.path.name), watched, _WIDTH, _HEIGHT, look, _others(watch, i)):
            click.echo(line)
    for text in watch.notes:
        note(text)
    lossy = any(watched.engine.losses or watched.log.damaged for watched in watch.engines)
    return DAMAGED if lossy or watch.notes else 0


def _live(watch: Watch, interval: float) -> int:
    from kvtrace.top.render import frame, waiting
    from kvtrace.top.screen import terminal

    shown, look, pressed = 0, _look(), False
    with terminal() as screen:
        try:
            while True:
                begun = time.monotonic()
                watch.look(interval * _READING_SHARE)
                width, height = screen.size()
                if watch.engines:
                    shown = min(shown, len(watch.engines) - 1) if pressed else _busiest(watch)
                    watched = watch.engines[shown]
                    keys = "q quit" + ("   Tab next engine" if len(watch.engines) > 1 else "")
                    title = watched.log.path.name
                    screen.draw(frame(title, watched, width, height, look, _others(watch, shown), keys))
                else:
                    screen.draw(waiting(str(watch.path), width, look))
                key = screen.key(interval - (time.monotonic() - begun))
                if any(c in "qQ\x03\x04" for c in key):
                    return 0
                if "\t" in key and watch.engines:
                    shown, pressed = (shown + 1) % len(watch.engines), True
        except KeyboardInterrupt:
            return 0


def _busiest(watch: Watch) -> int:
    """The engine to show first: of those that have not ended the first one, else the last one."""
    running = [i for i, watched in enumerate(watch.engines) if watched.status not in ("ended", "killed: no end record")]
    return running[0] if running else len(watch.engines) - 1


def _others(watch: Watch, nth: int) -> str:
    if len(watch.engines) == 1:
        return ""
    return f"engine {watch.engines[nth].engine.header.get('engine_index', nth)} ({nth + 1} of {len(watch.engines)}), "


def _look() -> Look:
    from kvtrace.top.render import Look

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return Look(colour=colour, plain="utf" not in (sys.stdout.encoding or "").lower())
