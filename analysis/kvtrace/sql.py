"""SQL over traces: DuckDB in memory, reading the Polars frames of the tables that a query names.

A database can neither write nor reach a file or the network: access to anything outside is switched off and
the configuration locked before the first query runs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import duckdb
import polars as pl

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import TABLES

# Expanded on the fly from its run-length form, so that counting a million rows costs no million rows.
_STEP_REQUESTS = """
CREATE VIEW step_requests AS
SELECT {columns} FROM (
  SELECT * EXCLUDE (first_step, steps, computed_before),
         (first_step + i)::INTEGER AS step, (computed_before + i * tokens)::INTEGER AS computed_before
  FROM (SELECT *, unnest(range(steps)) AS i FROM step_spans))
"""
_DERIVED = {"step_requests": ("step_spans", _STEP_REQUESTS)}
_READING = {"SELECT", "EXPLAIN", "MULTI", "RELATION", "EXPRESSION"}  # MULTI: a PIVOT
_ALL_TABLES = re.compile(r"\bshow\b|\binformation_schema\b|\bduckdb_\w+|\bsqlite_master\b|\bpg_\w+", re.IGNORECASE)


class Tables(Protocol):
    """What a trace must have: its path, and a frame under the name of each table."""

    @property
    def path(self) -> Any: ...


class Database:
    """The tables of one or several traces as a read-only DuckDB database.

    With several traces every table starts with a column `trace`: the file's name, or its path where names
    are equal. A table is decoded when a query first names it, and then kept.
    """

    def __init__(self, traces: Sequence[Tables]) -> None:
        self._traces = list(traces)
        self._names = distinct_names([trace.path for trace in self._traces])
        self._loaded: set[str] = set()
        self._connection = duckdb.connect(":memory:")
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET python_enable_replacements = false")  # else Python variables are tables
        self._connection.execute("SET lock_configuration = true")

    def query(self, query: str) -> pl.DataFrame:
        """The result of one SELECT (or WITH, FROM, DESCRIBE, SUMMARIZE, EXPLAIN, PIVOT).

        Raises UsageError for wrong SQL and for anything that does not read, KvtraceError where a right query
        fails.
        """
        try:
            self._check(query)
            self._load(_named_in(query))
            return tidy(self._run(query))
        except duckdb.Error as error:
            raise _explained(error) from error

    def _run(self, query: str) -> pl.DataFrame:
        """Run a query in a thread, since DuckDB does not look for Ctrl-C while it works."""

        def work() -> pl.DataFrame:
            relation = self._connection.sql(query)
            if relation is None:
                raise UsageError("the query returns no table")
            return pl.DataFrame(relation.to_arrow_table())

        answer: Future[pl.DataFrame] = Future()
        threading.Thread(target=_settle, args=(answer, work), daemon=True).start()
        try:
            while not wait([answer], timeout=0.5).done:  # a wait without end could sleep through a Ctrl-C
                pass
            return answer.result()
        except KeyboardInterrupt:
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
        # DuckDB 1.x splits a PIVOT into a CREATE TYPE of its own and the SELECT.
        kinds = [statement.type.name for statement in statements]
        if len(kinds) > 1 and not re.search(r"\bpivot\b", query, re.IGNORECASE):
            raise UsageError("one query at a time")
        if kinds[-1] not in _READING:
            raise UsageError(f"traces are read-only: {kinds[-1]} is not allowed, SELECT is")

    def _load(self, tables: Iterator[str]) -> None:
        for table in tables:
            if table in self._loaded:
                continue
            if table in _DERIVED:
                source, view = _DERIVED[table]
                self._load(iter([source]))
                columns = ["trace"] * (len(self._traces) > 1) + [column.name for column in TABLES[table].columns]
                self._connection.execute(view.format(columns=", ".join(columns)))
            else:
                self._connection.register(table, self._frame(table).to_arrow())
            self._loaded.add(table)

    def _frame(self, table: str) -> pl.DataFrame:
        frames = [getattr(trace, table) for trace in self._traces]
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
        for table in TABLES.values()
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


def _named_in(query: str) -> Iterator[str]:
    # A word of the query may also be a column or sit in a string: such a table is decoded for nothing, that
    # is all.
    if _ALL_TABLES.search(query):
        yield from TABLES
        return
    words = {word.lower() for word in re.findall(r"\w+", query)}
    yield from (name for name in TABLES if name in words)


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
        return UsageError(f"there is no table {missing[1]!r}; the tables are {', '.join(TABLES)}")
    if kind == "PermissionException":
        return UsageError(f"{line} (a query sees the trace's tables and nothing else)")
    wrong = (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError)
    return UsageError(line) if isinstance(error, wrong) else KvtraceError(line)
