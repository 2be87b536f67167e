"""`kvtrace diff`: what became of the same requests in two traces."""

from __future__ import annotations

from pathlib import Path

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, note, output_options, refuse_to_overwrite, table_suffix, write_table
from kvtrace.cli.traces import TRACE, exit_code, open_traces

DIFFERENT = 1


@click.command(
    "diff",
    epilog=examples(
        "kvtrace diff traces/samples/thrash.kvt traces/samples/thrash.kvt --blocks why.csv",
        "kvtrace simulate traces/samples/thrash.kvt --num-blocks 400 -o larger.kvt;"
        " kvtrace diff traces/samples/thrash.kvt larger.kvt || true",
    ),
)
@click.argument("a", type=TRACE, metavar="A")
@click.argument("b", type=TRACE, metavar="B")
@click.option("--match", "match_by", metavar="HOW",
              help="Match by this alone: request-id, client-id, prompt or number. Default: all, in turn.")  # fmt: skip
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
              help="Show so many of the requests that changed most.")  # fmt: skip
@click.option("--blocks", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write each block that only one trace found, and why, to FILE (.csv .parquet .json).")  # fmt: skip
@output_options
def command(a: Path, b: Path, match_by: str | None, top: int, blocks: Path | None, output: Output) -> int:
    """Compare two runs of the same requests: what changed, and why.

    Two recordings, or two runs of simulate -o. Who gained or lost hits, was preempted, slowed down; and which request
    evicted what would have been found. --json, --csv and --parquet give a row for each matched request.

    Exit code 0: no request differs in hits, preemptions or output (times never agree, and do not count); 1: one does,
    or has no counterpart; 2: the question was wrong.
    """
    from kvtrace.diff import diff
    from kvtrace.diff.summary import matched, page

    if blocks is not None:
        table_suffix(blocks)
        refuse_to_overwrite(blocks, output.force)
    traces = open_traces([a, b])
    found = diff(traces[0], traces[1], match_by)
    if output.kind == "people":
        for line in page(traces[0], traces[1], found, top):
            click.echo(line)
    else:
        for line in matched(found):
            note(line)
        output.table(found.requests)
    if blocks is not None:
        write_table(found.blocks, blocks, output.force)
    return exit_code(traces) if found.equal else DIFFERENT
