"""Chosen fields of many lines as columns, and what formats make of them.

A scanner (``json_lines``, ``csv_lines``) fills a :class:`Columns` with the plain lines of a chunk: those it understands
wholly and without any doubt. All others it marks, and they are read one by one by the format's careful reader, which
decides what is right: the scanner is only ever a quicker way to the same answer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit
from kvtrace_traces.importers.batches import MAX_TOKENS, Bad, Batch, Ids, Piece, Record, gathered
from kvtrace_traces.importers.source import Lines, Source

ABSENT, WHOLE, NEGATIVE, DECIMAL, TEXT, LIST, NULL, OTHER = range(8)
"""Kinds of field: absent (or empty); a whole number from 0 to 2^64-1; one below 0, by its magnitude; a decimal number
``value * 10^extra``; plain text, ``extra`` bytes at ``value`` of the chunk; ids ``value`` to ``extra``; null; others.
"""

MILLISECONDS, SECONDS = 6, 9
"""Units of time: powers of ten to nanoseconds."""

MOST_NS = (1 << 63) - 1


class Columns(NamedTuple):
    """``kinds`` uint8, ``values`` uint64 and ``extras`` int64 are [field, line]; ``good``: the line is plain; line i is
    number ``numbers[i]`` of the file and stands at ``begins[i] : ends[i]`` of ``data``; ``ids`` uint64."""

    lines: Lines
    kinds: NDArray[np.uint8]
    values: NDArray[np.uint64]
    extras: NDArray[np.int64]
    good: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    ids: NDArray[np.uint64]

    def whole(self, field: int, most: int, absent: int | None = None) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which lines have a whole number up to ``most`` (below 2^63) in ``field``, and the numbers; ``absent``: what
        stands for none."""
        kinds, values = self.kinds[field], self.values[field]
        fine = (kinds == WHOLE) & (values <= np.uint64(most))
        if absent is not None:
            fine |= kinds == ABSENT
        return fine, np.where((kinds == WHOLE) & fine, values, np.uint64(absent or 0)).astype(np.int64)

    def tokens(self, field: int, absent: int | None = None) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """As :meth:`whole`, for numbers of tokens."""
        fine, values = self.whole(field, MAX_TOKENS, absent)
        return fine, values.astype(np.int32)

    def time(self, field: int, unit: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which lines have a time, or none, in ``field``; in nanoseconds, rounded half to even, -1 for none."""
        out = np.empty(len(self.good), np.int64)
        fine = np.empty(len(self.good), np.bool_)
        _times(self.kinds[field], self.values[field], self.extras[field], unit, out, fine)
        return fine, out

    def text(self, field: int) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int32]]:
        """Which lines have text, or nothing, in ``field``; where it starts in the chunk, and its size."""
        kinds = self.kinds[field]
        found = kinds == TEXT
        starts = np.where(found, self.values[field], np.uint64(0)).astype(np.int64)
        sizes = np.where(found, self.extras[field], 0).astype(np.int32)
        return found | (kinds == ABSENT), starts, sizes

    def labels(self, field: int) -> tuple[NDArray[np.bool_], NDArray[np.int32], list[str]]:
        """As :meth:`text`, with equal texts as equal numbers: number (-1 for none) and the texts."""
        fine, starts, sizes = self.text(field)
        found = fine & (self.kinds[field] == TEXT)
        hashes = hash_texts(self.lines.data, starts, sizes)
        _, first, number = np.unique(hashes[found], return_index=True, return_inverse=True)
        rows = np.flatnonzero(found)[first]
        texts = [self.lines.data[starts[r] : starts[r] + sizes[r]].tobytes().decode() for r in rows]
        numbers = np.full(len(found), -1, np.int32)
        numbers[found] = number
        return fine, numbers, texts

    def lists(self, field: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which lines have a list of ids in ``field``, and int64[lines + 1], where in ``ids`` each begins."""
        fine = self.kinds[field] == LIST
        ends = np.where(fine, self.extras[field], 0)
        indptr = np.zeros(len(fine) + 1, np.int64)
        np.maximum.accumulate(ends, out=indptr[1:])
        return fine, indptr


Scanner = Callable[[Lines], Columns]


def stream(
    source: Source,
    scan: Scanner,
    accept: Callable[[Columns], tuple[NDArray[np.bool_], Batch]],
    careful: Callable[[Lines, int, bytes], Record | Bad],
) -> Iterator[Piece]:
    """Read all lines of ``source``: those that ``accept`` takes as they are, the others with ``careful``.

    ``accept`` returns which lines it takes and a batch with an entry for every line; ``careful(lines, number, line)``.
    """
    for lines in source.chunks():
        columns = scan(lines)
        good, batch = accept(columns)
        good &= columns.good
        for start, stop, fine in runs(good):
            if fine:
                yield batch.part(start, stop)
            else:
                yield from gathered(one_by_one(columns, start, stop, careful))


def one_by_one(
    columns: Columns, start: int, stop: int, careful: Callable[[Lines, int, bytes], Record | Bad]
) -> Iterator[Record | Bad]:
    """Lines ``start`` to ``stop`` of a chunk, read with care."""
    data = columns.lines.data
    for i in range(start, stop):
        line = data[columns.begins[i] : columns.ends[i]].tobytes()
        yield careful(columns.lines, int(columns.numbers[i]), line)


def runs(good: NDArray[np.bool_]) -> Iterator[tuple[int, int, bool]]:
    """Stretches of equal values: start, stop, value."""
    if len(good):
        edges = [0, *(np.flatnonzero(good[1:] != good[:-1]) + 1).tolist(), len(good)]
        for start, stop in pairwise(edges):
            yield start, stop, bool(good[start])


def stream_ids(
    source: Source,
    scan: Scanner,
    accept: Callable[[Columns], tuple[NDArray[np.bool_], Ids]],
    careful: Callable[[Lines, int, bytes], tuple[int, int] | Bad],
) -> Iterator[Ids | Bad]:
    """As :func:`stream` for formats of one id a line; ``careful`` returns ``(id, arrival_ns)``."""
    for lines in source.chunks():
        columns = scan(lines)
        good, ids = accept(columns)
        good &= columns.good
        for start, stop, fine in runs(good):
            if fine:
                times = ids.arrival_ns
                yield Ids(ids.ids[start:stop], None if times is None else times[start:stop])
                continue
            taken: list[tuple[int, int]] = []
            for i in range(start, stop):
                line = lines.data[columns.begins[i] : columns.ends[i]].tobytes()
                found = careful(lines, int(columns.numbers[i]), line)
                if not isinstance(found, Bad):
                    taken.append(found)
                    continue
                if taken:
                    yield _ids_of(taken, ids.arrival_ns is not None)
                    taken = []
                yield found
            if taken:
                yield _ids_of(taken, ids.arrival_ns is not None)


def _ids_of(taken: list[tuple[int, int]], timed: bool) -> Ids:
    found = np.array([identity for identity, _ in taken], np.uint64)
    return Ids(found, np.array([time for _, time in taken], np.int64) if timed else None)


@njit
def _times(kinds, values, extras, unit, out, fine):
    for i in range(len(kinds)):
        fine[i] = True
        if kinds[i] == ABSENT:
            out[i] = -1
        elif kinds[i] == WHOLE or kinds[i] == DECIMAL:
            power = np.int64(unit) + (extras[i] if kinds[i] == DECIMAL else np.int64(0))
            value = values[i]
            most = np.uint64(MOST_NS)
            while power > 0 and value <= most // np.uint64(10):
                value *= np.uint64(10)
                power -= 1
            if value == 0:
                power = 0
            if power > 0 or power < -18 or value > most:
                fine[i] = False
                continue
            if power < 0:
                divisor = np.uint64(1)
                for _ in range(-power):
                    divisor *= np.uint64(10)
                rest = value % divisor
                value = value // divisor
                if rest > divisor - rest or (rest == divisor - rest and value & np.uint64(1)):
                    value += np.uint64(1)
            out[i] = np.int64(value)
        else:
            fine[i] = False


def hash_text(text: str) -> int:
    """As :func:`hash_texts`, of one text."""
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    return int(hash_texts(data, np.zeros(1, np.int64), np.array([len(data)]))[0])


@njit
def hash_texts(data, starts, sizes):
    """uint64 of each text: FNV-1a (Fowler, Noll and Vo), to tell equal ones from different ones."""
    hashes = np.empty(len(starts), np.uint64)
    for i in range(len(starts)):
        value = np.uint64(0xCBF29CE484222325)
        for k in range(starts[i], starts[i] + sizes[i]):
            value = (value ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        hashes[i] = value
    return hashes
