"""The state that a cut begins with, as its first operations tell it: START, LIVE, KEPT and QUEUE of the schema."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import survey
from kvtrace_traces.schema import LIVE_BEGUN, LIVE_RUNNING, LIVE_SCHEDULED, LIVE_TABLE

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class Live(NamedTuple):
    """A request under way: ``request``, its number; ``running``, else it waits; ``scheduled``: it is in the scheduled
    set; ``begun``: it was scheduled before; ``computed``: tokens; ``cached``: its first hit in tokens, None before it;
    ``preemptions`` so far; ``filled``: so many of its blocks are cached; ``table``: its blocks in order, None if not
    known."""

    request: int
    running: bool
    scheduled: bool
    begun: bool
    computed: int
    cached: int | None
    preemptions: int
    filled: int
    table: list[int] | None


class Snapshot(NamedTuple):
    """A run under way, at the moment before its next scheduler call.

    ``preempted``: requests since the step before; ``live``: running requests in the order of their queue, then waiting
    ones; ``blocks``, ``identities``, ``parents``: int32, parallel: cached blocks in the order in which they were
    filled, what each holds, and what the block before it held, -1 where that is none or stands nowhere else in the
    trace; ``queue``: int32, the free queue from its front.
    """

    preempted: int
    live: list[Live]
    blocks: I32
    identities: I32
    parents: I32
    queue: I32


def read(words: Any, starts: I64, stops: I64, hashes: NDArray[np.uint64]) -> Snapshot | None:
    """The snapshot at the begin of a log, None where there is none. ``hashes``: uint64, by dense identity."""
    live: list[Live] = []
    kept: list[NDArray[np.uint32]] = []
    queue: list[NDArray[np.uint32]] = []
    found, preempted = False, 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        at = start
        while at < stop:
            n = int(survey.op_words(words, at, stop))
            op, operand = int(words[at]) & 15, int(words[at]) >> 4
            if op == survey.BEGIN:
                return _snapshot(preempted, live, kept, queue, hashes) if found else None
            code = operand & 255 if op == 15 else 0
            if code == survey.X_START:
                found, preempted = True, int(words[at + 1])
            elif code == survey.X_LIVE:
                live.append(_live(words[at + 1 : at + n]))
            elif code == survey.X_KEPT:
                kept.append(np.asarray(words[at + 1 : at + n], np.uint32).reshape(-1, 5))
            elif code == survey.X_QUEUE:
                queue.append(np.asarray(words[at + 1 : at + n], np.uint32))
            at += n
    return _snapshot(preempted, live, kept, queue, hashes) if found else None


def _live(words: Any) -> Live:
    request, flags, computed, cached, preemptions, filled = (int(word) for word in words[:6])
    table = [int(block) for block in words[6:]] if flags & LIVE_TABLE else None
    return Live(
        request, bool(flags & LIVE_RUNNING), bool(flags & LIVE_SCHEDULED), bool(flags & LIVE_BEGUN), computed,
        cached - 1 if cached else None, preemptions, filled, table,
    )  # fmt: skip


def _snapshot(
    preempted: int,
    live: list[Live],
    kept: list[NDArray[np.uint32]],
    queue: list[NDArray[np.uint32]],
    hashes: NDArray[np.uint64],
) -> Snapshot:
    rows = np.concatenate(kept) if kept else np.empty((0, 5), np.uint32)
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

    free = np.concatenate(queue) if queue else np.empty(0, np.uint32)
    return Snapshot(preempted, live, rows[:, 0].astype(np.int32), dense(1), dense(3), free.astype(np.int32))
