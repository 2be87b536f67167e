"""A slow, obvious driver for slow policies: what `cache.object_driver` and `cache.prefix_driver` do, in plain Python.

A twin of a policy is a `SlowPolicy`; `check_policy` compares it with the compiled policy of a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.policies import find_policy
from unit.replay.twins import Outcome, tokens_of


class Pins(dict[int, int]):
    """Holds of each resident block; a block that is not resident has -1."""

    def __missing__(self, block: int) -> int:
        return -1


class SlowPolicy:
    """What a policy may be told and asked, as in `kvtrace_replay.policies.registry`. `insert`, `hit` and `evict` are
    the twin's own; of the rest it takes what it needs."""

    def insert(self, key: int, now: int) -> None:
        raise NotImplementedError

    def hit(self, key: int, pinned: bool, now: int) -> None:
        raise NotImplementedError

    def evict(self, key: int, now: int, pins: Pins) -> int:
        raise NotImplementedError

    def pin(self, key: int) -> None:
        pass

    def unpin(self, key: int) -> None:
        pass

    def begin(self, request: int, now: int) -> None:
        pass

    def expire(self, now: int, pins: Pins) -> int:
        return -1

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        return True

    def remove(self, key: int) -> None:
        raise NotImplementedError


@dataclass
class SlowOutcome(Outcome):
    expired: int = 0
    bypassed: int = 0


PolicyFactory = Callable[[int], SlowPolicy]


class _Driver:
    def __init__(self, workload: Workload, factory: PolicyFactory, capacity: float, semantics: str, uses: int) -> None:
        by_content = semantics == "object" and workload.raw is not None
        self.refs: list[int] = (workload.raw if by_content else workload.identities).tolist()  # type: ignore[union-attr]
        self.workload = workload
        self.bounds: list[int] = workload.indptr.tolist()
        # More room than there are blocks changes nothing: a policy is told no more than that.
        self.capacity = int(min(capacity, max(1, distinct_blocks(workload, semantics))))
        self.policy = factory(self.capacity)
        self.uses = uses
        self.asked: dict[int, int] = {}  # how often a missing block was asked for
        self.pins = Pins()
        self.outcome = SlowOutcome(hits=[0] * workload.n_requests)

    def expire(self, now: int) -> None:
        while (dropped := self.policy.expire(now, self.pins)) != -1:
            assert self.pins[dropped] == 0, "expired a block that is held or not resident"
            del self.pins[dropped]
            self.outcome.expired += 1

    def is_wanted(self, key: int, now: int) -> bool:
        """Whether the missing `key` may have a place."""
        if self.uses > 1 and self.asked.get(key, 0) < self.uses - 1:
            self.asked[key] = self.asked.get(key, 0) + 1
            return False
        return self.policy.admit(key, now, self.pins)

    def place(self, key: int, now: int) -> None:
        if len(self.pins) == self.capacity:
            victim = self.policy.evict(key, now, self.pins)
            assert self.pins[victim] == 0, "evicted a block that is held or not resident"
            del self.pins[victim]
            self.outcome.evictions += 1
        self.pins[key] = 0
        self.policy.insert(key, now)

    def run_object(self) -> SlowOutcome:
        for r in range(self.workload.n_requests):
            self.policy.begin(r, self.bounds[r])
            for now in range(self.bounds[r], self.bounds[r + 1]):
                self.expire(now)
                key = self.refs[now]
                if key in self.pins:
                    self.policy.hit(key, False, now)
                    self.outcome.hits[r] += 1
                    self.outcome.token_hits += tokens_of(self.workload, r, now)
                elif self.is_wanted(key, now):
                    self.place(key, now)
                else:
                    self.outcome.bypassed += 1
        return self.outcome

    def run_prefix(self) -> SlowOutcome:
        n = self.workload.n_requests
        events = [e for r in range(1, n + 1) for e in (r, -r)]
        if self.workload.schedule is not None:
            events = self.workload.schedule.tolist()
        held: dict[int, list[int]] = {r: [] for r in range(n)}  # positions at which a request holds a block
        for event in events:
            r = abs(event) - 1
            start, stop = self.bounds[r], self.bounds[r + 1]
            middle = start + int(self.workload.prompt_blocks[r])
            if event > 0:
                self.policy.begin(r, start)
                self.expire(start)
                at = start
                while at < min(middle, start + int(self.workload.hit_cap[r])) and self.refs[at] in self.pins:
                    self.outcome.token_hits += tokens_of(self.workload, r, at)
                    at += 1
                self.outcome.hits[r] = at - start
                held[r] += self.take(r, range(start, middle))
            else:
                held[r] += self.take(r, range(middle, stop))
                for at in sorted(held.pop(r), reverse=True):
                    key = self.refs[at]
                    self.pins[key] -= 1
                    if self.pins[key] == 0:
                        self.policy.unpin(key)
        return self.outcome

    def take(self, r: int, positions: range) -> list[int]:
        found = [at for at in positions if self.refs[at] in self.pins]
        for at in reversed(found):
            self.use_and_pin(at)
        room = self.capacity - sum(holds > 0 for holds in self.pins.values())
        chosen: list[int] = []
        placed: list[int] = []
        for at in positions:
            key = self.refs[at]
            if at in found:
                continue
            if key not in chosen:
                if self.uses > 1 and self.asked.get(key, 0) < self.uses - 1:
                    self.asked[key] = self.asked.get(key, 0) + 1
                    self.outcome.bypassed += 1
                    continue
                if len(chosen) == room:
                    self.outcome.overflows.add(r)
                    continue
                if not self.policy.admit(key, at, self.pins):
                    self.outcome.bypassed += 1
                    continue
                chosen.append(key)
            placed.append(at)
        for at in reversed(placed):
            if self.refs[at] in self.pins:
                self.use_and_pin(at)
            else:
                self.place(self.refs[at], at)
                self.policy.pin(self.refs[at])
                self.pins[self.refs[at]] = 1
        return found + placed

    def use_and_pin(self, at: int) -> None:
        key = self.refs[at]
        self.policy.hit(key, self.pins[key] > 0, at)
        if self.pins[key] == 0:
            self.policy.pin(key)
        self.pins[key] += 1


def run_slow(
    workload: Workload, policy_factory: PolicyFactory, capacity: float, semantics: str, uses: int = 1
) -> SlowOutcome:
    """Replays `workload` with the slow policy that `policy_factory(capacity)` makes; it is told the capacity that the
    compiled policy's `setup` is told: no more than there are blocks."""
    driver = _Driver(workload, policy_factory, capacity, semantics, uses)
    return driver.run_object() if semantics == "object" else driver.run_prefix()


def check_policy(
    workload: Workload, policy: str, policy_factory: PolicyFactory, capacity: float, semantics: str
) -> SlowOutcome:
    """Asserts that the compiled `policy` (as given to `--policy`) does what the slow one does; returns the latter's."""
    expected = run_slow(workload, policy_factory, capacity, semantics, find_policy(policy).uses)
    (row,) = replay(workload, policy, capacity, semantics)
    assert row["why"] is None
    assert replay_requests(workload, policy, capacity, semantics).tolist() == expected.hits
    assert row["token_hits"] == expected.token_hits
    assert row["evictions"] == expected.evictions
    assert row["pin_overflow_requests"] == len(expected.overflows)
    assert row["expired_blocks"] == expected.expired
    assert row["bypassed_blocks"] == expected.bypassed
    return expected
