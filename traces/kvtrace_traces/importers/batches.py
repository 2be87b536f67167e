"""What importers yield: requests in columns (:class:`Batch`), references alone (:class:`Ids`), and bad records.

Formats that go record by record make :class:`Record` and let :func:`gathered` put them into columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_ID = (1 << 64) - 1
MAX_TOKENS = (1 << 31) - 1
MAX_NAME_BYTES = 4096
UNKNOWN = -1
"""For times, turns and parents."""

_RECORDS, _IDS = 4096, 1 << 20


class Bad(NamedTuple):
    """Why line ``line`` of ``file`` holds no request."""

    file: Path
    line: int
    reason: str


class Record(NamedTuple):
    """One request. ``ids``: block ids in order, each 0 to 2^64 - 1.

    ``own``: what later requests call it in ``parent``; both UNKNOWN where the format has no conversations.
    """

    ids: Sequence[int]
    arrival_ns: int = UNKNOWN
    prompt_tokens: int = 0
    output_tokens: int = 0
    name: str = ""
    type: str | None = None
    turn: int = UNKNOWN
    own: int = UNKNOWN
    parent: int = UNKNOWN


class About(NamedTuple):
    """What is known of conversations: ``types`` int32 into ``names`` (UNKNOWN: none), ``turns`` int32, ``own`` and
    ``parents`` int64, as in :class:`Record`."""

    types: NDArray[np.int32]
    names: list[str]
    turns: NDArray[np.int32]
    own: NDArray[np.int64]
    parents: NDArray[np.int64]


class Batch(NamedTuple):
    """Requests in columns, one entry each.

    ``arrival_ns`` int64 (UNKNOWN where not known), ``prompt_tokens`` and ``output_tokens`` int32; request i's ids are
    ``ids[indptr[i] : indptr[i + 1]]`` (uint64; int64); its name is ``text[name_starts[i] :][: name_sizes[i]]`` (uint8;
    int64, int32), UTF-8.
    """

    arrival_ns: NDArray[np.int64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    indptr: NDArray[np.int64]
    ids: NDArray[np.uint64]
    text: NDArray[np.uint8]
    name_starts: NDArray[np.int64]
    name_sizes: NDArray[np.int32]
    about: About | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Requests ``start`` to ``stop``. The ids stay where they are: ``indptr`` may begin behind 0."""
        about = self.about
        if about is not None:
            about = About(
                about.types[start:stop], about.names, about.turns[start:stop], about.own[start:stop],
                about.parents[start:stop],
            )  # fmt: skip
        return Batch(
            self.arrival_ns[start:stop], self.prompt_tokens[start:stop], self.output_tokens[start:stop],
            self.indptr[start : stop + 1], self.ids, self.text, self.name_starts[start:stop],
            self.name_sizes[start:stop], about,
        )  # fmt: skip


class Ids(NamedTuple):
    """Requests of one block each. ``ids`` uint64, ``arrival_ns`` int64 or None where no time is known."""

    ids: NDArray[np.uint64]
    arrival_ns: NDArray[np.int64] | None = None


Piece = Batch | Ids | Bad


def batch_of(records: Sequence[Record]) -> Batch:
    """The records in columns."""
    names = [record.name.encode("utf-8", "replace") for record in records]
    sizes = np.fromiter(map(len, names), np.int32, len(names))
    indptr = np.zeros(len(records) + 1, np.int64)
    np.cumsum(np.fromiter((len(record.ids) for record in records), np.int64, len(records)), out=indptr[1:])
    ids = array("Q")
    for record in records:
        ids.extend(record.ids)
    about = None
    if any(r.type is not None or r.turn >= 0 or r.own != UNKNOWN or r.parent != UNKNOWN for r in records):
        labels: dict[str, int] = {}
        types = [UNKNOWN if r.type is None else labels.setdefault(r.type, len(labels)) for r in records]
        turns = np.array([r.turn for r in records], np.int32)
        own, parents = np.array([(r.own, r.parent) for r in records], np.int64).T
        about = About(np.array(types, np.int32), list(labels), turns, own, parents)
    return Batch(
        np.array([record.arrival_ns for record in records], np.int64),
        np.array([record.prompt_tokens for record in records], np.int32),
        np.array([record.output_tokens for record in records], np.int32),
        indptr, np.frombuffer(ids, np.uint64) if len(ids) else np.empty(0, np.uint64),
        np.frombuffer(b"".join(names), np.uint8), np.cumsum(sizes, dtype=np.int64) - sizes, sizes, about,
    )  # fmt: skip


def gathered(records: Iterable[Record | Bad]) -> Iterator[Piece]:
    """Records in batches of bounded size, bad ones in their places."""
    held: list[Record] = []
    size = 0
    for record in records:
        if isinstance(record, Bad):
            if held:
                yield batch_of(held)
                held, size = [], 0
            yield record
            continue
        held.append(record)
        size += len(record.ids)
        if len(held) >= _RECORDS or size >= _IDS:
            yield batch_of(held)
            held, size = [], 0
    if held:
        yield batch_of(held)
