"""LMCache's lookup-hash logs: a JSON object a line with ``timestamp`` (Unix seconds), ``request_id``, ``chunk_size``,
``seq_len`` (tokens) and ``chunk_hashes``, a chained hash in hexadecimal for every whole chunk.

The format is that of LMCache's ``LookupHashLoggingSubscriber`` (0.3.14 and later). A server writes a folder of
``lookup_hashes_*.jsonl``, which are read in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.importers import importer, mooncake
from kvtrace_traces.importers.batches import MAX_ID, Bad, Batch, Piece, Record
from kvtrace_traces.importers.columns import ABSENT, SECONDS, WHOLE, Columns, stream
from kvtrace_traces.importers.fields import (
    block_size_of,
    checked_block_size,
    lines_of,
    name_of,
    shown,
    time_of,
    tokens_of,
)  # fmt: skip
from kvtrace_traces.importers.json_lines import identity_of_hex, scanner
from kvtrace_traces.importers.source import Lines, Source

CHUNK_TOKENS = 256
_FIELDS = ("timestamp", "seq_len", "chunk_hashes", "chunk_size", "request_id")
_STAMP, _LENGTH, _HASHES, _CHUNK, _REQUEST = range(len(_FIELDS))


@importer(
    "lmcache", "LMCache lookup-hash JSONL, or its folder: chunk_hashes, chunk_size, seq_len",
    granule=lambda source: _granule(source), folder="lookup_hashes_*.jsonl",
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line. LMCache's agent traces, which are after Mooncake's pattern, are read as that."""
    if _like_mooncake(source):
        return mooncake.read(source)

    def careful(lines: Lines, number: int, line: bytes) -> Record | Bad:
        return lines_of(lines, number, line, lambda row: _record(source, row))

    scan = scanner(*_FIELDS, ids="chunk_hashes", hexadecimal=True)
    return stream(source, scan, lambda columns: _accept(source, columns), careful)


def _granule(source: Source) -> int:
    if source.options.block_size is not None:
        return source.options.block_size
    stated = block_size_of(source, "chunk_size", 0)
    return stated or block_size_of(source, "block_size", 16 if _like_mooncake(source) else CHUNK_TOKENS)


def _like_mooncake(source: Source) -> bool:
    first = next(source.lines(), None)
    return first is not None and b'"hash_ids"' in first[2] and b'"chunk_hashes"' not in first[2]


def _accept(source: Source, columns: Columns) -> tuple[NDArray[np.bool_], Batch]:
    good, indptr = columns.lists(_HASHES)
    fine, prompt = columns.tokens(_LENGTH)
    good &= fine
    fine, arrival = columns.time(_STAMP, SECONDS)
    good &= fine
    if source.options.block_size is None:
        same = (columns.kinds[_CHUNK] == WHOLE) & (columns.values[_CHUNK] == np.uint64(source.granule))
        good &= same | (columns.kinds[_CHUNK] == ABSENT)
    fine, starts, sizes = columns.text(_REQUEST)
    good &= fine
    output = np.zeros(len(good), np.int32)
    return good, Batch(arrival, prompt, output, indptr, columns.ids, columns.lines.data, starts, sizes)


def _record(source: Source, row: dict[str, Any]) -> Record:
    checked_block_size(source, row, "chunk_size")
    hashes = row.get("chunk_hashes")
    if not isinstance(hashes, list):
        raise ValueError("chunk_hashes is not a list" if "chunk_hashes" in row else "it has no chunk_hashes")
    return Record(
        [_identity(value) for value in hashes],
        time_of(row, "timestamp", SECONDS),
        tokens_of(row, "seq_len"),
        name=name_of(row, "request_id"),
    )


def _identity(value: Any) -> int:
    if type(value) is int and 0 <= value <= MAX_ID:
        return value
    try:
        if isinstance(value, str):
            return identity_of_hex(value)
    except ValueError:
        pass
    raise ValueError(f"chunk_hashes holds {shown(value)}, which is no hash in hexadecimal")
