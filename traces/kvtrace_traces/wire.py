"""The bytes of a ``.kvt`` file: prefix, commits, checksums. Standard library only.

All numbers are little-endian; everything is aligned to 4 bytes.

    file   := prefix commit*            (then, while it is being written, zeros up to the preallocated end)

    prefix    0        8      10     12            16
              | magic  | major| minor| reserved = 0 |
              | \\x89KVT\\r\\n\\x1a\\n | u16  | u16  | u32          |

    commit    0                               4            8          12           12 + length
              | tag                           | length     | crc32    | body        |
              | 'K' : 8 | kind : 4 | flags : 4 | seq : 16    (from the high bits of a u32 to the low)

``length`` is the body's bytes, a multiple of 4. ``crc32`` (zlib's) covers tag, length and body, in this order.
``seq`` counts the commits of a file modulo 65536, so that a missing commit is seen.

INVARIANT: the body is stored before its head. A process killed in between leaves a zero tag, never a wrong commit.

A *frame* is a commit with flag :data:`KEY` and the commits up to the next one: it decodes with the header alone.
A header commit comes first and again at the start of every rotated segment.
"""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.schema import FORMAT_MAJOR, FORMAT_MINOR

MAGIC = b"\x89KVT\r\n\x1a\n"
PREFIX = struct.Struct("<8sHHI")
HEAD = struct.Struct("<III")
HEAD_BYTES = HEAD.size
TAG_BYTE = 0x4B  # 'K'

HEADER, OPS, LOSS, END, NEXT = 1, 2, 3, 4, 5
"""Kinds of commit: JSON header; operations; JSON loss; JSON end of the trace; the trace goes on in the next segment."""

KEY = 1
"""Flag of an OPS commit that starts a frame."""

MAX_BODY_BYTES = 1 << 28
MAX_HEADER_BYTES = 1 << 22


FORMAT = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"


def prefix() -> bytes:
    """The first 16 bytes of every file."""
    return PREFIX.pack(MAGIC, FORMAT_MAJOR, FORMAT_MINOR, 0)


def tag(kind: int, flags: int, seq: int) -> int:
    """First word of a commit."""
    return TAG_BYTE << 24 | kind << 20 | flags << 16 | (seq & 0xFFFF)


def head(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    """The 12 bytes that stand before ``body`` (whose length must be a multiple of 4)."""
    first = tag(kind, flags, seq)
    length = len(body)
    return HEAD.pack(first, length, zlib.crc32(body, zlib.crc32(HEAD.pack(first, length, 0)[:8])))


def check_prefix(data: bytes, name: str) -> None:
    """Raise :class:`KvtraceError` unless ``data`` starts a file that this version reads."""
    if not data:
        raise KvtraceError(f"{name} is empty: the recording wrote nothing (did the engine start?)")
    if data[:8] != MAGIC[: len(data)]:
        raise KvtraceError(f"{name} is not a kvtrace log (.kvt): import other formats with `kvtrace import`")
    if len(data) < PREFIX.size:
        raise KvtraceError(f"{name} ends within its first {PREFIX.size} bytes: nothing can be read from it")
    _, major, _, reserved = PREFIX.unpack_from(data)
    if major > FORMAT_MAJOR:
        raise KvtraceError(
            f"{name} has log format {major}, and this kvtrace reads up to {FORMAT_MAJOR}: upgrade kvtrace"
        )
    if major < 1:
        raise KvtraceError(f"{name} has log format {major}, which never existed: the file is damaged")
    if reserved:
        raise KvtraceError(f"{name} has {reserved} where its first {PREFIX.size} bytes must have 0: it is damaged")


def version_of(data: bytes) -> str:
    """The format version in a prefix, which the header repeats where a checksum covers it: ``"1.0"``."""
    _, major, minor, _ = PREFIX.unpack_from(data)
    return f"{major}.{minor}"


def host_id() -> str:
    """A name for this machine since its last start, which gives nothing away; a process number needs it to mean one."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read()
    except OSError:
        boot = b""
    return blake2b(boot + socket.gethostname().encode(), digest_size=8, person=b"kvtrace").hexdigest()


class Commit(NamedTuple):
    """One commit: ``offset`` of its head in the file, and its parts."""

    offset: int
    kind: int
    flags: int
    seq: int
    body: bytes


def read_commit(data: bytes, offset: int) -> Commit | str:
    """The commit at ``offset``, or why there is none: ``"end"``, ``"cut"`` (the file ends within it) or ``"bad"``."""
    if offset + HEAD_BYTES > len(data):
        return "cut" if any(data[offset:]) else "end"
    first, length, crc = HEAD.unpack_from(data, offset)
    if first == 0:
        return "end"
    if first >> 24 != TAG_BYTE or length % 4 or length > MAX_BODY_BYTES:
        return "bad"
    start = offset + HEAD_BYTES
    if start + length > len(data):
        return "cut"
    body = data[start : start + length]
    if zlib.crc32(body, zlib.crc32(data[offset : offset + 8])) != crc:
        return "bad"
    return Commit(offset, first >> 20 & 15, first >> 16 & 15, first & 0xFFFF, body)


def commits(data: bytes) -> Iterator[Commit]:
    """The commits from the start of the file to the first that does not read: the obvious reader, for tests and
    for looking into a small file. The compiled one is :mod:`kvtrace_traces.scan`."""
    check_prefix(data[: PREFIX.size], "the data")
    offset = PREFIX.size
    while isinstance(commit := read_commit(data, offset), Commit):
        yield commit
        offset += HEAD_BYTES + len(commit.body)
