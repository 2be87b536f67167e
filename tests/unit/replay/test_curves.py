"""The one-pass LRU curve against a list as the stack, the replay at each capacity, a Fenwick tree and libCacheSim."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtrace_replay import Workload, replay
from kvtrace_replay.curves.lru import LruCurve, largest_request, lru_curve
from kvtrace_replay.curves.lru_kernels import import_kernel, object_kernel
from kvtrace_replay.curves.parts import ObjectCurve, parts_for
from kvtrace_replay.curves.points import Exact, spread
from kvtrace_replay.curves.stack import SLOTS_PER_AREA, count_from, new_stack
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError
from unit.replay.test_against_twins import random_workload
from unit.replay.twins import make_workload, tokens_of

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
SEMANTICS = ["object", "prefix"]
compiled_only = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="too slow uncompiled")
FACTS = ["requests", "block_lookups", "token_lookups"]


class Stack:
    """Blocks by their last use, the latest first; pinned ones stand apart."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.holders: Counter[int] = Counter()
        self.most_pinned = 0

    def needed(self, block: int) -> float:
        """The capacity from which on `block` is in the cache."""
        if self.holders[block]:
            return 0
        return len(+self.holders) + self.blocks.index(block) + 1 if block in self.blocks else math.inf

    def use(self, block: int) -> None:
        if block in self.blocks:
            self.blocks.remove(block)
        self.blocks.insert(0, block)

    def take(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self.blocks:
                self.blocks.remove(block)
            self.holders[block] += 1
        self.most_pinned = max(self.most_pinned, len(+self.holders))

    def let_go(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                self.use(block)


def slow_curve(workload: Workload, semantics: str, first: int = 0) -> tuple[list[tuple[float, int]], int]:
    """([(capacity needed, tokens)] of every lookup after the first `first` requests admitted, most pinned blocks)."""
    refs = workload.raw if semantics == "object" and workload.raw is not None else workload.identities
    chains = [refs[a:b].tolist() for a, b in pairwise(workload.indptr.tolist())]
    stack = Stack()
    found: list[tuple[float, int]] = []
    admitted = 0
    if semantics == "object":
        events = range(1, workload.n_requests + 1)
    elif workload.schedule is None:
        events = [e for r in range(1, workload.n_requests + 1) for e in (r, -r)]
    else:
        events = workload.schedule.tolist()
    for event in events:
        r = abs(event) - 1
        chain, prompt, start = chains[r], int(workload.prompt_blocks[r]), int(workload.indptr[r])
        counted = admitted >= first
        if semantics == "object":
            for i, block in enumerate(chain):
                if counted:
                    found.append((stack.needed(block), tokens_of(workload, r, start + i)))
                stack.use(block)
        elif event > 0:
            needed = 0.0
            for i, block in enumerate(chain[: min(prompt, int(workload.hit_cap[r]))]):
                needed = max(needed, stack.needed(block))
                if counted:
                    found.append((needed, tokens_of(workload, r, start + i)))
            stack.take(chain[:prompt])
        else:
            stack.take(chain[prompt:])
            stack.let_go(chain)
        admitted += event > 0
    return found, stack.most_pinned


def check_against_stack(workload: Workload, semantics: str, warmup: float) -> LruCurve:
    curve = lru_curve(workload, semantics, warmup)
    found, most_pinned = slow_curve(workload, semantics, int(warmup * workload.n_requests))
    for capacity in range(curve.exact_from, curve.distinct_blocks + 2):
        hit = [tokens for needed, tokens in found if needed <= capacity]
        assert curve.block_hits(capacity) == len(hit)
        assert curve.token_hits(capacity) == sum(hit)
    if semantics == "prefix":
        assert curve.exact_from == max(1, curve.largest_request, most_pinned if workload.schedule is not None else 0)
    return curve


def check_against_replay(workload: Workload, semantics: str, warmup: float, curve: LruCurve) -> None:
    """The driver, run at every capacity from the smallest it accepts on."""
    capacities = [*range(curve.exact_from, curve.distinct_blocks + 2), math.inf]
    for capacity, row in zip(capacities, replay(workload, "lru", capacities, semantics, warmup=warmup), strict=True):
        assert row["why"] is None
        assert (row["block_hits"], row["token_hits"]) == (curve.block_hits(capacity), curve.token_hits(capacity))
        assert row["pin_overflow_requests"] == 0
        assert [row[name] for name in FACTS] == [getattr(curve, name) for name in FACTS]
    if semantics == "prefix" and curve.largest_request > 1:
        (row,) = replay(workload, "lru", curve.largest_request - 1, semantics)
        assert row["why"] is not None


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_thousands_of_random_workloads(semantics: str) -> None:
    rng = random.Random(semantics)
    for _ in range(1500):
        workload, _ = random_workload(rng)
        warmup = rng.choice([0.0, 0.0, 0.3, 0.9])
        curve = check_against_stack(workload, semantics, warmup)
        check_against_replay(workload, semantics, warmup, curve)


@settings(max_examples=300, deadline=None)
@given(
    chains=st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=10),
    semantics=st.sampled_from(SEMANTICS),
    warmup=st.sampled_from([0.0, 0.5]),
)
def test_any_chains_shrinkable(chains: list[list[int]], semantics: str, warmup: float) -> None:
    workload = make_workload(chains)
    check_against_replay(workload, semantics, warmup, check_against_stack(workload, semantics, warmup))


def test_below_exact_from_the_pass_may_be_wrong_and_points_are_replayed() -> None:
    """Where not everything that runs at a time fits, the one pass cannot tell what is bypassed: the bound is needed."""
    rng = random.Random(5)
    wrong = points = 0
    for _ in range(400):
        workload, _ = random_workload(rng)
        if workload.schedule is None:
            continue
        exact = Exact(workload, "lru", "prefix")
        capacities = list(range(exact.curve.largest_request, exact.curve.exact_from))
        if not capacities:
            continue
        frame = exact.at(capacities)
        rows = replay(workload, "lru", capacities, "prefix")
        assert frame["block_hits"].to_list() == [row["block_hits"] for row in rows]
        assert set(frame["method"]) == {"replay"}
        points += len(capacities)
        wrong += sum(
            exact.curve.block_hits(capacity) != row["block_hits"]
            for capacity, row in zip(capacities, rows, strict=True)
        )
    assert points > 100
    assert wrong > 5


def test_points_keep_the_order_asked_for() -> None:
    workload, _ = random_workload(random.Random(3))
    schedule = [*range(1, workload.n_requests + 1), *(-r for r in range(1, workload.n_requests + 1))]
    lengths = np.diff(workload.indptr).tolist()
    workload = make_workload(
        [workload.identities[a:b].tolist() for a, b in pairwise(workload.indptr)],
        prompt_blocks=lengths,
        schedule=schedule,
    )
    exact = Exact(workload, "lru", "prefix")
    middle, top = exact.curve.exact_from, exact.curve.distinct_blocks
    assert exact.curve.largest_request < middle
    capacities = [math.inf, middle - 1, top, 1, middle]
    frame = exact.at(capacities)
    rows = replay(workload, "lru", capacities, "prefix")
    for name in ("capacity_blocks", "block_hits", "block_hit_ratio", "token_hits", "token_hit_ratio", "why"):
        assert frame[name].to_list() == [row[name] for row in rows]
    assert frame["method"].to_list() == ["one-pass", "replay", "one-pass", "replay", "one-pass"]
    assert frame["block_hits"][3] is None
    assert "cannot hold the largest single request" in frame["why"][3]


@pytest.mark.parametrize("policy", ["fifo", "opt", "lru+second-touch"])
def test_other_policies_are_replayed(policy: str) -> None:
    workload, _ = random_workload(random.Random(8))
    exact = Exact(workload, policy, "object")
    points = exact.default_points()
    rows = replay(workload, policy, points, "object")
    frame = exact.at(points)
    assert frame["block_hits"].to_list() == [row["block_hits"] for row in rows]
    assert set(frame["method"]) == {"replay"}
    assert set(frame["policy"]) == {policy}


def test_all_points_are_where_the_curve_turns() -> None:
    workload = make_workload([[0, 1, 2, 3], [3], [0], [0, 1, 2, 3]])
    exact = Exact(workload, "lru", "object")
    # 3 again: needs 1; 0: 4; then 0: 1, 1: 4, 2: 4, 3: 4.
    assert list(exact.all_points()) == [1, 4]
    assert exact.at([1, 2, 3, 4])["block_hits"].to_list() == [2, 2, 2, 6]
    rng = random.Random(2)
    for _ in range(200):
        workload, _ = random_workload(rng)
        exact = Exact(workload, "lru", "prefix")
        turns = exact.curve.breakpoints().tolist()
        every = range(exact.curve.exact_from, exact.curve.distinct_blocks + 1)
        hits = {c: exact.curve.block_hits(c) for c in every}
        assert turns[0] == exact.curve.exact_from
        assert turns[1:] == [c for c in every[1:] if hits[c] != hits[c - 1]]


# Larger streams: several lines, nodes and areas of slots, and slots that run out.


@njit(cache=False)
def fenwick(refs: I32, n_identities: int) -> I64:
    """int64[n_identities + 1]: uses that need a capacity of c. Bennett and Kruskal's algorithm, as it stands."""
    n = refs.size
    tree = np.zeros(n + 1, np.int64)
    last = np.full(n_identities, -1, np.int64)
    found = np.zeros(n_identities + 1, np.int64)
    live = 0
    for i in range(n):
        key = refs[i]
        if last[key] >= 0:
            before, at = 0, last[key]
            while at > 0:
                before += tree[at]
                at -= at & -at
            found[live - before] += 1
            at = last[key] + 1
            while at <= n:
                tree[at] -= 1
                at += at & -at
        else:
            live += 1
        last[key] = i
        at = i + 1
        while at <= n:
            tree[at] += 1
            at += at & -at
    return found


def zipf(n_refs: int, n_objects: int, alpha: float, seed: int) -> I32:
    weight = np.cumsum(np.arange(1, n_objects + 1) ** -alpha)
    drawn = np.searchsorted(weight / weight[-1], np.random.default_rng(seed).random(n_refs))
    ids: I32 = np.unique(drawn, return_inverse=True)[1].astype(np.int32)
    return ids


def run_kernel(refs: I32, indptr: I64, hits: npt.NDArray[Any], stack: tuple[Any, ...]) -> None:
    """The kernel alone, over all requests, whose blocks are full."""
    full, none = np.full(indptr.size - 1, 16, np.int32), np.zeros(0, np.int32)
    object_kernel(refs, indptr, full, 16, 0, indptr.size - 1, 0, none, none, hits, none.astype(np.int64), *stack)


@compiled_only
@pytest.mark.parametrize("slots_per_block", [1, 2, 4])
@pytest.mark.parametrize(("n_refs", "n_objects", "alpha"), [(30_000, 600, 0.5), (300_000, 50_000, 0.8)])
def test_against_a_fenwick_tree(n_refs: int, n_objects: int, alpha: float, slots_per_block: int) -> None:
    refs = zipf(n_refs, n_objects, alpha, n_objects)
    n = int(refs.max()) + 1
    hits = np.zeros(n + 1, np.int64)
    indptr = np.array([0, refs.size // 3, refs.size])
    run_kernel(refs, indptr, hits, new_stack(n, slots_per_block))
    assert hits.tolist() == fenwick(refs, n).tolist()


@compiled_only
def test_parts_of_the_references_are_as_the_whole() -> None:
    """Any number of parts, also empty ones; last blocks that are not full, and a warm-up that ends in any part."""
    rng = np.random.default_rng(8)
    beyond = 0
    for case in range(150):
        n = int(rng.integers(1, 400))
        lengths = rng.integers(0, 30, int(rng.integers(1, 200)))
        indptr = np.append(0, np.cumsum(lengths)).astype(np.int64)
        # High numbers are rare, so that their last use often lies several parts back.
        refs = rng.integers(0, rng.integers(1, n + 1, 1 + indptr[-1])[: indptr[-1]], dtype=np.int32)
        last = rng.integers(1, 17, lengths.size).astype(np.int32)
        counted = int(rng.integers(0, lengths.size + 1)) if case % 2 else 0
        partial = case % 3 > 0
        if not partial:
            last[:] = 16
        whole, *others = (
            ObjectCurve(refs, indptr, last, 16, counted, n, partial, parts).run() for parts in (1, 2, 3, 5, 9)
        )
        if not counted:
            assert whole[0].tolist() == fenwick(refs, n).tolist()
        for hits, short in others:
            assert hits.tolist() == whole[0].tolist()
            assert short.tolist() == whole[1].tolist()
        beyond += int(whole[0][n // 2 :].sum())
    assert beyond > 10_000


def test_a_large_workload_is_spread_over_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    workloads = [random_workload(rng)[0] for _ in range(60)]
    alone = [lru_curve(workload, "object", 0.2) for workload in workloads]
    for name, value in (("cores", lambda: 3), ("_LEAST_REFS", 1), ("_LEAST_REFS_PER_BLOCK", 0)):
        monkeypatch.setattr(f"kvtrace_replay.curves.parts.{name}", value)
    assert parts_for(3, 1) == 3
    for workload, one in zip(workloads, alone, strict=True):
        spread_out = lru_curve(workload, "object", 0.2)
        assert spread_out.hits.tolist() == one.hits.tolist()
        assert spread_out.short_tokens.tolist() == one.short_tokens.tolist()


@compiled_only
def test_several_areas_of_slots() -> None:
    refs = zipf(3_000_000, 900_000, 0.4, 1)
    n = int(refs.max()) + 1
    assert 3 * n > SLOTS_PER_AREA
    requests = np.arange(0, refs.size + 1, 50, dtype=np.int64)
    hits = np.zeros(n + 1, np.uint32)
    run_kernel(refs, requests, hits, new_stack(n))
    assert (hits == fenwick(refs, n)).all()


@compiled_only
@pytest.mark.parametrize("slots_per_block", [1, 4])
def test_long_chains(slots_per_block: int) -> None:
    """Conversations whose chains grow over many lines of slots; each request's hits against one replay."""
    rng = np.random.default_rng(0)
    length = [0] * 12
    chains = []
    for _ in range(300):
        one = int(rng.integers(12))
        length[one] += int(rng.integers(1, 200))
        chains.append(np.arange(length[one]) * 12 + one)
        if rng.random() < 0.1:
            length[one] = 0
    inverse = np.unique(np.concatenate(chains), return_inverse=True)[1]
    bounds = np.cumsum([0, *(chain.size for chain in chains)])
    workload = make_workload([inverse[a:b].tolist() for a, b in pairwise(bounds)])
    n = workload.n_identities
    hits, none = np.zeros(n + 1, np.uint32), np.zeros(0, np.int64)
    import_kernel(
        workload.identities, workload.indptr, workload.prompt_blocks, workload.hit_cap, workload.last_tokens, 16, 0,
        hits, none, *new_stack(n, slots_per_block),
    )  # fmt: skip
    largest = largest_request(workload.identities, workload.indptr, n)
    capacities = sorted({largest, largest + 1, *np.geomspace(largest, n, 30).astype(int).tolist(), n})
    rows = replay(workload, "lru", capacities, "prefix")
    assert [row["block_hits"] for row in rows] == np.cumsum(hits)[capacities].tolist()
    # The same requests, seven at a time.
    events: list[int] = []
    for r in range(len(chains)):
        events += [r + 1, *([-(r - 6)] if r >= 7 else [])]
    recorded = make_workload([chain.tolist() for chain in np.split(inverse, bounds[1:-1])], schedule=events)
    curve = lru_curve(recorded)
    capacities = sorted({curve.exact_from, *np.geomspace(curve.exact_from, n, 20).astype(int).tolist()})
    rows = replay(recorded, "lru", capacities, "prefix")
    assert [row["block_hits"] for row in rows] == [curve.block_hits(capacity) for capacity in capacities]
    assert {row["pin_overflow_requests"] for row in rows} == {0}


def check_ranks(refs: I32, n: int, slots_per_block: int) -> None:
    """Ranks after `refs` against a running sum over all slots."""
    stack = new_stack(n, slots_per_block)
    indptr = np.array([0, refs.size])
    run_kernel(refs, indptr, np.zeros(n + 1, np.int64), stack)
    last, bits, *counts = stack
    live = np.unpackbits(bits.view(np.uint8), bitorder="little").astype(np.int64)
    assert live.sum() == n
    assert (live[last.astype(np.int64)] == 1).all()
    from_here = live[::-1].cumsum()[::-1]
    now = np.uint64(last.max() + 1)
    for key in np.random.default_rng(5).integers(0, n, 3000):
        assert count_from(np.uint64(last[key]), now, bits, *counts) == from_here[last[key]]


@compiled_only
@pytest.mark.parametrize("slots_per_block", [1, 2])
def test_a_rank_at_every_level(slots_per_block: int) -> None:
    """Live slots in several areas, some removed, once renumbered and once not."""
    n = 2 * SLOTS_PER_AREA + 12_345
    refs = np.concatenate([np.arange(n), np.random.default_rng(4).integers(0, n, 50_000)]).astype(np.int32)
    check_ranks(refs, n, slots_per_block)


@compiled_only
def test_a_rank_over_more_areas_than_a_row_has() -> None:
    """Some blocks were used last in the midst of the first row of areas, the others at the start of the second."""
    n, row = 3000, 32 * SLOTS_PER_AREA
    often = np.random.default_rng(6).integers(0, n - 1000, row + 3_000_000)
    refs = np.insert(often.astype(np.int32), row // 2, np.arange(n, dtype=np.int32))
    check_ranks(refs, n, -(-refs.size // n))


@compiled_only
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_libcachesim(seed: int) -> None:
    libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    refs = zipf(20_000, 3_000, [0.6, 1.0, 1.3][seed], seed)
    curve = lru_curve(make_workload(refs.reshape(-1, 10).tolist()), "object")
    for capacity in (1, 7, 50, 300, 1000, 2500):
        cache = libcachesim.LRU(cache_size=capacity)
        hits = 0
        for i, key in enumerate(refs.tolist()):
            request = libcachesim.Request()
            request.obj_id, request.obj_size, request.clock_time = key, 1, i
            hits += cache.get(request)
        assert curve.block_hits(capacity) == hits


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_maps_of_files(semantics: str, tmp_path: Path) -> None:
    """Arrays that lie in files are only read."""
    from dataclasses import replace

    workload, _ = random_workload(random.Random(1))
    path = tmp_path / "ids.npy"
    np.save(path, workload.identities)
    mapped = replace(workload, identities=np.load(path, mmap_mode="r"), raw=None)
    plain = lru_curve(replace(workload, raw=None), semantics)
    assert lru_curve(mapped, semantics).hits.tolist() == plain.hits.tolist()


def test_the_smallest_workloads() -> None:
    for chains in ([[]], [[0]], [[], [0, 0]]):
        workload = make_workload(chains)
        for semantics in SEMANTICS:
            exact = Exact(workload, "lru", semantics)
            frame = exact.at([*exact.all_points(), math.inf])
            assert frame["block_hits"].null_count() == 0
            assert frame["block_hits"][-1] == (1 if semantics == "object" and len(chains) == 2 else 0)
    assert Exact(make_workload([[]]), "lru", "object").at([1])["block_hit_ratio"].to_list() == [None]


def test_wrong_arguments_are_usage_errors() -> None:
    workload, _ = random_workload(random.Random(0))
    with pytest.raises(UsageError, match="radix"):
        lru_curve(workload, "radix")
    with pytest.raises(UsageError, match="warm-up"):
        lru_curve(workload, "object", 1.0)
    with pytest.raises(UsageError, match="no policy is called"):
        Exact(workload, "lur", "object")


def test_spread_points() -> None:
    assert spread(1, 1, 40) == [1]
    assert spread(5, 3, 40) == [5]
    assert spread(1, 10, 40) == list(range(1, 11))
    many = spread(7, 1_000_000, 40)
    assert (many[0], many[-1], len(many)) == (7, 1_000_000, 40)
    ratios = [b / a for a, b in pairwise(many[5:])]
    assert max(ratios) / min(ratios) < 1.05
