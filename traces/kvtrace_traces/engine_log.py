"""The log of one engine: its segments on disk, what is missing of them, and the arrays they decode to."""

from __future__ import annotations

import json
import mmap
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import content, survey, wire
from kvtrace_traces import events as play
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.scan import COMPLETE, OPEN, Scan, scan
from kvtrace_traces.schema import INEXACT

MAX_BLOCKS = 1 << 27


class Chains(NamedTuple):
    """Identities of all requests at the stride of the granule, in CSR form.

    ``indptr`` int64[requests + 1]; ``identities`` int32, dense, numbered in order of first use; ``hashes``
    uint64[unique], what stands in the log for each.
    """

    indptr: NDArray[np.int64]
    identities: NDArray[np.int32]
    hashes: NDArray[np.uint64]


class Decoded(NamedTuple):
    """The arrays of one engine; rows as in ``events``. ``known``: requests whose arrival was read."""

    known: NDArray[np.bool_]
    requests32: NDArray[np.int32]
    requests64: NDArray[np.int64]
    id_bytes: NDArray[np.uint8]
    steps32: NDArray[np.int32]
    steps64: NDArray[np.int64]
    spans: NDArray[np.int32]
    lookups: NDArray[np.int32]
    preemptions: NDArray[np.int32]
    preempted_at: NDArray[np.int64]
    events: NDArray[np.int32]
    times: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    groups: NDArray[np.int16]
    chains: Chains


class Segment(NamedTuple):
    """One file of an engine's log."""

    path: Path
    data: NDArray[np.uint8]
    scan: Scan
    header: dict[str, Any]


class Loss(NamedTuple):
    """What is missing of a log; None where it cannot be told."""

    reason: str
    time_ns: int | None
    commits: int | None
    events: int | None
    detail: str


