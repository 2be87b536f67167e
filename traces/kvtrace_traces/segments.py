"""The files of a log: opens one, checks its prefix and commits, and reads its header."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import wire
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.scan import Scan, scan
from kvtrace_traces.schema import MAX_BLOCK_TOKENS

MAX_BLOCKS = 1 << 27
TRIES = 3


class Segment(NamedTuple):
    """One file of an engine's log."""

    path: Path
    data: NDArray[np.uint8]
    scan: Scan
    header: dict[str, Any]


def never_begun(path: Path) -> bool:
    """Whether nothing was ever written to the file: it is empty, or holds only the zeros it was allocated with.

    A killed engine leaves such a file where it had made the next segment ready, or had only just started.
    """
    try:
        with path.open("rb") as file:
            return not file.read(wire.PREFIX.size).strip(b"\0")
    except OSError:
        return False


def open_segment(path: Path) -> Segment:
    """Map a file, check its prefix and commits, and read its header. Raises :class:`KvtraceError`."""
    try:
        with path.open("rb") as file:
            for _ in range(TRIES):
                data, closed = _content(file)
                wire.check_prefix(data[: wire.PREFIX.size].tobytes(), str(path))
                found = scan(data)
                if closed or not found.damaged:
                    break
                # A copy of a file that is being written may hold a later page without an earlier one: look again.
    except OSError as error:
        raise KvtraceError(f"{path}: {error.strerror}") from None
    if not len(found.kinds) or found.kinds[0] != wire.HEADER or found.gaps[0]:
        raise KvtraceError(f"{path}: its header is missing or damaged, and without it nothing can be read")
    if found.lengths[0] > wire.MAX_HEADER_BYTES:
        raise KvtraceError(f"{path}: its header is larger than {wire.MAX_HEADER_BYTES:,} bytes: the file is damaged")
    body = data[found.offsets[0] : found.offsets[0] + found.lengths[0]].tobytes()
    try:
        header = json.loads(body)
        _check(header, data[: wire.PREFIX.size].tobytes())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise KvtraceError(
            f"{path}: its header does not read as one ({error}): the file is damaged or from another program"
        ) from None
    return Segment(path, data, found, header)


def _content(file: BinaryIO) -> tuple[NDArray[np.uint8], bool]:
    """The bytes of a file, and whether it was closed by its writer.

    One that ends in a zero may still be written: it is copied, because its writer will cut it to its length, and to
    touch a mapping beyond that would kill this process.
    """
    size = file.seek(0, 2)
    if not size:
        return np.empty(0, np.uint8), True
    file.seek(size - 1)
    if file.read(1) != b"\0":
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8), True
    file.seek(0)
    return np.fromfile(file, np.uint8), False


def _check(header: dict[str, Any], prefix: bytes) -> None:
    """Raise one of the errors that ``open_segment`` catches unless the fields that reading relies on make sense."""
    for name, least, most in (
        ("block_size", 1, MAX_BLOCK_TOKENS),
        ("granule", 1, MAX_BLOCK_TOKENS),
        ("num_blocks", 0, MAX_BLOCKS),
        ("segment", 0, 1 << 32),
        ("engine_index", 0, 1 << 15),
        ("clock_wall_ns", -(1 << 62), 1 << 62),
    ):
        value = header[name] if least == 1 or name == "num_blocks" else header.get(name, 0)
        if type(value) is not int or not least <= value < most + (least == 1):
            raise ValueError(f"{name} is {str(value)[:40]}")
    if not isinstance(header.get("inexact", []), list):
        raise ValueError("inexact is no list")
    told = header.get("log_format")
    if told is not None and told != wire.version_of(prefix):
        raise ValueError(f"it is of format {str(told)[:40]}, and the file's first bytes say {wire.version_of(prefix)}")
