"""`kvtrace stats`: every metric of a trace, and conditions on them for pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, note, output_options
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

FAILED = 1
# Of the figures by group, those that people see; --json, --csv and --parquet have them all.
_SHOWN = (
    "requests", "prompt_tokens", "output_tokens", "token_hit_ratio", "cold_miss_ratio", "capacity_miss_ratio",
    "preemption_miss_ratio", "preemptions", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "e2e_p50_s", "e2e_p99_s",
)  # fmt: skip


@click.command(
    "stats",
    epilog=examples(
        "kvtrace stats traces/samples/thrash.kvt",
        'kvtrace stats traces/samples/thrash.kvt --json --fail-if "token_hit_ratio<40%"',
    ),
)
@click.argument("path", type=TRACE, metavar="TRACE")
@click.option("--fail-if", "conditions", multiple=True, metavar="CONDITION",
              help='Exit with code 1 where this holds: "token_hit_ratio<0.4" (or <40%). Repeatable.')  # fmt: skip
@click.option(
    "--by", metavar="WHAT", help="Key figures by group: tenant (LoRA adapter and salt), client, priority, type, turn."
)
@click.option("--client-pattern", metavar="REGEX",
              help="With --by client: the client is this pattern's group in the request id.")  # fmt: skip
@output_options
def command(path: Path, conditions: tuple[str, ...], by: str | None, client_pattern: str | None, output: Output) -> int:
    """Figures of a trace: hits, use of the cache, reuse, speed, latency.

    What a trace cannot know is null, with the reason beside it (`why`).
    """
    from kvtrace.metrics import stats
    from kvtrace.metrics.conditions import condition, failures

    if client_pattern is not None and by != "client":
        raise UsageError("--client-pattern says what a client is: it goes with --by client")
    if by is not None:
        if conditions:
            raise UsageError("--fail-if asks for figures of the whole trace: leave --by out")
        return _by(path, by, client_pattern, output)
    asked = [condition(text) for text in conditions]
    traces = open_traces([path])
    frame = stats(traces[0])
    if output.kind == "people":
        for line in page(frame):
            click.echo(line)
    else:
        output.table(frame)
    said = failures(frame, asked)
    for line in said:
        note(f"failed: {line}")
    return FAILED if said else exit_code(traces)


def _by(path: Path, by: str, client_pattern: str | None, output: Output) -> int:
    """A row for each group of requests."""
    from kvtrace import people
    from kvtrace.metrics.grouped import grouped

    traces = open_traces([path])
    frame = grouped(traces[0], by, client_pattern)
    if output.kind == "people":
        shown = [by, *_SHOWN] if frame["engine_index"].n_unique() < 2 else ["engine_index", by, *_SHOWN]
        known = [name for name in shown if name == by or frame[name].null_count() < frame.height]
        cells = {name: people.seconds for name in known if name.endswith("_s")}
        output.table(frame, people.Style(columns=known, cells=cells))
    else:
        output.table(frame)
    return exit_code(traces)


def page(frame: pl.DataFrame) -> Iterator[str]:
    """The lines that people see: a block for each group, and one reason where a whole group has no value."""
    from kvtrace.metrics import GROUPS
    from kvtrace.people import bold, dim

    engines = frame["engine_index"].unique(maintain_order=True).to_list()
    width = max(map(len, frame["metric"].to_list()), default=0)
    for engine in engines:
        rows = [row for row in frame.iter_rows(named=True) if row["engine_index"] == engine]
        if len(engines) > 1:
            yield bold(f"engine {engine}")
        for group in GROUPS:
            mine = [row for row in rows if row["group"] == group.name]
            yield bold(group.title)
            reasons = {row["why"] for row in mine}
            if len(reasons) == 1 and None not in reasons:
                yield f"  {dim('none: ' + reasons.pop())}"
            elif group.at:
                yield from _parts(mine, group.at)
            else:
                for row in mine:
                    yield f"  {dim(row['metric'].ljust(width))}  {_value(row)}"
            yield ""


def _parts(rows: list[dict[str, Any]], at: str) -> Iterator[str]:
    """A small table: a line for each part, a column for each metric."""
    from kvtrace.people import dim

    names = list(dict.fromkeys(row["metric"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row["at"], []).append(_value(row, short=True))
    table = [[at, *names], *([part, *values] for part, values in lines.items())]
    widths = [max(len(line[i]) for line in table) for i in range(len(names) + 1)]
    for n, line in enumerate(table):
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text = "  ".join([first, *rest])
        yield f"  {dim(text) if n == 0 else text}"


def _value(row: dict[str, Any], short: bool = False) -> str:
    from kvtrace import people

    value, unit = row["value"], row["unit"]
    if value is None:
        return "-" if short else f"-  ({row['why']})"
    if unit == "s":
        return people.seconds(value)
    if unit == "bytes":
        return people.size(value)
    if unit == "ratio":
        plain = not row["metric"].endswith(("correlation", "_cv", "_over_mean", "_over_capacity", "_degree", "_fill",
                                            "per_block"))  # fmt: skip
        return people.percent(value) if plain else people.number(value)
    number = f"{value:,.0f}" if value == round(value) else people.number(value)
    return number if short else f"{number} {unit}"
