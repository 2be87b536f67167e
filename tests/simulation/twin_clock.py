"""The plain re-simulation with a clock: what calls cost, and when each request has its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtrace_replay.timing.costs import StepCosts

from .twin import _Engine
from .twin_words import Batch, Live, Request, Run, Settings


@dataclass
class Times:
    """steps: (begin, end) of each. requests: when each (arrived, began, had its first token, its last), -1 where never.
    gaps: ns between two tokens of a request, all of them. now: at the end."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    requests: list[list[int]] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    now: int = 0


def simulate_timed(
    requests: Sequence[Request], settings: Settings, costs: StepCosts, step_ns: int | None = None
) -> tuple[Run, Times]:
    """As `twin.simulate`; with `step_ns`, requests come and are aborted so long after one another as that many ns a
    step make of their steps, not at the steps."""
    engine = _Timed(requests, settings, costs, step_ns)
    run = engine.run()
    engine.times.now = engine.now
    return run, engine.times


class _Timed(_Engine):
    def __init__(self, requests: Sequence[Request], settings: Settings, costs: StepCosts, step_ns: int | None) -> None:
        super().__init__(requests, settings, None)
        self.costs, self.step_ns = costs, step_ns
        self.now = self.device_free = 0
        self.times = Times(requests=[[-1] * 4 for _ in requests])
        self.outputs: list[int] = []  # when those of the calls under way arrive

    def _position(self) -> int:
        return super()._position() if self.step_ns is None else self.now

    def _due(self, one: Live) -> int:
        return super()._due(one) if self.step_ns is None else one.request.arrival_step * self.step_ns

    def _jump(self, following: int) -> None:
        if self.step_ns is not None:
            self.now = following

    def _aborted(self, one: Live) -> bool:
        if self.step_ns is None:
            return super()._aborted(one)
        if one.request.abort_step is None:
            return False
        waits = one.request.abort_step * self.step_ns + one.number - self._due(one)
        return self._due(one) + max(waits, 0) <= self.now

    def _arrive(self, arriving: Sequence[Live]) -> None:
        arriving = sorted(arriving, key=self._due)
        for one in arriving:
            if one.status == "absent":
                self.times.requests[one.number][0] = self.now if self.step_ns is None else self._due(one)
        super()._arrive(arriving)

    def _call(self) -> Batch:
        batch = super()._call()
        begin = max(self.now, self.device_free)
        cost = 0.0
        if batch.scheduled:
            cost = self.costs.call
            for number, tokens, before in self.result.steps[-1][0]:
                one = self.live[number]
                if tokens == 1 and before >= one.request.prompt:
                    cost += self.costs.decode_row + self.costs.decode_context * (before + 1)
                else:
                    cost += self.costs.prefill_token * tokens
                    cost += self.costs.prefill_pair * sum(before + i + 1 for i in range(tokens))
                if self.times.requests[number][1] < 0:
                    self.times.requests[number][1] = begin
            self.times.steps.append((begin, begin + int(cost)))
        self.device_free = begin + int(cost)
        self.outputs.append(self.device_free)
        return batch

    def _update(self, batch: Batch) -> None:
        self.now = max(self.now, self.outputs.pop(0))
        before = [one.generated for one in self.live]
        super()._update(batch)
        for one, generated in zip(self.live, before, strict=True):
            if one.generated > generated:
                told = self.times.requests[one.number]
                if told[2] < 0:
                    told[2] = self.now
                else:
                    self.times.gaps.append(self.now - told[3])
                told[3] = self.now
