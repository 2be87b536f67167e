"""Logs that know lengths and times alone (Azure, BurstGPT): requests without identities, whose reuse is not known."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.importers.batches import UNKNOWN, About, Bad, Batch, Piece, Record
from kvtrace_traces.importers.columns import ABSENT, SECONDS, TEXT, WHOLE, Columns, hash_text, hash_texts, stream
from kvtrace_traces.importers.csv_lines import fields_of, picked, scanner
from kvtrace_traces.importers.fields import date_ns, nanoseconds, shown, tokens_of
from kvtrace_traces.importers.source import Lines, Source

_HASHED = np.uint64(1 << 62)  # sessions named by a text stand apart from numbered ones
ANY_BLOCK_TOKENS = 16  # a header must name one; there is no block to measure


def read(source: Source, names: Sequence[Sequence[str]], typed: bool = False) -> Iterator[Piece]:
    """Requests of a CSV with a line of names. ``names``: what the columns may be called: time, prompt tokens, output
    tokens and, where ``typed``, type and session (both may be missing). A request's parent is the one before it in
    its session."""
    line, header = header_of(source)
    low = [name.lower() for name in header]
    places = []
    for number, choices in enumerate(names):
        found = [low.index(choice.lower()) for choice in choices if choice.lower() in low]
        if not found and number < 3:
            raise KvtraceError(f"{source.path}: its line of names has no column {' or '.join(choices)}")
        places.append(found[0] if found else -1)
    called = [header[place] if place >= 0 else "" for place in places]
    width = len(header)

    def accept(columns: Columns) -> tuple[NDArray[np.bool_], Batch]:
        return _accept(columns, typed)

    def careful(lines: Lines, number: int, line: bytes) -> Record | Bad:
        try:
            return _record(fields_of(line, width), places, called, typed)
        except ValueError as error:
            return Bad(lines.file, number, str(error))

    return stream(source, scanner(places, width, names_line=line), accept, careful)


def header_of(source: Source) -> tuple[int, list[str]]:
    """The first line of a CSV that is not blank: its number, and the names in it. Raises :class:`KvtraceError`."""
    for _, number, line in source.lines():
        try:
            return number, fields_of(line.rstrip(b"\r"), 0)
        except ValueError as error:
            raise KvtraceError(f"{source.path}, line {number}: {error}") from None
    raise KvtraceError(f"{source.path} is empty")


def _accept(columns: Columns, typed: bool) -> tuple[NDArray[np.bool_], Batch]:
    good, prompt = columns.tokens(1)
    fine, output = columns.tokens(2)
    good &= fine
    fine, arrival = columns.time(0, SECONDS)
    dated = columns.kinds[0] == TEXT
    stamps = np.where(dated, columns.values[0], np.uint64(0)).astype(np.int64)
    from_date = _dates(columns.lines.data, stamps, np.where(dated, columns.extras[0], 0))
    good &= (fine & ~dated & (columns.kinds[0] != ABSENT)) | (from_date >= 0)
    n = len(good)
    about = None
    if typed:
        fine, types, names = columns.labels(3)
        good &= fine
        fine, starts, sizes = columns.text(4)
        numbered = columns.kinds[4] == WHOLE
        good &= fine | numbered
        sessions = (hash_texts(columns.lines.data, starts, sizes) >> np.uint64(2) | _HASHED).astype(np.int64)
        sessions = np.where(numbered, columns.values[4].astype(np.int64), sessions)
        sessions = np.where(columns.kinds[4] == ABSENT, UNKNOWN, sessions)
        about = About(types, names, np.full(n, UNKNOWN, np.int32), sessions, sessions)
    starts, sizes = np.zeros(n, np.int64), np.zeros(n, np.int32)
    return good, Batch(
        np.where(dated, from_date, arrival), prompt, output, np.zeros(n + 1, np.int64), np.empty(0, np.uint64),
        columns.lines.data, starts, sizes, about,
    )  # fmt: skip


def _record(fields: Sequence[str], places: Sequence[int], called: Sequence[str], typed: bool) -> Record:
    stamp = picked(fields, places[0])
    prompt, output = (_tokens(picked(fields, places[i]), called[i]) for i in (1, 2))
    session = _session(picked(fields, places[4])) if typed else UNKNOWN
    return Record(
        (), _time(stamp, called[0]), prompt, output,
        type=(picked(fields, places[3]) or None) if typed else None, own=session, parent=session,
    )  # fmt: skip


def _session(text: str) -> int:
    """A number for a session, as ``_accept`` makes it."""
    if not text:
        return UNKNOWN
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    return hash_text(text) >> 2 | int(_HASHED)


def _tokens(text: str, field: str) -> int:
    value: object = int(text) if text.isascii() and text.isdigit() and len(text) < 4000 else text
    return tokens_of({field: value}, field)


def _time(text: str, field: str) -> int:
    try:
        stamp = Decimal(text)
    except InvalidOperation:
        if not text[:1].isdigit():
            raise ValueError(f"{field} is {shown(text)}, neither a number of seconds nor a date and time") from None
        return date_ns(text, field)
    return nanoseconds(stamp, field, SECONDS)


@njit
def _dates(data, starts, sizes):  # type: ignore[no-untyped-def]
    """ns since 1970 of texts like ``2023-11-16 18:17:03.9799600``, in UTC; -1 for all others.

    Days of the civil calendar by the counting of eras of 400 years (Hinnant, "chrono-compatible low-level date
    algorithms").
    """
    out = np.full(len(starts), -1, np.int64)
    template = np.array([48, 48, 48, 48, 45, 48, 48, 45, 48, 48, 32, 48, 48, 58, 48, 48, 58, 48, 48], np.uint8)
    months = np.array([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], np.int64)
    for n in range(len(starts)):
        at, size = starts[n], sizes[n]
        if size < 19 or size > 29 or size == 20:
            continue
        fine = True
        for k in range(size):
            c = data[at + k]
            want = template[k] if k < 19 else np.uint8(46 if k == 19 else 48)
            if want == 48:
                if c < 48 or c > 57:
                    fine = False
            elif c != want:
                fine = False
        if not fine:
            continue
        part = np.zeros(6, np.int64)
        for k in range(19):
            if template[k] == 48:
                which = 0 if k < 4 else 1 + (k - 5) // 3
                part[which] = part[which] * 10 + np.int64(data[at + k] - 48)
        year, month, day, hour, minute, second = part
        if month < 1 or month > 12 or hour > 23 or minute > 59 or second > 59 or year < 1970 or year > 2261:
            continue
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        if day < 1 or day > months[month - 1] + (1 if leap and month == 2 else 0):
            continue
        shifted = year - (1 if month <= 2 else 0)
        era = shifted // 400
        of_era = shifted - era * 400
        of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
        days = era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468
        fraction = np.int64(0)
        for k in range(20, 29):
            fraction = fraction * 10 + (np.int64(data[at + k] - 48) if k < size else np.int64(0))
        out[n] = ((days * 24 + hour) * 60 + minute) * 60_000_000_000 + second * 1_000_000_000 + fraction
    return out
