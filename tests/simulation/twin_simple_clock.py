"""The plain re-simulation with the simple connector and a clock: when calls and copies begin and end."""

from __future__ import annotations

from collections.abc import Sequence

from kvtrace_replay.timing.costs import StepCosts, TransferCosts

from .twin_offload_clock import OffloadTimes, _TimedOffload
from .twin_simple import Simple, SimpleEngine, SimpleRun
from .twin_words import Request, Settings

#: Rules of the clock that `simulate_timed(..., without=name)` leaves out.
CLOCK_RULES = (
    "one-copy-each-way", "loads-wait-for-nothing", "stores-after-the-call", "one-way-in-order", "ways-apart",
    "flushes-hold-the-call", "asked-when-made", "goes-on",
)  # fmt: skip
IDLE_CALLS_BY_TIME = 1000


def simulate_timed(
    requests: Sequence[Request],
    settings: Settings,
    simple: Simple,
    costs: StepCosts,
    transfers: TransferCosts,
    step_ns: int | None = None,
    without: str | None = None,
) -> tuple[SimpleRun, OffloadTimes]:
    """As `twin_offload_clock.simulate_timed`, with the simple connector."""
    engine = _TimedSimple(requests, settings, simple, costs, transfers, step_ns, without)
    run = engine.run()
    assert isinstance(run, SimpleRun)
    return run, engine.times


class _TimedSimple(_TimedOffload, SimpleEngine):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if self.step_ns is not None:
            self.idle_calls, self.most_empty = IDLE_CALLS_BY_TIME, self.most_empty + self.settings.num_blocks

    def clock(self, rule: str) -> bool:
        assert rule in CLOCK_RULES, rule
        return rule != self.without

    def _copy_all(self, numbers: Sequence[int], earliest: int) -> None:
        """All of a direction in a call are one copy."""
        load = self.jobs[numbers[0]].load
        once, each = self.transfers.out, self.transfers.block_out
        if load:
            once, each = self.transfers.in_, self.transfers.block_in
        link = "in" if load or not self.clock("ways-apart") else "out"
        begin = max(earliest, self.link_free[link]) if self.clock("one-way-in-order") else earliest
        end = begin + int(once + each * sum(len(self.jobs[number].blocks) for number in numbers))
        self.link_free[link] = end
        for number in numbers:
            self.ends[number] = end
            self.times.copies[self.jobs[number].row][1:3] = begin, end

    def _execute(self) -> list[int]:
        quiet = not (self.scheduled or self.stores or self.planned_loads)
        self.quiet = quiet and len(self.preempted) == self.preempted_before
        waits = [self.ends[job] for job in self.flush]
        flushed = max(waits, default=0) if self.clock("flushes-hold-the-call") else 0
        begin = max(self.now, self.device_free, flushed)
        self.device_free = begin + self._cost(begin)
        for numbers, earliest in (
            (self.planned_loads, max(self.now, flushed) if self.clock("loads-wait-for-nothing") else self.device_free),
            (self.stores, self.device_free if self.clock("stores-after-the-call") else begin),
        ):
            if numbers and self.clock("one-copy-each-way"):
                self._copy_all(numbers, earliest)
            for number in [] if self.clock("one-copy-each-way") else numbers:
                self._copy_all([number], earliest)
        asked = max(self.now, flushed)
        ended = SimpleEngine._execute(self) if self.step_ns is None else self._over(asked)
        self.last_output = max([self.device_free, self.last_output, *(self.ends[job] for job in ended)])
        if self.scheduled:
            self.times.steps.append((begin, self.last_output))
        self.outputs.append(self.last_output)
        return ended

    def _over(self, asked: int) -> list[int]:
        """The copies whose bytes are through when the worker asks, in order."""
        self.under_way.update(dict.fromkeys([*self.planned_loads, *self.stores], 0))
        if not self.clock("asked-when-made"):
            asked = self.device_free
        ended = [job for job in self.under_way if self.ends[job] <= asked]
        for job in ended:
            del self.under_way[job]
        return ended
