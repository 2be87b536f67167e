"""`kvtrace info`: what a trace holds, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvtrace import people
from kvtrace.cli.examples import examples
from kvtrace.cli.output import print_object
from kvtrace.cli.traces import TRACE, exit_code, open_traces

# The page: a label, and the keys of the info object that it is made of.
_TOLD = {
    "engine", "engine_version", "model", "device", "created", "block_size", "num_blocks", "granule",
    "engines",
    "requests", "steps", "events", "bytes", "bytes_per_block_event", "dropped", "damaged_frames", "complete",
    "inexact", "bytes_per_block", "format", "path", "lossy", "logged_events", "source",
}  # fmt: skip


@click.command(
    "info",
    epilog=examples(
        "kvtrace info traces/samples/thrash.kvt",
        "kvtrace info traces/samples/thrash.kvt --json",
    ),
)
@click.argument("trace", type=TRACE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(trace: Path, as_json: bool) -> int:
    """Show what a trace holds, and whether anything is missing."""
    (opened,) = open_traces([trace])
    if as_json:
        print_object(opened.info)
    else:
        rows = page(opened.info)
        width = max(len(label) for label, _ in rows)
        click.echo(people.bold(str(trace)))
        for label, text in rows:
            click.echo(f"  {people.dim(label.ljust(width))}  {text}")
    return exit_code([opened])


def page(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text of every line of the page, in order."""
    rows = [
        ("engine", _words(info.get("engine"), info.get("engine_version"), _engines(info))),
        ("model", _words(info.get("model"), info.get("device") and f"on {info['device']}")),
        (_made(info), str(info["created"]) if info.get("created") else ""),
        ("cache", _cache(info)),
        ("requests", people.figure("requests", info["requests"])),
        ("steps", people.figure("steps", info["steps"])),
        ("events", _events(info)),
        ("whole", _whole(info)),
        ("inexact", ", ".join(info.get("inexact") or ())),
    ]
    rows += [(key.replace("_", " "), _other(key, value)) for key, value in info.items() if key not in _TOLD]
    return [(label, text) for label, text in rows if text]


def _made(info: dict[str, Any]) -> str:
    return "simulated" if info.get("source") == "simulated" else "recorded"


def _engines(info: dict[str, Any]) -> str:
    engines = info.get("engines")
    count = len(engines) if isinstance(engines, list) else engines or 1
    return f"({count} engines)" if count > 1 else ""


def _cache(info: dict[str, Any]) -> str:
    blocks, block_size, granule = info.get("num_blocks"), info["block_size"], info.get("granule")
    if not blocks:
        text = f"{block_size} tokens a block"
    else:
        text = f"{blocks:,} blocks of {block_size} tokens = {blocks * block_size:,} tokens"
        if info.get("bytes_per_block"):
            text += f", {people.size(blocks * info['bytes_per_block'])}"
    if granule and granule != block_size:
        text += f"; identities every {granule} tokens"
    return text


def _events(info: dict[str, Any]) -> str:
    text = f"{info['events']:,} in {people.size(info['bytes'])}"
    each = info.get("bytes_per_block_event")
    return f"{text}, {each:.2f} bytes a logged block event" if each else text


def _whole(info: dict[str, Any]) -> str:
    wrong = [
        f"{info['dropped']:,} events dropped" if info.get("dropped") else "",
        f"{info['damaged_frames']:,} damaged frames" if info.get("damaged_frames") else "",
        "" if info.get("complete") else "no end record",
    ]
    wrong = [text for text in wrong if text]
    return "no: " + ", ".join(wrong) if wrong else "yes"


def _other(key: str, value: Any) -> str:
    if value is None or isinstance(value, dict) or value == []:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value)) if all(isinstance(item, str | int) for item in value) else ""
    if key.endswith("bytes") and isinstance(value, int):
        return people.size(value)
    return people.figure(key, value)


def _words(*parts: Any) -> str:
    return " ".join(str(part) for part in parts if part)
