"""Slow, obvious twins of the scored and learning policies: lists and dictionaries, the newest at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvtrace_replay import Workload
from unit.replay.policies.slow_driver import Pins, SlowPolicy
from unit.replay.policies.slow_sketch import Sketch


class SlowVllm(SlowPolicy):
    """The free queue: what is used leaves it, what is let go enters at the back, the front is handed out."""

    def __init__(self, capacity: int) -> None:
        self.free: list[int] = []

    def insert(self, key: int, now: int) -> None:
        self.free.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if not pinned:
            self.free.remove(key)
            self.free.append(key)

    def pin(self, key: int) -> None:
        self.free.remove(key)

    def unpin(self, key: int) -> None:
        self.free.append(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        return self.free.pop(0)

    def remove(self, key: int) -> None:
        self.free.remove(key)


class SlowTtl(SlowVllm):
    def __init__(self, capacity: int, workload: Workload, seconds: float) -> None:
        super().__init__(capacity)
        assert workload.arrival_ns is not None
        self.arrivals = workload.arrival_ns.tolist()
        self.seconds = seconds
        self.begun: list[int] = []
        self.used: dict[int, int] = {}

    def time(self) -> int:
        """The latest arrival among the requests begun so far."""
        return max(self.begun, default=0)

    def begin(self, request: int, now: int) -> None:
        self.begun.append(self.arrivals[request])

    def expire(self, now: int, pins: Pins) -> int:
        for key in self.free:
            if self.time() - self.used[key] > self.seconds * 1e9:
                self.free.remove(key)
                return key
        return -1

    def insert(self, key: int, now: int) -> None:
        super().insert(key, now)
        self.used[key] = self.time()

    def hit(self, key: int, pinned: bool, now: int) -> None:
        super().hit(key, pinned, now)
        self.used[key] = self.time()

    def unpin(self, key: int) -> None:
        super().unpin(key)
        self.used[key] = self.time()


class _Counting(SlowPolicy):
    """Keeps the moments of all uses of each resident block since it was placed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clock = 0
        self.uses: dict[int, list[int]] = {}

    def insert(self, key: int, now: int) -> None:
        self.clock += 1
        self.uses[key] = [self.clock]

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.clock += 1
        self.uses[key].append(self.clock)

    def evictable(self, pins: Pins) -> Iterable[int]:
        return [key for key in self.uses if pins[key] == 0]

    def remove(self, key: int) -> None:
        del self.uses[key]


class SlowLruK(_Counting):
    def __init__(self, capacity: int, k: int) -> None:
        super().__init__(capacity)
        self.k = k

    def evict(self, key: int, now: int, pins: Pins) -> int:
        def rank(block: int) -> tuple[bool, int]:
            uses = self.uses[block]
            enough = len(uses) >= self.k
            return enough, uses[-self.k] if enough else uses[0]

        victim = min(self.evictable(pins), key=rank)
        del self.uses[victim]
        return victim


class SlowGdsf(_Counting):
    def __init__(self, capacity: int, may_refuse: bool) -> None:
        super().__init__(capacity)
        self.may_refuse = may_refuse
        self.inflation = self.rising_to = 0
        self.priority: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        super().insert(key, now)
        self.priority[key] = self.inflation + 1
        self.inflation = max(self.inflation, self.rising_to)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        super().hit(key, pinned, now)
        self.priority[key] = self.inflation + len(self.uses[key])

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        if not self.may_refuse or len(self.uses) < self.capacity:
            return True
        if all(self.priority[block] > self.inflation + 1 for block in self.uses):
            self.inflation += 1
            return False
        return True

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = min(self.evictable(pins), key=lambda block: (self.priority[block], self.uses[block][-1]))
        self.rising_to = max(self.rising_to, self.priority.pop(victim))
        del self.uses[victim]
        return victim


