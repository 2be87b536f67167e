"""A plain re-simulation of vLLM V1's scheduler and block pool, written from vLLM's sources to be read, not to be fast.

It follows, call by call, `EngineCore.step` and `step_with_batch_queue`, `Scheduler` and `AsyncScheduler`, and
`KVCacheManager` for one KV cache group with full attention, without speculative decoding and without connectors.
The names in `RULES` are the rules that `simulate(..., broken=name)` can break, to see whether a test would notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from kvtrace_replay.schedulers.families import (
    VICTIM_INDEX_IF_BEFORE,
    VICTIM_INDEX_IF_SCHEDULED,
    VICTIM_STAYS_SCHEDULED,
)

from .twin_pool import Pool
from .twin_rules import RULES
from .twin_words import Batch, CannotFinish, Live, Request, Run, Settings


def simulate(requests: Sequence[Request], settings: Settings, broken: str | None = None) -> Run:
    """Run `requests` (numbered in this order) to the end; `broken` names a rule of `RULES` to break.

    Where the engine has nothing left to do before the next arrival step, the arrivals of that step come at once.
    Raises CannotFinish if the run never ends.
    """
    if broken is not None and broken not in RULES:
        raise KeyError(broken)
    return _Engine(requests, settings, broken).run()


class _Engine:
    def __init__(self, requests: Sequence[Request], settings: Settings, broken: str | None) -> None:
        self.settings, self.rules, self.broken = settings, settings.rules, broken
        self.result = Run()
        front = self.rules.uncached_first if settings.prefix_caching else self.rules.uncached_first_without_caching
        self.pool = Pool(settings.num_blocks, front, self.on, self.emit)
        self.live = [self._live(number, request) for number, request in enumerate(requests)]
        self.waiting: list[Live] = []
        self.running: list[Live] = []
        self.queue: deque[Batch] = deque()  # calls under way
        self.begun = 0  # steps begun
        self.in_call = False
        self.notice = False  # finished requests of which the workers have not been told: keeps the engine awake
        self.empty = 0  # empty calls since the last step
        self.preempted: list[int] = []  # preempted since the last step
        self.idle_steps, self.patience = 0, 100 + 2 * sum(r.request.prompt + r.output for r in self.live)

    def on(self, rule: str) -> bool:
        """Whether `rule` holds."""
        assert rule in RULES, rule
        return rule != self.broken

    def emit(self, kind: str, request: int, block: int, identity: int | None) -> None:
        step = self.begun if self.in_call else max(self.begun - 1, 0)
        self.result.events.append((step, kind, request, block, identity))

    def _live(self, number: int, request: Request) -> Live:
        limit = self.settings.max_model_len
        if not 1 <= request.prompt < limit or not 1 <= request.output <= request.max_tokens:
            raise ValueError(f"request {number}: lengths that vLLM would not take")
        room = limit - request.prompt if self.on("model-length-ends") else request.max_tokens
        output = min(request.output, room)
        stop = request.output < request.max_tokens and request.output == output
        if stop and output == room and not (self.rules.stop_before_length and self.on("stop-before-length")):
            stop = False
        return Live(number, request, output, "stop" if stop else "length")

    # ------------------------------------------------------------------------------------------- the engine's loop

    def run(self) -> Run:
        depth = 2 if self.settings.async_scheduling and self.on("queue-depth") else 1
        queue = self.queue
        while True:
            self._arrive([one for one in self.live if self._due(one) <= self._position()])
            self._abort()
            if not queue and not self._has_requests():
                absent = [one for one in self.live if one.status == "absent"]
                if not absent:
                    break
                following = min(self._due(one) for one in absent)
                self._jump(following)
                self._arrive([one for one in absent if self._due(one) == following])
                continue
            # EngineCore.step_with_batch_queue; with a depth of one this is EngineCore.step.
            if self._has_requests():
                busy, preempted = any(batch.scheduled for batch in queue), len(self.preempted)
                batch = self._call()
                calm = not busy and len(self.preempted) == preempted and not self._abort_awaits_calls()
                if not batch.scheduled and calm and self._unfinished():
                    raise CannotFinish(f"nothing can be scheduled at step {self.begun}: requests wait for ever")
                queue.append(batch)
                if len(queue) < depth and (batch.scheduled or self._has_requests()):
                    continue
            if queue:
                self._update(queue.popleft())
            if self.idle_steps > self.patience:
                raise CannotFinish(f"no token generated for {self.idle_steps} steps up to step {self.begun}")
        self.result.empty_after = self.empty
        self.result.requests = [
            (r.first_step, r.last_step, r.finish_step, r.cached_tokens, r.preemptions, r.finish_reason)
            for r in self.live
        ]
        return self.result

    def _position(self) -> int:
        """Where the run stands among the arrivals."""
        return self.begun

    def _due(self, one: Live) -> int:
        return one.request.arrival_step

    def _jump(self, following: int) -> None:
        """The engine idles until position `following`."""

    def _aborted(self, one: Live) -> bool:
        step = one.request.abort_step
        if step is None or step != self.begun - 1:
            return step is not None and step < self.begun
        return self.empty >= one.request.abort_calls

    def _abort_awaits_calls(self) -> bool:
        live = [one.request for one in self.live if one.status in ("waiting", "running")]
        return any(r.abort_step == self.begun - 1 and r.abort_calls > self.empty for r in live)

    def _unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def _has_requests(self) -> bool:
        return self._unfinished() or self.notice

    def _arrive(self, arriving: Sequence[Live]) -> None:
        for one in arriving:
            if one.status == "absent":
                one.status = "waiting"
                self.waiting.append(one)

    def _abort(self) -> None:
        due = [one for one in self.live if one.status in ("waiting", "running") and self._aborted(one)]
        due.sort(key=lambda one: (one.request.abort_step, one.request.abort_calls))
        for one in due if self.on("aborts-in-order") else reversed(due):
            (self.running if one.status == "running" else self.waiting).remove(one)
            self._finish(one, "abort")

    def _finish(self, one: Live, reason: str) -> None:
        one.status, one.finish_reason, one.finish_step = "finished", reason, max(self.begun - 1, 0)
        self.pool.give_up(one.number, one.table)
        one.table = []
        self.notice = True
        self.idle_steps = 0

    # -------------------------------------------------------------------------------------------- Scheduler.schedule

    def _call(self) -> Batch:
        self.notice, self.in_call = False, True
        self.scheduled: dict[int, int] = {}  # request -> tokens, in order
        self.worker_computed: dict[int, int] = {}  # request -> tokens its worker had computed before
        self.budget = self.settings.max_num_batched_tokens
        preempted_before = len(self.preempted)
        threshold = self.settings.long_prefill_token_threshold
        lone = len(self.running) + len(self.waiting) <= 1
        if lone and self.rules.threshold_spares_lone_request and self.on("threshold-lone"):
            threshold = 0
        self._schedule_running(threshold)
        if len(self.preempted) == preempted_before or not self.on("no-admission-after-preemption"):
            self._admit(threshold)
        return self._after_schedule()

    def _schedule_running(self, threshold: int) -> None:
        self.index = 0
        while self.index < len(self.running) and self.budget > 0:
            one = self.running[self.index]
            tokens = 0 if self._surely_finishes(one) else self._running_tokens(one, threshold)
            if tokens == 0:
                self.index += 1
                continue
            while not self._allocate(one, tokens):
                victim = self._choose_victim()
                self._preempt(victim)
                if victim is one:
                    return
            self._schedule(one, tokens)
            self.index += 1

    def _surely_finishes(self, one: Live) -> bool:
        if not self.rules.async_skips_finishing or not self.on("async-skips-finishing"):
            return False
        last = one.request.prompt + one.request.max_tokens
        return one.placeholders > 0 and one.computed + 2 - one.placeholders >= last

    def _running_tokens(self, one: Live, threshold: int) -> int:
        tokens = one.tokens + one.placeholders - one.computed
        if 0 < threshold < tokens and self.on("threshold-running"):
            tokens = threshold
        tokens = min(tokens, self.budget)
        if self.on("model-length-cut"):
            tokens = min(tokens, self.settings.max_model_len - one.computed - 1)
        return tokens

    def _schedule(self, one: Live, tokens: int) -> None:
        self.scheduled[one.number] = tokens
        self.worker_computed[one.number] = one.computed
        self.budget -= tokens

    def _choose_victim(self) -> Live:
        if self.settings.scheduling_policy == "priority" and self.on("victim-priority"):
            latest = 1 if self.on("victim-latest") else -1
            ranked = self.running if self.on("victim-first-of-equals") else self.running[::-1]
            return max(ranked, key=lambda one: (one.request.priority, latest * one.request.arrival_time))
        return self.running[-1] if self.on("victim-last") else self.running[max(len(self.running) - 2, 0)]

    def _preempt(self, victim: Live) -> None:
        position = self.running.index(victim)
        del self.running[position]
        kept = self.rules.priority_victim == VICTIM_STAYS_SCHEDULED
        was_scheduled = victim.number in self.scheduled
        if was_scheduled and not kept:
            restored = self.scheduled.pop(victim.number)
            if self.on("victim-tokens-restored"):
                self.budget += restored
        moves = {
            VICTIM_STAYS_SCHEDULED: False,
            VICTIM_INDEX_IF_SCHEDULED: was_scheduled,
            VICTIM_INDEX_IF_BEFORE: position < self.index,
        }[self.rules.priority_victim]
        if moves and self.on("victim-moves-scan"):
            self.index -= 1
        lost = victim.computed
        self.result.preemptions.append((self.begun, victim.number, len(victim.table), lost))
        self.preempted.append(victim.number)
        self.pool.give_up(victim.number, victim.table)
        victim.table, victim.filled = [], 0
        victim.computed = 0
        victim.placeholders, victim.stale = 0, victim.in_flight
        victim.preemptions += 1
        victim.status = "waiting"
        self.waiting.insert(0 if self.on("preempted-to-head") else len(self.waiting), victim)

    # ------------------------------------------------------------------------------------------------- admissions

    def _next(self) -> Live:
        if self.settings.scheduling_policy != "priority" or not self.on("waiting-by-priority"):
            return self.waiting[0]
        return min(self.waiting, key=self._rank)

    def _rank(self, one: Live) -> tuple[Any, ...]:
        request = one.request
        time = request.arrival_time if self.on("waiting-ties-by-arrival") else -request.arrival_time
        return (request.priority, time, request.request_id if self.on("waiting-ties-by-id") else "", one.number)

    def _admit(self, threshold: int) -> None:
        passed_over: list[Live] = []
        blocked: list[Live] = []  # by the broken rule "head-blocks"
        while self.waiting and self.budget > 0:
            if len(self.running) >= self.settings.max_num_seqs and self.on("max-num-seqs"):
                break
            one = self._next()
            if one.stale:
                self.waiting.remove(one)
                passed_over.append(one)
                continue
            hits, lookup = self._look_up(one)
            computed = one.computed + len(hits) * self.settings.block_size
            tokens = one.tokens - computed
            if 0 < threshold < tokens and self.on("threshold-waiting"):
                tokens = threshold
            if not self.settings.chunked_prefill and tokens > self.budget and self.on("unchunked-waits"):
                if self.rules.unchunked_prompt_blocks and self.on("unchunked-blocks"):
                    break
                self.waiting.remove(one)
                if self.on("passed-over-reversed") and not self.rules.unchunked_prompt_blocks:
                    passed_over.insert(0, one)
                else:
                    passed_over.append(one)
                continue
            tokens = min(tokens, self.budget)
            if not self._allocate(one, tokens, hits, admission=True):
                if self.on("head-blocks"):
                    break
                self.waiting.remove(one)
                blocked.append(one)
                continue
            if lookup:
                hit = len(hits) * self.settings.block_size
                self.result.lookups.append((self.begun, one.number, one.tokens, hit, one.preemptions > 0))
            self.waiting.remove(one)
            one.status = "running"
            one.computed = computed
            self.running.insert(len(self.running) if self.on("admitted-run-last") else 0, one)
            if one.cached_tokens is None:
                one.cached_tokens = computed
            self._schedule(one, tokens)
        self.waiting[:0] = passed_over + blocked

    def _look_up(self, one: Live) -> tuple[list[int], bool]:
        """KVCacheManager.get_computed_blocks: the cached blocks, and whether this counts as a lookup."""
        if one.computed or not self.settings.prefix_caching or (one.request.no_read and self.on("no-read")):
            return [], False
        longest = one.tokens if self.on("hit-includes-generated") else one.request.prompt
        longest -= 1 if self.on("hit-leaves-a-token") else 2
        hits: list[int] = []
        count = max(longest, 0) // self.settings.block_size
        if self.rules.late_hashes and self.on("late-hashes"):
            one.hashed = one.hashed or one.tokens // self.settings.block_size
            count = min(count, one.hashed)
        for identity in one.request.chain[:count]:
            block = self.pool.find(identity)
            if block is None:
                break
            hits.append(block)
        return hits, True

    # ------------------------------------------------------------------------------------ KVCacheManager.allocate_slots

    def _allocate(self, one: Live, tokens: int, hits: Sequence[int] = (), admission: bool = False) -> bool:
        """Give `one` the blocks for `tokens` more tokens, `hits` first; if there are too few do nothing: False."""
        size, free = self.settings.block_size, len(self.pool.free)
        evictable = sum(self.pool.references[block] == 0 for block in hits) if self.on("evictable-hits-count") else 0

        def needed(total: int) -> int:
            return max(-(-total // size) - len(one.table) - len(hits), 0) + evictable

        applies = self.rules.watermark and self.on("watermark")
        applies = applies and (admission or not self.on("watermark-for-admissions"))
        applies = applies and (bool(self.running) or not self.on("watermark-needs-running"))
        watermark = int(self.settings.watermark * self.settings.num_blocks) if applies else 0
        if admission and self.rules.whole_sequence_gate and self.on("whole-sequence-gate"):
            whole = one.tokens if self.on("gate-counts-generated") else one.request.prompt
            if needed(min(whole, self.settings.max_model_len)) + watermark > free:
                return False
        total = min(one.computed + len(hits) * size + tokens, self.settings.max_model_len)
        fresh = max(-(-total // size) - len(one.table) - len(hits), 0)
        if needed(total) + watermark > free or fresh + sum(self.pool.references[b] == 0 for b in hits) > free:
            return False
        self.pool.touch(one.number, hits)
        if admission:
            one.filled = len(hits)
        one.table.extend(hits)
        one.table.extend(self.pool.take(one.number, fresh))
        if self.on("filled-when-allocated"):
            self._fill(one, min(total, one.tokens) if self.on("only-known-tokens-filled") else total)
        return True

    def _fill(self, one: Live, tokens: int) -> None:
        """SingleTypeKVCacheManager.cache_blocks: all full blocks up to `tokens` are cached."""
        if not self.settings.prefix_caching:
            return
        limit = tokens if self.on("generated-blocks-filled") else min(tokens, one.request.prompt)
        for index in range(one.filled, min(limit // self.settings.block_size, len(one.request.chain), len(one.table))):
            self.pool.fill(one.number, one.table[index], one.request.chain[index])
            one.filled = index + 1
            one.hashed = max(one.hashed, one.filled)

    # ----------------------------------------------------------------------------------- after the call, and outputs

    def _after_schedule(self) -> Batch:
        """Scheduler._update_after_schedule and AsyncScheduler's; and which requests the workers will sample for."""
        rows, samples = [], set()
        for number, tokens in self.scheduled.items():
            one = self.live[number]
            known = one.tokens + one.placeholders
            if self.worker_computed[number] + tokens >= known:
                samples.add(number)
            one.computed += tokens
            one.in_flight += tokens
            if self.settings.async_scheduling and one.computed >= known:
                one.placeholders += 1
            if one.first_step is None:
                one.first_step = self.begun
            one.last_step = self.begun
            rows.append((number, tokens, one.computed - tokens))
        self.in_call = False
        if rows:
            free = len(self.pool.free)
            row = (rows, free, len(self.running), len(self.waiting), self.preempted, self.empty)
            self.result.steps.append(row)
            self.begun += 1
            self.empty, self.preempted = 0, []
            self.idle_steps += 1
        else:
            self.empty += 1
        return Batch(self.scheduled, samples)

    def _update(self, batch: Batch) -> None:
        """Scheduler.update_from_output."""
        order = batch.scheduled if self.on("outputs-in-order") else list(reversed(batch.scheduled))
        for number in order:
            one = self.live[number]
            if one.status == "finished":
                continue
            one.in_flight -= batch.scheduled[number]
            stale = one.stale > 0
            if stale:
                one.stale -= batch.scheduled[number]
            was_running = one.status == "running"
            if not self.on("filled-when-allocated") and was_running:
                self._fill(one, min(one.computed - one.placeholders, one.tokens))
            if number not in batch.samples or (stale and not self.on("stale-output-kept")):
                continue
            one.generated += 1
            self.idle_steps = 0
            if self.settings.async_scheduling:
                if not stale:
                    one.placeholders -= 1
                if was_running and self.on("async-fills-after-output"):
                    self._fill(one, one.computed - one.placeholders)
            if one.generated >= one.output:
                (self.running if was_running else self.waiting).remove(one)
                self._finish(one, one.reason)
