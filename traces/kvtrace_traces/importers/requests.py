"""Turns imported requests into the operations of a log."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces import wire
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.schema import EXT_OPS, OPS, REQUEST_FINISHED

COMMIT_BYTES = 1 << 18
_REQUEST = struct.Struct("<qdIIiIQII")
MAX_ID = (1 << 64) - 1


class Record(NamedTuple):
    """One request, or ``bad``: why line ``line`` is none.

    ``ids``: block ids in order, each 0 to 2^64 - 1. With ``single`` each id is a request of its own (of one token).
    """

    line: int
    ids: Sequence[int]
    arrival_ns: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    name: str = ""
    single: bool = False
    bad: str | None = None


class RequestWriter:
    """Bodies of OPS commits from records. ``requests``, ``references``, ``left_out`` and ``first_bad`` count along."""

    def __init__(self, records: Iterator[Record], skip_bad: bool, path: Path, granule: int) -> None:
        self._records = records
        self._skip_bad = skip_bad
        self._path = path
        self.requests = 0
        self.references = 0
        self.left_out = 0
        self.odd_lengths = 0
        self._granule = granule
        self.first_bad: str | None = None

    def bodies(self) -> Iterator[tuple[int, bytes]]:
        """Yield ``(flags, body)``; every commit is a frame, since nothing is relative to anything."""
        words = self._frame()
        for record in self._records:
            if record.bad is not None:
                self._reject(record)
                continue
            self._append(words, record)
            if len(words) * 4 >= COMMIT_BYTES:
                yield wire.KEY, words.tobytes()
                words = self._frame()
        if not self.requests:
            left = f" ({self.left_out} left out, first {self.first_bad})" if self.left_out else ""
            raise KvtraceError(f"{self._path} holds no request{left}")
        yield wire.KEY, words.tobytes()

    def end(self) -> dict[str, Any]:
        """Content of the end record."""
        return {"requests": self.requests, "left_out": self.left_out, "events": 0}

    def _reject(self, record: Record) -> None:
        where = f"line {record.line}: {record.bad}"
        if not self._skip_bad:
            raise KvtraceError(f"{self._path}, {where} (--skip-bad leaves such records out)")
        self.left_out += 1
        self.first_bad = self.first_bad or where

    def _frame(self) -> array[int]:
        words = array("I", [OPS["KEY"].code])
        words.extend((0, 0, 0, self.requests, 0, 0, 0, 0, 0, 0))
        return words

    def _append(self, words: array[int], record: Record) -> None:
        ids = array("Q", record.ids).tobytes()
        self.references += len(record.ids)
        if record.single:
            # An operation's length has 20 bits of words.
            for start in range(0, len(ids), 1 << 20):
                piece = ids[start : start + (1 << 20)]
                words.append(_ext("IDS", len(piece) // 4))
                words.frombytes(piece)
            self.requests += len(record.ids)
            return
        self.odd_lengths += len(record.ids) != -(-record.prompt_tokens // self._granule)
        name = record.name.encode("utf-8", "replace")[:4096].decode("utf-8", "ignore").encode()
        fixed = _REQUEST.pack(
            record.arrival_ns, record.arrival_ns / 1e9, record.prompt_tokens, record.output_tokens, 0,
            REQUEST_FINISHED, 0, record.output_tokens, len(name),
        )  # fmt: skip
        padded = name + b"\0" * (-len(name) % 4)
        words.append(_ext("REQ", (len(fixed) + len(padded)) // 4))
        words.frombytes(fixed)
        words.frombytes(padded)
        if len(record.ids):
            words.append(self.requests << 4 | OPS["CHAIN"].code)
            words.append(len(record.ids))
            words.frombytes(ids)
        self.requests += 1


def _ext(name: str, words: int) -> int:
    return OPS["EXT"].code | (EXT_OPS[name].code | words << 8) << 4
