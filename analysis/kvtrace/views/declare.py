"""What a view is made of, and the columns that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtrace_traces.schema import TABLES, Column

if TYPE_CHECKING:
    import polars as pl


class View(NamedTuple):
    """A view.

    `doc`: one row per what; `columns`: as those of a table, without `trace`; `needs`: the tables and views that its
    SQL names; `sql`: a SELECT with exactly these columns; `make`: where a compiled kernel makes the rows, what makes
    them of the rows of `sql`; `fast`: where a compiled kernel makes them of a trace, what makes the view's rows, in any
    order, without it (None: of this trace it cannot): plain DuckDB on an export has the SQL, `kvtrace sql` the kernel.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    needs: tuple[str, ...]
    sql: str
    make: Callable[[pl.DataFrame], pl.DataFrame] | None = None
    fast: Callable[[Any], pl.DataFrame | None] | None = None


def column(table: str, name: str) -> Column:
    """A column of a table of the schema, to be had in a view as well."""
    return next(column for column in TABLES[table].columns if column.name == name)


ENGINE, STEP, REQUEST = (column("step_requests", name) for name in ("engine_index", "step", "request"))
IDENTITY = Column("identity", "i32", "identity", "the block's identity: it stands for the whole prefix up to its end")

# The block events with a number that keeps their order, which a table of a database does not.
EVENTS = """events AS (
  SELECT row_number() OVER () AS n, {key}, step, time_ns, request, kind::VARCHAR AS kind, block, identity, "group"
  FROM block_events)"""


def expanded(spans: str) -> str:
    """A relation with each row of `spans` once for every one of its `steps`, and `i`, the number of the step in it.

    A list of all steps of a span would be held for thousands of spans at a time; so there are two levels of lists, and
    none has more than 1024 entries in a span of a million steps.
    """
    return f"""(
  SELECT * EXCLUDE (part), part * 1024 + unnest(range(least(1024, steps - part * 1024))) AS i
  FROM (SELECT *, unnest(range((steps + 1023) // 1024)) AS part FROM {spans}))"""
