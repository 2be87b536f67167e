"""Plays a log: block events come in pieces, so that all of them need never lie in memory at once; the rows of the
other tables, far fewer, are whole when the last piece has come."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import events, rows, survey
from kvtrace_traces.played import C_WANTED, PER_REQUEST

PIECE = 1 << 16
"""Rows of block events in a piece that nobody keeps: so few that they stay in the processor's cache."""


class Operations(NamedTuple):
    """What is played: the words of a log, where each commit starts and stops in them, whether something is missing
    just before it, and whether it can be used; the ``counts`` of the first pass, and what follows from the header."""

    words: NDArray[np.uint32]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    gaps: NDArray[np.bool_]
    use: NDArray[np.bool_]
    counts: NDArray[np.int64]
    granules_per_block: int
    num_blocks: int


class Events(NamedTuple):
    """Block events in the order they happened: ``narrow`` int32[4, n], a row for each of ``rows.E_STEP E_REQUEST
    E_BLOCK E_IDENTITY``, ``times`` int64, ``kinds`` uint8, ``groups`` int16."""

    narrow: NDArray[np.int32]
    times: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    groups: NDArray[np.int16]


class Player:
    """Plays a log once. ``rows``: the other tables, whole when all pieces were taken; ``events``: block events so far;
    ``lost``: those of which only the missing part of the log names the blocks."""

    def __init__(
        self,
        operations: Operations,
        indptr: NDArray[np.int64],
        identities: NDArray[np.int32],
        explicit: NDArray[np.int32],
    ) -> None:
        counts, total = operations.counts, len(indptr) - 1
        self.events = self.lost = 0
        self._played = operations
        self._chains = indptr, identities, explicit
        self._state = events.new_state()
        self._out = _empty_rows(counts)
        self._scratch = (
            np.zeros((PER_REQUEST, total), np.int32), np.empty(total, np.int32), np.empty(total, np.int32),
            np.empty(int(counts[survey.N_OWNERS]) + 1, np.uint32), np.zeros(operations.num_blocks, np.int64),
            np.empty((3, int(counts[survey.N_REFERENCES]) + 1), np.int32),
        )  # fmt: skip

    @property
    def most_events(self) -> int:
        """At least as many as there will be."""
        counts = self._played.counts
        # Each reference is made, filled and given up at most once, and evicts at most one identity.
        each = 4 * int(counts[survey.N_REFERENCES])
        return each + int(counts[survey.N_EXPLICIT]) + int(counts[survey.N_MOVES]) + 1

    def pieces(self, most: int = PIECE, keep: bool = False) -> Iterator[Events]:
        """All block events, up to ``most`` at once, or more where a single operation makes more. A piece holds until
        the next is taken, unless ``keep``."""
        played, (indptr, identities, explicit) = self._played, self._chains
        buffer, done = _room(most), False
        while not done:
            out = self._out._replace(events=buffer.narrow, times=buffer.times, kinds=buffer.kinds, groups=buffer.groups)
            done = events.play(
                played.words, played.starts, played.stops, played.gaps, played.use, indptr, identities,
                played.granules_per_block, explicit, self._state, *self._scratch, out,
            )  # fmt: skip
            n = int(self._state[events.N_EVENTS])
            self.events += n
            if n:
                yield Events(buffer.narrow[:, :n], buffer.times[:n], buffer.kinds[:n], buffer.groups[:n])
            if not n or keep:
                buffer = _room(most if n else int(self._state[C_WANTED]))
        self.lost = int(self._state[events.N_LOST])

    def rows(self) -> rows.Rows:
        """The rows of the tables, without block events."""
        made, out, total = self._state, self._out, len(self._chains[0]) - 1
        steps, spans, looked = made[events.N_STEPS], made[events.N_SPANS], made[events.N_LOOKUPS]
        preempted, moves = made[events.N_PREEMPTIONS], made[events.N_MOVES]
        return out._replace(
            requests32=out.requests32[:, :total], requests64=out.requests64[:, :total],
            steps32=out.steps32[:, :steps], steps64=out.steps64[:, :steps], spans=out.spans[:, :spans],
            lookups=out.lookups[:, :looked], preemptions=out.preemptions[:, :preempted],
            preempted_at=out.preempted_at[:preempted], moves32=out.moves32[:, :moves], moves64=out.moves64[:, :moves],
        )  # fmt: skip


def _room(most: int) -> Events:
    return Events(np.empty((4, most), np.int32), np.empty(most, np.int64), np.empty(most, np.uint8),
                  np.zeros(most, np.int16))  # fmt: skip


def _empty_rows(counts: NDArray[np.int64]) -> rows.Rows:
    """Arrays with room for all rows that the first pass has counted, but for block events."""
    total = int(counts[survey.N_REQUESTS])
    requests32 = np.full((rows.R_FINISH_EMPTY + 1, total), -1, np.int32)
    requests64 = np.full((rows.R_ID_AT + 1, total), -1, np.int64)
    requests32[rows.R_PREEMPTIONS] = 0
    requests32[rows.R_ID_BYTES] = 0
    requests64[rows.R_TENANT] = 0
    steps, preemptions = int(counts[survey.N_STEPS]), int(counts[survey.N_PREEMPTIONS])
    transfers = int(counts[survey.N_TRANSFERS])
    return rows.Rows(
        requests32, requests64, np.empty(int(counts[survey.N_ID_BYTES]), np.uint8),
        np.empty((8, steps), np.int32), np.full((2, steps), -1, np.int64),
        np.empty((5, 2 * int(counts[survey.N_ENTRIES]) + 1), np.int32),
        np.empty((5, int(counts[survey.N_LOOKUPS])), np.int32),
        np.empty((4, preemptions), np.int32), np.empty(preemptions, np.int64), *_room(0),
        np.empty((3, int(counts[survey.N_TYPES])), np.int32), np.empty(int(counts[survey.N_TYPE_BYTES]), np.uint8),
        np.empty((7, transfers), np.int32), np.empty((5, transfers), np.int64),
    )  # fmt: skip
