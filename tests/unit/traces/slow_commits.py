"""The commits of a `.kvt` file and the operations in them, read as docs/format.md says and in the plainest way."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any


@dataclass
class Commit:
    kind: int
    flags: int
    seq: int
    body: bytes
    gap: bool = False  # something is missing just before


def commit_at(data: bytes, at: int) -> Commit | None:
    if at + 12 > len(data):
        return None
    tag, length, crc = struct.unpack_from("<III", data, at)
    if tag >> 24 != ord("K") or length % 4 or at + 12 + length > len(data):
        return None
    body = data[at + 12 : at + 12 + length]
    if zlib.crc32(data[at : at + 8] + body) != crc:
        return None
    return Commit(tag >> 20 & 15, tag >> 16 & 15, tag & 0xFFFF, body)


def commits_of(data: bytes) -> list[Commit]:
    """Every commit that checks out, up to END or NEXT; `gap` where something between them does not, or is not there."""
    found: list[Commit] = []
    at, expected, gap = 16, 0, False
    while at < len(data):
        commit = commit_at(data, at)
        if commit is None:
            at, gap = at + 4, True
            continue
        commit.gap = gap or commit.seq != expected
        found.append(commit)
        expected, gap = (commit.seq + 1) % 65536, False
        at += 12 + len(commit.body)
        if commit.kind in (4, 5):
            break
    return found


class Words:
    """The words of a commit, taken one after another."""

    def __init__(self, body: bytes) -> None:
        self.words = struct.unpack(f"<{len(body) // 4}I", body)
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.words)

    def one(self) -> int:
        self.at += 1
        return self.words[self.at - 1]

    def many(self, n: int) -> list[int]:
        return [self.one() for _ in range(n)]

    def long(self) -> int:
        return self.one() | self.one() << 32


def operations(body: bytes) -> Any:
    """Yield `(op, operand, words)`; whatever the caller leaves of an operation's words is passed over."""
    w = Words(body)
    while w:
        word = w.one()
        end = w.at + length(w, word & 15, word >> 4)
        yield word & 15, word >> 4, w
        w.at = end


def length(w: Words, op: int, operand: int) -> int:
    """Words after the first of the operation whose first word was just taken."""
    if op == 1:
        return 10 + 3 * operand + 4 * w.words[w.at + 9]
    if op == 3:
        return 1 + 2 * w.words[w.at]
    if op in (5, 7):
        return operand
    if op == 14:
        flags, n, k = operand & 15, operand >> 4 & 0xFFF, operand >> 16
        if flags & 8:
            n, k = w.words[w.at], w.words[w.at + 1]
        size = 1 + (2 if flags & 8 else 0) + (2 if flags & 1 else 0) + 3 * n
        return size + ((k if flags & 2 else 1 + (k + 1) // 2) if k else 0)
    if op == 15:
        return operand >> 8
    return {2: 0, 4: 2, 6: 0, 8: 2, 9: 1, 10: 1, 11: 2, 12: 2, 13: 0}[op]


def owners_ahead(w: Words) -> list[int]:
    """The owners that this call's OWNs and its SCHED name, in order. Does not move `w`."""
    ahead = Words(b"")
    ahead.words, ahead.at = w.words, w.at
    owners: list[int] = []
    while ahead:
        word = ahead.one()
        op, operand = word & 15, word >> 4
        end = ahead.at + length(ahead, op, operand)
        if op == 15 and operand & 255 == 3:
            owners += ahead.many(operand >> 8)
        elif op == 14:
            flags, k = operand & 15, operand >> 16
            if flags & 8:
                k = ahead.words[ahead.at + 1]
            if k and flags & 2:
                owners += ahead.words[end - k : end]
            elif k:
                words = ahead.words[end - 1 - (k + 1) // 2 : end]
                offsets = [half for word in words[1:] for half in (word & 0xFFFF, word >> 16)]
                owners += [words[0] + offset for offset in offsets[:k]]
            break
        elif op == 13:
            break
        ahead.at = end
    return owners
