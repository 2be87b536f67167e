"""Traces of every odd kind for the report's tests."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples
from kvtrace_traces import importers, wire

NAMES = (
    "thrash", "no-preemptions", "no-hits", "no-steps", "one-request", "nothing-shared", "ids", "turns", "losses",
    "offloads", "no-clock", "empty",
)  # fmt: skip

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)


def case(name: str, folder: Path) -> Path:
    """The trace of that name, made in `folder` where it does not come with kvtrace."""
    if name == "thrash":
        return samples.path("thrash")
    if name in _TOYS:
        return _found(folder, _TOYS[name])
    if name in _LOGS:
        path = folder / f"{name}.kvt"
        path.write_bytes(_LOGS[name](samples.path("thrash").read_bytes()))
        return path
    if name == "no-steps":
        return Path(toys.imported(1, folder).path)
    if name == "ids":
        source = folder / "ids.txt"
        source.write_text("1\n2\n1\n3\n")
        importers.run("ids", source, folder / "ids.kvt")
        return folder / "ids.kvt"
    return imported(name, _IMPORTS[name], folder)


_TOYS: dict[str, Callable[[kvtrace.Trace], bool]] = {
    "no-preemptions": lambda trace: not trace.preemptions.height and trace.lookups["tokens_hit"].sum() > 0,
    "no-hits": lambda trace: trace.lookups.height > 0 and not trace.lookups["tokens_hit"].sum(),
    "offloads": lambda trace: trace.offloads.height > 0,
}


def _found(folder: Path, wanted: Callable[[kvtrace.Trace], bool]) -> Path:
    """The first run of the toy engine that is as wanted."""
    folder = folder / f"toys-{len(list(folder.iterdir()))}"
    folder.mkdir()
    for seed in range(300):
        trace = toys.toy(seed, folder)
        if wanted(trace):
            return Path(trace.path)
        trace.path.unlink()
    raise AssertionError("no toy run is like that")


def _head(data: bytes) -> wire.Commit:
    found = wire.read_commit(data, wire.PREFIX.size)
    assert isinstance(found, wire.Commit)
    return found


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _without_clock(data: bytes) -> bytes:
    head = _head(data)
    body = json.dumps({**json.loads(head.body), "clock": "logical", "source": "simulated"}).encode()
    body += b" " * (-len(body) % 4)
    start = wire.head(head.kind, head.flags, head.seq, body) + body
    return data[: head.offset] + start + data[head.offset + wire.HEAD_BYTES + len(head.body) :]


def _begun(data: bytes) -> bytes:
    """The header alone: the engine was killed before its first step."""
    head = _head(data)
    return data[: head.offset + wire.HEAD_BYTES + len(head.body)]


_LOGS: dict[str, Callable[[bytes], bytes]] = {"losses": _flipped, "no-clock": _without_clock, "empty": _begun}


def imported(name: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Requests as Mooncake writes them (Bailian, where they have turns), as a trace."""
    source, out = folder / f"{name}.jsonl", folder / f"{name}.kvt"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    importers.run("bailian" if "turn" in rows[0] else "mooncake", source, out)
    return out


def _request(number: int, ids: list[int]) -> dict[str, Any]:
    return {"timestamp": 10 * number, "input_length": 512 * len(ids) - 5, "output_length": 3, "hash_ids": ids}


_IMPORTS: dict[str, list[dict[str, Any]]] = {
    "one-request": [_request(0, [1, 2])],
    "nothing-shared": [_request(i, [2 * i, 2 * i + 1]) for i in range(5)],
    "turns": [
        {"chat_id": i, "parent_chat_id": i - 1 if i else -1, "timestamp": i, "input_length": 16 * (i + 1) - 3,
         "output_length": 3, "type": "text", "turn": i + 1, "hash_ids": list(range(i + 1))}
        for i in range(6)
    ],
}  # fmt: skip
