"""`kvtrace import`: other tools' traces become `.kvt` files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kvtrace import people
from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, refuse_to_overwrite
from kvtrace.cli.traces import DAMAGED

TOLD = ("requests", "references", "block_size", "granule")
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
@click.option(
    "--granule",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens to make an identity of (openai, sharegpt): any multiple can be replayed.",
)
@click.option(
    "--tokenizer",
    metavar="T",
    help="What turns text into tokens (openai, sharegpt): tiktoken:NAME, or a model's tokenizer.json.",
)
@click.option(
    "--columns",
    metavar="OURS=THEIRS,...",
    help="What the columns of a CSV are called, or their numbers where it has no names: id=obj,time_s=ts.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out records that cannot be read, and count them.")
@click.option("--force", is_flag=True, help="Overwrite OUT.kvt.")
def command(format_: str, source: Path, out: Path, columns: str | None, **options: Any) -> int:
    """Turn another tool's trace into a .kvt file.

    FORMAT is one of azure, bailian, burstgpt, csv, ids, kv-cache-tester, lmcache, mooncake, openai,
    oracle-general, ragpulse, sharegpt. SRC may be packed with gzip or zstd.
    """
    from kvtrace_traces import importers

    refuse_to_overwrite(out, options["force"])
    shown = _show_progress if sys.stderr.isatty() else None
    done = importers.run(format_, source, out, progress=shown, columns=_columns(columns), **options)
    told = [
        f"{key.replace('_', ' ')} {people.figure(key, done[key])}"
        for key in TOLD
        if done.get(key) and not (key == "granule" and done["granule"] == done["block_size"])
    ]
    note(f"wrote {out}: {', '.join(told)}")
    for text in _remarks(done):
        note(text)
    if done["reuse_known"]:
        note(f"next: kvtrace replay {out} --policy lru,fifo --capacity 50%,inf")
    return DAMAGED if done["left_out"] else 0


def _remarks(done: dict[str, Any]) -> list[str]:
    """What the user should know of an import, a line each."""
    said = []
    if not done["reuse_known"]:
        said.append("reuse is unknown: this format has times and lengths alone, so there are no blocks to replay")
    if done["content_ids"]:
        said.append(
            "its ids name content (one stands under several parents): prefixes are chained from them; "
            "--semantics object takes them as they are"
        )
    if done["odd_lengths"]:
        said.append(
            f"{done['odd_lengths']:,} requests have another number of ids than their prompt has blocks; "
            "token-weighted figures take both as they stand (--block-size N says how many tokens a block has)"
        )
    if 0 < done["untimed"] < done["requests"]:
        said.append(f"{done['untimed']:,} requests have no arrival time")
    if done["backwards"]:
        said.append(f"{done['backwards']:,} requests arrived before the one above them; the order of the file is kept")
    said += done["notes"]
    if done["left_out"]:
        said.append(f"{done['left_out']:,} bad records were left out, the first: {done['first_left_out']}")
    return said


def _columns(text: str | None) -> dict[str, str]:
    """`a=b,c=d` as a dict."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part]
    for ours, equals, theirs in pairs:
        if not (ours.strip() and equals and theirs.strip()):
            raise click.UsageError(f"--columns {text}: write OURS=THEIRS,... as in id=obj,time_s=ts")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _show_progress(done: int, total: int) -> None:
    click.echo(f"\rkvtrace: read {done / max(total, 1):.0%}", err=True, nl=done >= total)
