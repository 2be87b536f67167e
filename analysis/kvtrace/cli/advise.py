"""`kvtrace advise`: what to change about a deployment, and what that would be worth."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options
from kvtrace.cli.traces import TRACE, exit_code, open_traces

if TYPE_CHECKING:
    import polars as pl

WIDTH = 100


@click.command(
    "advise",
    epilog=examples(
        "kvtrace advise traces/samples/thrash.kvt",
        "kvtrace advise traces/samples/thrash.kvt --json",
    ),
)
@click.argument("path", type=TRACE, metavar="TRACE")
@click.option("--commands", is_flag=True, help="Below each finding, the commands that print its figures.")
@click.option("--timing", metavar="PROFILE",
              help="What steps and copies cost: a profile, its file, or GPU:MODEL, as h100:llama-3.1-8b.")  # fmt: skip
@click.option("--link", metavar="GPU", help="Whose link to the host moves blocks; the trace's steps tell the rest.")
@output_options
def command(path: Path, commands: bool, timing: str | None, link: str | None, output: Output) -> int:
    """Advice on a deployment: what replays of its trace say, with figures.

    The most valuable finding comes first. --json has, for each, its figures, how they make its value, how sure that is,
    and the commands that print them.
    """
    from kvtrace.advice import advise

    traces = open_traces([path])
    frame = advise(traces[0], timing, link)
    if output.kind == "people":
        for line in page(frame, commands):
            click.echo(line)
        if not commands and frame.height:
            output.facts("--commands shows how to reproduce each figure")
    else:
        output.table(frame)
    return exit_code(traces)


def page(frame: pl.DataFrame, commands: bool) -> Iterator[str]:
    """The lines that people see: a paragraph for each finding."""
    from kvtrace.people import bold, dim

    several = frame["engine_index"].n_unique() > 1
    engine = None
    for row in frame.iter_rows(named=True):
        if several and row["engine_index"] != engine:
            engine = row["engine_index"]
            yield bold(f"engine {engine}")
        yield bold(f"{row['rank']}. {row['kind']}")
        yield from textwrap.wrap(row["text"], WIDTH, initial_indent="   ", subsequent_indent="   ")
        yield from (
            dim(line)
            for line in textwrap.wrap(row["uncertainty"], WIDTH, initial_indent="   ", subsequent_indent="   ")
        )
        if commands:
            for line in dict.fromkeys(figure["command"] for figure in row["figures"]):
                yield f"   $ {line}"
        yield ""
