"""Mooncake's block-hash traces: a JSON object a line with ``timestamp`` (ms), ``input_length``, ``output_length``
(tokens) and ``hash_ids``, one id per block of 512 tokens, the last one possibly partial.

The format is that of the traces published with Mooncake (Qin et al., FAST 2025). Files made after its pattern
with another block size may say so in a field ``block_size``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from kvtrace_traces.importers import Source, importer
from kvtrace_traces.importers.requests import MAX_ID, Record

BLOCK_TOKENS = 512
MAX_TOKENS = (1 << 31) - 1


def _granule(source: Source) -> int:
    if source.block_size is not None:
        return source.block_size
    for _, line in source.lines():
        try:
            value = json.loads(line).get("block_size")
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        break
    return BLOCK_TOKENS


@importer("mooncake", "Mooncake JSONL: timestamp, input_length, output_length, hash_ids", _granule)
def read(source: Source) -> Iterator[Record]:
    """Yield one record per line."""
    for number, line in source.lines():
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            yield Record(number, (), bad="it is not UTF-8")
            continue
        except (ValueError, RecursionError):
            yield Record(number, (), bad="it is not JSON")
            continue
        yield _record(number, row)


def _record(number: int, row: Any) -> Record:
    if not isinstance(row, dict):
        return Record(number, (), bad="it is not a JSON object")
    ids = row.get("hash_ids")
    if not isinstance(ids, list):
        return Record(number, (), bad="hash_ids is not a list")
    for value in ids:
        if type(value) is not int or not 0 <= value <= MAX_ID:
            return Record(number, (), bad=f"hash_ids holds {value!r}, which is no whole number from 0 to 2^64-1")
    lengths = []
    for name in ("input_length", "output_length"):
        value = row.get(name, 0 if name == "output_length" else None)
        if type(value) is not int or not 0 <= value <= MAX_TOKENS:
            return Record(number, (), bad=f"{name} is {value!r}, not a number of tokens")
        lengths.append(value)
    stamp = row.get("timestamp", 0)
    if isinstance(stamp, bool) or not isinstance(stamp, (int, float)) or not math.isfinite(stamp):
        return Record(number, (), bad=f"timestamp is {stamp!r}, not a number of milliseconds")
    if not 0 <= stamp <= 1e15:
        return Record(number, (), bad=f"timestamp is {stamp!r}: it must lie between 0 and 1e15 ms")
    label = row.get("request_id", row.get("session_id", ""))
    return Record(number, ids, round(stamp * 1e6), lengths[0], lengths[1], str(label))
