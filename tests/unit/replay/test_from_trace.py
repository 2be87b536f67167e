"""From a trace to a workload: strides, caps, schedules. The trace is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from kvtrace_replay import from_trace, replay_requests
from kvtrace_traces.errors import UsageError


def fake_trace(
    chains: list[list[int]],
    *,
    prompt: list[int],
    output: list[int | None] | None = None,
    first: list[int | None] | None = None,
    finish: list[int | None] | None = None,
    finish_ns: list[int | None] | None = None,
    lookups: list[tuple[int, int]] = (),  # type: ignore[assignment]
    raw: list[int] | None = None,
    **header: Any,
) -> SimpleNamespace:
    n = len(chains)
    lengths = [len(chain) for chain in chains]
    head = {
        "source": "vllm",
        "block_size": 4,
        "granule": 4,
        "bytes_per_block": 100,
        "engine_index": 0,
        **header,
    }
    requests = pl.DataFrame(
        {
            "engine_index": pl.Series([head["engine_index"]] * n, dtype=pl.Int16),
            "request": pl.Series(range(n), dtype=pl.Int32),
            "prompt_tokens": pl.Series(prompt, dtype=pl.Int32),
            "output_tokens": pl.Series(output or [0] * n, dtype=pl.Int32),
            "first_step": pl.Series(first or [0] * n, dtype=pl.Int32),
            "finish_step": pl.Series(finish or [None] * n, dtype=pl.Int32),
            "finish_ns": pl.Series(finish_ns or [None] * n, dtype=pl.Int64),
        }
    )
    chain = SimpleNamespace(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        identities=np.array([i for c in chains for i in c], np.int32),
        hashes=np.zeros(0, np.uint64),
    )
    return SimpleNamespace(
        header=head,
        engines=[head],
        requests=requests,
        lookups=pl.DataFrame(
            {
                "engine_index": pl.Series([head["engine_index"]] * len(lookups), dtype=pl.Int16),
                "request": pl.Series([r for r, _ in lookups], dtype=pl.Int32),
                "step": pl.Series([s for _, s in lookups], dtype=pl.Int32),
            }
        ),
        chains=lambda engine_index=0: chain,
        raw_ids=lambda engine_index=0: None if raw is None else np.array(raw, np.int32),
    )


def test_recorded_blocks_are_full_ones() -> None:
    # 11 tokens of prompt and 6 of output: 4 full blocks, 2 of the prompt, and a fifth granule cut off.
    workload = from_trace(fake_trace([[0, 1, 2, 3, 4]], prompt=[11], output=[6]))
    workload.validate()
    assert workload.identities.tolist() == [0, 1, 2, 3]
    assert workload.prompt_blocks.tolist() == [2]
    assert workload.hit_cap.tolist() == [2]
    assert workload.prompt_tokens.tolist() == [11]
    assert set(workload.last_tokens.tolist()) == {4}
    assert (workload.source, workload.block_size, workload.bytes_per_block) == ("recorded", 4, 100)


def test_the_cap_leaves_one_token_to_compute() -> None:
    assert from_trace(fake_trace([[0, 1]], prompt=[8])).hit_cap.tolist() == [1]
    assert from_trace(fake_trace([[0, 1]], prompt=[9])).hit_cap.tolist() == [2]


@pytest.mark.parametrize(
    ("size", "ids", "prompt", "bytes_per_block"),
    [(4, [0, 1, 2, 3, 4, 0, 1, 5], [4, 3], 100), (8, [0, 1, 0], [2, 1], 200), (12, [0, 1], [1, 1], 300)],
)
def test_a_coarser_block_takes_every_kth_entry(
    size: int, ids: list[int], prompt: list[int], bytes_per_block: int
) -> None:
    trace = fake_trace([[0, 1, 2, 3, 4], [0, 1, 5]], prompt=[16, 12], output=[5, 0])
    workload = from_trace(trace, size)
    workload.validate()
    assert workload.identities.tolist() == ids
    assert workload.n_identities == max(ids) + 1
    assert workload.prompt_blocks.tolist() == prompt
    assert workload.bytes_per_block == bytes_per_block


@pytest.mark.parametrize("size", [2, 6, 0, -4, 4.5, True])
def test_a_block_size_off_the_granule_names_what_is_possible(size: Any) -> None:
    with pytest.raises(UsageError, match=r"possible are 4, 8, 12, 16, \.\.\."):
        from_trace(fake_trace([[0]], prompt=[4]), size)


@pytest.mark.parametrize("size", [1 << 25, 4 * 10**30])
def test_a_block_size_that_no_cache_has(size: int) -> None:
    with pytest.raises(UsageError, match="is too large: at most 16,777,216 tokens"):
        from_trace(fake_trace([[0]], prompt=[4]), size)


def test_requests_never_admitted_are_left_out() -> None:
    trace = fake_trace([[7], [3], [7]], prompt=[4, 4, 4], first=[None, 0, 1], finish=[None, 2, None])
    workload = from_trace(trace)
    workload.validate()
    assert workload.identities.tolist() == [0, 1]
    assert workload.schedule is not None
    assert workload.schedule.tolist() == [1, 2, -1]


def test_within_a_step_admissions_then_finishes() -> None:
    trace = fake_trace(
        [[0], [1], [2], [3]],
        prompt=[4] * 4,
        first=[0, 1, 1, 1],
        finish=[1, 1, 3, None],
        finish_ns=[900, 800, 50, None],
        # Request 2 was looked up at step 0 in vain; at step 1 it came after 3, and 1 left no lookup.
        lookups=[(2, 0), (0, 0), (3, 1), (2, 1), (0, 1)],
    )
    workload = from_trace(trace)
    workload.validate()
    assert workload.schedule is not None
    assert workload.schedule.tolist() == [1, 4, 3, 2, -2, -1, -3]


def test_an_unfinished_request_keeps_its_chain() -> None:
    workload = from_trace(fake_trace([[0, 1, 2]], prompt=[8], output=[None]))
    assert workload.identities.tolist() == [0, 1, 2]
    assert workload.prompt_blocks.tolist() == [2]


def test_an_import_keeps_its_ids_as_they_stand() -> None:
    trace = fake_trace([[0, 1, 2], [0], []], prompt=[9, 4, 0], source="import", bytes_per_block=None)
    workload = from_trace(trace)
    workload.validate()
    assert workload.source == "import"
    assert workload.schedule is None
    assert workload.raw is None
    assert workload.prompt_blocks.tolist() == workload.hit_cap.tolist() == [3, 1, 0]
    assert workload.last_tokens.tolist() == [1, 4, 4]
    assert workload.bytes_per_block is None
    assert replay_requests(workload, "lru", 4).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("tokens", "last"), [(3, 1), (8, 1), (9, 1), (12, 4), (99, 4)])
def test_the_tokens_of_an_imports_last_block_are_clipped(tokens: int, last: int) -> None:
    workload = from_trace(fake_trace([[0, 1, 2]], prompt=[tokens], source="import"))
    assert workload.last_tokens.tolist() == [last]


def test_an_import_at_a_coarser_size_keeps_the_partial_block() -> None:
    trace = fake_trace([[0, 1, 2], [0, 1, 3]], prompt=[12, 10], source="import")
    workload = from_trace(trace, 8)
    workload.validate()
    assert workload.identities.tolist() == [0, 1, 0, 2]
    assert workload.last_tokens.tolist() == [4, 2]


def test_content_ids() -> None:
    trace = fake_trace([[0, 1, 2], [3, 4, 5]], prompt=[12, 12], source="import", raw=[0, 1, 2, 0, 2, 2])
    workload = from_trace(trace)
    workload.validate()
    assert workload.raw is not None
    assert workload.raw.tolist() == [0, 1, 2, 0, 2, 2]
    coarse = from_trace(trace, 8)
    coarse.validate()
    assert coarse.raw is not None
    assert coarse.raw.tolist() == [0, 1, 2, 1]  # (0 1) (2 -) (0 2) (2 -)


def test_no_requests_at_all() -> None:
    for source in ("vllm", "import"):
        workload = from_trace(fake_trace([], prompt=[], source=source))
        workload.validate()
        assert workload.n_requests == workload.n_refs == 0


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="has no engine 3: choose from 0"):
        from_trace(fake_trace([[0]], prompt=[4]), engine_index=3)


def test_a_trace_with_missing_request_numbers() -> None:
    trace = fake_trace([[0], [1], [2]], prompt=[4, 4, 4])
    trace.requests = trace.requests.filter(pl.col("request") != 1)
    workload = from_trace(trace)
    workload.validate()
    assert workload.identities.tolist() == [0, 1]
    assert workload.n_requests == 2


def test_the_first_engine_is_the_default_whatever_its_number() -> None:
    trace = fake_trace([[0], [0]], prompt=[5, 5], engine_index=2, finish=[0, None], first=[0, 1])
    for workload in (from_trace(trace), from_trace(trace, engine_index=2)):
        assert workload.schedule is not None
        assert workload.schedule.tolist() == [1, -1, 2]


def test_a_request_that_does_not_read_the_cache_never_hits() -> None:
    trace = fake_trace([[0], [0], [0]], prompt=[5, 5, 5])
    trace.requests = trace.requests.with_columns(no_cache_read=pl.Series([False, True, False]))
    assert replay_requests(from_trace(trace), "lru", 3).tolist() == [0, 0, 1]


def test_the_last_output_token_is_never_computed() -> None:
    """A block that it would complete is not in the cache (measured: 64 tokens in all leave one block of 32)."""
    for output, blocks in ((3, 1), (4, 1), (5, 2)):
        workload = from_trace(fake_trace([[0, 1]], prompt=[4], output=[output], block_size=4))
        assert workload.n_refs == blocks
