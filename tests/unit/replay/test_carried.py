"""Replays of cuts begin with the cache that the cut carries in; against a slow twin, loaded from the snapshot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest

from kvtrace_replay import from_trace, replay, replay_requests, requests_of
from kvtrace_replay.curves.lru import lru_curve
from kvtrace_replay.curves.sample import Sampled
from kvtrace_replay.curves.working_set import working_sets
from kvtrace_replay.pool import uncached_first
from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.tiers.runs import replay_tiers
from kvtrace_replay.workload import Workload
from kvtrace_replay.workload import store as workload_store
from kvtrace_traces import Trace, cut, open_trace
from kvtrace_traces.errors import UsageError
from kvtrace_traces.snapshot import Live, Snapshot
from simulation.cases import random_case
from simulation.kernel import as_recorded, as_settings
from unit.replay.test_from_trace import fake_trace

SAMPLES = Path(__file__).resolve().parents[3] / "traces" / "samples"


class Case(NamedTuple):
    whole: Trace
    part: Trace
    first: int
    workload: Workload

    @property
    def size(self) -> int:
        return int(self.whole.header["block_size"])

    @property
    def capacity(self) -> int:
        return int(self.whole.header["num_blocks"]) - 1


def cut_at(whole: Trace, path: Path, first: int, stop: int | None = None) -> Trace:
    with path.open("wb") as file:
        cut.cut_steps(whole, file, first, stop, uncached_first=uncached_first(whole.header))
    return open_trace(path)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Cuts of both samples, and of random simulated runs, which keep all of vLLM's rules."""
    folder = tmp_path_factory.mktemp("cuts")

    def traces() -> Iterator[tuple[Trace, list[int]]]:
        for name in ("thrash", "chat"):
            yield open_trace(SAMPLES / f"{name}.kvt"), [1, 60, 100, 300]
        for seed in range(150):
            path = folder / f"run-{seed}.kvt"
            case = random_case(seed)
            recorded = as_recorded(case)
            # In a snapshot the identity 0 means that a block is the first: no real one has it.
            recorded = replace(recorded, hashes=recorded.hashes + np.uint64(1))
            write_run(path, recorded, as_settings(case.settings))
            whole = open_trace(path)
            if whole.steps.height > 3:
                rng = np.random.default_rng(seed)
                yield whole, sorted({int(rng.integers(1, whole.steps.height)) for _ in range(3)})

    found = []
    for number, (whole, firsts) in enumerate(traces()):
        for first in firsts:
            part = cut_at(whole, folder / f"{number}-{first}.kvt", first)
            workload = from_trace(part)
            workload.validate()
            found.append(Case(whole, part, first, workload))
    assert sum(case.workload.carried > 0 for case in found) > 60
    return found


# ---------------------------------------------------------------- the twin


def chains_of(part: Trace, size: int) -> list[list[int]]:
    """Of each request, the trace's identities of its whole blocks."""
    chains, stride = part.chains(), size // int(part.header["granule"])
    bounds = chains.indptr.tolist()
    return [chains.identities[a:b].tolist()[stride - 1 :: stride] for a, b in pairwise(bounds)]


