"""Whom the compiled scheduler preempts by rules that are not the engine's."""

from __future__ import annotations

from typing import Any

import pytest

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.vllm_v1.layout import VICTIMS

from .cases import random_case
from .kernel import by_arrival, difference, kernel_run, twin_in_words
from .twin import CannotFinish, Live, _Engine


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
