"""Mooncake's block-hash traces: a JSON object a line with ``timestamp`` (ms), ``input_length``, ``output_length``
(tokens) and ``hash_ids``, one id per block of 512 tokens, the last one possibly partial.

The format is that of the traces published with Mooncake (Qin et al., FAST 2025). Files made after its pattern
with another block size may say so in a field ``block_size``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import Bad, Batch, Piece, Record
from kvtrace_traces.importers.columns import ABSENT, MILLISECONDS, WHOLE, Columns, stream
from kvtrace_traces.importers.fields import (
    block_size_of,
    checked_block_size,
    ids_of,
    lines_of,
    name_of,
    time_of,
    tokens_of,
)
from kvtrace_traces.importers.json_lines import scanner
from kvtrace_traces.importers.source import Lines, Source

BLOCK_TOKENS = 512
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "block_size", "request_id", "session_id")
_STAMP, _INPUT, _OUTPUT, _IDS, _BLOCK, _REQUEST, _SESSION = range(len(FIELDS))


@importer(
    "mooncake", "Mooncake JSONL: timestamp, input_length, output_length, hash_ids",
    granule=lambda source: source.options.block_size or block_size_of(source, "block_size", BLOCK_TOKENS),
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line."""

    def careful(lines: Lines, number: int, line: bytes) -> Record | Bad:
        return lines_of(lines, number, line, lambda row: record(source, row))

    return stream(source, scanner(*FIELDS, ids="hash_ids"), lambda columns: accept(source, columns), careful)


def accept(source: Source, columns: Columns) -> tuple[NDArray[np.bool_], Batch]:
    """The lines of a chunk that are plain records of Mooncake's."""
    good, indptr = columns.lists(_IDS)
    fine, prompt = columns.tokens(_INPUT)
    good &= fine
    fine, output = columns.tokens(_OUTPUT, absent=0)
    good &= fine
    fine, arrival = columns.time(_STAMP, MILLISECONDS)
    good &= fine
    if source.options.block_size is None:
        same = (columns.kinds[_BLOCK] == WHOLE) & (columns.values[_BLOCK] == np.uint64(source.granule))
        good &= same | (columns.kinds[_BLOCK] == ABSENT)
    fine, starts, sizes = columns.text(_REQUEST)
    good &= fine
    fine, more_starts, more_sizes = columns.text(_SESSION)
    good &= fine
    unnamed = columns.kinds[_REQUEST] == ABSENT
    starts, sizes = np.where(unnamed, more_starts, starts), np.where(unnamed, more_sizes, sizes)
    return good, Batch(arrival, prompt, output, indptr, columns.ids, columns.lines.data, starts, sizes)


def record(source: Source, row: dict[str, object]) -> Record:
    """The request of one line. Raises :class:`ValueError` with the reason why there is none."""
    checked_block_size(source, row, "block_size")
    return Record(
        ids_of(row, "hash_ids"),
        time_of(row, "timestamp", MILLISECONDS),
        tokens_of(row, "input_length"),
        tokens_of(row, "output_length", absent=0),
        name_of(row, "request_id", "session_id"),
    )