class Twin:
    """LRU in prefix semantics: `free`, unpinned blocks from the oldest on; `pins`, how often each other is held."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.free: dict[int, None] = {}
        self.pins: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}

    def load(self, block: int) -> None:
        self.free.pop(block, None)
        self.free[block] = None
        if len(self.free) > self.capacity:
            del self.free[next(iter(self.free))]

    def has(self, block: int) -> bool:
        return block in self.free or block in self.pins

    def take(self, request: int, blocks: list[int]) -> None:
        own = self.held.setdefault(request, [])
        there = [block for block in blocks if self.has(block)]
        for block in there:
            self.free.pop(block, None)
            self.pins[block] = self.pins.get(block, 0) + 1
        missing = [block for block in blocks if block not in there]
        missing = missing[: int(min(len(missing), self.capacity - len(self.pins)))]
        for block in missing:
            if len(self.free) + len(self.pins) == self.capacity:
                del self.free[next(iter(self.free))]
            self.pins[block] = 1
        own += [block for block in blocks if block in there or block in missing]

    def let_go(self, request: int) -> None:
        for block in reversed(self.held.pop(request)):
            self.pins[block] -= 1
            if not self.pins[block]:
                del self.pins[block]
                self.free[block] = None


def twin_hits(case: Case, capacity: float, begin_empty: bool = False) -> list[int]:
    """Hits of each admitted request of the cut, in their order, from the snapshot as it stands."""
    part, size = case.part, case.size
    rows = {row["request"]: row for row in part.requests.to_dicts()}
    chains = chains_of(part, size)
    begun = part.snapshot()
    cache = Twin(capacity)
    assert begun is not None

    def whole_blocks(request: int) -> list[int]:
        output = rows[request]["output_tokens"]
        if output is None:
            return chains[request]
        return chains[request][: (rows[request]["prompt_tokens"] + output - (output > 0)) // size]

    known = dict(zip(begun.blocks.tolist(), begun.identities.tolist(), strict=True))
    placed: dict[int, int] = {}
    if not begin_empty:
        for block in begun.queue.tolist():
            if block in known:
                cache.load(known[block])
    for live in begun.live:
        if live.begun:
            many = max(rows[live.request]["prompt_tokens"] // size, live.filled) if live.running else 0
            placed[live.request] = many
            cache.take(live.request, [] if begin_empty else whole_blocks(live.request)[:many])
    numbers = [live.request for live in begun.live if live.begun] + requests_of(part).to_list()
    idle = case.workload.n_requests - len(numbers)
    hits: dict[int, int] = {}
    assert case.workload.schedule is not None
    for event in case.workload.schedule.tolist():
        if abs(event) <= idle:
            continue
        request = numbers[abs(event) - idle - 1]
        prompt = rows[request]["prompt_tokens"]
        blocks = whole_blocks(request)
        if event > 0 and request not in placed:
            most = 0 if rows[request].get("no_cache_read") else (prompt - 1) // size
            many = placed[request] = min(prompt // size, len(blocks))
            hits[request] = next((i for i in range(min(most, many)) if not cache.has(blocks[i])), min(most, many))
            cache.take(request, blocks[:many])
        elif event < 0:
            cache.take(request, blocks[placed[request] :])
            cache.let_go(request)
    return [hits[request] for request in requests_of(part).to_list()]


def held_at_begin(workload: Workload) -> int:
    spans = zip(workload.indptr[: workload.carried], workload.prompt_blocks[: workload.carried], strict=True)
    return len({block for start, many in spans for block in workload.identities[start : start + many].tolist()})


def test_lru_from_the_snapshot_is_the_twin_loaded_with_it(cases: list[Case]) -> None:
    checked = better = 0
    for case in cases:
        if case.part.snapshot() is None:
            continue
        workload = case.workload
        longest = int(np.diff(workload.indptr)[workload.carried :].max(initial=1))
        held = held_at_begin(workload)
        for capacity in (math.inf, case.capacity, max(longest, case.capacity * 3 // 4), longest + 1):
            if capacity < max(longest, held):  # which blocks find no place is a matter of what came first
                continue
            checked += 1
            mine = replay_requests(workload, "lru", capacity).tolist()
            assert mine == twin_hits(case, capacity), (case.part.path, capacity)
            better += sum(mine) > sum(twin_hits(case, capacity, begin_empty=True))
    assert checked > 300
    assert better > 200


def test_every_request_hits_what_was_in_the_cache_at_the_cut(cases: list[Case]) -> None:
    hit = 0
    for case in cases:
        begun = case.part.snapshot()
        if begun is None:
            continue
        known = set(begun.identities.tolist())
        chains = chains_of(case.part, case.size)
        first_new = case.part.header["cut"]["first_request"]
        carried = case.part.header["cut"]["carried"]
        whole = from_trace(case.whole)
        full = dict(zip(requests_of(case.whole).to_list(), replay_requests(whole, "lru").tolist(), strict=True))
        mine = replay_requests(case.workload, "lru").tolist()
        for request, hits in zip(requests_of(case.part).to_list(), mine, strict=True):
            old = carried[request] if request < len(carried) else first_new + request - len(carried)
            there = next((i for i, b in enumerate(chains[request]) if b not in known), len(chains[request]))
            assert min(there, full[old]) <= hits <= full[old]
            hit += there > 0 and hits > 0
    assert hit > 100


def test_the_first_request_hits_what_the_engine_found(cases: list[Case]) -> None:
    checked = found = 0
    for case in cases:
        begun, part = case.part.snapshot(), case.part
        admitted = part.requests.filter(pl.col("first_step").is_not_null())
        if begun is None or not admitted.height or case.workload.schedule is None:
            continue
        rows = part.requests.rows_by_key("request", named=True, unique=True)
        if any(r.running and r.filled < rows[r.request]["prompt_tokens"] // case.size for r in begun.live if r.begun):
            continue  # their prompts are replayed as if they were there already
        first = (
            next(e for e in case.workload.schedule.tolist() if e > case.workload.carried) - 1 - case.workload.carried
        )
        row = admitted.sort("request").row(first, named=True)
        earlier = part.block_events.filter(
            (pl.col("step") <= row["first_step"]) & (pl.col("request") != row["request"]).fill_null(True)
        )
        if earlier["kind"].is_in(["fill", "evict"]).any() or part.preemptions["step"].min() == 0:
            continue
        hits = int(replay_requests(case.workload, "lru", case.capacity)[first])
        assert hits == row["cached_tokens"] // case.size, (part.path, row)
        checked += 1
        found += hits > 0
    assert checked > 30
    assert found > 10


# ---------------------------------------------------------------- the other ways to replay


def test_all_ways_begin_with_the_same_cache(cases: list[Case]) -> None:
    for case in cases[::3]:
        workload = case.workload
        rows = replay(workload, ["lru", "fifo", "opt"], [case.capacity, "inf"], ["prefix", "object", "radix"])
        of = {(row["policy"], row["semantics"], row["capacity_blocks"]): row for row in rows}
        assert {row["requests"] for row in rows} == {requests_of(case.part).len()}
        for size, told in ((case.capacity, case.capacity), (math.inf, None)):
            one = of["lru", "prefix", told]
            if one["why"] is not None:
                continue
            hits = replay_requests(workload, "lru", size)
            assert one["block_hits"] == hits.sum()
            assert one["block_lookups"] == workload.prompt_blocks[workload.carried :].sum()
            if not one["pin_overflow_requests"]:  # else an output is left out of a tree that lacks its prompt
                assert of["lru", "radix", told]["block_hits"] == one["block_hits"]
            for semantics in ("prefix", "object"):
                curve, row = lru_curve(workload, semantics), of["lru", semantics, told]
                assert (curve.requests, curve.block_lookups) == (row["requests"], row["block_lookups"])
                if size >= curve.exact_from:
                    assert curve.block_hits(size) == row["block_hits"]
            (tier, _) = replay_tiers(workload, [f"hbm:{size}"])
            for name in ("requests", "block_lookups", "block_hits", "token_lookups", "token_hits", "evictions"):
                assert tier[name] == one[name], name


def test_a_warm_up_is_a_share_of_the_other_requests(cases: list[Case]) -> None:
    case = cases[1]
    n = requests_of(case.part).len()
    hits = replay_requests(case.workload, "lru", case.capacity)
    (row,) = replay(case.workload, "lru", case.capacity, warmup=0.5)
    assert case.workload.schedule is not None
    admitted = [e - 1 - case.workload.carried for e in case.workload.schedule.tolist() if e > case.workload.carried]
    assert row["requests"] == n - n // 2
    assert row["block_hits"] == hits[admitted[n // 2 :]].sum()
    curve = lru_curve(case.workload, warmup=0.5)
    assert (curve.requests, curve.block_hits(case.capacity)) == (n - n // 2, row["block_hits"])


def test_requests_by_name_leave_the_carried_out(cases: list[Case]) -> None:
    import kvtrace

    part = cases[1].part
    for semantics in ("prefix", "object"):
        told: list[pl.DataFrame] = []
        frame = kvtrace.replay(part.path, "lru", "inf", semantics=semantics, per_request=told)
        assert told[0]["request"].to_list() == requests_of(part).to_list()
        assert told[0]["block_hits"].sum() == frame["block_hits"][0]
        assert told[0]["block_lookups"].sum() == frame["block_lookups"][0]
        assert told[0]["token_lookups"].sum() == frame["token_lookups"][0]
    assert working_sets(cases[1].workload, 10)["requests"].sum() == requests_of(part).len()


def test_the_begin_of_a_trace_carries_nothing(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    part = cut_at(whole, tmp_path / "begin.kvt", 0, 200)
    assert from_trace(part).carried == from_trace(whole).carried == 0


def test_a_cut_without_new_requests(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    last = whole.steps.height - 1
    workload = from_trace(cut_at(whole, tmp_path / "end.kvt", last))
    workload.validate()
    assert workload.n_requests == workload.carried > 0
    for row in replay(workload, "lru", [50, "inf"], ["prefix", "object", "radix"]):
        assert (row["requests"], row["block_lookups"], row["block_hits"], row["why"]) == (0, 0, 0, None)
    assert lru_curve(workload).requests == lru_curve(workload, "object").requests == 0


def test_a_kept_workload_keeps_what_is_carried(cases: list[Case], tmp_path: Path) -> None:
    workload_store.save(cases[1].workload, tmp_path / "kept")
    again = workload_store.load(tmp_path / "kept")
    assert again is not None
    assert again.carried == cases[1].workload.carried > 0


def test_what_cannot_be_told_says_so(cases: list[Case]) -> None:
    with pytest.raises(UsageError, match="leave out --sample"):
        Sampled(cases[1].workload, "lru", "prefix", 0.5)
    fine = snapshot_trace([[0, 1, 2]], blocks={1: (1, -1)}, queue=[1], granule=2)
    with pytest.raises(UsageError, match="take --block-size 4, 8, 12"):
        from_trace(fine, 2)


# ---------------------------------------------------------------- snapshots by hand


def snapshot_trace(
    chains: list[list[int]], *, blocks: dict[int, tuple[int, int]], queue: list[int], live: tuple[Live, ...] = (),
    **more: Any,
) -> Any:  # fmt: skip
    """`blocks`: what each cached one holds, and what the one before it held."""
    begun = {request.request for request in live if request.begun}
    first = [None if r in begun else 0 for r in range(len(chains))]
    more.setdefault("prompt", [4 * len(chain) for chain in chains])
    trace = fake_trace(chains, first=first, inexact=["carried-state"], **more)
    state = Snapshot(
        0, list(live), np.array(list(blocks), np.int32), np.array([i for i, _ in blocks.values()], np.int32),
        np.array([p for _, p in blocks.values()], np.int32), np.array(queue, np.int32),
    )  # fmt: skip
    trace.path = "by-hand.kvt"
    trace.snapshot = lambda engine_index=0: state
    return trace


def carried_chains(workload: Workload) -> list[list[int]]:
    bounds = workload.indptr.tolist()
    return [workload.identities[bounds[r] : bounds[r + 1]].tolist() for r in range(workload.carried)]


def test_paths_of_free_blocks_stand_in_the_order_of_the_queue() -> None:
    # 0 1 2 and 0 1 3 were cached; 7 is no longer in a chain; block 9 holds nothing.
    blocks = {1: (0, -1), 2: (1, 0), 3: (2, 1), 4: (3, 1), 5: (7, -1)}
    workload = from_trace(snapshot_trace([[0, 1, 2]], blocks=blocks, queue=[9, 3, 5, 4, 2, 1]))
    workload.validate()
    assert carried_chains(workload) == [[0, 1, 2], [3], [0, 1, 4]]  # in order of first use: 2, 7, then 3 with 1 and 0
    assert workload.schedule is not None
    assert workload.schedule.tolist() == [1, -1, 2, -2, 3, -3, 4]
    assert replay_requests(workload, "lru", 5).tolist() == [2]  # of three, one token is computed


def test_of_several_copies_the_youngest_counts() -> None:
    blocks = {1: (0, -1), 2: (5, -1), 3: (0, -1)}
    workload = from_trace(snapshot_trace([[0, 3]], blocks=blocks, queue=[1, 2, 3]))
    assert carried_chains(workload) == [[0], [1]]  # 5, then 0


def test_coarser_blocks_are_carried_where_all_their_parts_are() -> None:
    blocks = {1: (0, -1), 2: (1, 0), 3: (2, 1), 4: (3, 2), 5: (4, 3), 6: (9, 8)}
    trace = snapshot_trace([[0, 1, 2, 3, 4, 5]], blocks=blocks, queue=[5, 4, 3, 2, 1, 6])
    workload = from_trace(trace, 8)
    workload.validate()
    assert carried_chains(workload) == [[0, 1]]
    assert workload.identities.tolist() == [0, 1, 0, 1, 2]
    assert replay_requests(workload).tolist() == [2]


def test_running_requests_hold_their_blocks_and_preempted_ones_do_not() -> None:
    running = Live(0, True, True, True, 12, 0, 0, 3, [1, 2, 3])
    preempted = Live(1, False, False, True, 0, 0, 1, 0, None)
    fresh = Live(2, False, False, False, 0, None, 0, 0, None)
    blocks = {1: (0, -1), 2: (1, 0), 3: (2, 1), 4: (6, -1)}
    chains = [[0, 1, 2, 3], [6, 7], [0, 1, 2], [6, 8]]
    trace = snapshot_trace(
        chains, blocks=blocks, queue=[4], live=(running, preempted, fresh), prompt=[8, 8, 12, 8], output=[9, 1, 1, 1],
        finish=[5, 4, None, None],
    )  # fmt: skip
    workload = from_trace(trace)
    workload.validate()
    assert workload.carried == 3
    assert workload.prompt_blocks.tolist() == [0, 3, 0, 3, 2]
    assert workload.hit_cap.tolist() == [0, 0, 0, 2, 1]
    assert workload.schedule is not None
    assert workload.schedule.tolist() == [1, -1, 2, 3, 4, 5, -3, -2]
    # Room for 4: the running one's three stay, the free block goes for the second request's own.
    assert replay_requests(workload, "lru", 4).tolist() == [2, 1]
    assert replay_requests(workload, "lru", 3).tolist() == [2, 0]
