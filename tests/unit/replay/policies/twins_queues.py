"""Slow twins of the classic policies: lists and dictionaries, the oldest block first, one rule a line.

What a hold means is the rule of each policy's file: a held block whose turn it is to go is set aside until it is let
go; lists ordered by recency, and counts, do not know held blocks at all.

`strict`: with the oddities of libCacheSim, in `object` semantics and where not all blocks fit.
"""

from __future__ import annotations

from collections.abc import Callable

from unit.replay.policies.slow_driver import Pins, SlowPolicy


class Fifo(SlowPolicy):
    """The block placed first of those that nobody holds."""

    def __init__(self, capacity: int) -> None:
        self.queue: list[int] = []

    def insert(self, key: int, now: int) -> None:
        self.queue.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        pass

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = next(block for block in self.queue if pins[block] == 0)
        self.queue.remove(victim)
        return victim

    def remove(self, key: int) -> None:
        self.queue.remove(key)


class Clock(SlowPolicy):
    def __init__(self, capacity: int, most: int = 1) -> None:
        self.most = most
        self.queue: list[int] = []
        self.count: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        self.queue.append(key)
        self.count[key] = 0

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.count[key] = min(self.count[key] + 1, self.most)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        while True:
            candidate = self.queue.pop(0)
            if self.count[candidate] > 0:
                self.count[candidate] -= 1
                self.queue.append(candidate)
            elif pins[candidate] == 0:
                return candidate

    def unpin(self, key: int) -> None:
        if key not in self.queue:
            self.queue.append(key)

    def remove(self, key: int) -> None:
        self.queue.remove(key)


