"""The plain re-simulation with a connector and a clock: when calls and copies begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtrace_replay.timing.costs import StepCosts, TransferCosts

from .twin_clock import Times
from .twin_offload import _OffloadEngine
from .twin_offload_words import Offload, OffloadRun
from .twin_words import Batch, Live, Request, Settings

#: Rules of the clock that `simulate_timed(..., without=name)` leaves out.
CLOCK_RULES = (
    "one-way-in-order", "ways-apart", "loads-after-the-call", "flushes-hold-the-call", "asked-when-made", "goes-on",
)  # fmt: skip


@dataclass
class OffloadTimes(Times):
    """`Times`, and copies: when the call of each transfer was made, its copy begun and ended, and it was heard of."""

    copies: list[list[int]] = field(default_factory=list)
    last: int = 0


def simulate_timed(
    requests: Sequence[Request],
    settings: Settings,
    offload: Offload,
    costs: StepCosts,
    transfers: TransferCosts,
    step_ns: int | None = None,
    without: str | None = None,
) -> tuple[OffloadRun, OffloadTimes]:
    """As `twin_clock.simulate_timed`, with a connector. Without `step_ns` the polls of `offload` decide when the
    scheduler hears of a transfer's end, with it the bytes do."""
    engine = _TimedOffload(requests, settings, offload, costs, transfers, step_ns, without)
    run = engine.run()
    return run, engine.times


class _TimedOffload(_OffloadEngine):
    def __init__(
        self,
        requests: Sequence[Request],
        settings: Settings,
        offload: Offload,
        costs: StepCosts,
        transfers: TransferCosts,
        step_ns: int | None,
        without: str | None,
    ) -> None:
        super().__init__(requests, settings, offload, None)
        self.costs, self.transfers, self.step_ns, self.without = costs, transfers, step_ns, without
        self.now = self.device_free = self.last_output = 0
        self.link_free = {"in": 0, "out": 0}
        self.ends: dict[int, int] = {}  # of the copies that have been submitted
        self.times = OffloadTimes(requests=[[-1] * 4 for _ in requests])
        self.outputs: list[int] = []  # when those of the calls under way arrive

    def clock(self, rule: str) -> bool:
        assert rule in CLOCK_RULES, rule
        return rule != self.without

    # ------------------------------------------------------------------------------------------- who comes and goes

    def _position(self) -> int:
        return self.begun if self.step_ns is None else self.now

    def _due(self, one: Live) -> int:
        return one.request.arrival_step * (self.step_ns or 1)

    def _jump(self, following: int) -> None:
        if self.step_ns is not None:
            self.now = following

    def _abort_due(self, one: Live) -> int | None:
        """When it is aborted, ns: so long after its arrival as the recorded times have it."""
        if one.request.abort_step is None or self.step_ns is None:
            return None
        return max(one.request.abort_step * self.step_ns + one.number, self._due(one))

    def _abort_order(self) -> list[Live]:
        return sorted(self.live, key=lambda one: self._abort_due(one) or 0)

    def _aborted(self, one: Live) -> bool:
        if self.step_ns is None:
            return super()._aborted(one)
        due = self._abort_due(one)
        return due is not None and due <= self.now

    def _arrive(self, arriving: Sequence[Live]) -> None:
        arriving = sorted(arriving, key=self._due)
        for one in arriving:
            if one.status == "absent":
                self.times.requests[one.number][0] = self.now if self.step_ns is None else self._due(one)
        super()._arrive(arriving)

    # ----------------------------------------------------------------------------------------------- calls and copies

    def _cost(self, begin: int) -> int:
        """Of the call just made."""
        if not self.scheduled:
            return 0
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
        return int(cost)

    def _copy(self, number: int, earliest: int) -> None:
        job = self.jobs[number]
        once, each = self.transfers.out, self.transfers.block_out
        if job.load:
            once, each = self.transfers.in_, self.transfers.block_in
        link = "in" if job.load or not self.clock("ways-apart") else "out"
        begin = max(earliest, self.link_free[link]) if self.clock("one-way-in-order") else earliest
        self.ends[number] = self.link_free[link] = begin + int(once + each * len(job.blocks))
        self.times.copies[job.row][1:3] = begin, self.ends[number]

    def _planned(self, number: int) -> None:
        super()._planned(number)
        self.times.copies.append([self.now, -1, -1, -1])

    def _execute(self) -> list[int]:
        quiet = not (self.scheduled or self.stores or self.planned_loads)
        self.quiet = quiet and len(self.preempted) == self.preempted_before
        start = max(self.now, self.device_free)
        now_stored = [*self.not_submitted, *(job for job in self.stores if job in self.flush)]
        for job in now_stored:
            self._copy(job, start)
        waits = [self.ends[job] for job in self.flush if job in self.under_way or job in now_stored]
        flushed = max(waits, default=0) if self.clock("flushes-hold-the-call") else 0
        begin = max(start, flushed)
        self.device_free = begin + self._cost(begin)
        for job in self.planned_loads:
            self._copy(job, self.device_free if self.clock("loads-after-the-call") else begin)
        ended = super()._execute() if self.step_ns is None else self._through(now_stored, max(self.now, flushed))
        self.last_output = max([self.device_free, self.last_output, *(self.ends[job] for job in ended)])
        if self.scheduled:
            self.times.steps.append((begin, self.last_output))
        self.outputs.append(self.last_output)
        return ended

    def _through(self, now_stored: list[int], asked: int) -> list[int]:
        """The transfers whose bytes are through when the worker asks, stores before loads."""
        self.not_submitted = [job for job in self.stores if job not in now_stored]
        self.under_way.update(dict.fromkeys([*now_stored, *self.planned_loads], 0))
        if not self.clock("asked-when-made"):
            asked = self.device_free
        ended = [job for job in self.under_way if self.ends[job] <= asked]
        for job in ended:
            del self.under_way[job]
        return sorted(ended, key=lambda job: self.jobs[job].load)

    def _call(self) -> Batch:
        self.preempted_before = len(self.preempted)
        return super()._call()

    # --------------------------------------------------------------------------------------------------------- outputs

    def _update(self, batch: Batch) -> None:
        self.now = max(self.now, self.outputs.pop(0))
        if batch.scheduled:
            self.times.last = self.now
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

    def _hear(self, ended: list[int]) -> None:
        for number in ended:
            self.times.copies[self.jobs[number].row][3] = self.now
        super()._hear(ended)

    def _told(self, anything: bool) -> None:
        """Where nothing can be done before the next copy ends, or somebody comes or goes, the clock goes on to then."""
        if anything or not self.quiet or self.not_submitted or self.step_ns is None:
            return
        due = [self.ends[job] for job in self.under_way]
        due += [self._due(one) for one in self.live if one.status == "absent"]
        gone = [self._abort_due(one) for one in self.live]
        due += [at for at in gone if at is not None and at > self.now]
        if due and self.clock("goes-on"):
            self.now = max(self.now, min(due))
            self.empty_calls = 0
