"""SQL over traces: DuckDB in memory, reading the Polars frames of the tables that a query names.

A database can neither write nor reach a file or the network: access to anything outside is switched off and
the configuration locked before the first query runs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import duckdb
import polars as pl

from kvtrace import overflow
from kvtrace.views import EXTRA, View, every_table, extra, filled, views
from kvtrace_traces.errors import KvtraceError, UsageError

_READING = {"SELECT", "EXPLAIN", "MULTI", "RELATION", "EXPRESSION"}  # MULTI: a PIVOT
_ALL_TABLES = re.compile(r"\bshow\b|\binformation_schema\b|\bduckdb_\w+|\bsqlite_master\b|\bpg_\w+", re.IGNORECASE)


# Views that take long to compute and are no larger than what they are computed from: asked for again, they are kept.
_WORTH_KEEPING = {
    "latencies", "misses", "preemptions", "prefixes", "read_spans", "step_phases",
}  # fmt: skip


class Tables(Protocol):
    """What a trace must have: its path, and a frame under the name of each table."""

    @property
    def path(self) -> Any: ...


class Database:
    """The tables of one or several traces, and the views over them, as a read-only DuckDB database.

    With several traces every table starts with a column `trace`: the file's name, or its path where names
    are equal. A table is decoded when a query first names it, and then kept; a view is computed anew for each query.
    What takes long is kept from the second query on that names it, and what `keep` names from the first. `unsafe` lifts
    the fence: queries may then write files, read others and reach the network.

    `most_bytes`: where the views that are kept take more, those that were named longest ago are given up, and made anew
    when a query names them.
    """

    def __init__(
        self,
        traces: Sequence[Tables],
        unsafe: bool = False,
        keep: Sequence[str] = (),
        most_bytes: int | None = None,
    ) -> None:
        self._traces = list(traces)
        self._names = distinct_names([trace.path for trace in self._traces])
        self._loaded: set[str] = set()
        self._views: set[str] = set()  # those of them that are computed anew for each query
        self._unsafe = unsafe
        self._keep = set(keep)
        self._most_bytes = most_bytes
        self._kept: dict[str, int] = {}  # bytes of the views that are kept, the one named last at the end
        self._connection = duckdb.connect(":memory:")
        overflow.bound(self._connection, f"{id(self):x}")
        if unsafe:
            return
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET python_enable_replacements = false")  # else Python variables are tables
        self._connection.execute("SET lock_configuration = true")

    def query(self, query: str) -> pl.DataFrame:
        """The result of one SELECT (or WITH, FROM, DESCRIBE, SUMMARIZE, EXPLAIN, PIVOT).

        An `unsafe` database takes any statement; one that returns no table is answered with an empty frame. Raises
        UsageError for wrong SQL and for anything that does not read, KvtraceError where a right query fails.
        """
        try:
            self._check(query)
            named = _named_in(query)
            if not _ALL_TABLES.search(query):  # which asks for no rows
                for view in self._views & _WORTH_KEEPING & set(named):
                    self._keep_rows(view)
            self._make_room(named)
            self._load(named)
            return tidy(self._run(query))
        except duckdb.Error as error:
            raise _explained(error) from error

    def _run(self, query: str) -> pl.DataFrame:
        """Run a query in a thread, since DuckDB does not look for Ctrl-C while it works."""

        def work() -> pl.DataFrame:
            relation = self._connection.sql(query)
            if relation is None:
                if self._unsafe:
                    return pl.DataFrame()
                raise UsageError("the query returns no table")
            return pl.DataFrame(relation.to_arrow_table())

        answer: Future[pl.DataFrame] = Future()
        threading.Thread(target=_settle, args=(answer, work), daemon=True).start()
        try:
            while not wait([answer], timeout=0.5).done:  # a wait without end could sleep through a Ctrl-C
                pass
            return answer.result()
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            # An interruption counts only while DuckDB executes, so one that came a moment too early is lost.
            for _ in range(50):
                self._connection.interrupt()
                if wait([answer], timeout=0.1).done:
                    break
            raise

    def _check(self, query: str) -> None:
        statements = self._connection.extract_statements(query)
        if not statements:
            raise UsageError("the query is empty")
        if self._unsafe:
            return
        # DuckDB 1.x splits a PIVOT into a CREATE TYPE of its own and the SELECT.
        kinds = [statement.type.name for statement in statements]
        if len(kinds) > 1 and not re.search(r"\bpivot\b", query, re.IGNORECASE):
            raise UsageError("one query at a time")
        if kinds[-1] not in _READING:
            raise UsageError(f"traces are read-only: {kinds[-1]} is not allowed, SELECT is")

    def _load(self, tables: Iterable[str]) -> None:
        for table in tables:
            if table in self._loaded:
                continue
            if (view := views().get(table)) is None:
                self._connection.register(table, self.frame(table.removeprefix("logged_")).to_arrow())
            elif (rows := self._fast(view)) is not None:
                self._register(table, rows)
            else:
                self._load(view.needs)
                sql = filled(view.sql, len(self._traces) > 1)
                if view.make is None and table not in self._keep:
                    self._connection.execute(f"CREATE VIEW {table} AS {sql}")
                    self._views.add(table)
                else:
                    rows = self._run(sql)
                    self._register(table, view.make(rows) if view.make else rows)
            self._loaded.add(table)

    def _make_room(self, named: Sequence[str]) -> None:
        for view in named:
            if view in self._kept:
                self._kept[view] = self._kept.pop(view)
        if self._most_bytes is None:
            return
        for view in list(self._kept):
            if sum(self._kept.values()) <= self._most_bytes:
                return
            if view not in named and not self._needed(view):
                del self._kept[view]
                self._connection.unregister(view)
                self._loaded.remove(view)

    def _needed(self, view: str) -> bool:
        """Whether the SQL of another view names it."""
        return any(view in views()[other].needs for other in self._views)

    def _register(self, view: str, rows: pl.DataFrame) -> None:
        self._connection.register(view, rows.to_arrow())
        self._kept[view] = int(rows.estimated_size())

    def _fast(self, view: View) -> pl.DataFrame | None:
        """The rows of a view that a kernel makes of all traces; None where there is none, or it cannot."""
        if view.fast is None:
            return None
        frames = [frame for trace in self._traces if (frame := view.fast(trace)) is not None]
        return self._joined(frames) if len(frames) == len(self._traces) else None

    def _keep_rows(self, view: str) -> None:
        rows = self._run(f"FROM {view}")
        self._connection.execute(f"DROP VIEW {view}")
        self._register(view, rows)
        self._views.remove(view)

    def frame(self, table: str) -> pl.DataFrame:
        """A logged table of all traces, with the column `trace` where there are several."""
        return self._joined(
            [extra.frame(table, trace) if table in EXTRA else getattr(trace, table) for trace in self._traces]
        )

    def _joined(self, frames: list[pl.DataFrame]) -> pl.DataFrame:
        """The frames of the traces as one."""
        if len(frames) == 1:
            return frames[0]
        kind = pl.Enum(self._names)
        return pl.concat(
            [
                frame.select(pl.lit(name, dtype=kind).alias("trace"), pl.all())
                for frame, name in zip(frames, self._names, strict=True)
            ],
            how="diagonal_relaxed",
        )


def _settle(answer: Future[pl.DataFrame], work: Callable[[], pl.DataFrame]) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:
        answer.set_exception(error)


def schema() -> pl.DataFrame:
    """Every table and column with type, unit and meaning: one row a column."""
    rows = [
        {
            "table": table.name,
            "column": column.name,
            "type": _sql_type(column.dtype),
            "unit": column.unit,
            "meaning": column.doc,
        }
        for table in every_table()
        for column in table.columns
    ]
    return pl.DataFrame(rows)


def distinct_names(paths: Sequence[Any]) -> list[str]:
    """A name for each trace: its stem where all differ, else its path, numbered where those repeat."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def tidy(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with DuckDB's 128-bit whole numbers (any SUM of integers) as 64-bit ones, where they fit."""
    whole = [
        name
        for name, dtype in frame.schema.items()
        if dtype == pl.Int128 or (isinstance(dtype, pl.Decimal) and dtype.scale == 0)
    ]
    narrow = [frame[name].cast(pl.Int64, strict=False) for name in whole]
    return frame.with_columns([column for column in narrow if column.null_count() == frame[column.name].null_count()])


