"""The slow, obvious twin of several tiers: dictionaries, slow policies, and the laws checked at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtrace_replay import Workload
from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.policies import find_policy
from kvtrace_replay.tiers import Tier
from kvtrace_replay.tiers.spec import uses_of
from unit.replay.policies.slow_driver import Pins, SlowPolicy
from unit.replay.policies.twins_queues import Fifo
from unit.replay.policies.twins_scores import SlowVllm
from unit.replay.twins import FOREVER, tokens_of

# Makes the slow policy of a tier: given the workload, the semantics and the blocks that the tier can hold.
Factory = Callable[[Workload, str, int], SlowPolicy]


@dataclass
class Sums:
    block_hits: int = 0
    token_hits: int = 0
    blocks_up: int = 0
    blocks_down: int = 0
    evictions: int = 0
    expired_blocks: int = 0
    bypassed_blocks: int = 0
    invalidated_blocks: int = 0


@dataclass
class Level:
    """A tier: its blocks, each with how many references hold it, and which."""

    tier: Tier
    policy: SlowPolicy
    capacity: int
    in_order: bool
    pins: Pins = field(default_factory=Pins)
    holds: dict[int, set[int]] = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)

    def pinned(self) -> set[int]:
        return {block for block, refs in self.holds.items() if refs}


class NextLookup(SlowPolicy):
    """Belady's rule by brute force: the block that is looked up last, and of those of one prompt the deepest."""

    def __init__(self, twin: TierTwin) -> None:
        self.twin = twin
        self.used_at: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        self.used_at[key] = now

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.used_at[key] = now

    def remove(self, key: int) -> None:
        del self.used_at[key]

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = max((block for block in self.used_at if pins[block] == 0), key=self.rank)
        del self.used_at[victim]
        return victim

    def rank(self, block: int) -> tuple[int, ...]:
        twin, last = self.twin, self.used_at[block]
        if twin.by_block:
            return (next((i for i in range(last + 1, len(twin.refs)) if twin.refs[i] == block), FOREVER), -last)
        w = twin.workload
        for later in range(twin.event + 1, len(twin.events)):
            r = twin.events[later] - 1
            if r >= 0:
                start = int(w.indptr[r])
                prompt = twin.refs[start : start + int(w.prompt_blocks[r])]
                if block in prompt:
                    return (later, prompt.index(block))
        r = next(r for r in range(w.n_requests) if w.indptr[r] <= last < w.indptr[r + 1])
        return (FOREVER, last - int(w.indptr[r]), -twin.served_at[last])


