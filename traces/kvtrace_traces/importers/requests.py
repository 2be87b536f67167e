"""Turns what importers yield into the commits of a log."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import wire
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.importers.batches import MAX_NAME_BYTES, Bad, Batch, Ids, Piece
from kvtrace_traces.importers.parents import Parents
from kvtrace_traces.importers.source import Source
from kvtrace_traces.schema import EXT_OPS, NO_REQUEST, OPS, REQUEST_FINISHED

MAX_REQUESTS = 1 << 28
COMMIT_WORDS = 1 << 16
PIECE_IDS = 1 << 15  # of a chain, in one operation
_ROOM = COMMIT_WORDS + 2 * PIECE_IDS + MAX_NAME_BYTES // 4 + 64
_KEY, _EXT, _CHAIN = (OPS[name].code for name in ("KEY", "EXT", "CHAIN"))
_X_REQ, _X_IDS, _X_ABOUT, _X_WHEN = (EXT_OPS[name].code for name in ("REQ", "IDS", "ABOUT", "WHEN"))
_NO_REQUEST = np.uint32(NO_REQUEST)
_FINISHED = REQUEST_FINISHED


class RequestWriter:
    """Bodies of OPS commits from what an importer yields.

    Counts along: ``requests``, ``references``, ``left_out``, ``first_bad``, ``odd_lengths`` (requests whose number of
    ids is not that of their prompt's blocks, a partial last one counted or not), ``untimed`` and ``backwards``
    (requests without a time, or with one before that of the request before them).
    """

    def __init__(self, pieces: Iterator[Piece], skip_bad: bool, source: Source) -> None:
        self._pieces = pieces
        self._skip_bad = skip_bad
        self._source = source
        self.requests = 0
        self.references = 0
        self.left_out = 0
        self.odd_lengths = 0
        self.untimed = 0
        self.backwards = 0
        self.first_bad: str | None = None
        self.parents = Parents()
        self._last_ns = 0
        self._types: dict[str, int] = {}
        self._numbers: dict[int, int] = {}
        self._words = np.empty(_ROOM, np.uint32)

    def bodies(self) -> Iterator[tuple[int, bytes]]:
        """Yield ``(flags, body)``; every commit is a frame, since nothing is relative to anything."""
        used = self._frame()
        for piece in self._pieces:
            if isinstance(piece, Bad):
                self._reject(piece)
                continue
            if self.requests + (len(piece.ids) if isinstance(piece, Ids) else len(piece.arrival_ns)) > MAX_REQUESTS:
                raise KvtraceError(f"{self._source.path} holds more than {MAX_REQUESTS:,} requests: cut it into parts")
            for full, size in self._ids(piece, used) if isinstance(piece, Ids) else self._batch(piece, used):
                used = size
                if full:
                    yield wire.KEY, self._words[:used].tobytes()
                    used = self._frame()
        if not self.requests:
            left = f" ({self.left_out} left out, first: {self.first_bad})" if self.left_out else ""
            raise KvtraceError(f"{self._source.path} holds no request{left}")
        yield wire.KEY, self._words[:used].tobytes()

    def end(self) -> dict[str, Any]:
        """Content of the end record."""
        return {"requests": self.requests, "left_out": self.left_out, "events": 0}

    def _reject(self, bad: Bad) -> None:
        if not self._skip_bad:
            where = self._source.where(bad.file, bad.line)
            raise KvtraceError(f"{where}: {bad.reason} (--skip-bad leaves such records out)")
        self.left_out += 1
        file = "" if bad.file == self._source.path else f"{bad.file.name}, "
        self.first_bad = self.first_bad or f"{file}line {bad.line}: {bad.reason}"

    def _frame(self) -> int:
        self._words[:11] = (_KEY, 0, 0, 0, self.requests, 0, 0, 0, 0, 0, 0)
        return 11

    def _times(self, times: NDArray[np.int64]) -> None:
        known = times[times >= 0]
        self.untimed += len(times) - len(known)
        if len(known):
            self.backwards += int(known[0] < self._last_ns) + int((np.diff(known) < 0).sum())
            self._last_ns = int(known[-1])

    def _ids(self, piece: Ids, used: int) -> Iterator[tuple[bool, int]]:
        self.references += len(piece.ids)
        if piece.arrival_ns is None:
            self.untimed += len(piece.ids)
        else:
            self._times(piece.arrival_ns)
        for at in range(0, len(piece.ids), PIECE_IDS // 4):
            part = piece.ids[at : at + PIECE_IDS // 4]
            size = 2 * len(part)
            self._words[used] = _EXT | (_X_IDS | size << 8) << 4
            self._words[used + 1 : used + 1 + size] = part.view(np.uint32)
            used += 1 + size
            if piece.arrival_ns is not None:
                used = _when(self._words, used, self.requests, piece.arrival_ns[at : at + len(part)])
            self.requests += len(part)
            yield used >= COMMIT_WORDS, used
            used = used if used < COMMIT_WORDS else 11

    def _batch(self, piece: Batch, used: int) -> Iterator[tuple[bool, int]]:
        lengths = np.diff(piece.indptr)
        blocks, rest = np.divmod(piece.prompt_tokens, np.int32(self._source.granule))
        self.odd_lengths += int(((lengths < blocks) | (lengths > blocks + (rest > 0))).sum())
        self.references += int(piece.indptr[-1] - piece.indptr[0])
        self._times(piece.arrival_ns)
        self.parents.see(piece.indptr, piece.ids)
        kinds, turns, parents = self._about(piece)
        if piece.about is not None:
            for name in piece.about.names:
                if name not in self._types:
                    used = self._name_type(name, used)
                    if used >= COMMIT_WORDS:
                        yield True, used
                        used = 11
        state = np.zeros(2, np.int64)
        first = self.requests
        while state[0] < len(lengths):
            used = _encode(
                state, first, piece.arrival_ns, piece.prompt_tokens, piece.output_tokens, piece.indptr, piece.ids,
                piece.text, piece.name_starts, piece.name_sizes, kinds, turns, parents, self._words, used,
            )  # fmt: skip
            self.requests = first + int(state[0]) + int(state[1] > 0)
            yield used >= COMMIT_WORDS, used
            used = 11

    def _about(self, piece: Batch) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """Types as numbers in the log, turns, and parents as request numbers; empty where nothing is known."""
        about = piece.about
        if about is None:
            return np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int64)
        numbers = [*range(len(self._types), len(self._types) + len(about.names))]
        fresh = iter(numbers)
        names = [self._types[name] if name in self._types else next(fresh) for name in about.names]
        kinds = np.array([*names, -1], np.int64)[about.types]  # -1 takes the last
        parents = np.full(len(about.own), -1, np.int64)
        known = self._numbers
        for i, (own, parent) in enumerate(zip(about.own.tolist(), about.parents.tolist(), strict=True)):
            if parent != -1:
                parents[i] = known.get(parent, -1)
            if own != -1:
                known[own] = self.requests + i
        return kinds, about.turns, parents

    def _name_type(self, name: str, used: int) -> int:
        self._types[name] = len(self._types)
        text = name.encode("utf-8", "replace")[:MAX_NAME_BYTES].decode("utf-8", "ignore").encode()
        words = array("I", (self._types[name], len(text)))
        words.frombytes(text + b"\0" * (-len(text) % 4))
        self._words[used] = _EXT | (EXT_OPS["TYPE"].code | len(words) << 8) << 4
        self._words[used + 1 : used + 1 + len(words)] = words
        return used + 1 + len(words)


@njit
def _encode(
    state, first, arrival_ns, prompt_tokens, output_tokens, indptr, ids, text, name_starts, name_sizes, kinds, turns,
    parents, words, used,
):  # fmt: skip
    """Append operations until the commit is full or the batch done; returns the words used.

    ``state`` int64[2]: the request to go on with, and how many of its ids are written already, plus one; 0 for none.
    """
    seconds = np.empty(1, np.float64)
    bits = seconds.view(np.uint32)
    while state[0] < len(arrival_ns) and used < COMMIT_WORDS:
        r = state[0]
        done = state[1] - 1
        if done < 0:
            done = np.int64(0)
            used = _request(
                words, used, arrival_ns[r], prompt_tokens[r], output_tokens[r], text, name_starts[r], name_sizes[r],
                seconds, bits,
            )  # fmt: skip
            if len(kinds) and (kinds[r] >= 0 or turns[r] >= 0 or parents[r] >= 0):
                words[used] = np.uint32(_EXT | (_X_ABOUT | 4 << 8) << 4)
                words[used + 1] = np.uint32(first + r)
                words[used + 2] = np.uint32(kinds[r]) if kinds[r] >= 0 else _NO_REQUEST
                words[used + 3] = np.uint32(turns[r]) if turns[r] >= 0 else _NO_REQUEST
                words[used + 4] = np.uint32(parents[r]) if parents[r] >= 0 else _NO_REQUEST
                used += 5
        left = indptr[r + 1] - indptr[r] - done
        take = min(left, np.int64(PIECE_IDS))
        if take > 0:
            words[used] = np.uint32((first + r) << 4 | _CHAIN)
            words[used + 1] = np.uint32(take)
            used += 2
            for i in range(indptr[r] + done, indptr[r] + done + take):
                words[used] = np.uint32(ids[i] & np.uint64(0xFFFFFFFF))
                words[used + 1] = np.uint32(ids[i] >> np.uint64(32))
                used += 2
        if take == left:
            state[0] = r + 1
            state[1] = 0
        else:
            state[1] = done + take + 1
    return used


@njit(cache=False)
def _request(words, used, arrival_ns, prompt_tokens, output_tokens, text, name_start, name_size, seconds, bits):
    size = min(np.int64(name_size), np.int64(MAX_NAME_BYTES))
    if size < name_size:  # not within a character
        while size > 0 and (text[name_start + size] & 0xC0) == 0x80:
            size -= 1
    padded = (size + 3) // 4
    seconds[0] = arrival_ns / 1e9 if arrival_ns >= 0 else np.nan
    words[used] = np.uint32(_EXT | (_X_REQ | (12 + padded) << 8) << 4)
    words[used + 1] = np.uint32(arrival_ns & 0xFFFFFFFF)
    words[used + 2] = np.uint32((arrival_ns >> 32) & 0xFFFFFFFF)
    words[used + 3] = bits[0]
    words[used + 4] = bits[1]
    words[used + 5] = np.uint32(prompt_tokens)
    words[used + 6] = np.uint32(output_tokens)
    words[used + 7] = 0
    words[used + 8] = np.uint32(_FINISHED)
    words[used + 9] = 0
    words[used + 10] = 0
    words[used + 11] = np.uint32(output_tokens)
    words[used + 12] = np.uint32(size)
    used += 13
    for i in range(padded):
        word = np.uint32(0)
        for k in range(min(np.int64(4), size - 4 * i)):
            word |= np.uint32(text[name_start + 4 * i + k]) << np.uint32(8 * k)
        words[used + i] = word
    return used + padded


@njit
def _when(words, used, first, arrival_ns):
    """Append WHEN: the times of requests ``first`` and on, as runs of equal ones."""
    head = used
    words[used + 1] = np.uint32(first)
    used += 2
    i = 0
    while i < len(arrival_ns):
        j = i + 1
        while j < len(arrival_ns) and arrival_ns[j] == arrival_ns[i]:
            j += 1
        words[used] = np.uint32(j - i)
        words[used + 1] = np.uint32(arrival_ns[i] & 0xFFFFFFFF)
        words[used + 2] = np.uint32((arrival_ns[i] >> 32) & 0xFFFFFFFF)
        used += 3
        i = j
    words[head] = np.uint32(_EXT | (_X_WHEN | (used - head - 1) << 8) << 4)
    return used
