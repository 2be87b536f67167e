"""The slow, obvious twin of several tiers: dictionaries, brute-force search, and the laws checked at every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvtrace_replay import Workload
from kvtrace_replay.tiers import Tier
from kvtrace_replay.tiers.spec import uses_of
from unit.replay.twins import FOREVER, tokens_of


@dataclass
class Sums:
    block_hits: int = 0
    token_hits: int = 0
    blocks_up: int = 0
    blocks_down: int = 0
    evictions: int = 0
    bypassed_blocks: int = 0
    invalidated_blocks: int = 0


@dataclass
class Level:
    """A tier: its blocks with the time that LRU or FIFO orders them by, and who holds them."""

    tier: Tier
    stamps: dict[int, int] = field(default_factory=dict)
    used_at: dict[int, int] = field(default_factory=dict)  # block -> the reference of its last use here
    holds: dict[int, set[int]] = field(default_factory=dict)  # block -> references that hold it
    sums: Sums = field(default_factory=Sums)

    def pinned(self) -> set[int]:
        return {block for block, refs in self.holds.items() if refs}


class TierTwin:
    """`tiers` have whole numbers as capacities and the policies lru, fifo or opt."""

    def __init__(self, workload: Workload, tiers: list[Tier], semantics: str) -> None:
        self.workload = workload
        by_block = semantics == "object"
        self.refs = (workload.raw if by_block and workload.raw is not None else workload.identities).tolist()
        self.by_block = by_block
        self.levels = [Level(tier) for tier in tiers]
        n = workload.n_requests
        self.events = (
            workload.schedule.tolist()
            if workload.schedule is not None and not by_block
            else [e for r in range(1, n + 1) for e in (r, -r)]
        )
        self.event = 0
        self.clock = 0
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
            if self.by_block:
                for p in range(start, stop) if entry > 0 else ():
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
        return block in self.levels[k].stamps

    def first(self, block: int) -> int | None:
        return next((k for k in range(len(self.levels)) if self.has(k, block)), None)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def serve(self, r: int, lo: int, hi: int, limit: int) -> None:
        run = lo
        while run < limit:
            k = self.first(self.refs[run])
            if k is None:
                break
            self.levels[k].sums.block_hits += 1
            self.levels[k].sums.token_hits += tokens_of(self.workload, r, run)
            self.request_hits[r] += 1
            run += 1
        victims = self.serve_top(r, lo, hi, run)
        for k in range(1, len(self.levels)):
            victims = self.serve_below(k, lo, hi, victims)

    def serve_top(self, r: int, lo: int, hi: int, run: int) -> list[int]:
        top = self.levels[0]
        self.use(0, range(lo, hi))
        room = int(top.tier.capacity) - len(top.pinned())
        chosen: list[int] = []
        for p in range(lo, hi):
            block = self.refs[p]
            self.uses[block] = self.uses.get(block, 0) + 1
            self.served_at[p] = self.event
            if not lo <= self.last.get(block, -1) < p:  # of two references in the range the one nearer the head counts
                self.last[block] = p
            if block in top.stamps:
                continue
            if block not in chosen:
                if p < run:
                    source = self.levels[self.first(block) or 0]
                    source.sums.blocks_up += 1
                    if not source.tier.promote:
                        continue
                if self.uses[block] < uses_of(top.tier):
                    top.sums.bypassed_blocks += 1
                    continue
                if len(chosen) == room:
                    self.overflows.add(r)
                    continue
                chosen.append(block)
            self.hold(0, p)
        return self.place(0, lo, hi, chosen)

    def serve_below(self, k: int, lo: int, hi: int, victims: list[int]) -> list[int]:
        level, top = self.levels[k], self.levels[0]
        mode = level.tier.mode
        if mode == "exclusive":
            for p in range(lo, hi):
                if self.refs[p] in top.stamps:
                    level.stamps.pop(self.refs[p], None)
        self.use(k, range(lo, hi), only=top if mode == "inclusive" else level)
        if not level.tier.demotes:
            room = int(level.tier.capacity) - len(level.pinned())
            chosen: list[int] = []
            for p in range(lo, hi):
                block = self.refs[p]
                if block in level.stamps or block not in top.stamps:
                    continue
                if block not in chosen:
                    if self.uses[block] < uses_of(level.tier):
                        level.sums.bypassed_blocks += 1
                        continue
                    if len(chosen) == room:
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
            elif len(level.pinned()) < level.tier.capacity:
                evicted += self.make_room(k)
                level.stamps[block] = self.tick()
                level.used_at[block] = self.last[block]
                level.sums.blocks_down += 1
        return evicted

    def use(self, k: int, places: range, only: Level | None = None) -> None:
        """References to blocks that tier k holds; it holds on to those that `only` has, too."""
        level = self.levels[k]
        for p in reversed(places):
            block = self.refs[p]
            if block in level.stamps:
                level.used_at[block] = p
                if level.tier.policy == "lru":
                    level.stamps[block] = self.tick()
                if only is None or block in only.stamps:
                    self.hold(k, p)

    def hold(self, k: int, p: int) -> None:
        if not self.by_block:
            self.levels[k].holds.setdefault(self.refs[p], set()).add(p)

    def let_go(self, k: int, places: range) -> None:
        level = self.levels[k]
        for p in reversed(places):
            block = self.refs[p]
            if p in level.holds.get(block, ()):
                level.holds[block].remove(p)
                if not level.holds[block] and level.tier.policy == "lru":
                    level.stamps[block] = self.tick()

    def place(self, k: int, lo: int, hi: int, chosen: list[int]) -> list[int]:
        level = self.levels[k]
        evicted: list[int] = []
        for p in range(hi - 1, lo - 1, -1):
            block = self.refs[p]
            if block in chosen and (self.by_block or p in level.holds[block]):
                if block not in level.stamps:
                    evicted += self.make_room(k)
                    level.stamps[block] = self.tick()
                    level.sums.blocks_down += k > 0
                level.used_at[block] = p
        return evicted

    def make_room(self, k: int) -> list[int]:
        """Evicts a block where the tier is full."""
        level = self.levels[k]
        if len(level.stamps) < level.tier.capacity:
            return []
        victim = max(set(level.stamps) - level.pinned(), key=lambda block: self.rank(k, block))
        del level.stamps[victim]
        level.sums.evictions += 1
        for above in self.levels[:k] if level.tier.mode == "inclusive" else ():
            if above.stamps.pop(victim, None) is not None:
                above.sums.invalidated_blocks += 1
        return [victim]

    def rank(self, k: int, block: int) -> Any:
        """The block with the highest rank is evicted."""
        if self.levels[k].tier.policy != "opt":
            return -self.levels[k].stamps[block]
        last = self.levels[k].used_at[block]
        if self.by_block:
            return (next((i for i in range(last + 1, len(self.refs)) if self.refs[i] == block), FOREVER), -last)
        w = self.workload
        for later in range(self.event + 1, len(self.events)):
            r = self.events[later] - 1
            if r >= 0:
                start = int(w.indptr[r])
                prompt = self.refs[start : start + int(w.prompt_blocks[r])]
                if block in prompt:
                    return (later, prompt.index(block))
        r = next(r for r in range(w.n_requests) if w.indptr[r] <= last < w.indptr[r + 1])
        return (FOREVER, last - int(w.indptr[r]), -self.served_at[last])

    def check_laws(self) -> None:
        for k, level in enumerate(self.levels):
            assert len(level.stamps) <= level.tier.capacity
            assert level.pinned() <= set(level.stamps)
            above = {block for other in self.levels[:k] for block in other.stamps}
            if level.tier.mode == "exclusive":
                assert not above & set(level.stamps)
            if level.tier.mode == "inclusive":
                assert above <= set(level.stamps)
