"""Scans JSON objects, one a line, for chosen fields: compiled, and strict: it takes nothing that ``json`` refuses.

A line is plain if it is an object of numbers, texts without escapes in ASCII, ``true``, ``false``, ``null`` and flat
lists of these. Everything else is for the careful reader.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.importers.columns import (
    ABSENT,
    DECIMAL,
    LIST,
    NEGATIVE,
    NULL,
    OTHER,
    TEXT,
    WHOLE,
    Columns,
)  # fmt: skip
from kvtrace_traces.importers.source import Lines

_OPEN, _CLOSE, _LEFT, _RIGHT, _QUOTE, _COMMA, _COLON = (np.uint8(ord(c)) for c in '{}[]",:')
_ZERO, _ONE, _NINE, _MINUS, _PLUS, _DOT, _BIG_E, _E = (np.uint8(ord(c)) for c in "019-+.Ee")
_SPACE, _TAB, _RETURN, _ESCAPE = (np.uint8(ord(c)) for c in " \t\r\\")
_BAD = -1
_MASK = (1 << 64) - 1
_HEX = re.compile(r"[0-9a-fA-F]+")


def scanner(*fields: str, ids: str, hexadecimal: bool = False) -> Callable[[Lines], Columns]:
    """A scanner for the named fields. ``ids`` is one of them: a list of whole numbers from 0 to 2^64-1 or, with
    ``hexadecimal``, of texts as :func:`identity_of_hex` takes them."""
    names = [field.encode() for field in fields]
    text = np.frombuffer(b"".join(names), np.uint8)
    ends = np.cumsum([0, *map(len, names)]).astype(np.int64)
    listed = fields.index(ids)

    def scan(lines: Lines) -> Columns:
        data = lines.data
        breaks = np.flatnonzero(data == 10)
        most = len(breaks) + 1
        kinds = np.zeros((len(fields), most), np.uint8)
        values, extras = np.zeros((len(fields), most), np.uint64), np.zeros((len(fields), most), np.int64)
        good = np.zeros(most, np.bool_)
        numbers, begins, stops = (np.empty(most, np.int64) for _ in range(3))
        found = np.empty(len(data) // 2 + 1, np.uint64)
        count = _scan(
            data,
            breaks,
            lines.first,
            text,
            ends,
            listed,
            hexadecimal,
            kinds,
            values,
            extras,
            good,
            numbers,
            begins,
            stops,
            found,
        )
        return Columns(
            lines, kinds[:, :count], values[:, :count], extras[:, :count], good[:count], numbers[:count],
            begins[:count], stops[:count], found,
        )  # fmt: skip

    return scan


def parse(line: bytes) -> Any:
    """What ``json`` makes of a line, decimal numbers exactly. Raises :class:`ValueError` with a reason."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_float=Decimal)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (ValueError, ArithmeticError, RecursionError):
        raise ValueError("it is not JSON") from None


@lru_cache(maxsize=1 << 16)
def identity_of_hex(text: str) -> int:
    """64 bits for a hash in hexadecimal, ``0x`` before it: the number itself (the two's complement of a negative one)
    or, where it has more than 16 digits, its 64-bit words mixed together. Raises :class:`ValueError`."""
    negative, digits = text[:1] == "-", text.removeprefix("-").removeprefix("0x")
    if digits == text.removeprefix("-") or _HEX.fullmatch(digits) is None or (negative and len(digits) > 16):
        raise ValueError(text)
    if len(digits) <= 16:
        return int(digits, 16) if not negative else -int(digits, 16) & _MASK
    mixed = 0
    for at in range(0, len(digits), 16):
        mixed = _mix(mixed ^ int(digits[at : at + 16], 16))
    return mixed


