"""A slow model of vLLM 0.4.2's scheduler and block manager, written to be read: lists, and a rule per line.

`Twin(case).run()` gives a `Run`; so do the judge (judge.py) and the compiled scheduler (kernel.py). Each rule has the
name that `docs/vllm-v0-semantics.md` gives it, and `Twin(case, without="name")` leaves it out, to see that a comparison
would notice (some go on for ever then: `limit` ends them after so many calls).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from .cases import Case

#: What can be left out.
RULES = (
    "prefill-alone", "swapped-first", "prompt-limit", "never-fits", "admission-watermark", "head-blocks",
    "token-budget", "max-num-seqs", "running-by-arrival", "swapped-by-arrival", "ties-keep-order",
    "spare-block", "victim-last", "several-victims", "recomputed-to-head", "recompute-includes-output",
    "recompute-samples", "no-swap-in-after-preemption", "swap-in-order", "swap-in-spare-block", "swap-in-watermark",
    "swap-in-runs", "swap-in-never", "leak", "model-length-ends", "ignored-at-once", "freed-after-call",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run did.

    `steps`: for each call that changed something (kind, [(request, tokens)], [request recomputed], [(request swapped
    out, blocks)], [(request swapped in, blocks)], [request dropped], free GPU blocks, free CPU blocks, running,
    waiting, swapped, tokens of prefill, pairs of a query and a key in them, rows of decode, tokens that these look at).
    `requests`: for each (first call, last call, recomputations, swaps, blocks out, blocks in, tokens computed again,
    tokens at the end, how it ended).
    `ended`: "done", "livelock" or "swap-space". `leaked`: CPU blocks that ended requests still hold.
    """

    steps: list[Any]
    requests: list[Any]
    ended: str
    leaked: int


class _Request:
    """A request, and what is told of it."""

    def __init__(self, number: int, spec: Any) -> None:
        self.number, self.spec = number, spec
        self.tokens, self.blocks = spec.prompt, 0
        self.first = self.last = -1
        self.recomputes = self.swaps = self.blocks_out = self.blocks_in = self.again = 0
        self.way: str | None = None  # how it was preempted last
        self.end = "unfinished"

    def row(self) -> tuple[Any, ...]:
        return (
            self.first, self.last, self.recomputes, self.swaps, self.blocks_out, self.blocks_in, self.again,
            self.tokens, self.end,
        )  # fmt: skip


class LackOfSwapSpace(Exception):
    """The engine dies."""


