"""The compiled scheduler with a connector equals its twin, keeps its laws, and refuses what it does not take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Offload
from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload, tier_blocks
from kvtrace_traces.errors import UsageError

from .kernel import as_recorded, as_settings
from .kernel_offload import difference, in_words, kernel_run, twin_in_words
from .offload_cases import offload_case
from .twin_offload import simulate
from .twin_words import CannotFinish

SEEDS = 300


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_kernel_equals_the_twin(asynchronous: bool) -> None:
    """Same transfers, same chunks dropped from the tier, same hits, steps and block events, one by one."""
    wrong, loads, evicted, endless = [], 0, 0, 0
    for seed in range(SEEDS):
        case, offload = offload_case(seed, asynchronous)
        try:
            theirs: dict[str, Any] | None = twin_in_words(simulate(case.requests, case.settings, offload))
        except CannotFinish:
            theirs = None
        try:
            run = kernel_run(case, offload)
        except UsageError:
            endless += 1
            if theirs is not None:
                wrong.append(f"seed {seed}: the kernel never ends, the twin does")
            continue
        if theirs is None:
            wrong.append(f"seed {seed}: the twin never ends, the kernel does")
        elif found := difference(in_words(case, run), theirs):
            wrong.append(f"seed {seed}: {found}, {offload}")
        loads += run.loaded_blocks
        evicted += run.tier_evictions
    assert not wrong, "\n".join(wrong)
    assert loads > 500
    assert evicted > 500
    assert endless < 10


def test_laws() -> None:
    """Whatever is asked, without a log: counts agree with one another, and the tier never holds more than it has."""
    for seed in range(0, SEEDS, 7):
        case, offload = offload_case(seed, None)
        try:
            run, logged = kernel_run(case, offload, events=False), kernel_run(case, offload)
        except UsageError:
            continue
        assert (run.transfers == logged.transfers).all()
        assert (run.requests == logged.requests).all()
        assert not run.logs
        assert run.finished == len(case.requests)
        loads = run.transfers[:, 1] == 1
        assert run.loaded_blocks == run.transfers[loads, 3].sum() == run.requests[:, 6].sum()
        assert run.stored_blocks == run.transfers[~loads, 3].sum() == run.requests[:, 5].sum()
        assert run.loaded_tokens == run.transfers[loads, 4].sum()
        kept = run.stored_blocks // offload.blocks_per_chunk - run.tier_evictions
        assert 0 <= kept <= offload.chunks
        # All ends of transfers are heard of before the engine rests, but for none.
        assert (run.transfers[:, 5] >= run.transfers[:, 0] - 1).all()


def test_without_room_for_a_chunk_nothing_is_stored_and_nothing_changes() -> None:
    """A tier that refuses all is no tier: the same steps as with one that is never asked."""
    case, _ = offload_case(4, False)
    source, settings = as_recorded(case), as_settings(case.settings)
    never = simulate_offload(source, settings, Offload(blocks=8, store_threshold=1000), events=True)
    assert never.stored_blocks == never.loaded_blocks == 0
    plain = simulate_offload(source, settings, Offload(blocks=1, store_threshold=10**6), events=True)
    assert (plain.logs["events"] == never.logs["events"]).all()


@pytest.mark.parametrize(
    ("offload", "words"),
    [
        (Offload(blocks=0), "blocks 0 must be a whole number from 1"),
        (Offload(blocks=8, policy="fifo"), "--offload-policy fifo is none of lru, arc"),
        (Offload(blocks=1, blocks_per_chunk=2), "no room for a chunk"),
        (Offload(blocks=8, steps=-1), "steps -1"),
    ],
)
def test_what_the_connector_does_not_take(offload: Offload, words: str) -> None:
    case, _ = offload_case(1)
    with pytest.raises(UsageError, match=words):
        simulate_offload(as_recorded(case), as_settings(case.settings), offload)


def test_what_is_not_simulated_with_a_tier() -> None:
    case, _ = offload_case(1)
    source, settings = as_recorded(case), as_settings(case.settings)
    for changed, words in (
        (replace(settings, policy="lru"), "--policy"),
        (replace(settings, num_blocks=2), "can never serve"),
    ):
        with pytest.raises(UsageError, match=words):
            simulate_offload(source, changed, Offload(blocks=8))
    with pytest.raises(UsageError, match="--arrivals"):
        simulate_offload(source, settings, Offload(blocks=8), arrivals="time")


def test_bytes_follow_the_header() -> None:
    case, _ = offload_case(1)
    source, settings = as_recorded(case), as_settings(case.settings)
    assert simulate_offload(source, settings, Offload(blocks=8)).stored_bytes is None
    with pytest.raises(UsageError, match="--cpu-offload"):
        tier_blocks("1MiB", source, settings.block_size)
    source.header["bytes_per_block"] = 4096
    assert tier_blocks("1MiB", source, settings.block_size) == 256
    assert tier_blocks("1MiB", source, 2 * settings.block_size) == 128
    assert tier_blocks("2k", source, settings.block_size) == 2000
    run = simulate_offload(source, settings, Offload(blocks=80))
    assert run.stored_bytes == 4096 * run.stored_blocks > 0
    assert np.issubdtype(run.transfers.dtype, np.integer)
