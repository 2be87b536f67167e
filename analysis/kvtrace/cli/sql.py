"""`kvtrace sql`: one query, or a prompt."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, note, output_options
from kvtrace.cli.traces import exit_code, open_traces
from kvtrace_traces.errors import KvtraceError, UsageError

if TYPE_CHECKING:
    from kvtrace import sql
    from kvtrace.api import Trace


@click.command(
    "sql",
    epilog=examples(
        'kvtrace sql traces/samples/thrash.kvt "SELECT kind, count(*) FROM block_events GROUP BY ALL"',
        "kvtrace sql --schema",
    ),
)
@click.argument("arguments", nargs=-1, metavar="TRACE... [QUERY]")
@click.option("--schema", is_flag=True, help="List the tables, views and their columns.")
@click.option("--unsafe", is_flag=True, help="Let queries write files, read others and reach the network.")
@output_options
def command(arguments: tuple[str, ...], schema: bool, unsafe: bool, output: Output) -> int:
    """Ask a trace questions in SQL (DuckDB's dialect, read-only).

    Beside what was logged there are views: lifetimes of blocks, reads, prefixes, reuse and more (--schema). A last
    argument that is no path is the query. Without one it comes from stdin; on a terminal DuckDB's own shell opens on
    the trace, or, where no program `duckdb` is installed, a plain prompt. Several traces are read as one, with a
    column `trace`.
    """
    from kvtrace import sql
    from kvtrace.people import Style

    if schema:
        output.table(sql.schema(), Style(wrap=False))
        return 0
    paths, query = split(arguments)
    if query is None and not sys.stdin.isatty():
        query = sys.stdin.read()
    traces = open_traces(paths)
    if query is not None:
        output.table(sql.Database(traces, unsafe).query(query), Style(wrap=False))
    elif output.kind == "people" and (program := shutil.which("duckdb")):
        shell(traces, program, unsafe)
    else:
        note("`pip install duckdb-cli` gives this prompt DuckDB's own shell")
        prompt(sql.Database(traces, unsafe), output)
    return exit_code(traces)


def split(arguments: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """The paths and the query. Raises UsageError where there is no path, or one that does not exist."""
    words = list(arguments)
    if len(words) > 1 and not words[-1].strip():
        raise UsageError("the query is empty: leave it out for a prompt, or write SQL")
    # A path that was mistyped should not end as a syntax error: a query has at least two words.
    is_query = bool(words) and not _exists(words[-1]) and len(words[-1].split()) > 1
    query = words.pop() if is_query else None
    if not words:
        raise UsageError("name a trace before the query")
    for word in words:
        if not _exists(word):
            raise UsageError(f"there is no file or folder {word!r}")
    return [Path(word) for word in words], query


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # too long for a name, as queries are
        return False


def shell(traces: Sequence[Trace], program: str, unsafe: bool) -> None:
    """Run DuckDB's shell on a database file of the traces, which is gone afterwards; without `unsafe` it can only
    read."""
    from kvtrace import overflow
    from kvtrace.views import database_file

    with tempfile.TemporaryDirectory(dir=overflow.folder()) as folder:
        path = Path(folder) / "trace.duckdb"
        database_file.write(traces, path)
        note("SHOW TABLES; lists the tables, .quit leaves")
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the shell
        try:
            subprocess.run([program, *([] if unsafe else ["-safe", "-readonly"]), str(path)], check=False)
        finally:
            signal.signal(signal.SIGINT, before)


def prompt(database: sql.Database, output: Output) -> None:
    """Read queries line by line until `;`, and answer each; Ctrl-D or `.quit` ends."""
    import contextlib

    from kvtrace.people import Style
    from kvtrace.views import every_table

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    note("tables: " + ", ".join(table.name for table in every_table()) + "; end a query with ';', Ctrl-D leaves")
    lines: list[str] = []
    while True:
        try:
            line = input("  ... " if lines else "sql> ")
        except EOFError:
            click.echo(err=True)
            return
        if not lines and line.strip() in (".quit", ".exit", "quit", "exit"):
            return
        lines.append(line)
        if not line.rstrip().endswith(";"):
            continue
        query, lines = "\n".join(lines), []
        try:
            output.table(database.query(query), Style(wrap=False))
        except KvtraceError as error:
            note(f"error: {error}")
