"""The defects of 0.4.2, each in its smallest run, by its name; and the same run with the defect mended.

That vLLM's own code does the same in each of these runs, `test_against_vllm` says.
"""

from __future__ import annotations

from typing import Any

import pytest

from .cases import DEFECT_CASES
from .kernel import simulated
from .twin import RULES, Twin

#: What is mended, and what is then told: how it ended, how many requests are finished, dropped, recomputed and swapped,
#: CPU blocks leaked, and the defects met.
TOLD: list[tuple[str, set[str], tuple[Any, ...]]] = [
    ("swap-space", set(), ("swap-space", 0, 0, 0, 0, 0, {"swap-space": 1, "spare-block": 1})),
    ("swap-space", {"swap-space"}, ("done", 1, 1, 1, 0, 0, {"no-return": 1, "spare-block": 1})),
    ("livelock", set(), ("livelock", 1, 0, 0, 1, 0, {"livelock": 1, "spare-block": 1})),
    ("livelock", {"livelock"}, ("done", 2, 0, 0, 1, 0, {"spare-block": 1})),
    ("leak", set(), ("done", 0, 1, 0, 1, 10, {"leak": 10, "no-return": 1, "spare-block": 1})),
    ("leak", {"leak"}, ("done", 0, 1, 0, 1, 0, {"no-return": 1, "spare-block": 1})),
    ("no-return", set(), ("done", 0, 1, 1, 0, 0, {"no-return": 1, "spare-block": 1})),
    ("no-return", {"no-return"}, ("done", 1, 0, 10, 0, 0, {"spare-block": 10})),
    ("spare-block", set(), ("done", 1, 0, 10, 0, 0, {"spare-block": 10})),
    ("spare-block", {"spare-block"}, ("done", 1, 0, 0, 0, 0, {})),
]


@pytest.mark.parametrize(("name", "mend", "expected"), TOLD, ids=lambda value: str(value))
def test_a_defect_and_its_mending(name: str, mend: set[str], expected: tuple[Any, ...]) -> None:
    run = simulated(DEFECT_CASES[name].with_settings(mend=frozenset(mend)))
    told = (run.ended, run.finished, run.dropped, run.recomputes, run.swaps, run.leaked_blocks, run.defects)
    assert told == expected
    assert not mend & set(run.defects)
    assert run.culprit == (1 if run.ended != "done" else -1)


@pytest.mark.parametrize("name", DEFECT_CASES)
def test_all_mended(name: str) -> None:
    run = simulated(DEFECT_CASES[name].with_settings(mend=frozenset(DEFECT_CASES)))
    assert (run.ended, run.finished, run.defects) == ("done", len(run.tokens), {})


def test_the_dead_call_leaves_no_trace() -> None:
    """The engine dies before its workers hear of the call: rows, moves and counts are those of the calls before."""
    case = DEFECT_CASES["swap-space"]
    run = simulated(case)
    assert run.calls == len(run.rows) == 18
    assert not len(run.moves)
    assert "spare-block" in RULES
    assert Twin(case).run().ended == "swap-space"
