"""Requests of many blocks, of which the compiled scheduler moves sixteen at a time; the twin does not."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v1 import blocks, lanes
from kvtrace_replay.schedulers.vllm_v1.lanes import LANES
from kvtrace_replay.schedulers.vllm_v1.layout import B_REFS
from kvtrace_traces.compile import njit

from .cases import Case, random_case
from .test_kernel import all_compared

#: Those of `random_case` with large blocks: cut into blocks of 1 and 2 tokens, their prompts have hundreds.
SEEDS = [seed for seed in range(400) if random_case(seed).settings.block_size >= 8]


def cut_finer(seed: int) -> Case:
    """The requests of a case in blocks of one or two tokens, in a pool that holds about as many tokens."""
    case = random_case(seed)
    own, size = case.settings, 1 + seed % 2
    longest = max(len(prompt) + len(output) for prompt, output in case.tokens)
    room = max((own.num_blocks - 1) * own.block_size // size, -(-longest // size))
    return case.with_settings(block_size=size, num_blocks=room + 1)


@pytest.mark.parametrize("chunk", range(3))
def test_the_kernel_equals_the_twin_in_long_runs_of_blocks(chunk: int) -> None:
    seeds = SEEDS[12 * chunk : 12 * (chunk + 1)]
    runs = all_compared({seed: cut_finer(seed) for seed in seeds})
    kinds = [event[1] for run in runs for event in run.events]
    assert kinds.count("evict") > LANES
    assert kinds.count("hit") > 10 * LANES


@njit
def even_and_filled(values: Any, column: int, at: int, begin: int, step: int, but: int) -> tuple[bool, bool]:
    both = lanes.even(values, column, at, begin, step), lanes.even(values, column, at, begin, step, but)
    lanes.fill_even(values, column, at, begin, step)
    return both


@pytest.mark.parametrize("layout", ["line", "columns", "rows"])
def test_sixteen_at_a_time(layout: str) -> None:
    """Compiled, against what the words say; columns that lie row by row are never said to be even."""
    shape: tuple[int, ...] = (50,) if layout == "line" else (50, 3)
    order: Literal["C", "F"] = "F" if layout == "columns" else "C"
    r = np.random.default_rng(1)
    for _ in range(300):
        values = np.zeros(shape, np.int32, order=order)
        values[:] = r.integers(-9, 9, shape)
        column = 0 if layout == "line" else int(r.integers(3))
        at, begin, step, but = (int(r.integers(low, high)) for low, high in ((0, 35), (-2, 9), (-1, 2), (0, LANES)))
        wanted = begin + step * np.arange(LANES)
        place = values if layout == "line" else values[:, column]
        odd = r.choice(["none", "spared", "another"])
        place[at : at + LANES] = wanted
        if odd != "none":
            place[at + (but if odd == "spared" else (but + 1) % LANES)] += 1
        before = values.copy()
        seen = layout != "rows" or not hasattr(even_and_filled, "py_func")  # plain Python looks everywhere
        said = (seen and odd == "none", seen and odd != "another")
        assert even_and_filled(values, column, at, begin, step, but) == said
        (before if layout == "line" else before[:, column])[at : at + LANES] = wanted
        assert values.tolist() == before.tolist()


def test_cached_or_a_closer_look() -> None:
    """A block without an identity is never among those that are said to be cached."""
    blk = np.zeros((40, 6), np.int32, order="F")
    found = set()
    for begin in range(-20, 21):
        for step in range(-3, 4):
            held = begin + step * np.arange(LANES)
            blk[2 : 2 + LANES, 1] = held
            said = blocks.all_cached(blk, 2)
            found.add(said)
            assert not (said and (held == -1).any()), (begin, step)
    assert found == {True, False}
    assert blk[:, B_REFS].sum() == 0
