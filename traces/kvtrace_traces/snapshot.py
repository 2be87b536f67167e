"""The state that a cut begins with, as its first operations tell it: START, LIVE, KNOWN, KEPT, QUEUE of the schema."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import survey
from kvtrace_traces.played import time_of
from kvtrace_traces.schema import KNOWN_GIVES, LIVE_BEGUN, LIVE_RUNNING, LIVE_SCHEDULED, LIVE_TABLE

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class Live(NamedTuple):
    """A request under way: ``request``, its number; ``running``, else it waits; ``scheduled``: it is in the scheduled
    set; ``begun``: it was scheduled before; ``computed``: tokens; ``cached``: its first hit in tokens, None before it;
    ``preemptions`` so far; ``filled``: so many of its blocks are cached; ``table``: its blocks in order, None if not
    known. ``tokens``: known of prompt and output, None in cuts of format 1.2; ``under_way``: scheduled in the call
    whose output is due; ``gives``: the call before gives it a token; ``lost``: most tokens that a preemption cost."""

    request: int
    running: bool
    scheduled: bool
    begun: bool
    computed: int
    cached: int | None
    preemptions: int
    filled: int
    table: list[int] | None
    tokens: int | None = None
    under_way: int = 0
    gives: bool = False
    lost: int = 0


class Snapshot(NamedTuple):
    """A run under way, at the moment before its next scheduler call.

    ``preempted``: requests since the step before; ``live``: running requests in the order of their queue, then waiting
    ones; ``blocks``, ``identities``, ``parents``: int32, parallel: cached blocks in the order in which they were
    filled, what each holds, and what the block before it held, -1 where that is none or stands nowhere else in the
    trace; ``queue``: int32, the free queue from its front. ``empty``: scheduler calls without a step since the last
    step; ``due``: calls whose output is due; ``due_ns``: when the last of these outputs arrived, None where it never
    did.
    """

    preempted: int
    live: list[Live]
    blocks: I32
    identities: I32
    parents: I32
    queue: I32
    empty: int = 0
    due: int = 0
    due_ns: int | None = None


def read(words: Any, starts: I64, stops: I64, hashes: NDArray[np.uint64]) -> Snapshot | None:
    """The snapshot at the begin of a log, None where there is none. ``hashes``: uint64, by dense identity."""
    told = _Told()
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        at = start
        while at < stop:
            n = int(survey.op_words(words, at, stop))
            op, operand = int(words[at]) & 15, int(words[at]) >> 4
            if op == survey.BEGIN:
                return _snapshot(told, hashes, _due_ns(words, starts, stops, told.due)) if told.found else None
            told.take(words, at, n, op, operand & 255)
            at += n
    return _snapshot(told, hashes, None) if told.found else None


class _Told:
    """What the operations before the first call tell."""

    def __init__(self) -> None:
        self.found, self.preempted, self.empty, self.due = False, 0, 0, 0
        self.live: dict[int, Live] = {}
        self.kept: list[NDArray[np.uint32]] = []
        self.queue: list[NDArray[np.uint32]] = []

    def take(self, words: Any, at: int, n: int, op: int, code: int) -> None:
        body = words[at + 1 : at + n]
        if op == survey.KEY:
            self.due = int(words[at + 9])
        elif op != 15:
            return
        elif code == survey.X_START:
            self.found, self.preempted, self.empty = True, int(body[0]), int(body[1])
        elif code == survey.X_LIVE:
            one = _live(body)
            self.live[one.request] = one
        elif code == survey.X_KNOWN:
            for request, tokens, under_way, flags, lost in np.asarray(body, np.int64).reshape(-1, 5).tolist():
                if request in self.live:
                    self.live[request] = self.live[request]._replace(
                        tokens=tokens, under_way=under_way, gives=bool(flags & KNOWN_GIVES), lost=lost
                    )
        elif code == survey.X_KEPT:
            self.kept.append(np.asarray(body, np.uint32).reshape(-1, 5))
        elif code == survey.X_QUEUE:
            self.queue.append(np.asarray(body, np.uint32))


def _due_ns(words: Any, starts: I64, stops: I64, due: int) -> int | None:
    """When the last of the ``due`` first outputs arrived; None where the log does not tell of it."""
    time = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        at = start
        while due and at < stop:
            n = int(survey.op_words(words, at, stop))
            op, operand = int(words[at]) & 15, int(words[at]) >> 4
            if op == survey.KEY or (op == 15 and operand & 255 == survey.X_TIME):
                time = int(time_of(words, at + 1))
            elif op in (survey.BEGIN, survey.OUTPUT):
                time += operand
                due -= op == survey.OUTPUT
                if not due:
                    return time
            elif op == 15 and operand & 255 == survey.X_SKIP:
                due = max(0, due - int(words[at + 1]))
            at += n
        if not due:
            break
    return None


def _live(words: Any) -> Live:
    request, flags, computed, cached, preemptions, filled = (int(word) for word in words[:6])
    table = [int(block) for block in words[6:]] if flags & LIVE_TABLE else None
    return Live(
        request, bool(flags & LIVE_RUNNING), bool(flags & LIVE_SCHEDULED), bool(flags & LIVE_BEGUN), computed,
        cached - 1 if cached else None, preemptions, filled, table,
    )  # fmt: skip


def _snapshot(told: _Told, hashes: NDArray[np.uint64], due_ns: int | None) -> Snapshot:
    rows = np.concatenate(told.kept) if told.kept else np.empty((0, 5), np.uint32)
    order = np.argsort(hashes)

    def dense(column: int) -> I32:
        values = rows[:, column].astype(np.uint64) | rows[:, column + 1].astype(np.uint64) << np.uint64(32)
        if not len(hashes):
            return np.full(len(values), -1, np.int32)
        place = np.minimum(np.searchsorted(hashes, values, sorter=order), len(hashes) - 1)
        found = order[place]
        known = hashes[found] == values
        if column == 3:
            known &= values != 0  # a parent of 0 is none
        return np.where(known, found, -1).astype(np.int32)

    free = np.concatenate(told.queue) if told.queue else np.empty(0, np.uint32)
    return Snapshot(
        told.preempted, list(told.live.values()), rows[:, 0].astype(np.int32), dense(1), dense(3),
        free.astype(np.int32), told.empty, told.due, due_ns,
    )  # fmt: skip
