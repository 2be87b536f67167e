"""`remove`: blocks that leave a policy though it did not choose them, against the slow twins, step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.cache.hooks import admit, begin, evict, expire, hit, insert, pin, remove, unpin
from kvtrace_replay.cache.prepare import prepare
from kvtrace_replay.policies import find_policy, policies
from kvtrace_replay.policies.registry import MAX_STATE, Policy
from kvtrace_traces.compile import njit
from unit.replay.policies import test_scores, twins_queues
from unit.replay.policies.slow_driver import Pins, SlowPolicy
from unit.replay.policies.test_kv_policies import SlowLengthAware, SlowWorkloadAware
from unit.replay.policies.test_queues import is_strict
from unit.replay.policies.twins_scores import SlowOptBypass, SlowTtl, SlowVllm
from unit.replay.twins import make_workload

HIT, PINNED_HIT, INSERT, EVICT, PIN, UNPIN, REMOVE, ADMIT, EXPIRE, BEGIN = range(10)
ABSENT = -1


@njit
def follow(
    tag: Any, steps: Any, pins: Any, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any
) -> int:
    """Tells the policy the `steps` int64[n, 4] (what, key, now, what is to come of it), the last of which is no step;
    returns the number of the first of which something else comes."""
    for i in range(steps.shape[0] - 1):
        what, key, now, expected = steps[i, 0], np.intp(np.uint32(steps[i, 1])), steps[i, 2], steps[i, 3]
        if what == HIT or what == PINNED_HIT:  # noqa: SIM109  as in a driver
            hit(tag, key, what == PINNED_HIT, now, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] += what == PINNED_HIT
        elif what == INSERT:
            insert(tag, key, now, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = 0
        elif what == EVICT:
            victim = evict(tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if victim != expected:
                return i
            pins[victim] = ABSENT
        elif what == PIN:
            pin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = 1
        elif what == UNPIN:
            pins[key] -= 1
            if pins[key] == 0:
                unpin(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
        elif what == REMOVE:
            remove(tag, key, s0, s1, s2, s3, s4, s5, s6, s7)
            pins[key] = ABSENT
        elif what == ADMIT:
            if admit(tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7) != (expected != 0):
                return i
        elif what == EXPIRE:
            dropped = expire(tag, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if dropped != expected:
                return i
            if dropped >= 0:
                pins[dropped] = ABSENT
        elif what == BEGIN:
            begin(tag, key, now, s0, s1, s2, s3, s4, s5, s6, s7)
    return steps.shape[0] - 1


class SlowBypass(SlowOptBypass):
    """Of blocks never used again the one used longer ago goes; a block may come in later than at its last use."""

    def __init__(self, capacity: int, refs: list[int]) -> None:
        super().__init__(capacity, refs)
        self.last: dict[int, int] = {}

    def insert(self, key: int, now: int) -> None:
        super().insert(key, now)
        self.last[key] = now

    def hit(self, key: int, pinned: bool, now: int) -> None:
        self.last[key] = now

    def admit(self, key: int, now: int, pins: Pins) -> bool:
        farthest = max((self.next_use(block, self.last[block]) for block in self.resident), default=-1)
        return len(self.resident) < self.capacity or self.next_use(key, now) < farthest

    def evict(self, key: int, now: int, pins: Pins) -> int:
        victim = max(self.resident, key=lambda block: (self.next_use(block, self.last[block]), -self.last[block]))
        self.resident.remove(victim)
        return victim

    def remove(self, key: int) -> None:
        self.resident.remove(key)


class SlowOpt(SlowBypass):
    def admit(self, key: int, now: int, pins: Pins) -> bool:
        return True


def shared_tag(entry: Policy) -> Any:
    """The tag of the first policy with the same functions (`clock` for `clock2`, whose state alone is another):
    `follow` then is compiled once for both."""
    return next(other.tag for other in policies() if other.functions == entry.functions)


Factory = Callable[[Any, str, int], SlowPolicy]
TWINS: dict[str, Factory] = {
    **{name: lambda w, s, c, make=make: make(w, s)(c) for name, make in test_scores.TWINS.items()},
    **{name: lambda w, s, c, make=make: make(c, is_strict(w, c, s)) for name, make in twins_queues.TWINS.items()},
    "lru": lambda w, s, c: SlowVllm(c),
    "fifo": lambda w, s, c: twins_queues.Fifo(c),
    "opt-bypass": lambda w, s, c: SlowBypass(c, (w.identities if w.raw is None else w.raw).tolist()),
    "opt": lambda w, s, c: SlowOpt(c, w.identities.tolist()),
    "ttl:seconds=3": lambda w, s, c: SlowTtl(c, w, 3.0),
    "length-aware": lambda w, s, c: SlowLengthAware(w, s),
    "workload-aware:samples=3": lambda w, s, c: SlowWorkloadAware(w, s, 60.0, 3),
}
# With holds, `opt` looks at admissions; it is tested in tiers.
CASES = [
    (policy, semantics)
    for policy in TWINS
    for semantics in ("object", "prefix")
    if semantics in find_policy(policy).semantics and (policy, semantics) != ("opt", "prefix")
]


def random_life(
    rng: random.Random, workload: Any, twin: SlowPolicy, capacity: int, holding: bool
) -> tuple[list[list[int]], int]:
    """References of one-block requests, each held for a while where `holding`, and removals in between: the steps,
    with what the slow policy does at each; and how often a block was evicted after the first removal."""
    steps: list[list[int]] = []
    pins = Pins()
    held: list[int] = []
    evicted_after = removals = 0
    rate = rng.choice([0.0, 0.1, 0.4])
    longest = rng.randint(0, capacity - 1)
    for now, key in enumerate(workload.identities.tolist()):
        while held and (len(held) > longest or rng.random() < 0.3):
            block = held.pop(rng.randrange(len(held)))
            pins[block] -= 1
            if pins[block] == 0:
                twin.unpin(block)
            steps.append([UNPIN, block, now, 0])
        often = 0.8 if rng.random() < 0.05 else rate  # now and then most blocks go at once
        while rng.random() < often and (idle := [block for block, holds in pins.items() if holds == 0]):
            block = rng.choice(idle)
            del pins[block]
            twin.remove(block)
            steps.append([REMOVE, block, now, 0])
            removals += 1
        twin.begin(now, now)
        steps.append([BEGIN, now, now, 0])
        dropped = 0
        while dropped >= 0:
            dropped = twin.expire(now, pins)
            steps.append([EXPIRE, 0, now, dropped])
            if dropped >= 0:
                del pins[dropped]
        if key in pins:
            twin.hit(key, pins[key] > 0, now)
            if pins[key] > 0:
                steps.append([PINNED_HIT, key, now, 0])
                pins[key] += 1
                held.append(key)
                continue
            steps.append([HIT, key, now, 0])
        else:
            admitted = twin.admit(key, now, pins)
            steps.append([ADMIT, key, now, admitted])
            if not admitted:
                continue
            if len(pins) == capacity:
                victim = twin.evict(key, now, pins)
                assert pins[victim] == 0
                del pins[victim]
                steps.append([EVICT, key, now, victim])
                evicted_after += removals > 0
            twin.insert(key, now)
            pins[key] = 0
            steps.append([INSERT, key, now, 0])
        if holding:
            twin.pin(key)
            pins[key] = 1
            held.append(key)
            steps.append([PIN, key, now, 0])
    return steps, evicted_after


@pytest.mark.parametrize(("policy", "semantics"), CASES)
def test_thousands_of_random_lives(policy: str, semantics: str) -> None:
    rng = random.Random(f"{policy} {semantics} removal")
    entry = find_policy(policy)
    tag = shared_tag(entry)
    evictions = 0
    for _ in range(300):
        blocks = rng.choice([3, 12, 60])
        skew = rng.choice([0.0, 1.0, 2.0])
        drawn = rng.choices(range(blocks), [(i + 1) ** -skew for i in range(blocks)], k=rng.choice([60, 250]))
        numbers: dict[int, int] = {}
        workload = make_workload([[numbers.setdefault(block, len(numbers))] for block in drawn])
        times = np.cumsum([rng.choice([0, 1, 1, 2, 5]) for _ in drawn]).astype(np.int64) * 10**9
        classes = np.array([rng.randrange(3) for _ in drawn], np.int32)
        workload = replace(workload, arrival_ns=times, request_class=classes)
        capacity = min(rng.choice([1, 2, 4, 7, 15, 25, 25]), len(numbers))
        twin = TWINS[policy](workload, semantics, capacity)
        steps, evicted_after = random_life(rng, workload, twin, capacity, semantics == "prefix")
        evictions += evicted_after
        stream = replace(prepare(workload, semantics, 0.0).stream, removes=True)
        state = entry.state(stream, capacity)
        padding = (np.zeros(0, np.int32),) * (MAX_STATE - len(state))
        pins = np.full(stream.n_identities, ABSENT, np.int32)
        told = np.array([*steps, [0, 0, 0, 0]], np.int64)
        assert follow(tag, told, pins, *state, *padding) == len(steps)
    assert evictions > 30


def test_every_policy_that_tiers_can_have_is_tested_here() -> None:
    able = {entry.name for entry in policies() if {"object", "prefix"} & set(entry.semantics)}
    assert able == {find_policy(policy).name for policy in TWINS}
    assert all(find_policy(policy).removable for policy in able)