def _named_in(query: str) -> list[str]:
    # A word of the query may also be a column or sit in a string: such a table is decoded for nothing, that
    # is all.
    names = [table.name for table in every_table()]
    if _ALL_TABLES.search(query):
        return names
    words = {word.lower() for word in re.findall(r"\w+", query)}
    return [name for name in names if name in words]


def _sql_type(dtype: str) -> str:
    names = {"i8": "TINYINT", "i16": "SMALLINT", "i32": "INTEGER", "i64": "BIGINT", "u64": "UBIGINT",
             "f64": "DOUBLE", "bool": "BOOLEAN", "str": "VARCHAR"}  # fmt: skip
    return "VARCHAR" if dtype.startswith("enum:") else names[dtype]


def _explained(error: duckdb.Error) -> KvtraceError:
    """DuckDB's message as one line; wrong SQL is the user's error, anything else a failure."""
    text = str(error)
    line = " ".join(text.split("\n\nLINE")[0].split())
    kind = type(error).__name__
    if isinstance(error, duckdb.CatalogException) and (missing := re.search(r"Table with name (\S+) does not", text)):
        return UsageError(
            f"there is no table {missing[1]!r}; the tables are {', '.join(table.name for table in every_table())}"
        )
    if kind == "PermissionException":
        return UsageError(f"{line} (a query sees the trace's tables and nothing else)")
    wrong = (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError)
    return UsageError(line) if isinstance(error, wrong) else KvtraceError(line)