class TierTwin:
    """`tiers` have whole numbers as capacities; `factories` make the policies other than lru, fifo and opt."""

    def __init__(
        self, workload: Workload, tiers: list[Tier], semantics: str, factories: dict[str, Factory] | None = None
    ) -> None:
        self.workload = workload
        by_block = semantics == "object"
        self.refs = (workload.raw if by_block and workload.raw is not None else workload.identities).tolist()
        self.by_block = by_block
        known: dict[str, Factory] = {
            "lru": lambda _, __, capacity: SlowVllm(capacity),
            "fifo": lambda _, __, capacity: Fifo(capacity),
            "opt": lambda *_: NextLookup(self),
            **(factories or {}),
        }
        most = max(1, distinct_blocks(workload, semantics))
        self.levels = []
        for tier in tiers:
            capacity = min(int(tier.capacity), most)
            in_order = find_policy(tier.policy).in_order and workload.schedule is None and tier.mode != "inclusive"
            policy = known[tier.policy](workload, semantics, capacity)
            self.levels.append(Level(tier, policy, capacity, in_order and not by_block))
        n = workload.n_requests
        self.events = (
            workload.schedule.tolist()
            if workload.schedule is not None and not by_block
            else [e for r in range(1, n + 1) for e in (r, -r)]
        )
        self.event = 0
        self.uses: dict[int, int] = {}
        self.last: dict[int, int] = {}  # block -> its last reference
        self.served_at: dict[int, int] = {}  # reference -> event
        self.overflows: set[int] = set()
        self.request_hits = [0] * n

    def run(self) -> TierTwin:
        w = self.workload
        for event, entry in enumerate(self.events):
            self.event = event
            r = abs(entry) - 1
            start, stop = int(w.indptr[r]), int(w.indptr[r + 1])
            middle = start + int(w.prompt_blocks[r])
            if entry > 0:
                for k, level in enumerate(self.levels):
                    level.policy.begin(r, start)
                    self.expire(k, start)
            if self.by_block:
                for p in range(start, stop) if entry > 0 else ():
                    for k in range(len(self.levels)) if p > start else ():
                        self.expire(k, p)
                    self.serve(r, p, p + 1, p + 1)
            elif entry > 0:
                self.serve(r, start, middle, min(middle, start + int(w.hit_cap[r])))
            else:
                self.serve(r, middle, stop, middle)
                for k in range(len(self.levels)):
                    self.let_go(k, range(start, stop))
            self.check_laws()
        return self

    def has(self, k: int, block: int) -> bool:
        return block in self.levels[k].pins

    def first(self, block: int) -> int | None:
        return next((k for k in range(len(self.levels)) if self.has(k, block)), None)

    def expire(self, k: int, now: int) -> None:
        level = self.levels[k]
        while (dropped := level.policy.expire(now, level.pins)) != -1:
            assert level.pins[dropped] == 0
            level.sums.expired_blocks += 1
            self.forget(k, dropped)

    def serve(self, r: int, lo: int, hi: int, limit: int) -> None:
        run = lo
        found = {}
        while run < limit and (k := self.first(self.refs[run])) is not None:
            found[run] = k
            self.levels[k].sums.block_hits += 1
            self.levels[k].sums.token_hits += tokens_of(self.workload, r, run)
            self.request_hits[r] += 1
            run += 1
        victims = (self.serve_top_in_order if self.levels[0].in_order else self.serve_top)(r, lo, hi, found)
        for k in range(1, len(self.levels)):
            victims = self.serve_below(k, lo, hi, victims)

    def note_use(self, p: int, lo: int) -> None:
        block = self.refs[p]
        self.uses[block] = self.uses.get(block, 0) + 1
        self.served_at[p] = self.event
        if not lo <= self.last.get(block, -1) < p:  # of two references in the range the one nearer the head counts
            self.last[block] = p

    def serve_top(self, r: int, lo: int, hi: int, found: dict[int, int]) -> list[int]:
        top = self.levels[0]
        self.use(0, range(lo, hi))
        room = top.capacity - len(top.pinned())
        chosen: list[int] = []
        for p in range(lo, hi):
            block = self.refs[p]
            self.note_use(p, lo)
            if block in top.pins:
                continue
            if block not in chosen:
                if p in found and not self.read_up(block):
                    continue
                if self.uses[block] < uses_of(top.tier):
                    top.sums.bypassed_blocks += 1
                    continue
                if len(chosen) == room:
                    self.overflows.add(r)
                    continue
                if not top.policy.admit(block, p, top.pins):
                    top.sums.bypassed_blocks += 1
                    continue
                chosen.append(block)
            self.hold(0, p)
        return self.place(0, lo, hi, chosen)

    def serve_top_in_order(self, r: int, lo: int, hi: int, found: dict[int, int]) -> list[int]:
        top = self.levels[0]
        victims: list[int] = []
        for p in range(lo, hi):
            block = self.refs[p]
            self.note_use(p, lo)
            if block in top.pins:
                top.policy.hit(block, False, p)
            elif found.get(p, 0) == 0 or self.read_up(block):
                victims += self.place_one(0, block, p)
        return victims

    def read_up(self, block: int) -> bool:
        """A hit of a tier below the top is read there; whether it is to move up."""
        source = self.levels[self.first(block) or 0]
        source.sums.blocks_up += 1
        return source.tier.promote

    def serve_below(self, k: int, lo: int, hi: int, victims: list[int]) -> list[int]:
        level, top = self.levels[k], self.levels[0]
        mode = level.tier.mode
        if not level.tier.demotes and level.in_order:
            self.use(k, range(lo, hi))
            for p in range(lo, hi):
                if self.refs[p] in top.pins and self.refs[p] not in level.pins:
                    victims = victims + self.place_one(k, self.refs[p], p)
            return victims
        self.use(k, range(lo, hi), only=top if mode == "inclusive" else level)
        if not level.tier.demotes:
            room = level.capacity - len(level.pinned())
            chosen: list[int] = []
            for p in range(lo, hi):
                block = self.refs[p]
                if block in level.pins or block not in top.pins:
                    continue
                if block not in chosen:
                    refused = self.uses[block] < uses_of(level.tier)
                    if not refused and len(chosen) == room:
                        continue
                    refused = refused or not (mode == "inclusive" or level.policy.admit(block, p, level.pins))
                    if refused:
                        level.sums.bypassed_blocks += 1
                        continue
                    chosen.append(block)
                self.hold(k, p)
            victims = victims + self.place(k, lo, hi, chosen)
        else:
            victims = self.accept(k, victims)
        if mode != "inclusive":
            self.let_go(k, range(lo, hi))
        return victims

    def accept(self, k: int, victims: list[int]) -> list[int]:
        level = self.levels[k]
        evicted: list[int] = []
        for block in victims:
            if any(self.has(j, block) for j in range(k + 1)):
                continue
            if self.uses[block] < uses_of(level.tier):
                level.sums.bypassed_blocks += 1
            elif len(level.pinned()) < level.capacity:
                now = self.last[block]
                if not level.policy.admit(block, now, level.pins):
                    level.sums.bypassed_blocks += 1
                    continue
                evicted += self.insert(k, block, now)
                if not self.by_block and not level.in_order:
                    level.policy.pin(block)
                    level.policy.unpin(block)
        return evicted

    def place_one(self, k: int, block: int, now: int) -> list[int]:
        """A place that nobody holds, for a tier that goes in order."""
        level = self.levels[k]
        if self.uses[block] < uses_of(level.tier) or not level.policy.admit(block, now, level.pins):
            level.sums.bypassed_blocks += 1
            return []
        return self.insert(k, block, now)

    def use(self, k: int, places: range, only: Level | None = None) -> None:
        """References to blocks that tier k holds; it holds on to those that `only` has, too; an exclusive tier gives up
        what the top tier has."""
        level, top = self.levels[k], self.levels[0]
        for p in reversed(places):
            block = self.refs[p]
            if block not in level.pins:
                continue
            if level.tier.mode == "exclusive" and block in top.pins:
                level.policy.remove(block)
                del level.pins[block]
                continue
            level.policy.hit(block, level.pins[block] > 0, p)
            if self.by_block or level.in_order:
                continue
            if level.pins[block] == 0:
                level.policy.pin(block)
            if only is None or block in only.pins:
                self.hold(k, p)
                level.pins[block] += 1
            elif level.pins[block] == 0:
                level.policy.unpin(block)

    def hold(self, k: int, p: int) -> None:
        if not self.by_block:
            self.levels[k].holds.setdefault(self.refs[p], set()).add(p)

    def let_go(self, k: int, places: range) -> None:
        level = self.levels[k]
        for p in reversed(places):
            block = self.refs[p]
            if p in level.holds.get(block, ()):
                level.holds[block].remove(p)
                level.pins[block] -= 1
                if level.pins[block] == 0:
                    level.policy.unpin(block)

    def place(self, k: int, lo: int, hi: int, chosen: list[int]) -> list[int]:
        level = self.levels[k]
        evicted: list[int] = []
        for p in range(hi - 1, lo - 1, -1):
            block = self.refs[p]
            if block not in chosen or not (self.by_block or p in level.holds[block]):
                continue
            if block in level.pins:
                level.policy.hit(block, True, p)
                level.pins[block] += 1
                continue
            evicted += self.insert(k, block, p)
            if not self.by_block:
                level.policy.pin(block)
                level.pins[block] = 1
        return evicted

    def insert(self, k: int, block: int, now: int) -> list[int]:
        """Places the block, after an eviction where the tier is full; returns the victim."""
        level = self.levels[k]
        victims = []
        if len(level.pins) == level.capacity:
            victims = [level.policy.evict(block, now, level.pins)]
            assert level.pins[victims[0]] == 0
            level.sums.evictions += 1
            self.forget(k, victims[0])
        level.policy.insert(block, now)
        level.pins[block] = 0
        level.sums.blocks_down += k > 0
        return victims

    def forget(self, k: int, block: int) -> None:
        level = self.levels[k]
        del level.pins[block]
        for above in self.levels[:k] if level.tier.mode == "inclusive" else ():
            if block in above.pins:
                above.policy.remove(block)
                del above.pins[block]
                above.sums.invalidated_blocks += 1

    def check_laws(self) -> None:
        for k, level in enumerate(self.levels):
            assert len(level.pins) <= level.tier.capacity
            assert level.pinned() <= set(level.pins)
            above = {block for other in self.levels[:k] for block in other.pins}
            if level.tier.mode == "exclusive":
                assert not above & set(level.pins)
            if level.tier.mode == "inclusive":
                assert above <= set(level.pins)
