"""The twin of the scheduler with vLLM's OffloadingConnector beside it: plain, slow, written from the sources (0.32.0).

It adds to `twin` what `Scheduler.schedule` does with a connector that loads asynchronously,
`kv_connector/v1/offloading/scheduler.py` and `worker.py` for one group with full attention, and a worker that answers
"not yet" so often. Where vLLM goes through a set, the order is that in which requests finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from . import twin
from .twin_offload_words import RULES, Job, Offload, OffloadRun, Side
from .twin_tier import Tier
from .twin_words import Batch, CannotFinish, Live, Request, Settings

PATIENCE = 20  # empty calls in a row after which nothing will ever happen


def simulate(
    requests: Sequence[Request], settings: Settings, offload: Offload, broken: str | None = None
) -> OffloadRun:
    """As `twin.simulate`, with a connector."""
    return _OffloadEngine(requests, settings, offload, broken).run()


class _OffloadEngine(twin._Engine):
    result: OffloadRun

    def __init__(self, requests: Sequence[Request], settings: Settings, offload: Offload, broken: str | None) -> None:
        self.offload = offload
        super().__init__(requests, settings, broken)
        self.result = OffloadRun()
        self.tier = Tier(offload.chunks, offload.policy, offload.store_threshold, self.on)
        self.result.tier = self.tier.log
        self.side = {one.number: Side() for one in self.live}
        self.holding: list[Live] = []  # those that wait and have blocks
        self.prefilling: set[int] = set()  # admitted, and not at the end of what is known
        self.leaving: set[int] = set()  # aborted while loading: they keep their blocks until that ends
        self.gone: list[int] = []  # finished since the last call
        self.jobs: dict[int, Job] = {}
        self.next_job = self.empty_calls = 0
        self.most_empty = PATIENCE + 2 * offload.polls
        self.fences: dict[int, set[int]] = {}  # block of a finished request -> stores that still read it
        self.being_loaded: set[int] = set()
        self.loads: list[int] = []  # planned in this call
        # With several steps under way, blocks are free once all steps that may write to them are done.
        self.steps_called = self.steps_done = 0
        self.last_step = [0] * len(self.live)  # the number of the last step that each request was in, from 1
        self.to_free: deque[tuple[int, int, list[int]]] = deque()  # free once so many steps are done: request, blocks
        self.handed_out: set[int] = set()  # blocks, in this call
        self.not_submitted: list[int] = []  # the worker's
        self.under_way: dict[int, int] = {}  # job -> times it was asked for

    def on(self, rule: str) -> bool:
        if rule in RULES:
            return rule != self.broken
        return super().on(rule)

    # ------------------------------------------------------------------------------------------- the engine's loop

    def run(self) -> OffloadRun:
        depth = 2 if self.settings.async_scheduling else 1
        queue: deque[tuple[Batch, list[int]]] = deque()
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
            if self._has_requests():
                batch = self._call()
                self.empty_calls = 0 if batch.scheduled else self.empty_calls + 1
                if self.empty_calls > self.most_empty:
                    raise CannotFinish(f"nothing can be scheduled at step {self.begun}")
                queue.append((batch, self._execute()))
                if len(queue) < depth and (batch.scheduled or self._has_requests()):
                    continue
            if queue:
                batch, ended = queue.popleft()
                self._update(batch)
                self._hear(ended)
                self._told(any(one.scheduled or jobs for one, jobs in [(batch, ended), *queue]))
            if self.idle_steps > self.patience:
                raise CannotFinish(f"no token generated for {self.idle_steps} steps up to step {self.begun}")
        self.result.empty_after = self.empty
        self.result.requests = [
            (r.first_step, r.last_step, r.finish_step, r.cached_tokens, r.preemptions, r.finish_reason)
            for r in self.live
        ]
        return self.result

    def _told(self, anything: bool) -> None:
        """An output has arrived; `anything`: whether it told of anything, or one of the calls under way will."""

    def _unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.holding)

    def _has_requests(self) -> bool:
        return self._unfinished() or bool(self.gone or self.leaving or self.jobs)

    def _abort_order(self) -> list[Live]:
        return self.live

    def _abort(self) -> None:
        for one in self._abort_order():
            if one.status not in ("waiting", "running", "loading") or not self._aborted(one):
                continue
            queue = self.running if one.status == "running" else self.holding if one in self.holding else self.waiting
            queue.remove(one)
            if one.status == "loading" and not self.side[one.number].loaded:
                self.leaving.add(one.number)
            self._finish(one, "abort")

    def _finish(self, one: Live, reason: str) -> None:
        side = self.side[one.number]
        side.keys = self._keys(one)
        for job in side.jobs:
            self._fence(job)
        self.prefilling.discard(one.number)
        self.gone.append(one.number)
        one.status, one.finish_reason, one.finish_step = "finished", reason, max(self.begun - 1, 0)
        if one.number not in self.leaving:
            self._release(one)
        self.idle_steps = 0

    def _may_free(self, one: Live) -> bool:
        late = self.settings.async_scheduling and self.last_step[one.number] > self.steps_done
        return not late or not self.on("frees-wait")

    def _release(self, one: Live) -> None:
        """Scheduler._free_request_blocks."""
        if self._may_free(one):
            self.pool.give_up(one.number, one.table)
        elif one.table:
            self.to_free.append((self.steps_called, one.number, one.table))
        one.table = []

    def _update(self, batch: Batch) -> None:
        if batch.scheduled:
            self.steps_done += 1
            while self.to_free and self.to_free[0][0] <= self.steps_done:
                _, number, table = self.to_free.popleft()
                self.pool.give_up(number, table)
        super()._update(batch)

    # -------------------------------------------------------------------------------------------- Scheduler.schedule

    def _call(self) -> Batch:
        self.notice, self.in_call = False, True
        self.scheduled, self.worker_computed = {}, {}
        self.admitted: set[int] = set()
        self.budget = self.settings.max_num_batched_tokens
        before = len(self.preempted)
        threshold = self.settings.long_prefill_token_threshold
        if len(self.running) + len(self.waiting) + len(self.holding) <= 1:
            threshold = 0
        self._schedule_running(threshold)
        victims = self.preempted[before:]
        if not victims:
            self._admit(threshold)
        self.stores, self.flush = self._plan(victims)
        for number, tokens in self.scheduled.items():
            one = self.live[number]
            if one.computed + tokens >= one.tokens + one.placeholders:
                self.prefilling.discard(number)
        batch = self._after_schedule()
        if batch.scheduled:
            self.steps_called += 1
            for number in batch.scheduled:
                self.last_step[number] = self.steps_called
            rows, free, running, waiting, preempted, empty = self.result.steps[-1]
            self.result.steps[-1] = (rows, free, running, waiting + len(self.holding), preempted, empty)
        return batch

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
                if not self._may_free(victim) and self.on("victims-wait"):
                    return  # its blocks would not be free at once
                self._preempt(victim)
                if victim is one:
                    return
            self._schedule(one, tokens)
            self.index += 1

    def _preempt(self, victim: Live) -> None:
        super()._preempt(victim)
        self.prefilling.discard(victim.number)

    def _first(self, queue: list[Live]) -> Live:
        return min(queue, key=self._rank) if self.settings.scheduling_policy == "priority" else queue[0]

    def _admit(self, threshold: int) -> None:
        passed_over: list[Live] = []
        passed_holding: list[Live] = []
        while self.budget > 0:
            first = (self.holding, self.waiting) if self.on("loads-first") else (self.waiting, self.holding)
            queue = first[0] or first[1]
            if not queue or len(self.running) >= self.settings.max_num_seqs:
                break
            one = self._first(queue)
            side = self.side[one.number]
            if one.status == "loading" and not side.loaded:
                queue.remove(one)
                passed_holding.append(one)
                continue
            if one.status == "loading":
                self._fill(one, one.computed)
                if one.computed == one.tokens and self.on("full-hit-recomputes"):
                    one.computed -= 1
                side.loaded, one.status = False, "waiting"
            hits: list[int] = []
            lookup, loads = False, 0
            if one.computed == 0:
                hits, lookup = self._look_up(one)
                local = len(hits) * self.settings.block_size
                found = self._matched(one, local)
                if one.request.no_read:
                    found = 0
                if found is None:
                    queue.remove(one)
                    passed_over.append(one)
                    continue
                loads = found
                if one.preemptions == 0:
                    side.cached = local + loads
                computed = local + loads
            else:
                computed = one.computed
            tokens = 0
            if not loads:
                tokens = one.tokens - computed
                if 0 < threshold < tokens:
                    tokens = threshold
                if not self.settings.chunked_prefill and tokens > self.budget:
                    break
                tokens = min(tokens, self.budget)
            if not self._allocate_slots(one, tokens, hits, computed, bool(loads)):
                break
            if loads:
                self._begin_load(one, loads)
            if lookup:
                hit = len(hits) * self.settings.block_size
                self.result.lookups.append((self.begun, one.number, one.tokens, hit, one.preemptions > 0))
            queue.remove(one)
            one.computed = computed
            if loads:
                one.status = "loading"
                self.prefilling.add(one.number)
                passed_holding.append(one)
                continue
            one.status = "running"
            self.running.append(one)
            self.admitted.add(one.number)
            if one.cached_tokens is None:
                one.cached_tokens = side.cached
            if computed + tokens < one.tokens:
                self.prefilling.add(one.number)
            self._schedule(one, tokens)
        self.holding[:0] = passed_holding
        self.waiting[:0] = passed_over

    def _allocate_slots(self, one: Live, tokens: int, hits: list[int], computed: int, load: bool) -> bool:
        """Blocks for a request that waits; a load takes only what leaves room for those that are being prefilled."""
        size, most, free = self.settings.block_size, self.settings.max_model_len, len(self.pool.free)
        evictable = sum(self.pool.references[block] == 0 for block in hits)

        def needed(total: int) -> int:
            return max(-(-total // size) - len(one.table) - len(hits), 0)

        watermark = int(self.settings.watermark * self.settings.num_blocks) if self.running else 0
        if needed(min(one.tokens, most)) + evictable + watermark > free:
            return False
        reserved = 0
        if load and self.on("loads-reserve"):
            for other in (self.live[number] for number in self.prefilling):
                reserved += max(-(-min(other.tokens, most) // size) - len(other.table), 0)
        total = min(computed + tokens, most)
        if needed(total) + evictable + watermark > free - reserved:
            return False
        fresh = needed(total)
        self.pool.touch(one.number, hits)
        if not one.table:
            one.filled = len(hits)
        one.table.extend(hits)
        one.table.extend(self.pool.take(one.number, fresh))
        if not load:
            self._fill(one, min(total, one.tokens))
        return True

    # ------------------------------------------------------------------------- OffloadingConnectorScheduler

    def _keys(self, one: Live) -> int:
        return min(one.tokens // self.settings.block_size, len(one.request.chain)) // self.offload.blocks_per_chunk

    def _key(self, one: Live, chunk: int) -> int:
        return one.request.chain[(chunk + 1) * self.offload.blocks_per_chunk - 1]

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.settings.block_size * self.offload.blocks_per_chunk

    def _matched(self, one: Live, local: int) -> int | None:
        """get_num_new_matched_tokens: tokens beyond the local hit that the tier has; None: ask again later."""
        side, chunk = self.side[one.number], self.chunk
        side.blocks.clear()
        if side.jobs and self.on("under-way-waits"):
            return None
        side.keys, side.local = self._keys(one), local
        if one.request.no_read:
            return 0
        limit = min(one.tokens, side.keys * chunk)
        if limit - local < chunk:
            return 0
        start, hits, pending = local // chunk, 0, False
        for index in range(start, min(-(-limit // chunk), side.keys)):
            found = self.tier.lookup(self._key(one, index))
            if found == "miss" or (found == "pending" and not self.on("pending-waits")):
                break
            pending |= found == "pending"
            hits += 1
        if hits == 0:
            return 0
        if pending:
            return None
        tokens = min(limit, (start + hits) * chunk) - local
        if tokens < chunk and self.on("whole-chunks"):
            return 0
        keys = {self._key(one, index) for index in range(start, -(-(local + tokens) // chunk))}
        if keys & self.being_loaded and self.on("being-loaded-waits"):
            return None
        return tokens

    def _begin_load(self, one: Live, tokens: int) -> None:
        """update_state_after_alloc."""
        side, size = self.side[one.number], self.settings.block_size
        cached = side.local + tokens
        first, last = side.local // size, -(-cached // size)
        self.handed_out.update(one.table)
        chunks = -(-cached // self.chunk)
        keys = [self._key(one, index) for index in range(first // self.offload.blocks_per_chunk, chunks)]
        if self.on("loaded-not-stored"):
            side.stored = chunks
        self.tier.prepare_load(one.number, keys)
        self.loads.append(self._job(one, True, keys, one.table[first:last], tokens))
        if self.settings.prefix_caching:
            self.being_loaded.update(keys)

    def _job(self, one: Live, load: bool, keys: list[int], blocks: list[int], tokens: int) -> int:
        number = self.next_job
        self.next_job += 1
        self.jobs[number] = Job(one.number, load, keys, blocks, -1)
        self.side[one.number].jobs.add(number)
        self.jobs[number].row = tokens  # until it is planned
        return number

    def _planned(self, number: int) -> None:
        job = self.jobs[number]
        tokens, job.row = job.row, len(self.result.transfers)
        kind = "load" if job.load else "store"
        self.result.transfers.append((self.begun, kind, job.request, job.blocks, tokens, None))

    def _fence(self, number: int) -> None:
        job = self.jobs[number]
        if not job.load:
            for block in job.blocks:
                self.fences.setdefault(block, set()).add(number)

    def _plan(self, victims: list[int]) -> tuple[list[int], set[int]]:
        """build_connector_meta: the stores of this call, and those that must be done before its step."""
        for number in self.scheduled:
            one, side = self.live[number], self.side[number]
            side.keys = self._keys(one)
            new = one.table if number in self.admitted else one.table[len(side.blocks) :]
            self.handed_out.update(new)
            side.blocks = list(one.table)
        flush: set[int] = set()
        if self.on("flush-preempted"):
            flush |= {job for number in victims for job in self.side[number].jobs}
        if self.on("flush-reused"):
            flush |= {job for block in self.handed_out for job in self.fences.get(block, ())}
        for number in self.loads:
            self._planned(number)
        stores: list[int] = []
        for number in [*self.scheduled, *(self.gone if self.on("finished-stores") else ())]:
            job = self._store(self.live[number])
            if job is None:
                continue
            stores.append(job)
            self._planned(job)
            if number in self.gone:
                self._fence(job)
                if self.handed_out.intersection(self.jobs[job].blocks) and self.on("flush-reused"):
                    flush.add(job)
        for number in self.gone:
            self.side[number].ended = True
            chain = self.live[number].request.chain
            self.tier.finished(number, chain.index)
        self.planned_loads, self.loads, self.gone, self.handed_out = self.loads, [], [], set()
        return stores, flush

    def _store(self, one: Live) -> int | None:
        side, request = self.side[one.number], one.request
        if one.finish_reason == "abort":
            tokens = one.computed
        elif one.status == "finished":
            tokens = max(request.prompt, one.tokens - 1)
        else:
            tokens = one.computed + self.scheduled[one.number]
        tokens = min(tokens, one.tokens)
        if self.offload.prompt_only and self.on("prompt-only"):
            tokens = min(tokens, request.prompt)
        chunks = min(tokens // self.chunk, len(side.blocks) // self.offload.blocks_per_chunk, side.keys)
        offered = [self._key(one, index) for index in range(side.stored, chunks)]
        new = self.tier.prepare_store(one.number, offered) if offered else []
        if new is None:
            if not self.on("refused-again"):
                side.stored = chunks
            return None
        start, side.stored = side.stored, max(side.stored, chunks)
        if not new:
            return None
        per = self.offload.blocks_per_chunk
        blocks = [
            block
            for index in range(start, chunks)
            if self._key(one, index) in new
            for block in side.blocks[index * per : (index + 1) * per]
        ]
        return self._job(one, False, new, blocks, 0)

    # ------------------------------------------------------------------------------------ the worker, and its answers

    def _execute(self) -> list[int]:
        """OffloadingConnectorWorker in one step: stores wait for the next step, unless they are flushed."""
        now = [job for job in self.stores if job in self.flush]
        later = [job for job in self.stores if job not in self.flush]
        if not self.on("deferred-store"):
            now, later = self.stores, []
        for job in [*self.not_submitted, *now]:
            self.under_way[job] = 0
        for job in self.flush:
            if job in self.under_way:
                self.under_way[job] = self.offload.polls
        for job in self.planned_loads:
            self.under_way[job] = 0
        self.not_submitted = later
        ended = [job for job, asked in self.under_way.items() if asked >= self.offload.polls]
        for job in ended:
            del self.under_way[job]
        for job in self.under_way:
            self.under_way[job] += 1
        return ended

    def _hear(self, ended: list[int]) -> None:
        """update_connector_output, then Scheduler._update_from_kv_xfer_finished."""
        loaded = []
        for number in ended:
            job = self.jobs.pop(number)
            row = self.result.transfers[job.row]
            self.result.transfers[job.row] = (*row[:5], max(self.begun - 1, 0))
            side = self.side[job.request]
            side.jobs.discard(number)
            if job.load:
                self.tier.complete_load(job.keys)
                self.being_loaded.difference_update(job.keys)
                loaded.append(self.live[job.request])
            else:
                self.tier.complete_store(job.keys)
                for block in job.blocks:
                    self.fences.get(block, set()).discard(number)
        for one in loaded:
            if one.number in self.leaving:
                self.leaving.discard(one.number)
                self._release(one)
            else:
                self.side[one.number].loaded = True
