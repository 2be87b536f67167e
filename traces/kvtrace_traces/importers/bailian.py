"""Alibaba's Bailian traces: as Mooncake's, with 16 tokens a block, ``timestamp`` in seconds, and conversations:
``chat_id``, ``parent_chat_id`` (-1 for a first turn), ``turn`` and ``type`` (text, search, image, file).

The format is that of the traces published as qwen-bailian-usagetraces-anon (Wang et al., USENIX ATC 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import UNKNOWN, About, Bad, Batch, Piece, Record
from kvtrace_traces.importers.columns import ABSENT, NEGATIVE, SECONDS, WHOLE, Columns, stream
from kvtrace_traces.importers.fields import ids_of, lines_of, shown, time_of, tokens_of
from kvtrace_traces.importers.json_lines import scanner
from kvtrace_traces.importers.source import Lines, Source

BLOCK_TOKENS = 16
_MOST = (1 << 31) - 1
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "chat_id", "parent_chat_id", "turn", "type")
_STAMP, _INPUT, _OUTPUT, _IDS, _CHAT, _PARENT, _TURN, _TYPE = range(len(_FIELDS))


@importer(
    "bailian", "Alibaba Bailian JSONL: as Mooncake's, with chat_id, parent_chat_id, turn and type",
    granule=lambda source: source.options.block_size or BLOCK_TOKENS,
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line."""
    return stream(source, scanner(*_FIELDS, ids="hash_ids"), _accept, _careful)


def _accept(columns: Columns) -> tuple[NDArray[np.bool_], Batch]:
    good, indptr = columns.lists(_IDS)
    fine, prompt = columns.tokens(_INPUT)
    good &= fine
    fine, output = columns.tokens(_OUTPUT, absent=0)
    good &= fine
    fine, arrival = columns.time(_STAMP, SECONDS)
    good &= fine
    fine, own = columns.whole(_CHAT, _MOST)
    good &= fine
    root = (columns.kinds[_PARENT] == NEGATIVE) & (columns.values[_PARENT] == 1) | (columns.kinds[_PARENT] == ABSENT)
    fine, parents = columns.whole(_PARENT, _MOST)
    good &= fine | root
    fine, turns = columns.whole(_TURN, _MOST)
    good &= fine | (columns.kinds[_TURN] == ABSENT)
    fine, types, names = columns.labels(_TYPE)
    good &= fine
    about = About(
        types, names, np.where(columns.kinds[_TURN] == WHOLE, turns, UNKNOWN).astype(np.int32), own,
        np.where(root, UNKNOWN, parents),
    )  # fmt: skip
    starts, sizes = _numerals(columns)
    return good, Batch(arrival, prompt, output, indptr, columns.ids, columns.lines.data, starts, sizes, about)


def _numerals(columns: Columns) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Requests have no names here: ``chat_id`` is a number, and their parents are told by request number."""
    none = np.zeros(len(columns.good), np.int64)
    return none, none.astype(np.int32)


def _careful(lines: Lines, number: int, line: bytes) -> Record | Bad:
    return lines_of(lines, number, line, _record)


def _record(row: dict[str, Any]) -> Record:
    kind, turn = row.get("type"), row.get("turn")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"type is {shown(kind)}, not a text")
    if turn is not None and (type(turn) is not int or not 0 <= turn <= _MOST):
        raise ValueError(f"turn is {shown(turn)}, not a number of a turn")
    if "chat_id" not in row:
        raise ValueError("it has no chat_id")
    return Record(
        ids_of(row, "hash_ids"),
        time_of(row, "timestamp", SECONDS),
        tokens_of(row, "input_length"),
        tokens_of(row, "output_length", absent=0),
        type=kind,
        turn=UNKNOWN if turn is None else turn,
        own=_chat(row["chat_id"], "chat_id"),
        parent=_chat(row.get("parent_chat_id"), "parent_chat_id"),
    )


def _chat(value: Any, field: str) -> int:
    """A conversation's number; one that is a text, or large, by a hash. UNKNOWN for none."""
    if value in (None, -1, "-1", "") and field != "chat_id":
        return UNKNOWN
    if type(value) is int and 0 <= value <= _MOST:
        return value
    if isinstance(value, str) or type(value) is int:
        digest = blake2b(repr(value).encode("utf-8", "replace"), digest_size=7).digest()
        return int.from_bytes(digest, "little") | 1 << 56
    raise ValueError(f"{field} is {shown(value)}, neither a number nor a text")
