"""What `import kvtrace` offers, in one place: opening traces and SQL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvtrace_traces

if TYPE_CHECKING:
    import polars as pl


class Trace:
    """An open trace: everything a `kvtrace_traces.Trace` has, and SQL.

    `.info` and `.header` are dicts; `.requests .steps .step_requests .step_spans .lookups .preemptions
    .block_events .losses` are Polars frames, decoded on first use and kept; `.chains(engine_index)` gives
    the block identities of every request. Columns, dtypes and units: `kvtrace sql --schema`.
    """

    def __init__(self, trace: kvtrace_traces.Trace) -> None:
        self.reader = trace
        self._database: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "reader":  # while being copied there is no reader yet
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.reader)})

    def __repr__(self) -> str:
        return f"kvtrace.Trace({str(self.reader.path)!r})"

    def sql(self, query: str) -> pl.DataFrame:
        """The result of one reading SQL query over the trace's tables.

        Raises UsageError for wrong SQL and for anything but reading.
        """
        from kvtrace.sql import Database

        if self._database is None:
            self._database = Database([self.reader])
        frame: pl.DataFrame = self._database.query(query)
        return frame


def open(path: str | os.PathLike[str], recover: str = "tail") -> Trace:
    """Open a `.kvt` file, or a folder of them, as one trace.

    `recover` says what to do where the log is damaged: `strict` raises, `tail` keeps what lies before the
    damage, `skip` also what lies behind it. Raises KvtraceError where there is no trace, or none that can be
    read.
    """
    return Trace(kvtrace_traces.open_trace(Path(path), recover=recover))


def open_as_it_is(path: str | os.PathLike[str]) -> tuple[Trace, str | None]:
    """Open a trace, or a file of another tool where its first record tells the format; and that format, None for a
    trace. Of such a file there are requests and their chains alone, which is what replays and curves ask for. Raises
    KvtraceError as `open`."""
    path = Path(path)
    if path.suffix != ".kvt":
        from kvtrace_traces.importers.opened import open_import, recognised

        if format := recognised(path):
            imported: Any = open_import(path, format)  # has of a trace what is asked for
            return Trace(imported), format
    return open(path), None
