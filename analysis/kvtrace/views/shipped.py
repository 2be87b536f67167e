"""The views for plain DuckDB, over the folder that `kvtrace export parquet` writes.

Beside the tables it holds what views need and only Python can make: `engines.parquet`, and `reuse.parquet` with its
distances; `views.sql` then creates a view for each table and view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtrace.sql import Database
from kvtrace.views import EXTRA, extra, filled, source_of, views
from kvtrace_traces.exporters.parquet import WRITTEN, write_pieces
from kvtrace_traces.schema import TABLES

NAME = "views.sql"
_TOP = """-- The tables and views of a trace that was exported to Parquet, for DuckDB 1.0 and later.
-- In the folder of the files: duckdb -init views.sql
-- What the columns mean: kvtrace sql --schema
"""


def script() -> str:
    """The text of `views.sql`: no paths but the names of the files, so that the folder can be moved."""
    known = views()
    lines = [_TOP]
    for table in [*TABLES, *EXTRA]:
        if table == "step_requests":
            continue  # cheaper to derive than to read
        lines.append(f"CREATE OR REPLACE VIEW {source_of(table)} AS FROM read_parquet('{table}.parquet');")
    for view in known.values():
        body = f"FROM read_parquet('{view.name}.parquet')" if view.make else filled(view.sql, several=False).strip()
        lines.append(f"\n-- {view.doc}\nCREATE OR REPLACE VIEW {view.name} AS\n{body};")
    return "\n".join(lines) + "\n"


def write(trace: Any, folder: Path) -> None:
    """Add the views, and the tables that they need, to a folder of an export, while that writes it or
    afterwards. `trace` is what is exported."""
    for table in EXTRA:
        if table not in WRITTEN:  # the export itself writes those
            write_pieces([extra.frame(table, trace)], folder / f"{table}.parquet")
    database = Database([trace])
    for view in views().values():
        if view.make is not None:
            rows = view.fast(trace) if view.fast is not None else None
            if rows is None:
                rows = database.query(f"FROM {view.name}")
            write_pieces([rows], folder / f"{view.name}.parquet")
    (folder / NAME).write_text(script())
