"""Speed of imports: `python benchmarks/import_speed.py [--ids 10000000] [--file TRACE.jsonl] [--formats ...]`.

Makes a file of each format with about so many block ids (conversations that grow, 2,000 of them alive at a time),
imports it, and opens what came out. Prints seconds by part, best of three; compilation is not counted. `--file` takes a
Mooncake JSONL of your own instead. Beside them stands what Polars needs to parse the same JSONL, and nothing more.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from kvtrace_traces import importers, open_trace

ALIVE, PER_REQUEST = 2000, 100
FORMATS = ("mooncake", "bailian", "lmcache", "csv", "ids", "oracle-general", "azure")


def requests(ids: int) -> Iterator[list[int]]:
    """Block ids of requests: each goes on with a conversation, or begins one."""
    rng = random.Random(1)
    alive: list[list[int]] = []
    following = made = 0
    while made < ids:
        if len(alive) < ALIVE or rng.random() < 0.3:
            blocks: list[int] = []
            alive.append(blocks)
            del alive[:-ALIVE]
        else:
            blocks = alive[rng.randrange(len(alive))]
        grown = rng.randrange(1, PER_REQUEST // 2 if blocks else PER_REQUEST)
        blocks.extend(range(following, following + grown))
        following += grown
        shown = blocks[: PER_REQUEST * 3 // 2]
        made += len(shown)
        yield shown


def write(format: str, path: Path, ids: int) -> None:
    """A file of `format`."""
    with path.open("wb") as file:
        if format == "csv":
            file.write(b"request,id,time_s,tokens\n")
        if format == "azure":
            file.write(b"TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for number, blocks in enumerate(requests(ids)):
            file.write(ROWS[format](number, blocks))


def _json(number: int, blocks: list[int], stamp: Any, size: int, more: str = "") -> bytes:
    return (
        f'{{{more}"timestamp": {stamp}, "input_length": {len(blocks) * size}, "output_length": {number % 500}, '
        f'"hash_ids": {blocks}}}\n'
    ).encode()


def _azure(number: int, blocks: list[int]) -> bytes:
    stamp = f"2023-11-16 18:{number // 60 % 60:02d}:{number % 60:02d}.6805900"
    return "".join(f"{stamp},{374 + i % 50},{44 + i % 7}\n" for i in range(len(blocks))).encode()


def _lmcache(number: int, blocks: list[int]) -> bytes:
    hashes = ", ".join(f'"0x{block * 0x9E3779B97F4A7C15 % (1 << 64):016x}{block:016x}"' for block in blocks)
    head = f'"timestamp": {number * 0.003}, "request_id": "req-{number}", "chunk_size": 256'
    return f'{{{head}, "seq_len": {len(blocks) * 256}, "chunk_hashes": [{hashes}]}}\n'.encode()


ROWS: dict[str, Callable[[int, list[int]], bytes]] = {
    "mooncake": lambda number, blocks: _json(number, blocks, number * 3, 512),
    "bailian": lambda number, blocks: _json(
        number, blocks, number * 0.003, 16,
        f'"chat_id": {number}, "parent_chat_id": {number - 7 if number > 7 else -1}, "turn": 2, "type": "text", ',
    ),
    "lmcache": _lmcache,
    "csv": lambda number, blocks: "".join(
        f"{number},{block},{number * 0.5},{512 * len(blocks)}\n" for block in blocks
    ).encode(),
    "ids": lambda _, blocks: "".join(f"{block}\n" for block in blocks).encode(),
    "oracle-general": lambda number, blocks: b"".join(struct.pack("<IQIq", number, b, 1, -1) for b in blocks),
    "azure": _azure,
}  # fmt: skip


def best(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the best of three runs, and what the last returned."""
    least, made = float("inf"), None
    for _ in range(3):
        made = None
        begun = time.perf_counter()
        made = run()
        least = min(least, time.perf_counter() - begun)
    return least, made


def measure(format: str, path: Path, out: Path) -> None:
    """Print one line for a file."""
    seconds, done = best(lambda: importers.run(format, path, out, force=True))
    size = path.stat().st_size
    amount = done["references"] or done["requests"]
    parts = []
    opened, trace = best(lambda: open_trace(out))
    parts.append(f"open {opened:.2f}")
    chained, _ = best(lambda: open_trace(out).chains())
    parts.append(f"open + chains {chained:.2f}")
    framed, _ = best(lambda: open_trace(out).requests)
    parts.append(f"open + requests {framed:.2f}")
    if format == "mooncake":
        parts.append(f"Polars' own parsing {best(lambda: pl.read_ndjson(path))[0]:.2f}")
    print(
        f"{format:15} {size / 1e6:7,.0f} MB {done['requests']:>11,} requests {amount / 1e6:6.1f} M ids: "
        f"import {seconds:.2f} s, {amount / seconds / 1e6:.1f} M/s, {size / seconds / 1e6:,.0f} MB/s; "
        f"seconds to {'; '.join(parts)}",
        flush=True,
    )
    assert trace.complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--file", type=Path, help="a Mooncake JSONL")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "in", Path(folder) / "out.kvt"
        for format in ["mooncake"] if args.file else args.formats:
            write(format, path, 20_000)
            importers.run(format, path, out, force=True)
            assert open_trace(out).requests.height  # compiles
            if args.file is None:
                write(format, path, args.ids)
            measure(format, args.file or path, out)


if __name__ == "__main__":
    main()
