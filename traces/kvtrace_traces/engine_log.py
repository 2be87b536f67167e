"""The log of one engine: its segments on disk, what is missing of them, and the arrays they decode to."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import content, play, rows, snapshot, survey, wire
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.play import Events, Operations, Player
from kvtrace_traces.scan import COMPLETE, OPEN
from kvtrace_traces.schema import INEXACT
from kvtrace_traces.segments import Segment
from kvtrace_traces.snapshot import Snapshot

MOST_UNSEEN = 1 << 20
"""Requests that a log may claim beyond what its bytes can hold: a missing segment may have named so many."""


class Chains(NamedTuple):
    """Identities of all requests at the stride of the granule, in CSR form.

    ``indptr`` int64[requests + 1]; ``identities`` int32, dense, numbered in order of first use; ``hashes``
    uint64[unique], what stands in the log for each.
    """

    indptr: NDArray[np.int64]
    identities: NDArray[np.int32]
    hashes: NDArray[np.uint64]


class Decoded(NamedTuple):
    """The tables of one engine, without its block events. ``known`` bool: requests whose arrival was read;
    ``events``: how many block events there are."""

    known: NDArray[np.bool_]
    rows: rows.Rows
    chains: Chains
    events: int


class Loss(NamedTuple):
    """What is missing of a log; None where it cannot be told."""

    reason: str
    time_ns: int | None
    commits: int | None
    events: int | None
    detail: str


class EngineLog:
    """The segments of one engine. Opening checks them; :meth:`decode` reads them.

    Attributes: ``header``; ``segments``; ``used`` bytes; ``losses``; ``damaged``: stretches that did not check out;
    ``notes`` for the user; ``logged``: block rows in the log, derived ones not counted; ``inexact``: names, those found
    while recording included.
    """

    def __init__(self, segments: list[Segment], recover: str) -> None:
        self.segments = sorted(segments, key=lambda s: int(s.header.get("segment", 0)))
        self.header = self.segments[0].header
        self.notes: list[str] = []
        self.losses: list[Loss] = []
        self.damaged = sum(s.scan.damaged for s in self.segments)
        self.used = sum(s.scan.used for s in self.segments)
        self._recover = recover
        self._decoded: Decoded | None = None
        self._chained: tuple[NDArray[np.bool_], Chains, NDArray[np.int32]] | None = None
        self._decoding = threading.Lock()  # several threads that want the tables wait for one
        self._lock = threading.Lock()  # block events may be gone through in several threads at once
        self.raw: NDArray[np.int32] | None = None  # content ids, once decoded
        self.raw_hashes: NDArray[np.uint64] | None = None  # what stands in the log for each of them
        self._end_events: int | None = None
        self._leave_out_copies()
        self._assemble()
        self._survey()

    @property
    def complete(self) -> bool:
        """The end record was read and nothing is known to be missing."""
        return self._ended and not self.losses and not self.damaged

    # ---------------------------------------------------------------- what is there

    def _leave_out_copies(self) -> None:
        """A copy of a file in the same folder is no second recording: of equal segments the longest is read."""
        best: dict[int, Segment] = {}
        for segment in self.segments:
            number = int(segment.header.get("segment", 0))
            kept = best.get(number)
            if kept is None or segment.scan.used > kept.scan.used:
                best[number], segment = segment, kept  # type: ignore[assignment]
            if segment is not None:
                self.notes.append(f"{segment.path.name} is a copy of {best[number].path.name}, and is left out")
        self.segments = list(best.values())

    def _assemble(self) -> None:
        """Lay the OPS commits of all segments out as one array of words, and note what lies between them."""
        words, starts, stops, keys, gaps = [], [], [], [], []
        self._ended = False
        base, expected, missing = 0, 0, False
        for segment in self.segments:
            number, found = int(segment.header.get("segment", 0)), segment.scan
            if number != expected:
                what = f"{expected}" if number == expected + 1 else f"{expected} to {number - 1}"
                detail = f"segment {what} before {segment.path.name} is missing"
                self.losses.append(Loss("gap", None, None, None, detail))
                missing = True
            expected = number + 1
            words.append(segment.data[: len(segment.data) // 4 * 4].view("<u4"))
            ops = np.flatnonzero(found.kinds == wire.OPS)
            breaks = np.cumsum(found.gaps)[ops]
            gap = np.diff(breaks, prepend=0) > 0
            if len(gap):
                gap[0] |= missing
                missing = False
            missing |= bool(found.gaps[(ops[-1] + 1 if len(ops) else 0) :].any())
            starts.append(found.offsets[ops] // 4 + base)
            stops.append((found.offsets[ops] + found.lengths[ops]) // 4 + base)
            keys.append((found.flags[ops] & wire.KEY) != 0)
            gaps.append(gap)
            base += len(words[-1])
            last = int(found.kinds[-1]) if len(found.kinds) else 0
            self._ended = last == wire.END
            missing |= last != wire.NEXT
            self._read_records(segment)
            self._note_ending(segment, last)
        self._words = words[0] if len(words) == 1 else np.concatenate(words)
        self._starts, self._stops = np.concatenate(starts), np.concatenate(stops)
        self._keys, self._gaps = np.concatenate(keys), np.concatenate(gaps)

    def _read_records(self, segment: Segment) -> None:
        found = segment.scan
        for i in np.flatnonzero((found.kinds == wire.LOSS) | (found.kinds == wire.END)):
            body = segment.data[found.offsets[i] : found.offsets[i] + found.lengths[i]].tobytes()
            try:
                told = json.loads(body)
                if found.kinds[i] == wire.END:
                    self._end_events = _count(told["events"]) if "events" in told else None
                    continue
                loss = Loss(
                    str(told["reason"]), _count(told["time_ns"]), _count(told["commits"]), _count(told["events"]),
                    str(told["detail"]),
                )  # fmt: skip
            except (ValueError, KeyError, TypeError, RecursionError):
                loss = Loss("damage", None, None, None, "a record of a loss, or of the end, that does not read")
            self.losses.append(loss)

    def _note_ending(self, segment: Segment, last: int) -> None:
        found, name = segment.scan, segment.path.name
        if last in (wire.END, wire.NEXT):
            if last == wire.NEXT and segment is self.segments[-1]:
                self.notes.append(f"{name} goes on in a further segment, which is not here")
        elif last == wire.LOSS and found.ending == COMPLETE:
            pass  # it says itself why nothing follows
        elif found.ending == COMPLETE or found.ending == OPEN:
            self.notes.append(f"{name} has no end record: the engine was still running or was killed")
        else:
            self.notes.append(f"{name} ends within a record: the file was cut, or the engine killed, while writing it")

    def _survey(self) -> None:
        """Check and count the operations; decide what to do about damage."""
        self._num_blocks = max(1, int(self.header["num_blocks"]))
        commits, gaps = len(self._starts), int(self._gaps.sum())
        if self._recover == "tail" and gaps:
            self._cut(int(np.argmax(self._gaps)))
        counts, malformed = self._check()
        self.damaged += malformed
        unused = int(len(self._use) - self._use.sum())
        if self._recover == "strict" and (self.damaged or unused or gaps):
            name = self.segments[0].path.name
            at = next((s.scan.damaged_at for s in self.segments if s.scan.damaged_at >= 0), -1)
            where = f" at byte {at:,}" if at >= 0 else ""
            raise KvtraceError(f"{name} is damaged{where}: read it with recover='skip' to get the rest")
        if self._recover == "tail" and unused:
            # Everything from the first commit that does not decode is left out.
            self._cut(int(np.argmin(self._use)))
            counts, _ = self._check()
        self._counts = counts
        logged = int(counts[survey.N_LOGGED])
        # Frames count the events before them, and the end record counts all: what was not read is missing.
        lost: int | None = int(counts[survey.N_KEY_LOST])
        recorded = sum(loss.events or 0 for loss in self.losses)
        if self._end_events is not None:
            lost = counts[survey.N_KEY_LOST] + max(0, self._end_events - logged - recorded)
        elif self._recover == "tail" and (gaps or unused):
            lost = None
        left_out = commits - int(self._use.sum())
        if self.damaged or left_out or lost:
            what = f"{self.damaged} damaged stretch(es) of the log" if self.damaged else "a part of the log is missing"
            reason = "damage" if self.damaged else "gap"
            detail = f"{what}; {left_out} whole commit(s) after it left out (recover='{self._recover}')"
            self.losses.append(Loss(reason, None, left_out or None, None if lost is None else int(lost), detail))
        self.logged = logged - int(counts[survey.N_KEY_LOST] + counts[survey.N_FIRST_LOGGED])
        found = int(counts[survey.N_INEXACT])
        late = [reason for bit, reason in enumerate(INEXACT) if found >> bit & 1]
        told = [str(reason) for reason in self.header.get("inexact", [])]
        self.inexact = told + [reason for reason in late if reason not in told]

    def _check(self) -> tuple[NDArray[np.int64], int]:
        self._use = np.zeros(len(self._starts), np.bool_)
        # Requests that the bytes could hold (IDS takes 8 for each), and those that what is missing may have held.
        room = min(max(self.used // 8, MOST_UNSEEN) + 16, 1 << 28)
        counts, malformed = survey.survey(
            self._words, self._starts, self._stops, self._keys, self._gaps, self._use, room, self._num_blocks
        )
        return counts, int(malformed)

    def _cut(self, first: int) -> None:
        self._starts, self._stops = self._starts[:first], self._stops[:first]
        self._keys, self._gaps = self._keys[:first], self._gaps[:first]

    @property
    def dropped(self) -> int:
        """Block events that are known to be missing."""
        return sum(loss.events or 0 for loss in self.losses)

    # ---------------------------------------------------------------- decoding

    def decode(self) -> Decoded:
        """Decode everything but block events, once."""
        with self._decoding:
            if self._decoded is None:
                for _ in self.pieces():
                    pass
        assert self._decoded is not None
        return self._decoded

    def pieces(self, most: int = play.PIECE, keep: bool = False) -> Iterator[Events]:
        """The block events, as :meth:`play.Player.pieces` gives them. The first time, all else is decoded with them.

        ``most`` 0: all at once.
        """
        with self._lock:
            if self._chained is None:
                self._chained = self._chains()
        known, chains, explicit = self._chained
        per_block = max(1, int(self.header["block_size"]) // int(self.header["granule"]))
        player = Player(
            Operations(self._words, self._starts, self._stops, self._gaps, self._use, self._counts, per_block,
                       self._num_blocks),
            chains.indptr, chains.identities, explicit,
        )  # fmt: skip
        if not most:
            most = player.most_events if self._decoded is None else self._decoded.events + 2 * play.PIECE
        yield from player.pieces(most, keep)
        with self._lock:
            if self._decoded is not None:
                return
            if player.lost:
                detail = "events whose blocks only the missing part of the log names"
                self.losses.append(Loss("gap", None, None, player.lost, detail))
            self._decoded = Decoded(known, player.rows(), chains, player.events)

    def snapshot(self) -> Snapshot | None:
        """The state that a cut begins with; None for a log that begins with an idle engine."""
        if "cut" not in self.header:
            return None
        return snapshot.read(self._words, self._starts, self._stops, self.decode().chains.hashes)

    def _chains(self) -> tuple[NDArray[np.bool_], Chains, NDArray[np.int32]]:
        counts = self._counts
        total, many = int(counts[survey.N_REQUESTS]), int(counts[survey.N_CHAIN])
        known, length = np.zeros(total, np.bool_), np.zeros(total, np.int32)
        owner, hashes = np.empty(many, np.int32), np.empty(many, np.uint64)
        count = survey.gather(
            self._words, self._starts, self._stops, self._gaps, self._use, known, length, owner, hashes
        )
        identities, unique = _densify(hashes, count)
        indptr = np.zeros(total + 1, np.int64)
        np.cumsum(length, out=indptr[1:])
        values = np.empty(int(indptr[-1]), np.int32)
        survey.by_request(owner, identities, count, indptr, values)
        if self.header.get("source") == "import" and content.many_parents(indptr, values, len(unique)):
            self.raw, self.raw_hashes = values, unique
            chained = np.empty(len(values), np.uint64)
            content.chain(indptr, values, unique, chained)
            values, unique = _densify(chained, len(chained))
        explicit = identities[owner[:count] < 0]
        return known, Chains(indptr, values, unique), explicit


def _count(value: Any) -> int:
    """A count that stands in a record; :class:`ValueError` for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value


def _densify(hashes: NDArray[np.uint64], count: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """Dense identities of the first ``count`` hashes, in order of first use, and the distinct hashes."""
    slots = np.full(1 << max(4, (2 * count).bit_length()), -1, np.int32)
    identities, unique = np.empty(count, np.int32), np.empty(count, np.uint64)
    multiplier = np.uint64(secrets.randbits(64) | 1)
    distinct = survey.densify(hashes, count, multiplier, slots, identities, unique)
    return identities, unique[:distinct].copy()
