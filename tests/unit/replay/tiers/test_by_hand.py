"""Tiers on streams small enough to follow with a pencil; the first is the example of docs/tiers.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload
from kvtrace_replay.cache.prepare import prepare
from kvtrace_replay.tiers import Tier, parse_tier, replay_tiers, runs
from kvtrace_traces.errors import KvtraceError, UsageError
from unit.replay.twins import make_workload

A, B, C, D = range(4)
STREAM = make_workload([[A, B, C, A, D, A]])


def contents(workload: Workload, texts: list[str], semantics: str) -> list[set[int]]:
    """The blocks of each tier at the end."""
    tiers = [parse_tier(text) for text in texts]
    run = prepare(workload, semantics, 0.0)
    mask = runs._drive(runs._levels(workload, tiers, semantics), run).mask
    return [set(np.flatnonzero(mask >> k & 1).tolist()) for k in range(len(tiers))]


def sums(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize(
    ("options", "below", "hits", "up", "down"),
    [
        ("", {C, A, D}, (1, 1), 1, 4),
        (":mode=exclusive", {B, C}, (1, 1), 1, 3),
        (":write=demote", {A, B, C}, (1, 1), 1, 3),
        (":uses=2", {A}, (1, 0), 0, 1),
    ],
)
def test_the_example(options: str, below: set[int], hits: tuple[int, int], up: int, down: int) -> None:
    texts = ["hbm:2", f"dram:3{options}"]
    rows = replay_tiers(STREAM, texts, "object", bytes_per_token=10)
    assert contents(STREAM, texts, "object") == [{A, D}, below]
    assert [row["block_hits"] for row in rows] == [*hits, sum(hits)]
    assert sums(rows, "blocks_up", "blocks_down")[1] == (up, down)
    assert rows[1]["bytes_up"] == up * 160
    assert rows[2]["block_hit_ratio"] == sum(hits) / 6


def test_what_is_not_moved_up_is_read_where_it_lies() -> None:
    rows = replay_tiers(make_workload([[A, B, A, A]]), ["hbm:1", "dram:2:promote=no"], "object")
    assert sums(rows, "block_hits", "blocks_up")[:2] == [(0, 0), (2, 2)]


def test_a_run_of_hits_goes_on_over_tiers_and_ends_where_no_tier_has_the_block() -> None:
    # 0 1 2 fill both tiers; 3 4 take the top from 1 2; then 0 is lost everywhere but 1 2 are not.
    workload = make_workload([[0, 1, 2], [0, 3, 4], [0, 1, 2, 5], [6, 1, 2]])
    rows = replay_tiers(workload, ["hbm:4", "dram:9"])
    # Request 1 finds 0 in the top tier. It evicts 2, the tail; request 2 finds 0 1 in the top tier, 2 below.
    assert sums(rows, "block_hits", "blocks_up") == [(3, 0), (1, 1), (4, 1)]


def test_the_tail_of_a_chain_leaves_a_tier_before_its_head() -> None:
    workload = make_workload([[0, 1, 2], [3, 4]])
    for options in ("", ":write=demote"):
        top, below = contents(workload, ["hbm:3", f"dram:2{options}"], "prefix")
        assert top == {0, 3, 4}
        # Written through: 0 1 fit, then 3 4. Demoted: 2, then 1, the tail first.
        assert below == ({3, 4} if not options else {1, 2})
    assert contents(workload, ["hbm:3", "dram:4"], "prefix")[1] == {0, 1, 3, 4}


def test_blocks_in_use_stay_in_the_top_tier_only() -> None:
    # Request 0 holds 0 1 to the end, in the top tier; below they make room.
    workload = make_workload([[0, 1], [2], [3]], schedule=[1, 2, -2, 3, -3, -1])
    assert contents(workload, ["hbm:3", "dram:2"], "prefix") == [{0, 1, 3}, {2, 3}]


def test_an_inclusive_tier_that_evicts_takes_the_block_from_the_tiers_above() -> None:
    # First in, first out, below: 0 goes for 3, though it was used last above.
    workload = make_workload([[0, 1, 2, 0, 3]])
    texts = ["hbm:3", "dram:3:policy=fifo,mode=inclusive"]
    rows = replay_tiers(workload, texts, "object")
    assert contents(workload, texts, "object") == [{2, 3}, {1, 2, 3}]
    assert sums(rows, "evictions", "invalidated_blocks")[:2] == [(1, 1), (1, 0)]
    # Not so where nothing is enforced.
    nine = ["hbm:3", "dram:3:policy=fifo"]
    assert contents(workload, nine, "object") == [{0, 2, 3}, {1, 2, 3}]


def test_what_grows_too_old_below_an_inclusive_tier_drops_above_too() -> None:
    times = np.array([0, 10, 400], np.int64) * 10**9
    workload = replace(make_workload([[0], [1], [2]]), arrival_ns=times)
    texts = ["hbm:3", "dram:3:policy=ttl:seconds=300,mode=inclusive"]
    rows = replay_tiers(workload, texts, "object")
    assert contents(workload, texts, "object") == [{2}, {2}]
    assert sums(rows, "expired_blocks", "invalidated_blocks", "blocks_down")[:2] == [(0, 2, 0), (2, 0, 3)]


def test_a_top_tier_that_cannot_hold_a_request_gives_rows_that_say_so() -> None:
    rows = replay_tiers(make_workload([[0, 1, 2]]), ["hbm:2", "dram:9"], prefill_tokens_per_s=1)
    assert len(rows) == 3
    for row in rows:
        assert "cannot hold the largest single request" in row["why"]
        assert row["block_hits"] is row["seconds_saved"] is row["bytes_up"] is row["block_hit_ratio"] is None
        assert row["block_lookups"] == 3


def test_time_saved_is_recomputing_less_loading() -> None:
    workload = make_workload([[0, 1], [2, 3], [0, 1]], last_tokens=[4, 16, 4])
    tiers = [Tier("hbm", 2), Tier("dram", 9, bandwidth="1kB/s")]
    top, dram, total = replay_tiers(workload, tiers, bytes_per_token=10, prefill_tokens_per_s=100)
    assert (top["block_hits"], dram["block_hits"], dram["token_hits"]) == (0, 2, 20)
    assert dram["recompute_seconds"] == pytest.approx(0.2)
    assert dram["load_seconds"] == pytest.approx(2 * 160 / 1000)  # blocks move whole
    assert total["seconds_saved"] == pytest.approx(0.2 - 0.32)
    for change in ({"bytes_per_token": None}, {"prefill_tokens_per_s": None}):
        rows = replay_tiers(workload, tiers, **{"bytes_per_token": 10, "prefill_tokens_per_s": 100, **change})
        assert rows[1]["seconds_saved"] is None
        assert rows[2]["seconds_saved"] is None
    slower = replay_tiers(workload, ["hbm:2", "dram:9"], bytes_per_token=10, prefill_tokens_per_s=100)
    assert slower[1]["load_seconds"] is None
    assert slower[0]["load_seconds"] == 0


def test_bytes_are_known_from_the_trace_or_not_at_all() -> None:
    workload = make_workload([[0, 1], [2, 3], [0, 1]], bytes_per_block=7)
    assert replay_tiers(workload, ["hbm:2", "dram:28B"])[1]["bytes_down"] == 4 * 7
    unknown = replace(workload, bytes_per_block=None)
    assert replay_tiers(unknown, ["hbm:2", "dram:4"])[1]["bytes_down"] is None
    assert replay_tiers(unknown, ["hbm:2", "dram:1280B"], bytes_per_token=20)[1]["capacity_blocks"] == 4
    with pytest.raises(UsageError, match="does not know the bytes"):
        replay_tiers(unknown, ["hbm:2", "dram:4GiB"])


def test_no_requests() -> None:
    rows = replay_tiers(make_workload([]), ["hbm:2", "dram:3"])
    assert rows[-1]["block_hits"] == 0
    assert rows[-1]["block_hit_ratio"] is None


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"semantics": "radix"}, "object or prefix"),
        ({"warmup": 1.0}, "warm-up"),
        ({"bytes_per_token": 0}, "above 0"),
        ({"prefill_tokens_per_s": float("nan")}, "above 0"),
        ({"tiers": []}, "name 1 to 4"),
    ],
)
def test_arguments_that_cannot_be(change: dict[str, Any], fix: str) -> None:
    with pytest.raises(UsageError, match=fix):
        replay_tiers(STREAM, **{"tiers": ["hbm:2"], **change})


def test_an_invalid_workload_is_refused() -> None:
    with pytest.raises(KvtraceError, match="not a valid workload"):
        replay_tiers(replace(STREAM, hit_cap=np.zeros(9, np.int32)), ["hbm:2"])
