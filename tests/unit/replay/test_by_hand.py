"""Replays small enough to be worked on paper, and the answers to bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload, replay, replay_requests
from kvtrace_traces.errors import KvtraceError, UsageError
from unit.replay.twins import make_workload

KEYS = [
    "policy", "capacity_blocks", "block_size", "semantics", "requests", "block_lookups", "block_hits",
    "block_hit_ratio", "token_lookups", "token_hits", "token_hit_ratio", "evictions", "seconds",
    "pin_overflow_requests", "expired_blocks", "bypassed_blocks", "warmup", "why",
]  # fmt: skip


def one(workload: Workload, *args: Any) -> dict[str, Any]:
    (row,) = replay(workload, *args)
    return row


def hits(workload: Workload, policy: str, capacity: float, semantics: str = "prefix") -> list[int]:
    return replay_requests(workload, policy, capacity, semantics).tolist()


# The textbook string 1 2 3 4 1 2 5 1 2 3 4 5 (Belady's anomaly), ids from 0.
TEXTBOOK = [[0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("policy", "capacity", "misses"),
    [("fifo", 3, 9), ("fifo", 4, 10), ("lru", 3, 10), ("lru", 4, 8), ("opt", 3, 7), ("opt", 4, 6)],
)
def test_textbook_page_faults(policy: str, capacity: int, misses: int) -> None:
    row = one(make_workload(TEXTBOOK), policy, capacity, "object")
    assert row["block_lookups"] - row["block_hits"] == misses
    assert row["evictions"] == misses - capacity


def test_a_row_has_its_keys_in_order_and_plain_values() -> None:
    row = one(make_workload(TEXTBOOK), "lru", 4, "object")
    assert list(row) == KEYS
    assert type(row["block_hits"]) is type(row["token_hits"]) is type(row["evictions"]) is int
    assert row["block_hit_ratio"] == 4 / 12
    assert row["token_hits"] == 64
    assert row["token_lookups"] == 192
    assert row["seconds"] > 0


def test_prefix_needs_every_block_before_it() -> None:
    # The second request finds 1 and 2 resident, but not 3 in front of them.
    workload = make_workload([[0, 1, 2], [3, 1, 2], [0, 1, 3]])
    assert hits(workload, "lru", 10) == [0, 0, 3]
    assert hits(workload, "lru", 10, "object") == [0, 2, 3]


def test_lru_eats_a_chain_from_its_tail() -> None:
    # 4 blocks: placing 3, 4 evicts 2 then 1, so the head 0 is still there.
    workload = make_workload([[0, 1, 2], [3, 4], [0, 1, 2]])
    assert hits(workload, "lru", 4) == [0, 0, 2]
    assert hits(workload, "lru", 3) == [0, 0, 1]
    assert one(workload, "lru", 3)["evictions"] == 4


FIFO_CHAINS = [[0, 1], [2], [0, 1], [3], [0], [4], [0]]


def test_fifo_of_a_recorded_trace_keeps_insertion_order_and_the_tail_is_older() -> None:
    # Order, oldest first: 1 0 | 2; using 0 1 again changes nothing; 3 evicts 1, 4 evicts 0.
    workload = make_workload(FIFO_CHAINS, schedule=[e for r in range(1, 8) for e in (r, -r)])
    assert hits(workload, "fifo", 3) == [0, 0, 2, 0, 1, 0, 0]
    assert hits(workload, "lru", 3) == [0, 0, 2, 0, 1, 0, 1]


def test_fifo_of_an_import_places_in_chain_order_and_holds_nothing() -> None:
    # Order, oldest first: 0 1 2; 3 evicts 0, which comes back for 1; 4 evicts 2.
    assert hits(make_workload(FIFO_CHAINS), "fifo", 3) == [0, 0, 2, 0, 0, 0, 1]
    # Order 0 1 2; of 3 0 1 the first evicts 0, 0 comes back for 1, and 1 for 2: now 3 0 1.
    assert hits(make_workload([[0, 1, 2], [3, 0, 1], [3, 0, 1], [2]]), "fifo", 3) == [0, 0, 3, 0]


def test_opt_keeps_what_is_looked_up_soonest() -> None:
    workload = make_workload([[0], [1], [2], [1], [0], [2]])
    assert hits(workload, "opt", 2) == [0, 0, 0, 1, 0, 1]


def test_opt_evicts_the_deeper_of_two_blocks_with_one_next_use() -> None:
    workload = make_workload([[0, 1], [2], [0, 1]])
    assert hits(workload, "opt", 2) == [0, 0, 1]


def test_a_hit_is_capped_but_the_capped_block_counts_as_used() -> None:
    workload = make_workload([[0, 1], [0, 1], [2], [0, 1]], hit_cap=[1, 1, 0, 1])
    assert hits(workload, "lru", 2) == [0, 1, 0, 1]
    assert one(workload, "lru", 2)["evictions"] == 2  # 2 evicts 1, and 1 evicts 2 at the end


def test_output_blocks_come_at_finish() -> None:
    chains, prompts = [[0, 1], [0, 1]], [1, 2]
    apart = make_workload(chains, prompt_blocks=prompts, schedule=[1, -1, 2, -2])
    overlapping = make_workload(chains, prompt_blocks=prompts, schedule=[1, 2, -1, -2])
    assert hits(apart, "lru", 4) == [0, 2]
    assert hits(overlapping, "lru", 4) == [0, 1]


def test_running_requests_hold_their_blocks() -> None:
    # Request 0 holds both blocks while 1 is admitted: 1 finds no room, twice counted as one request.
    held = make_workload([[0, 1], [2, 3], [2, 3]], schedule=[1, 2, -2, -1, 3, -3])
    row = one(held, "lru", 2)
    assert row["pin_overflow_requests"] == 1
    assert row["evictions"] == 2
    assert hits(held, "lru", 2) == [0, 0, 0]
    assert hits(held, "lru", 3) == [0, 0, 1]  # with one free block the head 2 is placed, 3 is bypassed


def test_a_shared_block_is_held_until_the_last_request_ends() -> None:
    chains = [[0], [0], [1], [0]]
    schedule = [1, 2, -1, 3, -3, 4, -4, -2]
    assert hits(make_workload(chains, schedule=schedule), "lru", 1) == [0, 1, 0, 1]


def test_recency_is_the_time_of_letting_go() -> None:
    # Request 0 is admitted first and ends last, so its block is the younger one.
    workload = make_workload([[0], [1], [2], [0], [1]], schedule=[1, 2, -2, -1, 3, -3, 4, -4, 5, -5])
    assert hits(workload, "lru", 2) == [0, 0, 0, 1, 0]
    assert hits(workload, "fifo", 2) == [0, 0, 0, 0, 0]  # 2 evicts 0, 0 evicts 1


def test_an_unfinished_request_stays_pinned() -> None:
    workload = make_workload([[0, 1], [2], [0, 1]], schedule=[1, 2, -2, 3, -3])
    row = one(workload, "lru", 2)
    assert (row["block_hits"], row["evictions"], row["pin_overflow_requests"]) == (2, 0, 1)


def test_a_block_that_comes_twice_in_a_request_takes_one_place() -> None:
    workload = make_workload([[0, 0, 1], [0, 0, 1]])
    row = one(workload, "lru", 2)
    assert row["why"] is None
    assert hits(workload, "lru", 2) == [0, 3]
    assert row["evictions"] == 0


def test_content_ids_are_what_object_counts() -> None:
    workload = make_workload([[0, 1], [2, 3]], raw=[0, 1, 1, 0])
    assert one(workload, "lru", math.inf, "object")["block_hits"] == 2
    assert one(workload, "lru", math.inf, "prefix")["block_hits"] == 0


def test_tokens_of_partial_blocks() -> None:
    workload = make_workload([[0, 1], [0, 1]], last_tokens=[3, 3])
    assert one(workload, "lru", 2, "prefix")["token_hits"] == 19
    row = one(workload, "lru", 2, "object")
    assert (row["token_lookups"], row["token_hits"]) == (38, 19)


def test_a_capacity_below_the_largest_request_is_a_row_with_a_reason() -> None:
    workload = make_workload([[0, 1, 2], [3]])
    row = one(workload, "lru", 2)
    assert list(row) == KEYS
    assert row["why"].startswith("a capacity of 2 blocks cannot hold the largest single request")
    assert row["block_lookups"] == 4
    for key in ("block_hits", "block_hit_ratio", "token_hits", "evictions", "seconds"):
        assert row[key] is None
    assert one(workload, "lru", 1, "object")["why"] is None
    with pytest.raises(KvtraceError, match="cannot hold"):
        replay_requests(workload, "lru", 2)


def test_the_order_of_a_grid_and_infinity_as_none() -> None:
    rows = replay(make_workload(TEXTBOOK), ["fifo", "lru"], [5, math.inf], ["object", "prefix"])
    assert [(r["policy"], r["semantics"], r["capacity_blocks"]) for r in rows] == [
        (policy, semantics, capacity)
        for policy in ("fifo", "lru")
        for semantics in ("object", "prefix")
        for capacity in (5, None)
    ]
    assert {r["block_hits"] for r in rows if r["semantics"] == "object"} == {7}


def test_threads_give_the_same_rows() -> None:
    ids = np.random.default_rng(3).integers(0, 300, 4000).reshape(-1, 8)
    workload = make_workload(ids.tolist())
    grid = (["lru", "fifo", "opt"], [10, 50, 100, math.inf], ["object", "prefix"])
    timeless = [[{**r, "seconds": 0} for r in replay(workload, *grid, threads=n)] for n in (1, 4)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("semantics", ["object", "prefix"])
@pytest.mark.parametrize("policy", ["lru", "fifo", "opt"])
@pytest.mark.parametrize("chains", [[], [[]], [[], []]])
def test_nothing_to_look_up(chains: list[list[int]], policy: str, semantics: str) -> None:
    for capacity in (1, math.inf):
        row = one(make_workload(chains), policy, capacity, semantics)
        assert (row["requests"], row["block_lookups"], row["block_hits"]) == (len(chains), 0, 0)
        assert row["block_hit_ratio"] is row["token_hit_ratio"] is None


def test_one_request() -> None:
    assert hits(make_workload([[0]]), "opt", 1) == [0]


def test_read_only_arrays_are_fine() -> None:
    workload = make_workload([[0, 1], [0, 1]], schedule=[1, -1, 2, -2])
    for array in (workload.identities, workload.indptr, workload.schedule, workload.hit_cap):
        assert array is not None
        array.setflags(write=False)
    assert hits(workload, "lru", 2) == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lur", 5, "prefix"), "did you mean lru"),
        (("zzz", 5, "prefix"), "known: "),
        (("lru", 0, "prefix"), "comes to 0 blocks"),
        (("lru", -1, "prefix"), "not a size"),
        (("lru", math.nan, "prefix"), "not a size"),
        (("lru", 5, "prefx"), "semantics are object, prefix, radix"),
        (([], 5, "prefix"), "no policy given"),
        (("lru", [], "prefix"), "no capacity given"),
    ],
)
def test_wrong_usage(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replay(make_workload([[0]]), *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": np.array([0, 1, 7], np.int32)}, "identities must lie in"),
        ({"identities": np.array([0, 1, -1], np.int32)}, "identities must lie in"),
        ({"identities": np.array([0, 1, 2], np.int64)}, "identities must be a one-dimensional int32"),
        ({"indptr": np.array([0, 5, 3], np.int64)}, "indptr must rise"),
        ({"indptr": np.array([0, 3], np.int64)}, "indptr has 2 entries, 3 are needed"),
        ({"prompt_blocks": np.array([3, 1], np.int32)}, "prompt_blocks must lie"),
        ({"hit_cap": np.array([-1, 1], np.int32)}, "hit_cap must not"),
        ({"last_tokens": np.array([0, 1], np.int32)}, "last_tokens must lie"),
        ({"schedule": np.array([1, -1], np.int64)}, "admit every request exactly once"),
        ({"schedule": np.array([1, 2, 3], np.int64)}, "schedule entries must be"),
        ({"schedule": np.array([1, 0, 2], np.int64)}, "schedule entries must be"),
        ({"schedule": np.array([-1, 1, 2], np.int64)}, "before its admission"),
        ({"schedule": np.array([1, -1, -1, 2], np.int64)}, "finish no request twice"),
        ({"raw": np.array([0, 1, -1], np.int32)}, "raw must not be negative"),
        ({"block_size": 0}, "block_size is 0"),
        ({"source": "guess"}, "source is 'guess'"),
    ],
)
def test_a_broken_workload_is_refused(change: dict[str, Any], message: str) -> None:
    whole = make_workload([[0, 1], [2]])
    broken = Workload(**{**vars(whole), **change})
    whole.validate()
    with pytest.raises(KvtraceError, match=message):
        replay(broken, "lru", 5)
