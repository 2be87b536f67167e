"""A CSV of references: a line each, with columns ``id`` and, where known, ``request``, ``time_s`` (or ``time_ms``,
``time_us``, ``time_ns``), ``tokens`` and ``output_tokens``.

Lines that follow one another with the same ``request`` are one request, whose time and tokens stand in its first line;
an empty ``id`` is a request without blocks. Without ``request`` each line is a request of one block. An id is a whole
number from 0 to 2^64-1, or another text, of which a 64-bit hash is taken. What ``kvtrace export csv`` writes reads
back.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import UNKNOWN, Bad, Batch, Ids, Piece
from kvtrace_traces.importers.columns import ABSENT, TEXT, WHOLE, Columns, hash_text, hash_texts, runs
from kvtrace_traces.importers.csv_lines import fields_of, picked, scanner
from kvtrace_traces.importers.fields import nanoseconds, shown, tokens_of
from kvtrace_traces.importers.ids import identity_of
from kvtrace_traces.importers.lengths import header_of
from kvtrace_traces.importers.source import Lines, Source

_TIMES = {"time_s": 9, "time": 9, "time_ms": 6, "time_us": 3, "time_ns": 0}
_NAMES = ("id", "request", *_TIMES, "tokens", "output_tokens")
_ID, _REQUEST, _TIME, _TOKENS, _OUTPUT = range(5)


class Rows(NamedTuple):
    """Lines as columns: ``ids`` uint64 (where ``some``), ``requests`` uint64 (a number, or a hash that stands for a
    text), ``times`` int64 ns, ``tokens`` and ``outputs`` int32, -1 where there is none."""

    ids: NDArray[np.uint64]
    some: NDArray[np.bool_]
    requests: NDArray[np.uint64]
    times: NDArray[np.int64]
    tokens: NDArray[np.int32]
    outputs: NDArray[np.int32]

    def part(self, start: int, stop: int) -> Rows:
        """Lines ``start`` to ``stop``."""
        return Rows(
            self.ids[start:stop], self.some[start:stop], self.requests[start:stop], self.times[start:stop],
            self.tokens[start:stop], self.outputs[start:stop],
        )  # fmt: skip


def joined(parts: list[Rows]) -> Rows:
    """Lines that follow one another."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([part.ids for part in parts]), np.concatenate([part.some for part in parts]),
        np.concatenate([part.requests for part in parts]), np.concatenate([part.times for part in parts]),
        np.concatenate([part.tokens for part in parts]), np.concatenate([part.outputs for part in parts]),
    )  # fmt: skip


class Layout(NamedTuple):
    """Where the columns stand, -1 for those that do not; ``unit`` of the time; ``width`` and line of the names."""

    places: tuple[int, ...]
    called: tuple[str, ...]
    unit: int
    width: int
    names_line: int


