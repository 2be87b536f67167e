"""Finds the commits of a ``.kvt`` file, checks them, and says what is missing. See :mod:`kvtrace_traces.wire`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import wire
from kvtrace_traces.compile import njit

COMPLETE, CUT, OPEN = 0, 1, 2
"""How a file ends: with its last commit, within a commit, or with zeros that were allocated and not used."""


class Scan(NamedTuple):
    """The commits of one file, arrays of equal length in file order.

    ``offsets`` int64: of the bodies, in bytes; ``lengths`` int64: of the bodies; ``kinds`` and ``flags`` uint8;
    ``gaps`` bool: something is missing just before. ``damaged``: stretches that do not check out;
    ``damaged_at``: offset of the first, -1 for none; ``used``: bytes up to the end of the last commit; ``ending``: one
    of ``COMPLETE CUT OPEN``.
    """

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    flags: NDArray[np.uint8]
    gaps: NDArray[np.bool_]
    damaged: int
    damaged_at: int
    used: int
    ending: int


def scan(data: NDArray[np.uint8]) -> Scan:
    """Scan a whole file, prefix included. Reads past damage; what to make of that is the caller's choice."""
    size = len(data)
    # A commit takes at least its head; the first guess is grown when a file of tiny commits needs more.
    room = max(1024, size // 64)
    while True:
        offsets = np.empty(room, np.int64)
        lengths = np.empty(room, np.int64)
        kinds = np.empty(room, np.uint8)
        flags = np.empty(room, np.uint8)
        gaps = np.zeros(room, np.bool_)
        count, damaged, damaged_at, used, ending = _scan(
            data, wire.PREFIX.size, _TABLES, offsets, lengths, kinds, flags, gaps
        )
        if count >= 0:
            break
        room *= 4
    last = np.flatnonzero((kinds[:count] == wire.END) | (kinds[:count] == wire.NEXT))
    if len(last) and (last[0] < count - 1 or ending == CUT):
        # Something stands behind the end: part of another log, or of this one once more.
        count = int(last[0]) + 1
        used = int(offsets[count - 1] + lengths[count - 1])
        damaged, damaged_at, ending = damaged + 1, damaged_at if damaged_at >= 0 else used, COMPLETE
    return Scan(
        offsets[:count], lengths[:count], kinds[:count], flags[:count], gaps[:count],
        damaged, damaged_at, used, ending,
    )  # fmt: skip


def _crc_tables() -> NDArray[np.uint32]:
    """Eight tables of 256 for the CRC of zlib (reflected polynomial 0xEDB88320), eight bytes at a time."""
    tables = np.zeros((8, 256), np.uint32)
    value = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        value = np.where(value & 1, (value >> 1) ^ np.uint32(0xEDB88320), value >> 1).astype(np.uint32)
    tables[0] = value
    for i in range(1, 8):
        tables[i] = (tables[i - 1] >> 8) ^ tables[0][tables[i - 1] & 0xFF]
    return tables


_TABLES = _crc_tables()


@njit
def _u32(data, at):
    return (
        np.uint32(data[at])
        | np.uint32(data[at + 1]) << np.uint32(8)
        | np.uint32(data[at + 2]) << np.uint32(16)
        | np.uint32(data[at + 3]) << np.uint32(24)
    )


@njit
def _crc(data, start, stop, crc, tables):
    """CRC-32 of ``data[start:stop]`` going on from ``crc``, as ``zlib.crc32``."""
    crc = crc ^ np.uint32(0xFFFFFFFF)
    at = start
    mask = np.uint32(0xFF)
    while at + 8 <= stop:
        low = crc ^ _u32(data, at)
        high = _u32(data, at + 4)
        crc = (
            tables[7, low & mask]
            ^ tables[6, (low >> np.uint32(8)) & mask]
            ^ tables[5, (low >> np.uint32(16)) & mask]
            ^ tables[4, low >> np.uint32(24)]
            ^ tables[3, high & mask]
            ^ tables[2, (high >> np.uint32(8)) & mask]
            ^ tables[1, (high >> np.uint32(16)) & mask]
            ^ tables[0, high >> np.uint32(24)]
        )
        at += 8
    while at < stop:
        crc = tables[0, (crc ^ np.uint32(data[at])) & mask] ^ (crc >> np.uint32(8))
        at += 1
    return crc ^ np.uint32(0xFFFFFFFF)


@njit
def _commit_at(data, at, tables):
    """Length of the good commit's body at ``at``; else -1 nothing there, -2 the file ends within it, -3 bad."""
    size = len(data)
    if at + 12 > size:
        for i in range(at, size):
            if data[i] != 0:
                return -2
        return -1
    first = _u32(data, at)
    if first == 0:
        return -1
    length = np.int64(_u32(data, at + 4))
    if first >> np.uint32(24) != np.uint32(0x4B) or length % 4 != 0 or length > 268435456:
        return -3
    if at + 12 + length > size:
        return -2
    crc = _crc(data, at, at + 8, np.uint32(0), tables)
    crc = _crc(data, at + 12, at + 12 + length, crc, tables)
    if crc != _u32(data, at + 8):
        return -3
    return length


@njit
def _scan(data, start, tables, offsets, lengths, kinds, flags, gaps):
    size = len(data)
    room = len(offsets)
    count = 0
    damaged = 0
    damaged_at = -1
    used = start
    ending = 0
    budget = np.int64(8) * size + 1048576
    at = start
    expected = np.uint32(0)
    gap = False
    while True:
        length = _commit_at(data, at, tables)
        if length < 0:
            # Nothing good here. Whatever checks out later means damage; otherwise this is where writing stopped.
            found = -1
            probe = at + 4
            while probe + 12 <= size and budget > 0:
                if data[probe + 3] == 0x4B:
                    claimed = np.int64(_u32(data, probe + 4))
                    if probe + 12 + claimed <= size:
                        budget -= claimed + 12
                        if _commit_at(data, probe, tables) >= 0:
                            found = probe
                            break
                probe += 4
            if found < 0:
                if length == -3 or budget <= 0:
                    damaged += 1
                    if damaged_at < 0:
                        damaged_at = at
                    ending = 1
                elif length == -2:
                    ending = 1
                elif at < size:
                    ending = 2
                break
            damaged += 1
            if damaged_at < 0:
                damaged_at = at
            gap = True
            at = found
            continue
        if count == room:
            return -1, 0, 0, 0, 0
        first = _u32(data, at)
        sequence = first & np.uint32(0xFFFF)
        if sequence != expected and not gap:
            damaged += 1
            if damaged_at < 0:
                damaged_at = at
            gap = True
        expected = (sequence + np.uint32(1)) & np.uint32(0xFFFF)
        offsets[count] = at + 12
        lengths[count] = length
        kinds[count] = (first >> np.uint32(20)) & np.uint32(15)
        flags[count] = (first >> np.uint32(16)) & np.uint32(15)
        gaps[count] = gap
        gap = False
        count += 1
        at += 12 + length
        used = at
    return count, damaged, damaged_at, used, ending
