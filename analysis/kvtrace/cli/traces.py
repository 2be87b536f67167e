"""Opening the traces that a command was given, and saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtrace.cli.output import note

if TYPE_CHECKING:
    from kvtrace.api import Trace

DAMAGED = 3
TRACE = click.Path(exists=True, path_type=Path)


def open_traces(paths: Sequence[Path], as_they_are: bool = False) -> list[Trace]:
    """Open each path, and note on stderr what is missing from it. `as_they_are`: also a file of another tool, where its
    first record tells the format, for a command that asks for requests and their chains alone."""
    import kvtrace

    traces = [_as_it_is(path) if as_they_are else kvtrace.open(path) for path in paths]
    for trace in traces:
        for warning in complaints(trace):
            note(f"{trace.path}: {warning}")
    return traces


def _as_it_is(path: Path) -> Trace:
    from kvtrace.api import open_as_it_is

    trace, format = open_as_it_is(path)
    if format is not None:
        note(f"{path} is read as {format}")
    return trace


def complaints(trace: Trace) -> list[str]:
    """What is wrong with a trace, one line each; none for a whole one."""
    lines = [str(warning) for warning in trace.warnings]
    said = " ".join(lines).lower()
    for loss in trace.losses.iter_rows(named=True):
        missing = f" ({loss['events']:,} block events)" if loss["events"] else ""
        lines.append(f"incomplete, {loss['reason']}: {loss['detail']}{missing}")
    if not trace.complete and not lines and "end record" not in said:
        lines.append("no end record: the engine was killed, or is still running")
    return lines


def is_lossy(trace: Trace) -> bool:
    """Whether content is missing from the trace. A mere missing end record is not that."""
    return bool(trace.dropped or trace.damaged_frames or trace.lossy)


def exit_code(traces: Sequence[Trace]) -> int:
    """0, or 3 where the figures rest on damaged or lossy input."""
    return DAMAGED if any(map(is_lossy, traces)) else 0
