"""RAGPulse's traces of retrieval-augmented generation (Wang et al., 2025): ids name content, so that one stands under
many others; prefixes are chained from them when the trace is read.

As published, ``hash_ids`` is an object of lists, taken in the order of the prompt (system prompt, passages, history,
web search, user input), and ``timestamp`` a text in seconds. After Mooncake's pattern, ``hash_ids`` is one list and
``timestamp`` a number in milliseconds. Pieces of content have no fixed size: a block counts as 512 tokens at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from kvtrace_traces.importers import importer, mooncake
from kvtrace_traces.importers.batches import Bad, Piece, Record
from kvtrace_traces.importers.columns import SECONDS, stream
from kvtrace_traces.importers.fields import block_size_of, checked_ids, lines_of, name_of, nanoseconds, shown, tokens_of
from kvtrace_traces.importers.json_lines import scanner
from kvtrace_traces.importers.source import Lines, Source

PARTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")


@importer(
    "ragpulse", "RAGPulse JSONL: ids of content, chained into prefixes",
    granule=lambda source: source.options.block_size or block_size_of(source, "block_size", mooncake.BLOCK_TOKENS),
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line."""

    def careful(lines: Lines, number: int, line: bytes) -> Record | Bad:
        return lines_of(lines, number, line, lambda row: _record(source, row))

    scan = scanner(*mooncake.FIELDS, ids="hash_ids")
    return stream(source, scan, lambda columns: mooncake.accept(source, columns), careful)


def _record(source: Source, row: dict[str, Any]) -> Record:
    parts = row.get("hash_ids")
    if not isinstance(parts, dict):
        return mooncake.record(source, row)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"hash_ids has {shown(unknown[0])}, which is none of {', '.join(PARTS)}")
    ids = [value for part in PARTS for value in checked_ids(parts.get(part, []), f"hash_ids.{part}")]
    stamp = row.get("timestamp", 0)
    if isinstance(stamp, str):
        try:
            stamp = Decimal(stamp.strip())
        except InvalidOperation:
            raise ValueError(f"timestamp is {shown(stamp)}, not a number of seconds") from None
    return Record(
        ids,
        nanoseconds(stamp, "timestamp", SECONDS) if "timestamp" in row else -1,
        tokens_of(row, "input_length"),
        tokens_of(row, "output_length", absent=0),
        name_of(row, "request_id", "session_id"),
    )
