"""Values to the bytes of a Parquet page (Encodings.md of Apache Parquet's format). Compiled.

Each function fills ``out`` uint8 from its begin on, and returns how many bytes it wrote; ``room`` says what to bring.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit

BLOCK, MINI = 128, 32  # values that share a smallest difference, and a width


def room(values: int) -> int:
    """Bytes that any of the encodings needs at most for so many numbers of at most eight bytes."""
    return 64 + 9 * (values + BLOCK)


@njit(cache=False)
def _varint(out, at, value):
    value = np.uint64(value)
    while value > np.uint64(127):
        out[at] = np.uint8(value & np.uint64(127) | np.uint64(128))
        value >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@njit(cache=False)
def _zigzag(out, at, value):
    value = np.int64(value)
    return _varint(out, at, np.uint64((value << 1) ^ (value >> 63)))


@njit(cache=False)
def _width(value):
    """Bits of a uint64."""
    width = 0
    for step in (32, 16, 8, 4, 2, 1):
        if value >> np.uint64(step):
            value >>= np.uint64(step)
            width += step
    return width + np.int64(value)


@njit(cache=False)
def _store(out, at, word):
    """Four bytes at once, for which the compiler makes one store."""
    out[at] = np.uint8(word)
    out[at + 1] = np.uint8(word >> np.uint64(8))
    out[at + 2] = np.uint8(word >> np.uint64(16))
    out[at + 3] = np.uint8(word >> np.uint64(24))


@njit
def delta_packed(values, bits, out):
    """DELTA_BINARY_PACKED of ``values`` int32 or int64, for a column of so many ``bits`` (32 or 64)."""
    n = values.size
    at = _varint(out, 0, BLOCK)
    at = _varint(out, at, BLOCK // MINI)
    at = _varint(out, at, n)
    at = _zigzag(out, at, values[0] if n else 0)
    wrap = np.int64(64 - bits)  # differences are taken in the column's own width
    deltas = np.zeros(BLOCK, np.uint64)
    low32 = np.uint64(0xFFFFFFFF)
    for first in range(1, n, BLOCK):
        many = min(BLOCK, n - first)
        before = np.int64(values[first - 1])
        least = np.int64(0x7FFFFFFFFFFFFFFF)
        for i in range(many):
            value = np.int64(values[first + i])
            delta = ((value - before) << wrap) >> wrap
            before = value
            deltas[i] = np.uint64(delta)
            least = min(least, delta)
        deltas[many:] = np.uint64(least)
        at = _zigzag(out, at, least)
        widths = at
        at += BLOCK // MINI
        for mini in range(BLOCK // MINI):
            begin = mini * MINI
            if begin >= many:
                out[widths + mini] = 0
                continue
            union = np.uint64(0)
            for i in range(begin, begin + MINI):
                deltas[i] -= np.uint64(least)
                union |= deltas[i]
            width = _width(union)
            out[widths + mini] = np.uint8(width)
            if not width:
                continue
            waiting, have = np.uint64(0), 0  # fewer than 32 bits
            lower = np.uint64(min(width, 32))
            for i in range(begin, begin + MINI):
                waiting |= (deltas[i] & low32) << np.uint64(have)
                have += np.int64(lower)
                if have >= 32:
                    _store(out, at, waiting)
                    at += 4
                    waiting >>= np.uint64(32)
                    have -= 32
                if width > 32:
                    waiting |= (deltas[i] >> np.uint64(32)) << np.uint64(have)
                    have += width - 32
                    if have >= 32:
                        _store(out, at, waiting)
                        at += 4
                        waiting >>= np.uint64(32)
                        have -= 32
    return at


@njit
def run_lengths(codes, width, out):
    """The hybrid of run lengths and bit-packed groups, of ``codes`` uint8 of so many bits (1 to 8)."""
    n, at, i = codes.size, 0, 0
    while i < n:
        run = i + 1
        while run < n and codes[run] == codes[i]:
            run += 1
        if run - i >= 8:
            at = _varint(out, at, (run - i) << 1)
            out[at] = codes[i]
            at += 1
            i = run
            continue
        # Groups of eight until a run begins at the next one; 63 of them have a head of one byte.
        head, groups = at, 0
        at += 1
        while i < n and groups < 63:
            waiting = np.uint64(0)
            for k in range(min(8, n - i)):
                waiting |= np.uint64(codes[i + k]) << np.uint64(k * width)
            for k in range(width):
                out[at + k] = np.uint8(waiting >> np.uint64(8 * k))
            at += width
            groups += 1
            i += 8
            if i + 8 <= n:
                same = True
                for k in range(i + 1, i + 8):
                    same &= codes[k] == codes[i]
                if same:
                    break
        out[head] = np.uint8(groups << 1 | 1)
    return at


@njit
def plain_strings(offsets, data, out):
    """PLAIN of byte strings: string i is ``data[offsets[i] : offsets[i + 1]]``."""
    at = 0
    for i in range(offsets.size - 1):
        begin, end = offsets[i], offsets[i + 1]
        _store(out, at, np.uint64(end - begin))
        at += 4
        for k in range(begin, end):
            out[at] = data[k]
            at += 1
    return at
