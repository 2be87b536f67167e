"""Whom the compiled scheduler preempts by rules that are not the engine's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.vllm_v1.layout import VICTIMS
from kvtrace_replay.timing.profile import Model, Profile

from .cases import random_case
from .kernel import by_arrival, difference, kernel_run, twin_in_words
from .twin import _Engine
from .twin_words import CannotFinish, Live


class _Chooses(_Engine):
    """The plain scheduler with another rule."""

    def __init__(self, case: Any, rule: str) -> None:
        super().__init__(case.requests, case.settings, None)
        came = {number: place for place, number in enumerate(by_arrival(case))}
        keys: dict[str, Any] = {
            "last": lambda one: came[one.number],
            "first": lambda one: -came[one.number],
            "fewest-blocks": lambda one: -len(one.table),
            "most-blocks": lambda one: len(one.table),
            "lowest-priority": lambda one: (one.request.priority, one.request.arrival_time),
            "cheapest": lambda one: -one.computed,
        }
        self.key = lambda one: (keys[rule](one), came[one.number])

    def _choose_victim(self) -> Live:
        return max(self.running, key=self.key)


@pytest.mark.parametrize("rule", VICTIMS[1:])
def test_the_victim_is_the_rules(rule: str) -> None:
    preemptions = differs = 0
    for seed in range(120):
        case = random_case(seed, NEWEST, policy="fcfs")
        try:
            theirs = _Chooses(case, rule).run()
            native = _Engine(case.requests, case.settings, None).run()
        except CannotFinish:
            continue
        assert difference(kernel_run(case, victim=rule), twin_in_words(theirs)) is None, seed
        preemptions += len(theirs.preemptions)
        differs += theirs.preemptions != native.preemptions
    assert preemptions > 100
    # In the order of arrival, the last to come is the last to run.
    assert differs > 5 or rule == "last"


def profile_of(r: random.Random) -> Profile:
    """Some costs of prefill, also none."""
    costs = {name: r.choice([0.0, 1e-3, 1.0, 640.0]) for name in ("prefill_token", "prefill_pair")}
    return Profile(
        "some", "trace", "cpu", Model("m", 2), {"call": 1e6, "decode_row": 1.0, "decode_context": 1.0, **costs}
    )


def test_the_cheapest_is_the_one_by_any_profile() -> None:
    """Who has the fewest tokens computed is the cheapest to prefill again, attention and all, whatever the costs."""
    r = random.Random(5)
    for _ in range(2000):
        profile, computed = profile_of(r), [r.randint(0, r.choice([4, 5000])) for _ in range(r.randint(1, 8))]
        costs = [profile.recompute_ns(tokens) for tokens in computed]
        assert costs[computed.index(min(computed))] == min(costs)


class _CheapestBy(_Chooses):
    """The plain scheduler that asks a profile."""

    def __init__(self, case: Any, profile: Profile) -> None:
        super().__init__(case, "cheapest")
        came = {number: place for place, number in enumerate(by_arrival(case))}
        self.key = lambda one: (-profile.recompute_ns(one.computed), came[one.number])


def test_victims_by_a_profile_are_those_by_tokens() -> None:
    preemptions, r = 0, random.Random(6)
    for seed in range(60):
        case, profile = random_case(seed, NEWEST, policy="fcfs"), profile_of(r)
        if not profile.costs["prefill_token"]:
            continue
        try:
            theirs = _CheapestBy(case, profile).run()
        except CannotFinish:
            continue
        assert difference(kernel_run(case, victim="cheapest"), twin_in_words(theirs)) is None, seed
        preemptions += len(theirs.preemptions)
    assert preemptions > 40