@importer(
    "csv", "CSV with a line per reference: id, and request, time_s, tokens, output_tokens where known",
    granule=lambda source: source.options.block_size or 1, takes=("block_size", "columns"),
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """Requests of the references, see the module."""
    layout = _layout(source)
    scan = scanner(layout.places, layout.width, layout.names_line)
    if layout.places[_REQUEST] < 0:
        for found in _rows(source, layout, scan):
            yield (
                found if isinstance(found, Bad) else Ids(found.ids, found.times if layout.places[_TIME] >= 0 else None)
            )
        return
    held: list[Rows] = []  # of the last request, which may go on in the next chunk
    for found in _rows(source, layout, scan):
        if isinstance(found, Bad):
            yield found
            continue
        held.append(found)
        if bool((found.requests == held[0].requests[0]).all()):
            continue
        rows = joined(held)
        starts = np.flatnonzero(np.diff(rows.requests, prepend=~rows.requests[:1]))
        yield _batch(source, rows, starts[:-1], int(starts[-1]))
        held = [rows.part(int(starts[-1]), len(rows.ids))]
    if held:
        rows = joined(held)
        yield _batch(source, rows, np.zeros(1, np.int64), len(rows.ids))


def _layout(source: Source) -> Layout:
    chosen = source.options.columns
    for ours in chosen:
        if ours not in _NAMES:
            raise UsageError(f"--columns {ours}=...: the columns are {', '.join(_NAMES)}")
    numbered = bool(chosen) and all(theirs.isdigit() for theirs in chosen.values())
    line, header = header_of(source)
    found: dict[str, int] = {}
    if numbered:
        line = 0
        for ours, theirs in chosen.items():
            if not 1 <= int(theirs) <= len(header):
                raise UsageError(f"--columns {ours}={theirs}: {source.path} has columns 1 to {len(header)}")
            found[ours] = int(theirs) - 1
    else:
        for ours in _NAMES:
            theirs = chosen.get(ours, ours)
            if theirs in header:
                found[ours] = header.index(theirs)
            elif ours in chosen:
                raise UsageError(f"--columns {ours}={theirs}: {source.path} has columns {', '.join(header)[:200]}")
    if "id" not in found:
        raise KvtraceError(
            f"{source.path} has no column id: say which it is with --columns id=NAME, or id=1 in a file without names"
        )
    times = [ours for ours in _TIMES if ours in found]
    if len(times) > 1:
        raise UsageError(f"{source.path} has {' and '.join(times)}: choose one with --columns {times[0]}=NAME")
    called = ("id", "request", times[0] if times else "time_s", "tokens", "output_tokens")
    places = tuple(found.get(name, -1) for name in called)
    return Layout(places, called, _TIMES[called[_TIME]], len(header), line)


def _rows(source: Source, layout: Layout, scan) -> Iterator[Rows | Bad]:
    for lines in source.chunks():
        columns = scan(lines)
        good, rows = _accept(layout, columns)
        for start, stop, fine in runs(good & columns.good):
            if fine:
                yield rows.part(start, stop)
                continue
            for i in range(start, stop):
                text = lines.data[columns.begins[i] : columns.ends[i]].tobytes()
                yield _careful(layout, lines, int(columns.numbers[i]), text)


def _accept(layout: Layout, columns: Columns) -> tuple[NDArray[np.bool_], Rows]:
    grouped = layout.places[_REQUEST] >= 0
    some = columns.kinds[_ID] == WHOLE
    good = some | ((columns.kinds[_ID] == ABSENT) & grouped)
    named = columns.kinds[_REQUEST] == TEXT
    starts = np.where(named, columns.values[_REQUEST], np.uint64(0)).astype(np.int64)
    hashes = hash_texts(columns.lines.data, starts, np.where(named, columns.extras[_REQUEST], 0))
    requests = np.where(named, hashes, columns.values[_REQUEST])  # as _key
    good &= named | (columns.kinds[_REQUEST] == WHOLE) | (not grouped)
    fine, times = columns.time(_TIME, layout.unit)
    good &= fine
    none = np.full(len(good), UNKNOWN, np.int32)
    tokens = outputs = none
    if grouped:
        fine, tokens = columns.tokens(_TOKENS, absent=0)
        good &= fine
        tokens = np.where(columns.kinds[_TOKENS] == ABSENT, none, tokens)
        fine, outputs = columns.tokens(_OUTPUT, absent=0)
        good &= fine
        outputs = np.where(columns.kinds[_OUTPUT] == ABSENT, none, outputs)
    return good, Rows(columns.values[_ID], some, requests, times, tokens, outputs)


def _careful(layout: Layout, lines: Lines, number: int, line: bytes) -> Rows | Bad:
    grouped = layout.places[_REQUEST] >= 0
    try:
        fields = [picked(fields_of(line.rstrip(b"\r"), layout.width), place) for place in layout.places]
        if not fields[_ID] and not grouped:
            raise ValueError("its id is empty")
        if not fields[_REQUEST] and grouped:
            raise ValueError("its request is empty")
        tokens = outputs = UNKNOWN
        if grouped:
            tokens, outputs = (_tokens(fields[i], layout.called[i]) for i in (_TOKENS, _OUTPUT))
        return Rows(
            np.array([identity_of(fields[_ID].encode()) if fields[_ID] else 0], np.uint64),
            np.array([bool(fields[_ID])]),
            np.array([_key(fields[_REQUEST])], np.uint64),
            np.array([_time(fields[_TIME], layout)], np.int64),
            np.array([tokens], np.int32), np.array([outputs], np.int32),
        )  # fmt: skip
    except ValueError as error:
        return Bad(lines.file, number, str(error))


def _key(text: str) -> int:
    """What stands for a request's text: itself where it is a number, as the scanner takes them, else a hash."""
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    return hash_text(text)


def _tokens(text: str, field: str) -> int:
    if not text:
        return UNKNOWN
    value: object = int(text) if text.isascii() and text.isdigit() and len(text) < 4000 else text
    return tokens_of({field: value}, field)


def _time(text: str, layout: Layout) -> int:
    if not text:
        return UNKNOWN
    try:
        return nanoseconds(Decimal(text), layout.called[_TIME], layout.unit)
    except InvalidOperation:
        raise ValueError(f"{layout.called[_TIME]} is {shown(text)}, not a number") from None


def _batch(source: Source, rows: Rows, starts: NDArray[np.int64], stop: int) -> Batch:
    """The requests that begin at ``starts``, the last of them ending at ``stop``."""
    counts = np.zeros(len(rows.some) + 1, np.int64)
    np.cumsum(rows.some, out=counts[1:])
    indptr = counts[np.append(starts, stop)]
    own = rows.tokens[starts]
    # Where a file knows no lengths, prompts are whole blocks.
    whole = np.minimum(np.diff(indptr) * source.granule, (1 << 31) - 1).astype(np.int32)
    n = len(starts)
    return Batch(
        rows.times[starts], np.where(own >= 0, own, whole), np.maximum(rows.outputs[starts], 0), indptr,
        rows.ids[:stop][rows.some[:stop]], np.empty(0, np.uint8), np.zeros(n, np.int64), np.zeros(n, np.int32),
    )  # fmt: skip
