"""The twin of the scheduler with vLLM's SimpleCPUOffloadConnector beside it: plain, slow, written from the sources.

It adds to `twin_offload`, whose scheduler it is, `SimpleCPUOffloadScheduler` (`v1/simple_kv_offload/manager.py`,
0.32.0) for one group with full attention, eager and lazy, and its worker with copies that are not over so often as they
are asked for. Where vLLM goes through sets, of copies that end together, the order is that in which they were begun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .twin_offload import _OffloadEngine
from .twin_offload_words import Job, Offload, OffloadRun
from .twin_pool import Pool
from .twin_words import Batch, CannotFinish, Live, Request, Settings

#: Rules that `simulate(..., broken=name)` can break, beside those of the scheduler: see docs/offload.md.
RULES = (
    "a-token-is-left", "stale-pins-go", "hits-are-pinned", "loads-hold", "stores-hold", "ends-free-loads-first",
    "walk-goes-on", "busy-cursor-forgotten", "walk-covers-twice", "walk-leaves-what-the-host-has",
    "walk-needs-room", "only-computed", "new-ones-first", "resumed-ones-last", "resumed-ones-second", "full-host-waits",
    "under-way-not-again", "on-the-host-not-again", "preempted-begin-again", "end-stores", "end-stores-come-last",
    "copies-keep-awake", "preemption-ends-copies", "cached-once-over",
)  # fmt: skip
MOST_CALLS = 10_000  # without a step or a load: then those that wait do so for ever
IDLE_CALLS = 10  # calls without any request after which a run is over though copies are under way


@dataclass(frozen=True)
class Simple:
    """The connector's settings: room for `chunks` blocks, `lazy` or eager; `polls` of the worker; steps before which
    all that is cached on the host is forgotten, and in the engine too if no block is in use; which of vLLM's model
    `runner`s, 1 or 2, the scheduler speaks to."""

    chunks: int
    lazy: bool
    polls: int = 0
    resets: tuple[int, ...] = ()
    runner: int = 1


@dataclass
class SimpleRun(OffloadRun):
    """`OffloadRun`, of whose transfers a request may be None; blocks forgotten on the host; `kinds` of stores; `host`:
    what happened to the host's blocks, in order: (take, block), (pin, block), (give, block), which take a block from
    the front of its free queue, out of it, and put it to its end, and (cache, block, identity)."""

    evicted: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    host: list[tuple[Any, ...]] = field(default_factory=list)


def simulate(requests: Sequence[Request], settings: Settings, simple: Simple, broken: str | None = None) -> SimpleRun:
    """As `twin.simulate`, with a connector."""
    return SimpleEngine(requests, settings, simple, broken).run()


class SimpleEngine(_OffloadEngine):
    """`run` gives a SimpleRun."""

    result: SimpleRun

    def __init__(self, requests: Sequence[Request], settings: Settings, simple: Simple, broken: str | None) -> None:
        self.simple = simple
        super().__init__(requests, settings, Offload(chunks=1, polls=simple.polls), broken)
        self.result = SimpleRun()
        self.host = Pool(simple.chunks + 1, True, lambda rule: True, lambda *event: None)
        self.pins: dict[int, list[int]] = {}  # request -> blocks of the host that its last lookup found
        self.copying: set[int] = set()  # the engine's blocks that are being stored (eager)
        self.pending: list[int] = []  # stores of requests that have finished since the last call
        self.copies: list[list[int]] = []  # jobs of each copy out, in order
        self.cursor: int | None = None
        self.calls = self.alive = self.spin = 0
        self.idle_calls = IDLE_CALLS

    def on(self, rule: str) -> bool:
        return rule != self.broken if rule in RULES else super().on(rule)

    def run(self) -> SimpleRun:
        super().run()
        return self.result

    # --------------------------------------------------------------------------------------------- the host's blocks

    def _pin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self.host.references[block] == 0:
                self.result.host.append(("pin", block))
        self.host.touch(-1, blocks)

    def _give(self, blocks: Sequence[int]) -> None:
        """In the order of `blocks`."""
        for block in blocks:
            if self.host.references[block] == 1:
                self.result.host.append(("give", block))
        self.host.give_up(-1, blocks[::-1])

    def _take(self, count: int) -> list[int]:
        held = {self.host.identity[block] for block in list(self.host.free)[:count]} - {None}
        blocks = self.host.take(-1, count)
        self.result.host += [("take", block) for block in blocks]
        self.result.evicted += sum(not self.host.cached[identity] for identity in held if identity is not None)
        return blocks

    def _cache(self, host: list[int], blocks: list[int]) -> None:
        """`_process_store_completion`: what has been copied can be found on the host."""
        for block, other in zip(blocks, host, strict=True):
            identity = self.pool.identity[block]
            assert identity is not None
            self.host.fill(-1, other, identity)
            self.result.host.append(("cache", other, identity))

    # ------------------------------------------------------------------------------------------------- the scheduler

    def _has_requests(self) -> bool:
        rest = self._unfinished() or bool(self.gone or self.leaving)
        if rest:
            self.alive = self.calls
        stores = any(not job.load for job in self.jobs.values()) and self.on("copies-keep-awake")
        return (rest or stores) and self.calls - self.alive < self.idle_calls

    def _call(self) -> Batch:
        batch = super()._call()
        self.calls += 1
        loading = any(job.load for job in self.jobs.values())
        self.spin = 0 if batch.scheduled or loading else self.spin + 1
        if self.spin > MOST_CALLS:
            raise CannotFinish(f"{self.spin} calls without a step or a load at step {self.begun}")
        return batch

    def _finish(self, one: Live, reason: str) -> None:
        """`request_finished_all_groups`, before its blocks go."""
        if self.settings.prefix_caching and not self.simple.lazy and self.on("end-stores"):
            covered = -(-one.computed // self.settings.block_size)
            if chosen := self._select(one, one.table[:covered]):
                self.pending.append(self._store_job(one.number, chosen))
        self._give(self.pins.pop(one.number, []))
        super()._finish(one, reason)

    # ------------------------------------------------------------------------------------------------------- lookups

    def _matched(self, one: Live, local: int) -> int | None:
        """`get_num_new_matched_tokens`."""
        size, side = self.settings.block_size, self.side[one.number]
        if self.on("stale-pins-go"):
            self._give(self.pins.pop(one.number, []))
        side.local = local
        if one.request.no_read or not self.settings.prefix_caching:
            return 0
        most = (one.tokens - self.on("a-token-is-left")) // size
        hits = []
        for identity in one.request.chain[local // size : min(most, len(one.request.chain))]:
            block = self.host.find(identity)
            if block is None:
                break
            hits.append(block)
        if hits and self.on("hits-are-pinned"):
            self._pin(hits)
            self.pins[one.number] = hits
        elif hits:
            self.pins[one.number] = hits
        return len(hits) * size

    def _begin_load(self, one: Live, tokens: int) -> None:
        """`update_state_after_alloc`."""
        size, side = self.settings.block_size, self.side[one.number]
        first = side.local // size
        blocks = one.table[first : first + tokens // size]
        number = self._new_job(one.number, True, self.pins.pop(one.number), blocks)
        self.jobs[number].row = tokens
        self.loads.append(number)
        if self.on("loads-hold"):
            self.pool.touch(-1, blocks)

    def _new_job(self, request: int, load: bool, host: list[int], blocks: list[int]) -> int:
        number = self.next_job
        self.next_job += 1
        self.jobs[number] = Job(request, load, host, blocks, 0)
        return number

    def _planned(self, number: int) -> None:
        job = self.jobs[number]
        tokens, job.row = job.row, len(self.result.transfers)
        kind, request = "load" if job.load else "store", None if job.request < 0 else job.request
        self.result.transfers.append((self.begun, kind, request, job.blocks, tokens, None))

    # -------------------------------------------------------------------------------------------------------- stores

    def _store_job(self, request: int, blocks: list[int]) -> int:
        """Blocks of the engine are to be stored: both sides of the copy are held from here on."""
        host = self._take(len(blocks))
        self.copying.update(blocks)
        if self.on("stores-hold"):
            self.pool.touch(-1, blocks)
        if not self.on("cached-once-over"):
            self._cache(host, blocks)
        return self._new_job(request, False, host, blocks)

    def _plan(self, victims: list[int]) -> tuple[list[int], set[int]]:
        """`build_connector_meta`."""
        stores: list[int] = []
        for number in self.loads:
            self._planned(number)
        if self.settings.prefix_caching:
            stores = self._walk() if self.simple.lazy else self._filled(victims)
        last = self.on("end-stores-come-last")
        stores = [*stores, *self.pending] if last else [*self.pending, *stores]
        for number in stores:
            self._planned(number)
        if stores:
            self.copies.append(stores)
        self.planned_loads, self.loads, self.gone, self.pending = self.loads, [], [], []
        self.handed_out.clear()
        return stores, set(self.under_way) if victims and self.on("preemption-ends-copies") else set()

    def _walk(self) -> list[int]:
        """`_prepare_lazy_store_specs`."""
        size, queue, room = self.settings.block_size, list(self.pool.free), len(self.host.free)
        cover = -(-self.settings.max_num_batched_tokens // size) * (1 + self.on("walk-covers-twice"))
        if self.cursor is not None and self.pool.references[self.cursor] > 0:
            self.cursor = None if self.on("busy-cursor-forgotten") else queue[-1] if queue else None
        if self.cursor is not None and self.on("walk-goes-on"):
            queue = queue[queue.index(self.cursor) + 1 :]
        chosen: list[int] = []
        for block in queue[:cover]:
            if len(chosen) >= room and self.on("walk-needs-room"):
                break
            self.cursor = block
            identity = self.pool.identity[block]
            if identity is None:
                continue
            known = self.host.find(identity) is not None and self.on("walk-leaves-what-the-host-has")
            if not known and len(chosen) < room:
                chosen.append(block)
        return [self._store_job(-1, chosen)] if chosen else []

    def _filled(self, victims: list[int]) -> list[int]:
        """`_prepare_eager_store_specs`."""
        for number in victims:
            if self.on("preempted-begin-again"):
                self.side[number].stored = 0
        stores = []
        for number in self._told_order():
            one = self.live[number]
            if chosen := self._select(one, one.table):
                stores.append(self._store_job(number, chosen))
        return stores

    def _told_order(self) -> list[int]:
        """`yield_req_data`: scheduled requests in the order in which the workers are told of them."""
        new = [n for n in self.scheduled if n in self.admitted]
        fresh = [n for n in new if self.live[n].preemptions == 0]
        again = [n for n in new if self.live[n].preemptions > 0]
        running = [n for n in self.scheduled if n not in self.admitted]
        if not self.on("new-ones-first"):
            return [*running, *new]
        if self.simple.runner == 2:
            return [*fresh, *again, *running] if self.on("resumed-ones-second") else [*fresh, *running, *again]
        return [*fresh, *running, *again] if self.on("resumed-ones-last") else [*fresh, *again, *running]

    def _select(self, one: Live, table: list[int]) -> list[int]:
        """`_select_eager_blocks_to_store`."""
        side, size = self.side[one.number], self.settings.block_size
        room, computed = len(self.host.free), one.computed - one.placeholders
        if not self.on("only-computed"):
            computed = one.computed + self.scheduled.get(one.number, 0)
        chosen: list[int] = []
        if room == 0 and self.on("full-host-waits"):
            return chosen
        for block in table[side.stored : min(len(table), computed // size)]:
            identity = self.pool.identity[block]
            again = (block in self.copying and self.on("under-way-not-again")) or (
                identity is not None and self.host.find(identity) is not None and self.on("on-the-host-not-again")
            )
            if identity is None or again:
                side.stored += 1
                continue
            if len(chosen) >= room and self.on("full-host-waits"):
                break
            side.stored += 1
            if len(chosen) < room:
                chosen.append(block)
        return chosen

    # ------------------------------------------------------------------------------------ the worker, and its answers

    def _execute(self) -> list[int]:
        """SimpleCPUOffloadWorker in one step."""
        for job in self.flush:
            self.under_way[job] = self.offload.polls
        for job in [*self.planned_loads, *self.stores]:
            self.under_way[job] = 0
        ended = [job for job, asked in self.under_way.items() if asked >= self.offload.polls]
        for job in ended:
            del self.under_way[job]
        for job in self.under_way:
            self.under_way[job] += 1
        return ended

    def _hear(self, ended: list[int]) -> None:
        """`update_connector_output`, then Scheduler._update_from_kv_xfer_finished."""
        for number in ended:
            row = self.result.transfers[self.jobs[number].row]
            self.result.transfers[self.jobs[number].row] = (*row[:5], max(self.begun - 1, 0))
        loads = [number for number in ended if self.jobs[number].load]
        parts: list[Callable[[], None]] = [lambda: self._end_loads(loads), lambda: self._end_stores(ended)]
        for part in parts if self.on("ends-free-loads-first") else reversed(parts):
            part()
        loaded = [self.live[self.jobs.pop(number).request] for number in loads]
        for one in loaded:
            if one.number in self.leaving:
                self.leaving.discard(one.number)
                self._release(one)
            else:
                self.side[one.number].loaded = True

    def _end_loads(self, loads: list[int]) -> None:
        for number in loads:
            job = self.jobs[number]
            if self.on("hits-are-pinned"):
                self._give(job.keys)
            if self.on("loads-hold"):
                self.pool.give_up(-1, job.blocks[::-1])

    def _end_stores(self, ended: list[int]) -> None:
        while self.copies and self.copies[0][0] in ended:
            jobs = [self.jobs.pop(number) for number in self.copies.pop(0)]
            host, blocks = [b for job in jobs for b in job.keys], [b for job in jobs for b in job.blocks]
            self.copying.difference_update(blocks)
            if self.on("cached-once-over"):
                self._cache(host, blocks)
            self._give(host)
            if self.on("stores-hold"):
                self.pool.give_up(-1, blocks[::-1])
