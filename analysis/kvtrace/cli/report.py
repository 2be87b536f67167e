"""`kvtrace report`: everything that a trace tells, as one HTML file for somebody who was not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, refuse_to_overwrite
from kvtrace.cli.traces import TRACE, exit_code, open_traces


@click.command(
    "report",
    epilog=examples(
        "kvtrace report traces/samples/thrash.kvt -o report.html",
        "kvtrace report traces/samples/thrash.kvt --section occupancy --section hits -o hits.html",
    ),
)
@click.argument("paths", type=TRACE, nargs=-1, required=True, metavar="TRACE...")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("report.html"),
              show_default=True, metavar="FILE.html", help="The page to write.")  # fmt: skip
@click.option("--section", "sections", multiple=True, metavar="NAME",
              help="This section alone; repeatable. FILE.py:FUNCTION adds one of your own.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the file where it exists.")
def command(paths: tuple[Path, ...], out: Path, sections: tuple[str, ...], force: bool) -> int:
    """Write one HTML page on what a trace tells.

    It needs no network and no other file. Several traces are put side by side.
    """
    refuse_to_overwrite(out, force)  # before the work, not after it
    from kvtrace.reports.compose import report
    from kvtrace.reports.registry import chosen

    chosen(list(sections))  # a wrong name, too
    traces = open_traces(paths)
    say, done = progress()
    try:
        rows = report(traces, out, list(sections), force, progress=say)
    finally:
        done()
    drawn = rows.filter(rows["why"].is_null()).height
    empty = rows.height - drawn
    note(
        f"wrote {out}, {out.stat().st_size / 1e6:,.1f} MB: {drawn} parts"
        + (f", and {empty} of which the trace knows nothing" if empty else "")
    )
    return exit_code(traces)


def progress() -> tuple[Callable[[str], None], Callable[[], None]]:
    """Something to call with what is being done, and to call at the end: one line of a terminal, else a line each."""
    if not sys.stderr.isatty():
        return note, lambda: None

    def say(text: str) -> None:
        click.echo(f"\r\x1b[Kkvtrace: {text} ...", nl=False, err=True)

    return say, lambda: click.echo("\r\x1b[K", nl=False, err=True)
