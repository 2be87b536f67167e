"""Writes the commits of a cut as they are made. (``writer.write_file`` wants the events of a whole log at its end.)"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import wire
from kvtrace_traces.cut.operations import in_commits


class Output:
    """A log in the making: a header, then operations, then perhaps an end record."""

    def __init__(self, file: BinaryIO, header: dict[str, Any]) -> None:
        self._file = file
        self._seq = 0
        file.write(wire.prefix())
        self._put(wire.HEADER, 0, _json({**header, "log_format": wire.FORMAT, "segment": 0}))

    def _put(self, kind: int, flags: int, body: bytes) -> None:
        self._file.write(wire.head(kind, flags, self._seq, body))
        self._file.write(body)
        self._seq += 1

    def commit(self, words: NDArray[np.uint32], flags: int = 0) -> None:
        """Write one commit of operations, if there are any."""
        if len(words):
            self._put(wire.OPS, flags, np.ascontiguousarray(words, "<u4").tobytes())

    def together(self, operations: list[NDArray[np.uint32]], flags: int = 0) -> None:
        """Write operations in as few commits as fit; the first one has the flags."""
        for words in in_commits(operations):
            self.commit(words, flags)
            flags = 0

    def end(self, time_ns: int, events: int) -> None:
        """Write the end record: nothing is missing."""
        self._put(wire.END, 0, _json({"time_ns": time_ns, "commits": self._seq - 1, "events": events}))


def _json(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return text + b" " * (-len(text) % 4)