class Dice:
    """The generator of `structures.sampling`, in whole numbers."""

    def __init__(self, seed: int) -> None:
        mask = 2**64 - 1
        word = (seed + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        self.word = (word ^ (word >> 31)) | 1

    def below(self, n: int) -> int:
        self.word ^= self.word << 13 & (2**64 - 1)
        self.word ^= self.word >> 7
        self.word ^= self.word << 17 & (2**64 - 1)
        return (self.word >> 32) * n >> 32


class SlowRandom(SlowPolicy):
    """`slots` holds the residents, those that may be evicted first; moving one across the border swaps two."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.dice = Dice(seed)
        self.slots: list[int] = []
        self.evictable = 0

    def swap(self, one: int, other: int) -> None:
        self.slots[one], self.slots[other] = self.slots[other], self.slots[one]

    def insert(self, key: int, now: int) -> None:
        self.slots.append(key)
        self.unpin(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        pass

    def pin(self, key: int) -> None:
        self.evictable -= 1
        self.swap(self.slots.index(key), self.evictable)

    def unpin(self, key: int) -> None:
        self.swap(self.slots.index(key), self.evictable)
        self.evictable += 1

    def take(self, at: int) -> int:
        self.swap(at, self.evictable - 1)
        self.swap(self.evictable - 1, len(self.slots) - 1)
        self.evictable -= 1
        return self.slots.pop()

    def evict(self, key: int, now: int, pins: Pins) -> int:
        return self.take(self.dice.below(self.evictable))

    def remove(self, key: int) -> None:
        self.take(self.slots.index(key))


class SlowHyperbolic(SlowRandom):
    def __init__(self, capacity: int, samples: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self.samples = samples
        self.clock = 0
        self.uses: dict[int, int] = {}
        self.since: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        super().insert(key, now)
        self.clock += 1
        self.uses[key], self.since[key] = 1, self.clock

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.clock += 1
        self.uses[key] += 1

    def evict(self, key: int, now: int, pins: Pins) -> int:
        drawn = [self.dice.below(self.evictable) for _ in range(self.samples)]

        def score(at: int) -> float:
            block = self.slots[at]
            return self.uses[block] / (self.clock + 1 - self.since[block])

        return self.take(min(drawn, key=score))


class SlowLeCaR(_Counting):
    def __init__(self, capacity: int, rate: float = 0.45, discount: float = 0.005, seed: int = 0) -> None:
        super().__init__(capacity)
        self.rate, self.discount = rate, discount
        self.dice = Dice(seed)
        self.recent: list[int] = []  # that may be evicted
        self.last: dict[int, int] = {}  # when each was used or let go last
        self.weights = {"lru": 0.5, "lfu": 0.5}
        self.remembered: dict[str, list[int]] = {"lru": [], "lfu": []}
        self.evicted_at: dict[int, int] = {}

    def learn(self, key: int) -> None:
        for wrong, right in (("lru", "lfu"), ("lfu", "lru")):
            if key in self.remembered[wrong]:
                self.remembered[wrong].remove(key)
                age = self.clock + 1 - self.evicted_at[key]
                regret = math.exp(age * (math.log(self.discount) / self.capacity))
                lowered = self.weights[wrong] * math.exp(-self.rate * regret) + 1e-10
                total = lowered + self.weights[right] + 2e-10
                self.weights = {wrong: lowered / total, right: (self.weights[right] + 1e-10) / total}
                return

    def insert(self, key: int, now: int) -> None:
        self.learn(key)
        super().insert(key, now)
        self.last[key] = self.clock
        self.recent.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        super().hit(key, pinned, now)
        self.last[key] = self.clock
        if not pinned:
            self.recent.remove(key)
            self.recent.append(key)

    def pin(self, key: int) -> None:
        self.recent.remove(key)

    def unpin(self, key: int) -> None:
        self.clock += 1
        self.last[key] = self.clock
        self.recent.append(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        self.learn(key)
        choice = {
            "lru": self.recent[0],
            "lfu": min(self.recent, key=lambda block: (len(self.uses[block]), self.last[block])),
        }
        victim = choice["lru"]
        if choice["lru"] != choice["lfu"]:
            expert = "lru" if self.dice.below(2**30) / 2**30 < self.weights["lru"] else "lfu"
            victim = choice[expert]
            self.remembered[expert].append(victim)
            if len(self.remembered[expert]) > self.capacity // 2:
                self.remembered[expert].pop(0)
        self.evicted_at[victim] = self.clock + 1
        self.recent.remove(victim)
        del self.uses[victim]
        return victim

    def remove(self, key: int) -> None:
        super().remove(key)
        self.recent.remove(key)


class SlowLirs(SlowPolicy):
    """`stack`: S, its top at the end; `queue`: Q; `reminders`: evicted blocks in S by the time of their eviction."""

    def __init__(self, capacity: int, hir: float = 0.01, stack: float = 2.0) -> None:
        self.most_lir = capacity - max(1, int(hir * capacity))
        self.most_in_stack = int(stack * capacity)
        self.stack: list[int] = []
        self.queue: list[int] = []
        self.reminders: list[int] = []
        self.lir: set[int] = set()
        self.held: set[int] = set()

    def to_top(self, key: int) -> None:
        if key in self.stack:
            self.stack.remove(key)
        self.stack.append(key)

    def prune(self) -> None:
        while self.stack and self.stack[0] not in self.lir:
            gone = self.stack.pop(0)
            if gone in self.reminders:
                self.reminders.remove(gone)

    def demote(self) -> None:
        bottom = self.stack.pop(0)
        self.lir.remove(bottom)
        if bottom not in self.held:
            self.queue.append(bottom)
        self.prune()

    def promote(self, key: int) -> None:
        self.lir.add(key)
        if len(self.lir) > self.most_lir:
            self.demote()
        self.prune()

    def bound(self) -> None:
        while len(self.stack) > self.most_in_stack and self.reminders:
            self.stack.remove(self.reminders.pop(0))

    def insert(self, key: int, now: int) -> None:
        if self.most_lir == 0:
            self.queue.append(key)
            return
        again = key in self.stack
        self.to_top(key)
        if again:
            self.reminders.remove(key)
        if again or len(self.lir) < self.most_lir:
            self.promote(key)
        else:
            self.queue.append(key)
        self.bound()

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if key in self.lir:
            self.to_top(key)
            self.prune()
            return
        if key in self.queue:
            self.queue.remove(key)
        if key in self.stack:
            self.to_top(key)
            self.promote(key)
            return
        if key not in self.held:
            self.queue.append(key)
        if self.most_lir:
            self.to_top(key)
            self.bound()

    def evict(self, key: int, now: int, pins: Pins) -> int:
        while not self.queue:
            self.demote()
        victim = self.queue.pop(0)
        if victim in self.stack:
            self.reminders.append(victim)
        return victim

    def pin(self, key: int) -> None:
        self.held.add(key)
        if key in self.queue:
            self.queue.remove(key)

    def unpin(self, key: int) -> None:
        self.held.remove(key)
        if key not in self.lir:
            self.queue.append(key)

    def remove(self, key: int) -> None:
        self.lir.discard(key)
        for among in (self.queue, self.stack):
            if key in among:
                among.remove(key)
        self.prune()


class SlowWTinyLfu(SlowPolicy):
    """`parts`: window, probation, protected: all resident blocks of each; `free`: those of each that may be evicted."""

    def __init__(self, capacity: int, window: float = 0.01) -> None:
        self.most_in_main = capacity - max(1, int(window * capacity))
        self.most = {"protected": self.most_in_main * 4 // 5}
        self.most["probation"] = self.most_in_main - self.most["protected"]
        self.sketch = Sketch(self.most_in_main)
        self.hits = 0
        self.parts: dict[str, set[int]] = {"window": set(), "probation": set(), "protected": set()}
        self.free: dict[str, list[int]] = {"window": [], "probation": [], "protected": []}

    def part_of(self, key: int) -> str:
        return next(name for name, part in self.parts.items() if key in part)

    def leave(self, key: int) -> None:
        name = self.part_of(key)
        self.parts[name].remove(key)
        if key in self.free[name]:
            self.free[name].remove(key)

    def enter(self, key: int, name: str) -> None:
        self.parts[name].add(key)
        self.free[name].append(key)

    def enter_main(self, key: int) -> None:
        full = {name: len(self.parts[name]) >= self.most[name] for name in self.most}
        self.enter(key, "protected" if full["probation"] and not full["protected"] else "probation")

    def insert(self, key: int, now: int) -> None:
        self.enter(key, "window")
        self.sketch.add(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        name = self.part_of(key)
        to = "window" if name == "window" else "protected"
        self.leave(key)
        self.enter(key, to)
        if pinned:
            self.free[to].remove(key)
        if to == "window":
            return
        if len(self.parts["protected"]) > self.most["protected"] and name != "protected" and self.free["protected"]:
            demoted = self.free["protected"][0]
            self.leave(demoted)
            self.enter(demoted, "probation")
        self.sketch.add(key)
        self.hits += 1
        if self.hits >= 32 * self.most_in_main:
            self.hits = 0
            self.sketch.halve()

    def evict(self, key: int, now: int, pins: Pins) -> int:
        while True:
            victims = self.free["probation"] + self.free["protected"]
            if not self.free["window"]:
                self.leave(victims[0])
                return victims[0]
            candidate = self.free["window"][0]
            if len(self.parts["probation"]) + len(self.parts["protected"]) < self.most_in_main:
                self.leave(candidate)
                self.enter_main(candidate)
                self.sketch.add(candidate)
                continue
            out = candidate
            if victims and self.sketch.count(candidate) > self.sketch.count(victims[0]):
                out = victims[0]
            self.leave(out)
            if out != candidate:
                self.leave(candidate)
                self.enter_main(candidate)
            self.sketch.add(candidate)
            return out

    def pin(self, key: int) -> None:
        self.free[self.part_of(key)].remove(key)

    def unpin(self, key: int) -> None:
        self.free[self.part_of(key)].append(key)

    def remove(self, key: int) -> None:
        self.leave(key)


class SlowOptBypass(SlowPolicy):
    def __init__(self, capacity: int, refs: list[int]) -> None:
        self.capacity = capacity
        self.refs = refs
        self.resident: set[int] = set()

    def next_use(self, key: int, now: int) -> int:
        return next((i for i in range(now + 1, len(self.refs)) if self.refs[i] == key), 10**9)

    def insert(self, key: int, now: int) -> None:
        self.resident.add(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        pass

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        farthest = max((self.next_use(block, now) for block in self.resident), default=-1)
        return len(self.resident) < self.capacity or self.next_use(key, now) < farthest

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = max(self.resident, key=lambda block: self.next_use(block, now))
        self.resident.remove(victim)
        return victim
