"""The plain re-simulation, stopped before a step and taken up again: what a cut of a run must come to."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case
from .twin import _Engine
from .twin_words import Batch, Request, Run, Settings

#: What a request's state is made of.
OF_A_REQUEST = (
    "status", "generated", "computed", "placeholders", "in_flight", "stale", "table", "filled", "hashed", "preemptions",
    "cached_tokens", "first_step",
)  # fmt: skip


@dataclass
class State:
    """A run before a scheduler call. `requests`: OF_A_REQUEST of each; `running`, `waiting`: numbers in order;
    `under_way`: calls whose output is due, each (tokens by request in order, who gets a token). `free`, `references`,
    `identity`, `cached`: of the pool. `preempted`, `empty`: since the last step."""

    requests: list[dict[str, Any]]
    running: list[int]
    waiting: list[int]
    under_way: list[tuple[dict[int, int], set[int]]]
    free: list[int]
    references: list[int]
    identity: list[int | None]
    cached: dict[int, list[int]]
    preempted: list[int]
    empty: int


class _Stopping(_Engine):
    """Keeps the state before the first call of step `stop` that makes a step, or preempts and so has rows."""

    def __init__(self, requests: Sequence[Request], settings: Settings, stop: int) -> None:
        super().__init__(requests, settings, None)
        self.stop = stop
        self.kept: State | None = None

    def _call(self) -> Batch:
        before = self._state() if self.begun == self.stop and self.kept is None else None
        rows = len(self.result.events)
        batch = super()._call()
        if before is not None and (batch.scheduled or len(self.result.events) > rows):
            self.kept = before
        return batch

    def _state(self) -> State:
        pool = self.pool
        return copy.deepcopy(
            State(
                requests=[{name: getattr(one, name) for name in OF_A_REQUEST} for one in self.live],
                running=[one.number for one in self.running],
                waiting=[one.number for one in self.waiting],
                under_way=[(batch.scheduled, batch.samples) for batch in self.queue if batch.scheduled],
                free=list(pool.free),
                references=pool.references,
                identity=pool.identity,
                cached=pool.cached,
                preempted=self.preempted,
                empty=self.empty,
            )
        )


class _Resumed(_Engine):
    """Begins with a state."""

    def __init__(self, requests: Sequence[Request], settings: Settings, state: State, broken: str | None) -> None:
        super().__init__(requests, settings, broken)
        state = copy.deepcopy(state)
        for one, told in zip(self.live, state.requests, strict=True):
            for name, value in told.items():
                setattr(one, name, value)
        self.running = [self.live[number] for number in state.running]
        self.waiting = [self.live[number] for number in state.waiting]
        self.queue = deque(Batch(*batch) for batch in state.under_way)
        pool = self.pool
        pool.free.clear()
        pool.free.update(dict.fromkeys(state.free))
        pool.references, pool.identity, pool.cached = state.references, state.identity, state.cached
        self.preempted, self.empty = state.preempted, state.empty
        learn = getattr(pool, "learn", None)  # of a pool whose victims a policy chooses
        if learn is not None:
            learn()

    def run(self) -> Run:
        """As of the engine; where more calls are under way than there may be, the first output comes first."""
        while len(self.queue) >= (2 if self.settings.async_scheduling else 1):
            self._update(self.queue.popleft())
        return super().run()


def simulate_and_stop(requests: Sequence[Request], settings: Settings, step: int) -> tuple[Run, State | None]:
    """The whole run, and the state before step `step`; None where there is no such step."""
    engine = _Stopping(requests, settings, step)
    return engine.run(), engine.kept


def simulate_from(requests: Sequence[Request], settings: Settings, state: State, broken: str | None = None) -> Run:
    """As `twin.simulate`, from `state` on; steps are counted from there."""
    return _Resumed(requests, settings, state, broken).run()


def tail_of(case: Case, state: State, step: int) -> tuple[Case, State, list[int]]:
    """The requests that are not at their end before step `step`, with steps counted from there; the state of these
    alone; and what their numbers were."""
    numbers = [n for n, told in enumerate(state.requests) if told["status"] != "finished"]
    new = {number: i for i, number in enumerate(numbers)}
    requests = []
    for number in numbers:
        request, told = case.requests[number], state.requests[number]
        abort = request.abort_step
        requests.append(
            replace(
                request,
                arrival_step=0 if told["status"] != "absent" else request.arrival_step - step,
                abort_step=None if abort is None else max(abort - step, -1),
            )
        )
    first = [{**state.requests[number]} for number in numbers]
    for told in first:
        told["first_step"] = None if told["first_step"] is None else told["first_step"] - step
    mine = replace(
        state,
        requests=first,
        running=[new[n] for n in state.running],
        waiting=[new[n] for n in state.waiting],
        under_way=[
            ({new[n]: tokens for n, tokens in batch.items() if n in new}, {new[n] for n in samples if n in new})
            for batch, samples in state.under_way
        ],
    )
    return Case(case.settings, requests, [case.tokens[n] for n in numbers]), mine, numbers


def moved_to(state: State, old: Settings, new: Settings) -> State:
    """The state in the pool of other settings: more blocks stand at the front of the free queue; of fewer, those at
    its front are left out, and blocks of too high numbers are called by theirs, both in order. Without asynchronous
    scheduling nobody waits for an output that counts as a token."""
    state = copy.deepcopy(state)
    more = new.num_blocks - old.num_blocks
    if more > 0:
        state.free[:0] = range(old.num_blocks, new.num_blocks)
        state.references += [0] * more
        state.identity += [None] * more
    elif more < 0:
        gone = sorted(state.free[:-more])
        high = [block for block in range(new.num_blocks, old.num_blocks) if block not in gone]
        name = dict(zip(high, gone, strict=False)) | {block: block for block in range(new.num_blocks)}
        kept = [block for block in range(old.num_blocks) if block not in gone]
        references = [0] * new.num_blocks
        identity: list[int | None] = [None] * new.num_blocks
        for block in kept:
            references[name[block]], identity[name[block]] = state.references[block], state.identity[block]
        state.references, state.identity = references, identity
        state.free = [name[block] for block in state.free[-more:]]
        state.cached = {held: [name[b] for b in blocks if b in kept] for held, blocks in state.cached.items()}
        for told in state.requests:
            told["table"] = [name[block] for block in told["table"]]
    if not new.async_scheduling:
        for told in state.requests:
            told["placeholders"] = 0
    return state


def tail_in_words(run: Run, step: int, names: list[int]) -> dict[str, Any]:
    """What a whole run tells from step `step` on, in the words of `kernel.twin_in_words`; requests that were at their
    end before are left out, others are called by their places in `names`."""
    new = {number: i for i, number in enumerate(names)}
    steps = [
        (sorted((new[n], tokens, before) for n, tokens, before in rows), free, running, waiting, empty)
        for rows, free, running, waiting, _, empty in run.steps[step:]
    ]

    def shifted(value: int | None) -> int | None:
        return None if value is None or value < step else value - step

    def ended(value: int | None) -> int | None:
        """After a call that makes no step, a request may end in the step before the begin."""
        return None if value is None else max(value - step, 0)

    return {
        "events": [(s - step, kind, new[n], block, held) for s, kind, n, block, held in run.events if s >= step],
        "steps": steps,
        "lookups": [(s - step, new[n], *rest) for s, n, *rest in run.lookups if s >= step],
        "preemptions": [(s - step, new[n], *rest) for s, n, *rest in run.preemptions if s >= step],
        "requests": [
            (shifted(run.requests[n][0]), shifted(run.requests[n][1]), ended(run.requests[n][2]), *run.requests[n][3:])
            for n in names
        ],
    }