def _mix(value: int) -> int:
    """The finisher of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@njit(cache=False)
def _mixed(value):
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@njit(cache=False)
def _skip(data, i, stop):
    while i < stop and (data[i] == _SPACE or data[i] == _TAB or data[i] == _RETURN):
        i += 1
    return i


@njit(cache=False)
def _text(data, i, stop):
    """Behind the closing quote of the text that opens before ``i``; _BAD where it has escapes or other bytes."""
    while i < stop:
        c = data[i]
        if c == _QUOTE:
            return i + 1
        if c < 0x20 or c >= 0x80 or c == _ESCAPE:
            return np.int64(_BAD)
        i += 1
    return np.int64(_BAD)


@njit(cache=False)
def _digits(data, i, stop, value, room):
    """Take digits: where they end, the number so far, and digits that may still follow without loss (-1: too many)."""
    while i < stop and data[i] >= _ZERO and data[i] <= _NINE:
        value = value * np.uint64(10) + np.uint64(data[i] - _ZERO)
        room -= 1
        i += 1
    return i, value, room


@njit(cache=False)
def _whole(data, i, stop):
    """A whole number at ``i``: where it ends (_BAD: not one, or above 2^64-1) and the number."""
    first = i
    value = np.uint64(0)
    while i < stop:
        digit = np.uint8(data[np.uintp(i)] - _ZERO)  # unsigned: no check for an index below 0
        if digit > 9:
            break
        value = value * np.uint64(10) + np.uint64(digit)
        i += 1
    size = i - first
    if size == 0 or (size > 1 and data[np.uintp(first)] == _ZERO):
        return np.int64(_BAD), value
    # Of 20 digits the number may be above 2^64-1: then it has wrapped, or does not begin with a 1.
    if size >= 20 and (size > 20 or data[np.uintp(first)] != _ONE or value < np.uint64(10**19)):
        return np.int64(_BAD), value
    return i, value


@njit(cache=False)
def _number(data, i, stop):
    """A number at ``i``: where it ends, its kind, value and exponent."""
    negative = data[i] == _MINUS
    if negative:
        i += 1
    first = i
    at, value = _whole(data, i, stop)
    if at < 0:
        return np.int64(_BAD), OTHER, value, np.int64(0)
    if at == stop or not (data[at] == _DOT or data[at] == _E or data[at] == _BIG_E):
        return at, (NEGATIVE if negative else WHOLE), value, np.int64(0)
    room = np.int64(18) - (at - first)
    exponent = np.int64(0)
    if data[at] == _DOT:
        begin = at + 1
        at, value, room = _digits(data, begin, stop, value, room)
        if at == begin:
            return np.int64(_BAD), OTHER, value, np.int64(0)
        exponent = begin - at
    if at < stop and (data[at] == _E or data[at] == _BIG_E):
        at += 1
        down = at < stop and data[at] == _MINUS
        if at < stop and (data[at] == _MINUS or data[at] == _PLUS):
            at += 1
        begin = at
        at, power, _ = _digits(data, begin, stop, np.uint64(0), np.int64(0))
        if at == begin or at - begin > 3:
            return np.int64(_BAD), OTHER, value, np.int64(0)
        exponent += -np.int64(power) if down else np.int64(power)
    if room < 0 or negative:  # more digits than are kept exactly
        return np.int64(_BAD), OTHER, value, np.int64(0)
    return at, DECIMAL, value, exponent


@njit(cache=False)
def _literal(data, i, stop):
    """``true``, ``false`` or ``null`` at ``i``: where it ends and its kind."""
    if i + 4 <= stop and data[i] == 0x6E and data[i + 1] == 0x75 and data[i + 2] == 0x6C and data[i + 3] == 0x6C:
        return i + 4, NULL
    if i + 4 <= stop and data[i] == 0x74 and data[i + 1] == 0x72 and data[i + 2] == 0x75 and data[i + 3] == 0x65:
        return i + 4, OTHER
    if i + 5 <= stop and data[i] == 0x66 and data[i + 1] == 0x61 and data[i + 2] == 0x6C and data[i + 3] == 0x73:
        return (i + 5 if data[i + 4] == 0x65 else np.int64(_BAD)), OTHER
    return np.int64(_BAD), OTHER


@njit(cache=False)
def _scalar(data, i, stop):
    """Any value but a list or an object at ``i``: where it ends, kind, value, extra."""
    c = data[i]
    if c == _QUOTE:
        at = _text(data, i + 1, stop)
        return at, TEXT, np.uint64(i + 1), at - i - 2
    if c == _MINUS or (c >= _ZERO and c <= _NINE):
        return _number(data, i, stop)
    at, kind = _literal(data, i, stop)
    return at, kind, np.uint64(0), np.int64(0)


@njit(cache=False)
def _hex(data, i, stop):
    """A text like ``"0x1f"`` at ``i``: where it ends (_BAD: not one) and its 64 bits, as ``identity_of_hex``."""
    at = _text(data, i + 1, stop)
    size = at - i - 4
    if at < 0 or size < 1 or data[i + 1] != _ZERO or data[i + 2] != 0x78:
        return np.int64(_BAD), np.uint64(0)
    mixed = np.uint64(0)
    word = np.uint64(0)
    for k in range(size):
        c = data[i + 3 + k]
        if c >= _ZERO and c <= _NINE:
            digit = np.uint64(c - _ZERO)
        elif (c >= 0x61 and c <= 0x66) or (c >= 0x41 and c <= 0x46):
            digit = np.uint64((c & 0xDF) - 0x37)
        else:
            return np.int64(_BAD), np.uint64(0)
        word = word << np.uint64(4) | digit
        if size > 16 and (k % 16 == 15 or k == size - 1):
            mixed = _mixed(mixed ^ word)
            word = np.uint64(0)
    return at, mixed if size > 16 else word


@njit(cache=False)
def _ids(data, i, stop, hexadecimal, ids, count):
    """A list of ids, behind its bracket: where it ends (_BAD: not one), and how many ids there are by then."""
    i = _skip(data, i, stop)
    if i < stop and data[i] == _RIGHT:
        return i + 1, count
    while i < stop:
        if hexadecimal and data[i] == _QUOTE:
            i, value = _hex(data, i, stop)
        else:
            i, value = _whole(data, i, stop)
        if i < 0 or i >= stop:
            return np.int64(_BAD), count
        ids[np.uintp(count)] = value
        count += 1
        if data[np.uintp(i)] != _COMMA:
            i = _skip(data, i, stop)
            if i < stop and data[i] == _RIGHT:
                return i + 1, count
            if i >= stop or data[i] != _COMMA:
                return np.int64(_BAD), count
        i += 1
        if i < stop and data[np.uintp(i)] == _SPACE:
            i += 1
        if i < stop and data[np.uintp(i)] <= _SPACE:
            i = _skip(data, i, stop)
    return np.int64(_BAD), count


@njit(cache=False)
def _flat(data, i, stop):
    """Pass over a list of scalars, behind its bracket: where it ends, _BAD if it is no such list."""
    i = _skip(data, i, stop)
    if i < stop and data[i] == _RIGHT:
        return i + 1
    while i < stop:
        i, _, _, _ = _scalar(data, i, stop)
        if i < 0:
            return np.int64(_BAD)
        i = _skip(data, i, stop)
        if i >= stop:
            return np.int64(_BAD)
        if data[i] == _RIGHT:
            return i + 1
        if data[i] != _COMMA:
            return np.int64(_BAD)
        i = _skip(data, i + 1, stop)
    return np.int64(_BAD)


@njit(cache=False)
def _field(data, start, stop, text, ends):
    """Which field ``data[start:stop]`` names, -1 for none."""
    size = stop - start
    for f in range(len(ends) - 1):
        if ends[f + 1] - ends[f] == size:
            same = True
            for k in range(size):
                if data[start + k] != text[ends[f] + k]:
                    same = False
                    break
            if same:
                return f
    return -1


@njit(cache=False)
def _object(data, i, stop, text, ends, listed, hexadecimal, kinds, values, extras, row, ids, count):
    """An object that fills ``data[i:stop]``: whether it is plain, and how many ids there are by then."""
    i = _skip(data, i, stop)
    if i >= stop or data[i] != _OPEN:
        return False, count
    i = _skip(data, i + 1, stop)
    if i < stop and data[i] == _CLOSE:
        return _skip(data, i + 1, stop) == stop, count
    while i < stop:
        if data[i] != _QUOTE:
            return False, count
        begin = i + 1
        i = _text(data, begin, stop)
        if i < 0:
            return False, count
        f = _field(data, begin, i - 1, text, ends)
        i = _skip(data, i, stop)
        if i >= stop or data[i] != _COLON:
            return False, count
        i = _skip(data, i + 1, stop)
        if i >= stop or (f >= 0 and kinds[f, row] != ABSENT):
            return False, count
        if data[i] == _LEFT:
            if f == listed:
                values[f, row] = np.uint64(count)
                i, count = _ids(data, i + 1, stop, hexadecimal, ids, count)
                extras[f, row] = count
                kinds[f, row] = LIST
            else:
                i = _flat(data, i + 1, stop)
                if f >= 0:
                    kinds[f, row] = OTHER
            if i < 0:
                return False, count
        else:
            i, kind, value, extra = _scalar(data, i, stop)
            if i < 0:
                return False, count
            if f >= 0:
                kinds[f, row], values[f, row], extras[f, row] = kind, value, extra
        i = _skip(data, i, stop)
        if i >= stop:
            return False, count
        if data[i] == _CLOSE:
            return _skip(data, i + 1, stop) == stop, count
        if data[i] != _COMMA:
            return False, count
        i = _skip(data, i + 1, stop)
    return False, count


@njit
def _scan(
    data, breaks, first, text, ends, listed, hexadecimal, kinds, values, extras, good, numbers, begins, stops, ids
):  # fmt: skip
    """Fill the columns; ``breaks`` int64: where lines end. Returns how many lines are not blank."""
    row = 0
    count = np.int64(0)
    number = np.int64(first)
    i, line = np.int64(0), 0
    while i < len(data):
        blank = True
        fine, after = True, count
        stop = breaks[line] if line < len(breaks) else np.int64(len(data))
        line += 1
        for k in range(i, stop):
            c = data[k]
            if not (c == _SPACE or (c >= _TAB and c <= _RETURN)):
                blank = False
                break
        if not blank:
            fine, after = _object(
                data, i, stop, text, ends, listed, hexadecimal, kinds, values, extras, row, ids, count
            )
            good[row], numbers[row], begins[row], stops[row] = fine, number, i, stop
            if fine:
                count = after
            else:
                kinds[:, row] = ABSENT
            row += 1
        number += 1
        i = stop + 1
    return row
