"""`kvtrace import`: other tools' traces become `.kvt` files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvtrace import people
from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, refuse_to_overwrite
from kvtrace.cli.traces import DAMAGED

TOLD = ("requests", "references", "block_size", "content_ids")
MOONCAKE = '{"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]}'


@click.command(
    "import",
    epilog=examples(
        "printf '1\\n2\\n1\\n' > ids.txt; kvtrace import ids ids.txt -o ids.kvt",
        f"echo '{MOONCAKE}' > m.jsonl; kvtrace import mooncake m.jsonl -o m.kvt",
    ),
)
@click.argument("format_", metavar="FORMAT")
@click.argument("source", metavar="SRC", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="OUT.kvt",
    help="The trace to write.",
)
@click.option("--block-size", type=click.IntRange(min=1), metavar="N", help="Tokens a block stands for in SRC.")
@click.option("--skip-bad", is_flag=True, help="Leave out records that cannot be read, and count them.")
@click.option("--force", is_flag=True, help="Overwrite OUT.kvt.")
def command(format_: str, source: Path, out: Path, block_size: int | None, skip_bad: bool, force: bool) -> int:
    """Turn another tool's trace into a .kvt file."""
    from kvtrace_traces import importers

    refuse_to_overwrite(out, force)
    shown = _show_progress if sys.stderr.isatty() else None
    done = importers.run(format_, source, out, skip_bad=skip_bad, force=force, progress=shown, block_size=block_size)
    told = [f"{key.replace('_', ' ')} {people.figure(key, done[key])}" for key in TOLD if done.get(key)]
    note(f"wrote {out}: {', '.join(told)}")
    if done.get("odd_lengths"):
        note(
            f"{done['odd_lengths']:,} requests have another number of ids than their prompt has blocks; "
            "token-weighted figures take both as they stand"
        )
    if done.get("left_out"):
        note(f"{done['left_out']:,} bad records were left out, the first: {done.get('first_left_out')}")
    note(f"next: kvtrace replay {out} --policy lru,fifo --capacity 50%,inf")
    return DAMAGED if done.get("left_out") else 0


def _show_progress(done: int, total: int) -> None:
    click.echo(f"\rkvtrace: read {done / max(total, 1):.0%}", err=True, nl=done >= total)
