"""Views over the tables of a trace: SQL that DuckDB runs over what it is given, a trace or a folder of Parquet files.

One view a file; each file declares its `VIEW`. `{key}` in its SQL stands for the columns that keep engines (and
traces, where there are several) apart, `{a=b}` for the equality of those columns in two relations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from kvtrace.views.declare import View
from kvtrace.views.extra import EXTRA
from kvtrace_traces.schema import TABLES, Table

# In the order in which they are listed and shipped: none needs a later one.
_FILES = (
    "step_requests", "request_blocks", "block_lifetimes", "block_tables", "read_spans", "reads", "step_reads",
    "block_reads", "shared_reads", "prefixes", "reuse", "preemptions", "step_phases", "occupancy", "latencies",
    "misses", "clients",
)  # fmt: skip
__all__ = ["EXTRA", "View", "every_table", "filled", "source_of", "views"]


@cache
def views() -> dict[str, View]:
    """All views by name."""
    return {name: import_module(f"kvtrace.views.{name}").VIEW for name in _FILES}


def every_table() -> Iterator[Table | View]:
    """What a query can name: the tables of a trace, what else it holds, then the views. A view that adds columns to
    a table stands for it."""
    known = views()
    yield from (known.get(name, table) for name, table in TABLES.items())
    yield from EXTRA.values()
    yield from (view for name, view in known.items() if name not in TABLES)


def source_of(table: str) -> str:
    """The name under which the logged rows of a table lie: its own, or another where a view has that."""
    return f"logged_{table}" if table in views() else table


def filled(sql: str, several: bool) -> str:
    """The SQL of a view, for one trace or for several with a column `trace`."""
    columns = ["trace", "engine_index"] if several else ["engine_index"]

    def equal(match: re.Match[str]) -> str:
        return "(" + " AND ".join(f"{match[1]}.{column} = {match[2]}.{column}" for column in columns) + ")"

    return re.sub(r"\{(\w+)=(\w+)\}", equal, sql).replace("{key}", ", ".join(columns))
