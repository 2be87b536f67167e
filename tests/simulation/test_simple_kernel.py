"""The compiled scheduler with the simple connector equals its twin, keeps its laws, and refuses what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import SimpleOffload
from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload
from kvtrace_traces.errors import UsageError

from .cases import Case
from .kernel import as_recorded, as_settings
from .kernel_offload import difference
from .kernel_simple import in_words, kernel_run, twin_in_words
from .offload_cases import offload_case, simple_case
from .twin_simple import Simple, simulate
from .twin_words import CannotFinish

SEEDS = 80


def twin_told(case: Case, simple: Simple) -> dict[str, Any] | None:
    try:
        return twin_in_words(simulate(case.requests, case.settings, simple))
    except CannotFinish:
        return None


@pytest.mark.parametrize("lazy", [False, True], ids=["fill", "eviction"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_kernel_equals_the_twin(asynchronous: bool, lazy: bool) -> None:
    """Same transfers, same blocks of the host, same hits, steps and block events, one by one."""
    wrong, loads, evicted, endless = [], 0, 0, 0
    for seed in range(SEEDS):
        case, _ = offload_case(seed, asynchronous)
        simple = simple_case(seed, lazy)
        theirs = twin_told(case, simple)
        try:
            run = kernel_run(case, simple)
        except UsageError:
            endless += 1
            if theirs is not None:
                wrong.append(f"seed {seed}: the kernel never ends, the twin does")
            continue
        if theirs is None:
            wrong.append(f"seed {seed}: the twin never ends, the kernel does")
        elif found := difference(in_words(case, run), theirs):
            wrong.append(f"seed {seed}: {found}, {simple}")
        loads += run.loaded_blocks
        evicted += run.tier_evictions
    assert not wrong, "\n".join(wrong)
    assert loads > 200
    assert evicted > 200
    assert endless < 5


def test_laws() -> None:
    """Whatever is asked, without a log: counts agree with one another, and no block is owned twice or lost."""
    for seed in range(SEEDS):
        case, _ = offload_case(seed, None)
        simple = simple_case(seed, bool(seed % 2))
        try:
            run, logged = kernel_run(case, simple, events=False), kernel_run(case, simple)
        except UsageError:
            continue
        assert (run.transfers == logged.transfers).all()
        assert (run.requests == logged.requests).all()
        assert not run.logs
        assert run.finished == len(case.requests)
        loads = run.transfers[:, 1] == 1
        assert run.loaded_blocks == run.transfers[loads, 3].sum() == run.requests[:, 6].sum()
        assert run.stored_blocks == run.transfers[~loads, 3].sum()
        assert run.requests[:, 5].sum() == (0 if simple.lazy else run.stored_blocks)
        assert run.loaded_tokens == run.transfers[loads, 4].sum() == run.loaded_blocks * case.settings.block_size
        assert (run.transfers[~loads, 2] < 0).all() == (simple.lazy or not run.stored_blocks)
        assert 0 <= run.stored_blocks - run.tier_evictions <= simple.chunks
        taken: set[int] = set()
        for op, block, _ in logged.logs["host"].tolist():
            if op < 2:  # take, pin
                assert block not in taken
                taken.add(block)
            elif op == 2:
                taken.remove(block)
        if not (run.transfers[:, 5] < 0).any():
            assert not taken
        if not case.settings.prefix_caching:
            assert not len(run.transfers)


def without_outputs(source: Recorded, size: int) -> Recorded:
    """As an import knows it: what was generated is not told."""
    at, lengths = source.chain_at, source.prompt // size
    parts = [source.chain[a : a + n] for a, n in zip(at[:-1].tolist(), lengths.tolist(), strict=True)]
    return replace(source, chain=np.concatenate(parts), chain_at=np.concatenate([[0], np.cumsum(lengths)]))


def test_what_is_not_known_is_stored_once() -> None:
    """Blocks whose content the trace does not know go out, too, each once while the host keeps it."""
    many = 0
    for seed in range(1, 40):
        case, _ = offload_case(seed, bool(seed % 2))
        if not case.settings.prefix_caching:
            continue
        source = without_outputs(as_recorded(case), case.settings.block_size)
        settings = as_settings(case.settings)
        try:
            run = simulate_offload(source, settings, SimpleOffload(blocks=5000, store="eviction"), events=True)
        except UsageError:
            continue
        events, cached = run.logs["events"], run.logs["host"][run.logs["host"][:, 0] == 3]
        made = int((events[:, 1] == 2).sum())  # fills
        assert run.stored_blocks <= made
        many += int((cached[:, 2] == -2).sum())
        assert int((cached[:, 2] == -2).sum()) <= int(((events[:, 1] == 2) & (events[:, 4] == -2)).sum())
    assert many > 30


def test_without_room_nothing_is_stored() -> None:
    """A host whose only block is the null block."""
    case, _ = offload_case(4, False)
    for store in ("fill", "eviction"):
        offload = SimpleOffload(blocks=1, store=store)
        run = simulate_offload(as_recorded(case), as_settings(case.settings), offload)
        assert run.stored_blocks == run.loaded_blocks == 0
        assert run.finished == len(case.requests)


@pytest.mark.parametrize(
    ("offload", "words"),
    [
        (SimpleOffload(blocks=0), "blocks 0 must be a whole number from 1"),
        (SimpleOffload(blocks=8, store="never"), "--offload-store never is none of fill, eviction"),
        (SimpleOffload(blocks=8, steps=-1), "steps -1"),
        (SimpleOffload(blocks=8, runner=3), "runner 3 is none of 1, 2"),
    ],
)
def test_what_the_connector_does_not_take(offload: SimpleOffload, words: str) -> None:
    case, _ = offload_case(1)
    with pytest.raises(UsageError, match=words):
        simulate_offload(as_recorded(case), as_settings(case.settings), offload)
