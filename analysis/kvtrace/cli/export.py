"""`kvtrace export`: a trace for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note
from kvtrace.cli.traces import TRACE, exit_code, open_traces


@click.command(
    "export",
    epilog=examples(
        "kvtrace export parquet traces/samples/thrash.kvt -o thrash-tables",
        "kvtrace export mooncake traces/samples/thrash.kvt -o thrash.jsonl",
    ),
)
@click.argument("format_", metavar="FORMAT")
@click.argument("trace", type=TRACE)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="OUT",
    help="File or folder to write.",
)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def command(format_: str, trace: Path, out: Path, force: bool) -> int:
    """Write a trace in another tool's format.

    `parquet` makes a folder with one file per table, and views.sql, which makes the views in a DuckDB of your own.
    `csv`, `mooncake` and `oracle-general` write the references of one engine: which blocks each request looked up,
    in order of arrival.
    `perfetto` writes a timeline for ui.perfetto.dev (OUT.json or OUT.json.gz): requests, steps, counters.
    """
    from kvtrace_traces import exporters

    (opened,) = open_traces([trace])
    options = {}
    if format_ == "parquet":
        from kvtrace.views import shipped

        options["beside"] = shipped.write
    done = exporters.run(format_, opened.reader, out, force=force, **options)
    note(f"wrote {out}")
    if format_ == "csv" and done["block_size"] > 1:
        note(f"a CSV does not tell how large a block is: kvtrace import csv {out} --block-size {done['block_size']}")
    return exit_code([opened])
