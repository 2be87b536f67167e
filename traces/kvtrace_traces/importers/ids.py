"""Plain ids: one a line, each a reference to one block, as classic cache traces are written.

An id is a whole number from 0 to 2^64-1, or any other text, of which a 64-bit hash is taken.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit
from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import MAX_ID, Bad, Ids
from kvtrace_traces.importers.columns import Columns, stream_ids
from kvtrace_traces.importers.source import Lines, Source


@importer("ids", "plain ids, one a line: each is a request of one block", lambda source: source.options.block_size or 1)
def read(source: Source) -> Iterator[Ids | Bad]:
    """One request of one block a line."""
    return stream_ids(source, _scan_lines, _accept, _careful)


def identity_of(text: bytes) -> int:
    """The id that a text is, or the hash of another text. Raises :class:`ValueError`."""
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if text[text[:1] in (b"+", b"-") :].isdigit():
        value = int(text) if len(text) < 4000 else MAX_ID + 1
        if not 0 <= value <= MAX_ID:
            raise ValueError(f"{text[:40].decode()} is not between 0 and 2^64-1")
        return value
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def _careful(lines: Lines, number: int, line: bytes) -> tuple[int, int] | Bad:
    try:
        text = line.removeprefix(BOM_UTF8).strip() if number == 1 else line.strip()
        if b"\r" in text:
            raise ValueError("a carriage return stands within it: end lines with a line feed")
        return identity_of(text), -1
    except ValueError as error:
        return Bad(lines.file, number, str(error))


def _accept(columns: Columns) -> tuple[NDArray[np.bool_], Ids]:
    return columns.good.copy(), Ids(columns.ids)


def _scan_lines(lines: Lines) -> Columns:
    most = int(np.count_nonzero(lines.data == 10)) + 1
    good = np.zeros(most, np.bool_)
    numbers, begins, ends = (np.empty(most, np.int64) for _ in range(3))
    ids = np.zeros(most, np.uint64)
    count = _scan(lines.data, lines.first, good, numbers, begins, ends, ids)
    none = np.empty((0, count))
    return Columns(
        lines, none.astype(np.uint8), none.astype(np.uint64), none.astype(np.int64), good[:count], numbers[:count],
        begins[:count], ends[:count], ids[:count],
    )  # fmt: skip


@njit
def _scan(data, first, good, numbers, begins, ends, ids):
    """Lines of nothing but digits, up to 19 of them; returns how many lines are not blank."""
    row = 0
    number = np.int64(first)
    i = 0
    while i < len(data):
        begin = i
        value = np.uint64(0)
        while i < len(data) and data[i] >= 48 and data[i] <= 57:
            value = value * np.uint64(10) + np.uint64(data[i] - 48)
            i += 1
        plain = 0 < i - begin <= 19
        if i < len(data) and data[i] == 13:
            i += 1
        plain = plain and (i == len(data) or data[i] == 10)
        blank = True
        while i < len(data) and data[i] != 10:
            i += 1
        for k in range(begin, i):
            c = data[k]
            if not (c == 32 or (c >= 9 and c <= 13)):
                blank = False
                break
        if not blank:
            good[row], numbers[row], begins[row], ends[row], ids[row] = plain, number, begin, i, value
            row += 1
        number += 1
        i += 1
    return row