class EngineLog:
    """The segments of one engine. Opening checks them; :meth:`decode` reads them.

    Attributes: ``header``; ``segments``; ``used`` bytes; ``complete``: the end record was read and nothing is missing;
    ``losses``; ``damaged``: stretches that did not check out; ``notes`` for the user; ``logged``: block rows in
    the log, derived ones not counted; ``inexact``: names, those found while recording included.
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
        self.raw: NDArray[np.int32] | None = None  # content ids, once decoded
        self._assemble()
        self._survey()
        self.complete = self._ended and not self.losses and not self.damaged

    # ---------------------------------------------------------------- what is there

    def _assemble(self) -> None:
        """Lay the OPS commits of all segments out as one array of words, and note what lies between them."""
        words, starts, stops, keys, gaps = [], [], [], [], []
        self._ended = False
        base, expected, missing = 0, 0, False
        for segment in self.segments:
            number, found = int(segment.header.get("segment", 0)), segment.scan
            if number != expected:
                what = f"{expected}" if number == expected + 1 else f"{expected} to {number - 1}"
                self.losses.append(Loss("gap", None, None, None, f"segment {what} before {segment.path.name} is missing"))
                missing = True
            expected = number + 1
            words.append(segment.data[: len(segment.data) // 4 * 4].view("<u4"))
            ops = np.flatnonzero(found.kinds == wire.OPS)
            breaks = np.cumsum(found.gaps)[ops]
            gap = np.diff(breaks, prepend=0) > 0
            if len(gap):
                gap[0] |= missing
                missing = bool(found.gaps[ops[-1] + 1 :].any())
            starts.append(found.offsets[ops] // 4 + base)
            stops.append((found.offsets[ops] + found.lengths[ops]) // 4 + base)
            keys.append((found.flags[ops] & wire.KEY) != 0)
            gaps.append(gap)
            base += len(words[-1])
            last = int(found.kinds[-1]) if len(found.kinds) else 0
            self._ended = last == wire.END
            missing |= last != wire.NEXT
            self._read_losses(segment)
            self._note_ending(segment, last)
        self._words = words[0] if len(words) == 1 else np.concatenate(words)
        self._starts, self._stops = np.concatenate(starts), np.concatenate(stops)
        self._keys, self._gaps = np.concatenate(keys), np.concatenate(gaps)

    def _read_losses(self, segment: Segment) -> None:
        found = segment.scan
        for i in np.flatnonzero(found.kinds == wire.LOSS):
            body = segment.data[found.offsets[i] : found.offsets[i] + found.lengths[i]].tobytes()
            try:
                loss = json.loads(body)
                entry = Loss(
                    str(loss["reason"]), int(loss["time_ns"]), int(loss["commits"]), int(loss["events"]), str(loss["detail"])
                )
            except (ValueError, KeyError, TypeError):
                entry = Loss("damage", None, None, None, "a loss record that does not read")
            self.losses.append(entry)

    def _note_ending(self, segment: Segment, last: int) -> None:
        found, name = segment.scan, segment.path.name
        if last in (wire.END, wire.NEXT):
            if last == wire.NEXT and segment is self.segments[-1]:
                self.notes.append(f"{name} goes on in a further segment, which is not here")
        elif found.ending == COMPLETE or found.ending == OPEN:
            self.notes.append(f"{name} has no end record: the engine was still running or was killed")
        else:
            self.notes.append(f"{name} ends within a record: the file was cut, or the engine killed, while writing it")

    def _survey(self) -> None:
        """Check and count the operations; decide what to do about damage."""
        name = self.segments[0].path.name
        num_blocks = self.header.get("num_blocks")
        if not isinstance(num_blocks, int) or not 0 <= num_blocks <= MAX_BLOCKS:
            raise KvtraceError(f"{name}: the header gives no sensible number of blocks: the file is damaged")
        self._num_blocks = max(1, num_blocks)
        n = len(self._starts)
        self._use = np.zeros(n, np.bool_)
        room = min(self.used // 8 + 16, 1 << 28)  # requests that the bytes could hold; IDS takes 8 for each
        gaps = self._gaps.copy()
        dropped = 0
        if self._recover == "tail" and gaps.any():
            first = int(np.argmax(gaps))
            dropped = n - first
            self._cut(first)
            gaps = self._gaps.copy()
        counts, malformed = survey.survey(
            self._words, self._starts, self._stops, self._keys, gaps, self._use, room, self._num_blocks
        )
        unused = len(self._use) - int(self._use.sum())
        if malformed:
            self.damaged += int(malformed)
        if self.damaged and self._recover == "strict":
            at = next((s.scan.damaged_at for s in self.segments if s.scan.damaged_at >= 0), -1)
            where = f" at byte {at:,}" if at >= 0 else ""
            raise KvtraceError(f"{name} is damaged{where}: read it with recover='skip' to get the rest")
        if self._recover == "tail" and unused:
            # Everything from the first commit that does not decode is left out.
            first = int(np.argmin(self._use))
            dropped += len(self._use) - first
            self._cut(first)
            self._use = np.zeros(first, np.bool_)
            counts, _ = survey.survey(
                self._words, self._starts, self._stops, self._keys, self._gaps, self._use, room, self._num_blocks
            )
            unused = 0
        self._counts = counts
        if self.damaged:
            events = int(counts[survey.N_KEY_LOST]) if self._recover == "skip" else None
            left_out = dropped + unused
            self.losses.append(
                Loss("damage", None, left_out or None, events, f"{self.damaged} damaged stretch(es) of the log; "
                     f"{left_out} whole commit(s) after them left out (recover='{self._recover}')")
            )  # fmt: skip
        self.logged = int(counts[survey.N_LOGGED] - counts[survey.N_KEY_LOST])
        found = int(counts[survey.N_INEXACT])
        late = [reason for bit, reason in enumerate(INEXACT) if found >> bit & 1]
        told = [str(reason) for reason in self.header.get("inexact", [])]
        self.inexact = told + [reason for reason in late if reason not in told]

    def _cut(self, first: int) -> None:
        self._starts, self._stops = self._starts[:first], self._stops[:first]
        self._keys, self._gaps = self._keys[:first], self._gaps[:first]
        self._use = self._use[:first]

    @property
    def dropped(self) -> int:
        """Block events that are known to be missing."""
        return sum(loss.events or 0 for loss in self.losses)

    # ---------------------------------------------------------------- decoding

    def decode(self) -> Decoded:
        """Decode everything, once."""
        if self._decoded is None:
            self._decoded = self._decode()
        return self._decoded

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
            self.raw = values
            chained = np.empty(len(values), np.uint64)
            content.chain(indptr, values, unique, chained)
            values, unique = _densify(chained, len(chained))
        explicit = identities[owner[:count] < 0]
        return known, Chains(indptr, values, unique), explicit

    def _decode(self) -> Decoded:
        counts = self._counts
        total, references = int(counts[survey.N_REQUESTS]), int(counts[survey.N_REFERENCES])
        known, chains, explicit = self._chains()
        requests32, requests64 = np.full((13, total), -1, np.int32), np.full((5, total), -1, np.int64)
        requests32[play.R_PREEMPTIONS] = 0
        requests32[play.R_ID_BYTES] = 0
        requests64[play.R_TENANT] = 0
        id_bytes = np.empty(int(counts[survey.N_ID_BYTES]), np.uint8)
        n_steps = int(counts[survey.N_STEPS])
        steps32, steps64 = np.empty((8, n_steps), np.int32), np.full((2, n_steps), -1, np.int64)
        spans = np.empty((5, 2 * int(counts[survey.N_ENTRIES]) + 1), np.int32)
        lookups = np.empty((5, int(counts[survey.N_LOOKUPS])), np.int32)
        preemptions = np.empty((4, int(counts[survey.N_PREEMPTIONS])), np.int32)
        preempted_at = np.empty(preemptions.shape[1], np.int64)
        # Each reference is made, filled and given up at most once, and evicts at most one identity.
        rows = 4 * references + int(counts[survey.N_EXPLICIT]) + int(counts[survey.N_MOVES]) + 1
        events, times = np.empty((4, rows), np.int32), np.empty(rows, np.int64)
        kinds, groups = np.empty(rows, np.uint8), np.empty(rows, np.int16)
        nodes = np.empty((3, references + 1), np.int32)
        per_block = max(1, int(self.header["block_size"]) // int(self.header["granule"]))
        made = play.play(
            self._words, self._starts, self._stops, self._gaps, self._use, known, chains.indptr, chains.identities,
            per_block, self._num_blocks, int(counts[survey.N_OWNERS]), explicit,
            requests32, requests64, id_bytes, steps32, steps64, spans, lookups, preemptions, preempted_at,
            events, times, kinds, groups, nodes,
        )  # fmt: skip
        n = int(made[play.N_EVENTS])
        lost = int(made[play.N_LOST])
        if lost:
            self.losses.append(Loss("gap", None, None, lost, "events whose blocks only the missing part of the log names"))
        return Decoded(
            known, requests32, requests64, id_bytes,
            steps32[:, : made[play.N_STEPS]], steps64[:, : made[play.N_STEPS]], spans[:, : made[play.N_SPANS]],
            lookups[:, : made[play.N_LOOKUPS]], preemptions[:, : made[play.N_PREEMPTIONS]],
            preempted_at[: made[play.N_PREEMPTIONS]],
            events[:, :n], times[:n], kinds[:n], groups[:n], chains,
        )  # fmt: skip


def _densify(hashes: NDArray[np.uint64], count: int) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """Dense identities of the first ``count`` hashes, in order of first use, and the distinct hashes."""
    slots = np.full(1 << max(4, (2 * count).bit_length()), -1, np.int32)
    identities, unique = np.empty(count, np.int32), np.empty(count, np.uint64)
    multiplier = np.uint64(secrets.randbits(64) | 1)
    distinct = survey.densify(hashes, count, multiplier, slots, identities, unique)
    return identities, unique[:distinct].copy()


def open_segment(path: Path) -> Segment:
    """Map a file, check its prefix and commits, and read its header. Raises :class:`KvtraceError`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data = (
                np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
                if size
                else np.empty(0, np.uint8)
            )
    except OSError as error:
        raise KvtraceError(f"{path}: {error.strerror}") from None
    wire.check_prefix(data[: wire.PREFIX.size].tobytes(), str(path))
    found = scan(data)
    if not len(found.kinds) or found.kinds[0] != wire.HEADER or found.gaps[0]:
        raise KvtraceError(f"{path}: its header is missing or damaged, and without it nothing can be read")
    if found.lengths[0] > wire.MAX_HEADER_BYTES:
        raise KvtraceError(f"{path}: its header is larger than {wire.MAX_HEADER_BYTES:,} bytes: the file is damaged")
    body = data[found.offsets[0] : found.offsets[0] + found.lengths[0]].tobytes()
    try:
        header = json.loads(body)
        header["block_size"] = int(header["block_size"])
        header["granule"] = int(header["granule"])
        ok = header["block_size"] >= 1 <= header["granule"] and isinstance(header.get("segment", 0), int)
    except (ValueError, KeyError, TypeError, RecursionError):
        ok = False
    if not ok:
        raise KvtraceError(f"{path}: its header does not read as one: the file is damaged or from another program")
    return Segment(path, data, found, header)