class Twin:
    """One run."""

    def __init__(self, case: Case, without: str = "", limit: int = 1 << 30) -> None:
        assert not without or without in RULES, without
        self.limit_calls = limit
        self.case, self.s, self.without = case, case.settings, without
        self.requests = [_Request(number, spec) for number, spec in enumerate(case.requests)]
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.swapped: list[_Request] = []
        self.free_gpu, self.free_cpu = self.s.num_gpu_blocks, self.s.num_cpu_blocks
        self.watermark = int(self.s.watermark * self.s.num_gpu_blocks)
        self.steps: list[Any] = []

    # ------------------------------------------------------------------------------------------------------- helpers

    def has(self, rule: str) -> bool:
        return rule != self.without

    def mends(self, defect: str) -> bool:
        return defect in self.s.mend

    def needs(self, request: _Request) -> int:
        """Blocks for all known tokens."""
        return -(-request.tokens // self.s.block_size)

    def by_arrival(self, queue: list[_Request]) -> list[_Request]:
        """`Policy.sort_by_priority`: a stable sort."""
        if not self.has("ties-keep-order"):
            return sorted(queue, key=lambda request: (request.spec.arrival_time, request.number))
        return sorted(queue, key=lambda request: request.spec.arrival_time)

    def drop(self, request: _Request) -> None:
        """`FINISHED_IGNORED`, for which the engine reports the reason "length" at the end of the call."""
        self.ignored.append(request)

    def limit(self) -> int:
        return min(self.s.max_model_len, self.s.max_num_batched_tokens)

    # ----------------------------------------------------------------------------------------------- admissions

    def can_allocate(self, required: int) -> str:
        """`BlockSpaceManagerV1.can_allocate`."""
        total, kept = self.s.num_gpu_blocks, self.watermark if self.has("admission-watermark") else 0
        if self.mends("no-return"):
            kept = 0 if self.free_gpu == total else kept
            never = required > total
        else:
            never = self.has("never-fits") and total - required < self.watermark
        if never:
            return "never"
        return "ok" if self.free_gpu - required >= kept else "later"

    def prefills(self) -> list[tuple[_Request, int]]:
        """`Scheduler._schedule_prefills`."""
        scheduled: list[tuple[_Request, int]] = []
        spent, passed = 0, []
        while self.waiting:
            request = self.waiting[0]
            tokens = request.tokens
            if not self.has("recompute-includes-output"):
                tokens = request.tokens = request.spec.prompt
            if (tokens > self.limit() and self.has("prompt-limit")) or self.can_allocate(
                self.needs(request)
            ) == "never":
                self.drop(self.waiting.popleft())
                if not self.has("ignored-at-once"):
                    break
                continue
            if self.can_allocate(self.needs(request)) == "later":
                if self.has("head-blocks"):
                    break
                passed.append(self.waiting.popleft())
                continue
            if spent + tokens > self.s.max_num_batched_tokens and self.has("token-budget"):
                break
            if len(self.running) + len(scheduled) + 1 > self.s.max_num_seqs and self.has("max-num-seqs"):
                break
            self.waiting.popleft()
            request.blocks = self.needs(request)
            self.free_gpu -= request.blocks
            spent += tokens
            scheduled.append((request, tokens))
        self.waiting.extendleft(reversed(passed))
        return scheduled

    # ------------------------------------------------------------------------------------------------- decodes

    def can_append(self, request: _Request) -> bool:
        """`BlockSpaceManagerV1.can_append_slots`."""
        if self.mends("spare-block") or not self.has("spare-block"):
            return self.free_gpu >= self.needs(request) - request.blocks
        return self.free_gpu >= 1

    def append(self, request: _Request) -> None:
        """`BlockSpaceManagerV1.append_slots`."""
        if request.blocks < self.needs(request):
            assert self.free_gpu > 0
            self.free_gpu -= 1
            request.blocks += 1
        assert request.blocks == self.needs(request)

    def victim(self, queue: list[_Request]) -> _Request:
        """Which of those not yet scheduled in this call is preempted."""
        if self.s.victim == "last":
            return queue.pop(-1 if self.has("victim-last") else 0)
        size = (max if self.s.victim == "most-blocks" else min)(request.blocks for request in queue)
        place = max(place for place, request in enumerate(queue) if request.blocks == size)
        return queue.pop(place)

    def swaps(self, request: _Request) -> bool:
        """Whether a victim is swapped (or recomputed)."""
        fits = request.blocks <= self.free_cpu
        if self.s.preemption == "recompute":
            return False
        if self.s.preemption == "swap":
            if not fits and not self.mends("swap-space"):
                raise LackOfSwapSpace
            return fits
        cheaper = self.s.swap_cost_per_block * request.blocks < self.s.recompute_cost_per_token * request.tokens
        return fits and cheaper

    def preempt(self, request: _Request) -> None:
        """`Scheduler._preempt`."""
        if self.swaps(request):
            self.out.append((request, request.blocks))
            self.free_cpu -= request.blocks
            self.free_gpu += request.blocks
            request.way = "swapped"
        else:
            self.recomputed.append(request)
            self.free_gpu += request.blocks
            request.blocks = 0
            request.way = "recomputed"

    def decodes(self) -> list[tuple[_Request, int]]:
        """`Scheduler._schedule_running`."""
        queue = self.by_arrival(self.running) if self.has("running-by-arrival") else list(self.running)
        scheduled: list[tuple[_Request, int]] = []
        while queue:
            request = queue.pop(0)
            while not self.can_append(request):
                if queue and (self.has("several-victims") or not (self.recomputed or self.out)):
                    self.preempt(self.victim(queue))
                else:
                    self.preempt(request)
                    break
            else:
                self.append(request)
                scheduled.append((request, 1))
        return scheduled

    # --------------------------------------------------------------------------------------------------- swap in

    def can_swap_in(self, request: _Request) -> str:
        """`BlockSpaceManagerV1.can_swap_in`."""
        total = self.s.num_gpu_blocks
        spare = self.needs(request) - request.blocks if self.mends("no-return") else 1
        required = request.blocks + (spare if self.has("swap-in-spare-block") else self.needs(request) - request.blocks)
        if total < required and self.has("swap-in-never"):
            return "never"
        kept = 0 if self.mends("livelock") and self.free_gpu == total else self.watermark
        return "ok" if self.free_gpu - required >= (kept if self.has("swap-in-watermark") else 0) else "later"

    def swap_ins(self) -> list[tuple[_Request, int]]:
        """`Scheduler._schedule_swapped`. Running and swapped requests are never more than `max_num_seqs` together, so
        that its budget never binds."""
        queue = self.by_arrival(self.swapped) if self.has("swapped-by-arrival") else list(self.swapped)
        scheduled: list[tuple[_Request, int]] = []
        self.swapped = queue
        while queue:
            request = queue[0]
            status = self.can_swap_in(request)
            if status == "later":
                if not self.has("swap-in-order") and len(queue) > 1 and self.can_swap_in(queue[1]) == "ok":
                    queue[0], queue[1] = queue[1], queue[0]
                    continue
                break
            queue.pop(0)
            if status == "never":
                self.drop(request)
                if self.mends("leak") or not self.has("leak"):
                    self.free_cpu += request.blocks
                    request.blocks = 0
                continue
            self.back.append((request, request.blocks))
            self.free_gpu -= request.blocks
            self.free_cpu += request.blocks
            if self.has("swap-in-runs"):
                self.append(request)
                scheduled.append((request, 1))
            else:
                self.running.append(request)
        return scheduled

    # -------------------------------------------------------------------------------------------------- the call

    def call(self) -> bool:
        """`LLMEngine.step`. False if it changed nothing."""
        self.recomputed: list[_Request] = []
        self.out: list[tuple[_Request, int]] = []
        self.back: list[tuple[_Request, int]] = []
        self.ignored: list[_Request] = []
        scheduled: list[tuple[_Request, int]] = []
        kind, work = "idle", (0, 0, 0, 0)
        if not self.swapped or not self.has("swapped-first"):
            scheduled = self.prefills()
        if scheduled:
            kind = "prefill"
            self.running += [request for request, _ in scheduled]
            known = [tokens for _, tokens in scheduled]
            work = (sum(known), sum(tokens * (tokens + 1) // 2 for tokens in known), 0, 0)
            if not self.has("prefill-alone"):
                new = [request for request, _ in scheduled]
                self.running = [request for request in self.running if request not in new]
                more = self.decodes()
                self.running = [request for request, _ in more] + new
                scheduled += more
        else:
            scheduled = self.decodes()
            decoded = [request for request, _ in scheduled]
            self.running = decoded
            if not (self.recomputed or self.out) or not self.has("no-swap-in-after-preemption"):
                back = self.swap_ins()
                scheduled += back
                self.running += [request for request, _ in back]
            if scheduled:
                kind = "decode"
                work = (0, 0, len(scheduled), sum(request.tokens for request, _ in scheduled))
        for request in self.recomputed:
            if self.has("recomputed-to-head"):
                self.waiting.appendleft(request)
            else:
                self.waiting.append(request)
        self.swapped += [request for request, _ in self.out]
        if not (scheduled or self.recomputed or self.out or self.back or self.ignored):
            return False
        if not self.has("freed-after-call"):
            self.outputs(kind, scheduled)
        self.note(kind, scheduled, work)
        if self.has("freed-after-call"):
            self.outputs(kind, scheduled)
        return True

    def note(self, kind: str, scheduled: list[tuple[_Request, int]], work: tuple[int, ...]) -> None:
        for request, _ in scheduled:
            request.first = len(self.steps) if request.first < 0 else request.first
            if kind == "prefill" and request.recomputes:
                request.again += request.tokens - 1
        for request in self.ignored:
            if request.way:
                request.end = f"dropped-{request.way}"
            else:
                request.end = "prompt-too-long" if request.tokens > self.limit() else "never-fits"
            request.last = len(self.steps)
        for request in self.recomputed:
            request.recomputes += 1
        for request, blocks in self.out:
            request.swaps += 1
            request.blocks_out += blocks
        for request, blocks in self.back:
            request.blocks_in += blocks

        def numbers(pairs: list[tuple[_Request, int]]) -> list[tuple[int, int]]:
            return [(request.number, amount) for request, amount in pairs]

        self.steps.append(
            (
                kind, numbers(scheduled), [request.number for request in self.recomputed], numbers(self.out),
                numbers(self.back), [request.number for request in self.ignored], self.free_gpu, self.free_cpu,
                len(self.running), len(self.waiting), len(self.swapped), *work,
            )
        )  # fmt: skip

    def outputs(self, kind: str, scheduled: list[tuple[_Request, int]]) -> None:
        """A token for each; those that end give their blocks back (`StopChecker`, `Scheduler.free_seq`)."""
        step = len(self.steps) - 1 if self.has("freed-after-call") else len(self.steps)
        for request, _ in scheduled:
            if request.way == "recomputed" and kind == "prefill" and not self.has("recompute-samples"):
                continue
            request.tokens += 1
            spec = request.spec
            if request.tokens == spec.prompt + spec.output:
                request.end = "finished"
            elif request.tokens > self.s.max_model_len and self.has("model-length-ends"):
                request.end = "model-length"
            else:
                continue
            request.last = step
            self.free_gpu += request.blocks
            request.blocks = 0
            self.running.remove(request)

    # --------------------------------------------------------------------------------------------------- the run

    def abort(self, request: _Request) -> None:
        """`Scheduler.abort_seq_group`."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)
            self.free_gpu += request.blocks
        elif request in self.swapped:
            self.swapped.remove(request)
            self.free_cpu += request.blocks
        else:
            return
        request.blocks, request.end, request.last = 0, "aborted", max(len(self.steps) - 1, 0)

    def cost(self) -> int:
        """What the last call took: one, or, with costs, so many nanoseconds."""
        costs, step = self.case.costs, self.steps[-1]
        if costs is None:
            return 1
        total = costs[0]
        amounts = [*step[11:], sum(blocks for _, blocks in step[4]), sum(blocks for _, blocks in step[3])]
        for cost, amount in zip(costs[1:], amounts, strict=True):
            total += cost * amount
        return int(total)

    def run(self) -> Run:
        events = [(request.spec.arrival, 0, request) for request in self.requests]
        events += [(r.spec.abort, 1, r) for r in self.requests if r.spec.abort is not None]
        coming, now, ended, arrived = deque(sorted(events, key=lambda e: (*e[:2], e[2].number))), 0, "", set()
        while not ended:
            while coming and coming[0][0] <= now:
                _, abort, request = coming.popleft()
                if abort and request.number in arrived:
                    self.abort(request)
                elif abort:
                    request.end = "aborted"
                elif request.end != "aborted":
                    arrived.add(request.number)
                    self.waiting.append(request)
            unfinished = self.waiting or self.running or self.swapped
            try:
                changed = bool(unfinished) and self.call()
            except LackOfSwapSpace:
                ended = "swap-space"
                break
            if len(self.steps) >= self.limit_calls:
                ended = "endless"
            elif changed:
                now += self.cost()
            elif coming:
                now = max(now, coming[0][0])
            else:
                ended = "livelock" if unfinished else "done"
        leaked = sum(request.blocks for request in self.requests if request.end.startswith("dropped"))
        return Run(self.steps, [request.row() for request in self.requests], ended, leaked)
