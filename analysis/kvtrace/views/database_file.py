"""The tables and views as a DuckDB database file, for DuckDB's own shell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb

from kvtrace.sql import Database, Tables
from kvtrace.views import filled, source_of, views
from kvtrace.views.extra import EXTRA
from kvtrace_traces.schema import TABLES


def write(traces: Sequence[Tables], path: Path) -> None:
    """Write the file `path`, which must not exist: tables are decoded and stored, views stay views but for `reuse`.

    It is readable for DuckDB from 1.0 on, where the DuckDB that writes can do that (1.2 and later).
    """
    source = Database(traces)
    known = views()
    with duckdb.connect(":memory:") as connection:
        quoted = str(path).replace("'", "''")
        try:
            connection.execute(f"ATTACH '{quoted}' AS made (STORAGE_VERSION 'v1.0.0')")
        except duckdb.BinderException:
            connection.execute(f"ATTACH '{quoted}' AS made")
        connection.execute("USE made")
        for table in [*TABLES, *EXTRA]:
            if table != "step_requests":  # a view, and much larger than what it is made from
                connection.register("rows", source.frame(table).to_arrow())
                connection.execute(f"CREATE TABLE {source_of(table)} AS FROM rows")
        for view in known.values():
            if view.make is not None:
                connection.register("rows", source.query(f"FROM {view.name}").to_arrow())
                connection.execute(f"CREATE TABLE {view.name} AS FROM rows")
            else:
                connection.execute(f"CREATE VIEW {view.name} AS {filled(view.sql, len(traces) > 1)}")