class Sieve(SlowPolicy):
    def __init__(self, capacity: int) -> None:
        self.queue: list[int] = []
        self.hand = 0  # an index of the queue
        self.used: set[int] = set()

    def insert(self, key: int, now: int) -> None:
        self.queue.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.used.add(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        while True:
            candidate = self.queue[self.hand]
            if candidate in self.used:
                self.used.remove(candidate)
                self.hand = (self.hand + 1) % len(self.queue)
                continue
            self.queue.pop(self.hand)
            if self.hand == len(self.queue):
                self.hand = 0
            if pins[candidate] == 0:
                return candidate

    def unpin(self, key: int) -> None:
        if key not in self.queue:
            self.queue.append(key)

    def remove(self, key: int) -> None:
        """The hand stays before the block that it was to look at next; behind the newest it is back at the oldest."""
        at = self.queue.index(key)
        self.queue.pop(at)
        self.used.discard(key)
        if at < self.hand:
            self.hand -= 1
        elif self.hand == len(self.queue):
            self.hand = 0


class S3Fifo(SlowPolicy):
    def __init__(
        self, capacity: int, small: float = 0.1, ghost: float = 0.9, strict: bool = True, threshold: int = 2
    ) -> None:
        self.threshold = threshold
        self.stores = not strict or int(capacity * small) > 1
        self.small_limit = max(1, int(capacity * small))
        self.main_limit = capacity - int(capacity * small)
        self.ghost_limit = int(capacity * ghost)
        self.small: list[int] = []
        self.main: list[int] = []
        self.returned: list[int] = []
        self.ghost: list[int] = []
        self.aside_small: set[int] = set()
        self.aside_main: set[int] = set()
        self.uses: dict[int, int] = {}
        self.promised: set[int] = set()  # was a ghost when its eviction began
        self.has_evicted = False

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        return self.stores

    def insert(self, key: int, now: int) -> None:
        self.uses[key] = 0
        in_small = len(self.small) + len(self.returned) + len(self.aside_small)
        if key in self.promised or key in self.ghost:
            self.promised.discard(key)
            if key in self.ghost:
                self.ghost.remove(key)
            self.main.append(key)
        elif not self.has_evicted and in_small >= self.small_limit:
            self.main.append(key)
        else:
            self.small.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.uses[key] += 1

    def evict(self, key: int, now: int, pins: Pins) -> int:
        self.has_evicted = True
        if key in self.ghost:
            self.ghost.remove(key)
            self.promised.add(key)
        victim = None
        while victim is None:
            if (len(self.main) + len(self.aside_main) > self.main_limit and self.main) or not (
                self.small or self.returned
            ):
                victim = self.evict_main(pins)
            else:
                victim = self.evict_small(pins)
        return victim

    def evict_small(self, pins: Pins) -> int | None:
        while self.returned or self.small:
            candidate = (self.returned or self.small).pop(0)
            if self.uses[candidate] >= self.threshold:
                self.uses[candidate] = 0
                self.main.append(candidate)
            elif pins[candidate] > 0:
                self.aside_small.add(candidate)
            else:
                if self.ghost_limit > 0:
                    if len(self.ghost) == self.ghost_limit:
                        self.ghost.pop(0)
                    self.ghost.append(candidate)
                return candidate
        return None

    def evict_main(self, pins: Pins) -> int | None:
        while self.main:
            candidate = self.main.pop(0)
            if self.uses[candidate] > 0:
                self.uses[candidate] = min(self.uses[candidate], 3) - 1
                self.main.append(candidate)
            elif pins[candidate] > 0:
                self.aside_main.add(candidate)
            else:
                return candidate
        return None

    def unpin(self, key: int) -> None:
        if key in self.aside_small:
            self.aside_small.remove(key)
            self.returned.append(key)
        elif key in self.aside_main:
            self.aside_main.remove(key)
            self.main.append(key)

    def remove(self, key: int) -> None:
        next(queue for queue in (self.small, self.returned, self.main) if key in queue).remove(key)


class TwoQ(SlowPolicy):
    def __init__(self, capacity: int, a_in: float = 0.25, a_out: float = 0.5, strict: bool = True) -> None:
        self.stores = not strict or int(capacity * a_in) > 0
        self.in_limit = int(capacity * a_in)
        self.out_limit = int(capacity * a_out)
        self.a_in: list[int] = []
        self.returned: list[int] = []
        self.aside: set[int] = set()
        self.a_out: list[int] = []
        self.a_m: list[int] = []
        self.held_m: set[int] = set()
        self.promised: set[int] = set()

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        return self.stores

    def insert(self, key: int, now: int) -> None:
        if key in self.promised or key in self.a_out:
            self.promised.discard(key)
            if key in self.a_out:
                self.a_out.remove(key)
            self.a_m.append(key)
        else:
            self.a_in.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if key in self.a_m:
            self.a_m.remove(key)
            self.a_m.append(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        if key in self.a_out:
            self.a_out.remove(key)
            self.promised.add(key)
        while True:
            over = len(self.a_in) + len(self.returned) + len(self.aside) > self.in_limit
            if (over and (self.a_in or self.returned)) or not self.a_m:
                candidate = (self.returned or self.a_in).pop(0)
                if pins[candidate] > 0:
                    self.aside.add(candidate)
                    continue
                if self.out_limit > 0:
                    if len(self.a_out) == self.out_limit:
                        self.a_out.pop(0)
                    self.a_out.append(candidate)
                return candidate
            return self.a_m.pop(0)

    def pin(self, key: int) -> None:
        if key in self.a_m:
            self.a_m.remove(key)
            self.held_m.add(key)

    def unpin(self, key: int) -> None:
        if key in self.held_m:
            self.held_m.remove(key)
            self.a_m.append(key)
        elif key in self.aside:
            self.aside.remove(key)
            self.returned.append(key)

    def remove(self, key: int) -> None:
        next(queue for queue in (self.a_in, self.returned, self.a_m) if key in queue).remove(key)


class Slru(SlowPolicy):
    def __init__(self, capacity: int, segments: int = 4, strict: bool = True) -> None:
        self.stores = not strict or capacity // segments > 0
        self.sheds = strict and capacity % segments > 0
        self.due = False  # the lowest segment is to drop what is above its length
        self.limit = capacity // segments
        self.segments: list[list[int]] = [[] for _ in range(segments)]
        self.level: dict[int, int] = {}

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        return self.stores

    def enter(self, key: int) -> None:
        at = self.level[key]
        self.segments[at].append(key)
        while at > 0 and len(self.segments[at]) > self.limit:
            demoted = self.segments[at].pop(0)
            at -= 1
            self.level[demoted] = at
            self.segments[at].append(demoted)
            if at == 0 and self.sheds:
                self.due = True

    def expire(self, now: int, pins: Pins) -> int:
        if self.due and len(self.segments[0]) > self.limit:
            return self.segments[0].pop(0)
        self.due = False
        return -1

    def insert(self, key: int, now: int) -> None:
        room = [i for i, segment in enumerate(self.segments) if len(segment) < self.limit]
        self.level[key] = room[0] if room else 0
        self.segments[self.level[key]].append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if not pinned:
            self.segments[self.level[key]].remove(key)
        self.level[key] = min(self.level[key] + 1, len(self.segments) - 1)
        if not pinned:
            self.enter(key)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        return next(segment for segment in self.segments if segment).pop(0)

    def pin(self, key: int) -> None:
        self.segments[self.level[key]].remove(key)

    def unpin(self, key: int) -> None:
        self.enter(key)

    def remove(self, key: int) -> None:
        self.segments[self.level[key]].remove(key)


class Arc(SlowPolicy):
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.p = 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.held: dict[int, int] = {}  # block -> 1 or 2, the list it is of
        self.promised: set[int] = set()

    def size(self, which: int) -> int:
        return len((self.t1, self.t2)[which - 1]) + list(self.held.values()).count(which)

    def adapt(self, key: int) -> int:
        """Forgets the ghost `key`; returns the list it was in, 0 for none."""
        if key in self.b1:
            self.p = min(self.p + max(len(self.b2) / len(self.b1), 1.0), self.capacity)
            self.b1.remove(key)
            return 1
        if key in self.b2:
            self.p = max(self.p - max(len(self.b1) / len(self.b2), 1.0), 0.0)
            self.b2.remove(key)
            return 2
        return 0

    def replace(self, in_b2: bool) -> int:
        n = self.size(1)
        from_t1 = (n > 0 and (n > self.p or (n == self.p and in_b2))) or self.size(2) == 0
        if (from_t1 and self.t1) or not self.t2:
            victim = self.t1.pop(0)
            self.b1.append(victim)
        else:
            victim = self.t2.pop(0)
            self.b2.append(victim)
        return victim

    def evict(self, key: int, now: int, pins: Pins) -> int:
        was = self.adapt(key)
        if was:
            self.promised.add(key)
            return self.replace(was == 2)
        if key in self.promised:
            return self.replace(False)
        if self.size(1) + len(self.b1) >= self.capacity:
            if not self.b1 and self.t1:
                return self.t1.pop(0)
            if self.b1:
                self.b1.pop(0)
        elif self.size(1) + self.size(2) + len(self.b1) + len(self.b2) >= 2 * self.capacity and self.b2:
            self.b2.pop(0)
        return self.replace(False)

    def insert(self, key: int, now: int) -> None:
        if key in self.promised or self.adapt(key):
            self.promised.discard(key)
            self.t2.append(key)
        else:
            self.t1.append(key)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        if pinned:
            self.held[key] = 2
        else:
            (self.t1 if key in self.t1 else self.t2).remove(key)
            self.t2.append(key)

    def pin(self, key: int) -> None:
        self.held[key] = 1 if key in self.t1 else 2
        (self.t1 if key in self.t1 else self.t2).remove(key)

    def unpin(self, key: int) -> None:
        (self.t1 if self.held.pop(key) == 1 else self.t2).append(key)

    def remove(self, key: int) -> None:
        (self.t1 if key in self.t1 else self.t2).remove(key)


class Lfu(SlowPolicy):
    ages = False

    def __init__(self, capacity: int) -> None:
        self.count: dict[int, int] = {}
        self.priority: dict[int, int] = {}
        self.stamp: dict[int, int] = {}
        self.clock = 0
        self.age = 0

    def use(self, key: int, counts: int) -> None:
        self.clock += 1
        self.count[key] += counts
        self.priority[key] = self.count[key] + self.age
        self.stamp[key] = self.clock

    def insert(self, key: int, now: int) -> None:
        self.count[key] = 0
        self.use(key, 1)

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.use(key, 1)

    def evict(self, key: int, now: int, pins: Pins) -> int:
        free = [block for block in self.count if pins[block] == 0]
        victim = min(free, key=lambda block: (self.priority[block], self.stamp[block]))
        if self.ages:
            self.age = self.priority[victim]
        del self.count[victim]
        return victim

    def unpin(self, key: int) -> None:
        self.use(key, 0)

    def remove(self, key: int) -> None:
        del self.count[key]


class Lfuda(Lfu):
    ages = True


TWINS: dict[str, Callable[[int, bool], SlowPolicy]] = {
    "clock": lambda capacity, strict: Clock(capacity),
    "clock2": lambda capacity, strict: Clock(capacity, most=3),
    "sieve": lambda capacity, strict: Sieve(capacity),
    "s3fifo": lambda capacity, strict: S3Fifo(capacity, strict=strict),
    "2q": lambda capacity, strict: TwoQ(capacity, strict=strict),
    "slru": lambda capacity, strict: Slru(capacity, strict=strict),
    "arc": lambda capacity, strict: Arc(capacity),
    "lfu": lambda capacity, strict: Lfu(capacity),
    "lfuda": lambda capacity, strict: Lfuda(capacity),
}
