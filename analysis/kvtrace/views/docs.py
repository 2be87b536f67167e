"""Writes `docs/views.md`, the reference of `docs/metrics.md` and the answers of `docs/sql-cookbook.md`, or checks them.

python -m kvtrace.views.docs --check | --write
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import kvtrace
from kvtrace import samples
from kvtrace.metrics.collect import reference
from kvtrace.people import Style, render
from kvtrace.views import EXTRA, View, views
from kvtrace_traces.docs import _TYPES
from kvtrace_traces.schema import TABLES, Table

DOCS = Path(__file__).parents[3] / "docs"
SHOWN_ROWS = 8
_INTRO = """# Views

What `kvtrace sql` knows beside the logged [tables](tables.md). Made from `analysis/kvtrace/views/` by `python -m
kvtrace.views.docs --write`. Columns in *italics* may be null; times in nanoseconds count as in the tables.

Each view is SQL over the tables, computed when a query names it. The same views come with `kvtrace export parquet`:
`cd FOLDER && duckdb -init views.sql`. With several traces (`kvtrace sql A B`) every table and view starts with a column
`trace`.
"""


def page() -> str:
    """All of `docs/views.md`."""
    parts = [_INTRO]
    parts += [_section(table) for table in EXTRA.values()]
    parts += [
        _section(view) for name, view in views().items() if name not in TABLES or view.columns != TABLES[name].columns
    ]
    return "\n".join(parts)


def _section(table: Table | View) -> str:
    lines = [f"## {table.name}\n", f"{table.doc[0].upper()}{table.doc[1:]}.\n"]
    lines.append("| column | type | unit | meaning |\n|---|---|---|---|")
    for column in table.columns:
        name = f"*{column.name}*" if column.nullable else column.name
        lines.append(f"| {name} | {_TYPES.get(column.dtype, 'string')} | {column.unit} | {column.doc} |")
    return "\n".join(lines) + "\n"


def queries(text: str) -> list[str]:
    """The queries of a cookbook."""
    return re.findall(r"```sql\n(.*?)```", text, flags=re.DOTALL)


def answered(text: str) -> str:
    """A cookbook with what each query answers for the bundled sample below it."""
    trace = kvtrace.open(samples.path("thrash"))

    def answer(match: re.Match[str]) -> str:
        frame = trace.sql(match[1]).head(SHOWN_ROWS)
        table = render(frame, Style(wrap=False))[0] if frame.height else "(nothing)"
        return f"```sql\n{match[1]}```\n\n```text\n{table}\n```"

    return re.sub(r"```sql\n(.*?)```(?:\n\n```text\n.*?\n```)?", answer, text, flags=re.DOTALL)


def wanted() -> dict[Path, str]:
    """The files as they should be. `docs/metrics.md` is renewed between its markers."""
    metrics = DOCS / "metrics.md"
    text = re.sub(
        r"(<!-- begin reference -->\n).*?(<!-- end reference -->)",
        lambda match: f"{match[1]}{reference()}{match[2]}",
        metrics.read_text(),
        flags=re.DOTALL,
    )
    cookbook = DOCS / "sql-cookbook.md"
    return {DOCS / "views.md": page(), metrics: text, cookbook: answered(cookbook.read_text())}


def main() -> int:
    """Check or write the files. Exit code 1 where a check finds one out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", action="store_true", help="fail if a file is out of date")
    choice.add_argument("--write", action="store_true", help="renew the files")
    write = parser.parse_args().write
    stale = [path for path, text in wanted().items() if not path.exists() or path.read_text() != text]
    for path in stale if write else []:
        path.write_text(wanted()[path])
    if stale and not write:
        names = ", ".join(path.name for path in stale)
        print(f"out of date: {names}; run `python -m kvtrace.views.docs --write`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
