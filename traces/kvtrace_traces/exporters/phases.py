"""What each request was doing when: queue, prefill, decode, preempted, recompute; and lanes to draw requests in.

A request waits in the *queue* from its arrival to the begin of its first step. *Prefill* lasts from there to the output
of the step that computes the last token of its prompt, *decode* from there on. From a preemption to the begin of the
next step with the request in it, it is *preempted*; then it *recomputes*, until it has all tokens again that it had,
the last one sampled included, and at least its prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

QUEUE, PREFILL, DECODE, PREEMPTED, RECOMPUTE = "queue", "prefill", "decode", "preempted", "recompute"
I64 = NDArray[np.int64]


class Phase(NamedTuple):
    """A stretch of a request's time. ``tokens`` and ``steps``: computed in it; of the queue, and preempted, 0."""

    name: str
    begin_ns: int
    end_ns: int
    tokens: int
    steps: int


class Spells(NamedTuple):
    """The spans and preemptions of one engine's requests, sorted by request and step, with where each request's begin.

    ``spans``: int64[5, n], rows request, first_step, steps, tokens, computed_before; ``preempted``: int64[4, m], rows
    request, step, time_ns, tokens_lost; ``span_at`` and ``preempted_at``: int64[requests + 1].
    """

    spans: I64
    span_at: I64
    preempted: I64
    preempted_at: I64


class Clock(NamedTuple):
    """When the steps of one engine began and ended: ``steps`` their numbers, ascending; ``starts``; ``ends``, -1 where
    not known; all int64. ``last_ns``: the last time that the trace knows."""

    steps: I64
    starts: I64
    ends: I64
    last_ns: int

    def start(self, step: int) -> int | None:
        at = int(np.searchsorted(self.steps, step))
        return int(self.starts[at]) if at < len(self.steps) and self.steps[at] == step else None

    def end(self, step: int) -> int | None:
        at = int(np.searchsorted(self.steps, step))
        known = at < len(self.steps) and self.steps[at] == step and self.ends[at] >= 0
        return int(self.ends[at]) if known else None


def clock(steps: pl.DataFrame) -> Clock:
    """The clock of one engine's ``steps``, which are at least one."""
    ordered = steps.sort("step")
    starts = ordered["start_ns"].to_numpy().astype(np.int64)
    ends = ordered["end_ns"].fill_null(-1).to_numpy().astype(np.int64)
    return Clock(ordered["step"].to_numpy().astype(np.int64), starts, ends, int(max(starts.max(), ends.max())))


def spells(requests: I64, spans: pl.DataFrame, preemptions: pl.DataFrame) -> Spells:
    """Sort one engine's spans and preemptions by request. ``requests``: the numbers, ascending, of which to tell."""
    columns = ("request", "first_step", "steps", "tokens", "computed_before")
    by_span = spans.sort("request", "first_step").select(pl.col(columns).cast(pl.Int64)).to_numpy().T
    known = ("request", "step", "time_ns", "tokens_lost")
    lost = preemptions.sort("request", "step", maintain_order=True).select(pl.col(known).cast(pl.Int64)).to_numpy().T
    bounds = np.append(requests, np.iinfo(np.int64).max)
    return Spells(by_span, np.searchsorted(by_span[0], bounds), lost, np.searchsorted(lost[0], bounds))


def phases(told: Spells, nth: int, clock: Clock, prompt: int, arrival_ns: int, finish_ns: int) -> list[Phase]:
    """The phases of request number ``nth`` of ``told``, at least one, each beginning where the one before ends.

    ``arrival_ns`` and ``finish_ns``: -1 where not known; then it begins with its first step, and ends with the trace.
    """
    spans = told.spans[:, told.span_at[nth] : told.span_at[nth + 1]].T.tolist()
    losses = told.preempted[:, told.preempted_at[nth] : told.preempted_at[nth + 1]].T.tolist()
    end = finish_ns if finish_ns >= 0 else clock.last_ns
    first = clock.start(spans[0][1]) if spans else None
    begin = arrival_ns if arrival_ns >= 0 else first if first is not None else end
    found: list[Phase] = []
    at, highest = begin, 0

    def add(name: str, until: int, tokens: int = 0, steps: int = 0) -> None:
        nonlocal at
        until = min(max(at, until), max(end, at))
        if until > at or steps:
            found.append(Phase(name, at, until, tokens, steps))
        at = until

    taken = 0
    for spell in range(len(losses) + 1):
        lost = losses[spell] if spell < len(losses) else None
        mine = []
        while taken < len(spans) and (lost is None or spans[taken][1] < lost[1]):
            mine.append(spans[taken])
            taken += 1
        waited = QUEUE if spell == 0 else PREEMPTED
        started = clock.start(mine[0][1]) if mine else None
        until = lost[2] if lost is not None else end
        if not mine:
            add(waited, until)
        else:
            add(waited, at if started is None else started)
            goal = max(prompt, highest + 1) if highest >= prompt else prompt
            ready, before, steps_before = _ready(mine, goal)
            computed, steps = sum(n * k for _, _, n, k, _ in mine), sum(n for _, _, n, _, _ in mine)
            name = PREFILL if spell == 0 else RECOMPUTE
            done = None if ready is None else clock.end(ready)
            if steps_before:
                add(name, until if done is None else min(done, until), before, steps_before)
            if steps > steps_before:
                add(DECODE, until, computed - before, steps - steps_before)
            elif at < until:  # the output was there, and nothing more was scheduled
                add(DECODE if ready is not None else name, until)
        if lost is not None:
            highest = max(highest, lost[3])
    return found or [Phase(QUEUE, begin, begin, 0, 0)]


def _ready(spans: list[list[int]], goal: int) -> tuple[int | None, int, int]:
    """The step in which so many tokens are computed, None for never; tokens computed up to there, and steps."""
    tokens_before = steps_before = 0
    step = None
    for _, first, steps, tokens, computed in spans:
        if computed >= goal or tokens <= 0:
            break
        needed = min(steps, -(-(goal - computed) // tokens))
        step = first + needed - 1 if computed + needed * tokens >= goal else None
        tokens_before += needed * tokens
        steps_before += needed
        if needed < steps:
            break
    return step, tokens_before, steps_before


def lanes(begins: I64, ends: I64) -> tuple[NDArray[np.int32], int]:
    """Which lane each interval takes, the lowest that is free when it begins (int32), and how many lanes there are.

    No fewer lanes would do: there are as many as intervals under way at a time.
    """
    chosen = np.empty(len(begins), np.int32)
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    many = 0
    for i in np.lexsort((np.arange(len(begins)), begins)).tolist():
        begin = int(begins[i])
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, many = many, many + 1
        chosen[i] = lane
        heapq.heappush(busy, (int(ends[i]), lane))
    return chosen, many


def batches(frame: pl.DataFrame, rows: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of ``frame`` as dicts, so many at a time, each batch with the number of its first."""
    for first in range(0, frame.height, rows):
        yield first, frame.slice(first, rows).rows(named=True)
