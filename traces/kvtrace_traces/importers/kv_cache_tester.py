"""Traces of kv-cache-tester: a JSON file per conversation, a folder of them, or JSONL with one a line.

A conversation has ``id``, ``block_size`` (64) and ``requests``, each with ``t`` (s since the conversation began),
``in`` and ``out`` (tokens) and ``hash_ids``. An entry of type ``subagent`` holds ``requests`` of its own, whose ``t``
counts from the start of the conversation as well. Ids are local to the conversation, unless ``hash_id_scope`` is
``global``: equal ids of two conversations become two identities.

Conversations have no common clock. They are laid over one another as if all had begun at the same moment, and
their requests sorted by time. The format is that of callanjfox/kv-cache-tester, ``docs/trace_replay_tester.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import UNKNOWN, Bad, Piece, Record, gathered
from kvtrace_traces.importers.columns import SECONDS
from kvtrace_traces.importers.documents import documents
from kvtrace_traces.importers.fields import checked_ids, ids_of, nanoseconds, shown, tokens_of
from kvtrace_traces.importers.source import Source
from kvtrace_traces.schema import MAX_BLOCK_TOKENS

BLOCK_TOKENS = 64
MAX_NESTING = 32


class Entry(NamedTuple):
    """A request, its ids in a file of their own. ``own`` and ``parent`` number requests as they were read."""

    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    name: str
    type: str
    turn: int
    own: int
    parent: int
    at: int
    size: int


def _granule(source: Source) -> int:
    if source.options.block_size is not None:
        return source.options.block_size
    for found in documents(source):
        if isinstance(found, Bad) or not isinstance(found.value, dict):
            continue
        value = found.value.get("block_size")
        return value if type(value) is int and 0 < value <= MAX_BLOCK_TOKENS else BLOCK_TOKENS
    return BLOCK_TOKENS


@importer(
    "kv-cache-tester", "kv-cache-tester JSON, JSONL or a folder: conversations with ids of their own",
    granule=_granule, folder="*.json",
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """All requests, in order of time. Their ids wait in a temporary file, so that memory holds their times alone."""
    with tempfile.TemporaryFile() as spilled:
        entries: list[Entry] = []
        conversations, next_id = 0, 0
        for found in documents(source):
            if isinstance(found, Bad):
                yield found
                continue
            try:
                next_id = _conversation(source, found.value, entries, spilled, next_id)
                conversations += 1
            except ValueError as error:
                yield Bad(found.file, found.line, str(error))
        if conversations > 1:
            source.notes.append(
                f"{conversations:,} conversations without a common clock are laid over one another from their starts"
            )
        spilled.flush()
        entries.sort(key=lambda entry: entry.arrival_ns)  # equal times stay as they were read
        ids = np.memmap(spilled, np.uint64, "r") if spilled.tell() else np.empty(0, np.uint64)
        yield from gathered(
            Record(
                ids[e.at : e.at + e.size].tolist(), e.arrival_ns, e.prompt_tokens, e.output_tokens, e.name, e.type,
                e.turn, e.own, e.parent,
            )
            for e in entries
        )  # fmt: skip


def _conversation(source: Source, value: Any, entries: list[Entry], spilled: BinaryIO, next_id: int) -> int:
    """Take a conversation whole, or raise :class:`ValueError` and leave nothing of it. Returns the next free id."""
    if not isinstance(value, dict) or not isinstance(value.get("requests"), list):
        raise ValueError("it is no object with a list of requests")
    stated = value.get("block_size", source.granule)
    if source.options.block_size is None and stated != source.granule:
        raise ValueError(
            f"block_size is {shown(stated)} where the first conversation has {source.granule}: "
            "one trace has one block size (--block-size N takes all as N)"
        )
    found: list[tuple[Entry, NDArray[np.uint64]]] = []
    _collect(str(value.get("id", "")), value["requests"], "main", len(entries), found, 0)
    ids = np.concatenate([part for _, part in found]) if found else np.empty(0, np.uint64)
    if value.get("hash_id_scope", "local") != "global":
        local, ids = np.unique(ids, return_inverse=True)
        ids = ids.reshape(-1).astype(np.uint64) + np.uint64(next_id)
        next_id += len(local)
    at = spilled.tell() // 8
    spilled.write(ids.astype("<u8").tobytes())
    for entry, part in found:
        entries.append(entry._replace(at=at, size=len(part)))
        at += len(part)
    return next_id


def _collect(
    name: str, requests: Any, kind: str, first: int, found: list[tuple[Entry, NDArray[np.uint64]]], depth: int
) -> None:
    if not isinstance(requests, list) or depth > MAX_NESTING:
        raise ValueError("the requests of a subagent are not a list" if depth <= MAX_NESTING else "nested too deep")
    parent, turn = UNKNOWN, 0
    for number, row in enumerate(requests):
        try:
            if not isinstance(row, dict):
                raise ValueError("it is not an object")
            if row.get("type") == "subagent":
                agent = str(row.get("agent_id", number))
                _collect(f"{name}/{agent}", row.get("requests", []), str(row.get("subagent_type") or "subagent"), first,
                         found, depth + 1)  # fmt: skip
                continue
            own = first + len(found)
            ids = ids_of(row, "hash_ids") if "hash_ids" in row else checked_ids([], "hash_ids")
            turn += 1
            entry = Entry(
                nanoseconds(row.get("t"), "t", SECONDS), tokens_of(row, "in"), tokens_of(row, "out", absent=0), name,
                kind, turn, own, parent, 0, 0,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"requests[{number}]: {error}") from None
        parent = own
        found.append((entry, np.array(ids, np.uint64)))
