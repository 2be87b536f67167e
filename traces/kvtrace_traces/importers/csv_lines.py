"""Scans comma-separated lines for chosen fields: compiled, for lines without quotes, in ASCII. See ``columns``."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import csv
from collections.abc import Callable, Sequence

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.importers.columns import ABSENT, DECIMAL, TEXT, WHOLE, Columns
from kvtrace_traces.importers.source import Lines


def scanner(places: Sequence[int], width: int, names_line: int) -> Callable[[Lines], Columns]:
    """A scanner for the fields at ``places`` (-1: not there) of lines of ``width`` fields (0: whatever they have).

    A field that is a number comes as one, every other as text; an empty one as ABSENT. ``names_line``: number of the
    line of names, 0 for none.
    """
    wanted = np.array(places, np.int64)

    def scan(lines: Lines) -> Columns:
        data = lines.data
        most = int(np.count_nonzero(data == 10)) + 1
        shape = (len(wanted), most)
        kinds, values, extras = np.zeros(shape, np.uint8), np.zeros(shape, np.uint64), np.zeros(shape, np.int64)
        good = np.zeros(most, np.bool_)
        numbers, begins, ends = (np.empty(most, np.int64) for _ in range(3))
        count = _scan(
            data, lines.first, wanted, width, names_line, kinds, values, extras, good, numbers, begins, ends
        )  # fmt: skip
        return Columns(
            lines, kinds[:, :count], values[:, :count], extras[:, :count], good[:count], numbers[:count],
            begins[:count], ends[:count], np.empty(0, np.uint64),
        )  # fmt: skip

    return scan


def fields_of(line: bytes, width: int) -> list[str]:
    """The fields of one line. Raises :class:`ValueError` with a reason."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    try:
        (fields,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError):
        raise ValueError("it is no line of a CSV") from None
    if width and len(fields) != width:
        raise ValueError(f"it has {len(fields)} fields, not {width}")
    return [field.strip() for field in fields]


def picked(fields: Sequence[str], place: int) -> str:
    """The field at ``place``; an empty one where there is none."""
    return fields[place] if 0 <= place < len(fields) else ""


@njit
def _scan(data, first, wanted, width, names_line, kinds, values, extras, good, numbers, begins, ends):
    row = 0
    number = np.int64(first)
    i = np.int64(0)
    while i < len(data):
        begin = i
        blank = True
        plain = True
        place = 0
        start = i
        while True:
            c = data[i] if i < len(data) else np.uint8(10)
            if c == 44 or c == 10:
                stop = i
                if c == 10 and stop > start and data[stop - 1] == 13:
                    stop -= 1
                for f in range(len(wanted)):
                    if wanted[f] == place:
                        kinds[f, row], values[f, row], extras[f, row] = _field(data, start, stop)
                        if stop > start and (data[start] <= 32 or data[stop - 1] <= 32):
                            plain = False  # spaces around a field are not part of it
                place += 1
                start = i + 1
                if c == 10:
                    break
            elif c == 34 or c >= 0x80 or c == 0 or (c == 13 and i + 1 < len(data) and data[i + 1] != 10):
                plain = False
            if not (c == 32 or (c >= 9 and c <= 13)):
                blank = False
            i += 1
        if not blank and number != names_line:
            good[row], numbers[row], begins[row], ends[row] = plain and (width == 0 or place == width), number, begin, i
            if not good[row]:
                kinds[:, row] = ABSENT
            row += 1
        else:
            kinds[:, row] = ABSENT
        number += 1
        i += 1
    return row


@njit(cache=False)
def _field(data, start, stop):
    """Kind, value and extra of a field."""
    if start == stop:
        return np.uint8(ABSENT), np.uint64(0), np.int64(0)
    value = np.uint64(0)
    digits = np.int64(0)
    fraction = np.int64(-1)
    for i in range(start, stop):
        c = data[i]
        if c >= 48 and c <= 57:
            value = value * np.uint64(10) + np.uint64(c - 48)
            digits += 1
            if fraction >= 0:
                fraction += 1
        elif c == 46 and fraction < 0 and i > start and i < stop - 1:
            fraction = 0
        else:
            return np.uint8(TEXT), np.uint64(start), stop - start
    if digits > 18 or fraction == 0:
        return np.uint8(TEXT), np.uint64(start), stop - start
    if fraction > 0:
        return np.uint8(DECIMAL), value, -fraction
    return np.uint8(WHOLE), value, np.int64(0)
