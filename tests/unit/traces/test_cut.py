"""Cuts against the traces they were cut out of: the rows of the steps, the chains, what is told of requests."""

from __future__ import annotations

import io
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import generate
import numpy as np
import polars as pl
import pytest

from kvtrace_traces import KvtraceError, Trace, cut, importers, open_trace
from kvtrace_traces.cut.cut import ranges
from kvtrace_traces.cut.identities import keyed, rekey
from kvtrace_traces.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvtrace_replay.pool import follow, uncached_first
from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.verify import verify
from simulation.cases import random_case
from simulation.kernel import as_recorded, as_settings

SAMPLES = Path(__file__).resolve().parents[3] / "traces" / "samples"
STATIC = ("request_id", "arrival_ns", "arrival_s", "prompt_tokens", "max_tokens", "priority", "tenant", "no_cache_read")
TABLES = ("steps", "step_requests", "lookups", "preemptions", "block_events")


def made(trace: Trace, path: Path, first: int, stop: int | None, **options: Any) -> Trace:
    with path.open("wb") as file:
        cut.cut_steps(trace, file, first, stop, uncached_first=uncached_first(trace.header), **options)
    return open_trace(path)


def chosen(trace: Trace, path: Path, numbers: list[int], **options: Any) -> Trace:
    with path.open("wb") as file:
        cut.cut_requests(trace, file, np.array(numbers, np.int64), **options)
    return open_trace(path)


def simulated(seed: int, folder: Path, **options: Any) -> Trace:
    """A random run of the simulated scheduler, which keeps all of vLLM's rules."""
    case = random_case(seed, **options)
    path = folder / f"run-{seed}.kvt"
    write_run(path, as_recorded(case), as_settings(case.settings))
    return open_trace(path)


def toy(seed: int, folder: Path, **settings: Any) -> Trace:
    """A run of the toy engine, which uses every operation of the log."""
    own = generate.random_settings(seed)
    for name, value in settings.items():
        setattr(own, name, value)
    return open_trace(generate.write(own, folder / f"toy-{seed}")[0])


def hashes(trace: Trace, identities: pl.Series) -> list[int | None]:
    known = trace.chains().hashes
    return [None if i is None else int(known[i]) for i in identities.to_list()]


def numbers_of(part: Trace) -> list[int]:
    """What the requests of a cut by steps were called in the old trace."""
    about = part.header["cut"]
    new = len(part.chains().indptr) - 1 - len(about["carried"])
    return [*about["carried"], *range(about["first_request"], about["first_request"] + new)]


def renamed(frame: pl.DataFrame, old: list[int]) -> pl.DataFrame:
    names = dict(enumerate(old))
    return frame.with_columns(pl.col("request").replace_strict(names, default=None, return_dtype=pl.Int32))


def rows(trace: Trace, table: str, first: int, stop: int) -> pl.DataFrame:
    frame = getattr(trace, table)
    if table == "block_events":
        frame = frame.with_columns(identity=pl.Series(hashes(trace, frame["identity"]), dtype=pl.UInt64))
    return frame.filter(pl.col("step").is_between(first, stop - 1))


def assert_same_stretch(whole: Trace, part: Trace, first: int, stop: int, named: bool = True) -> None:
    """Every table of `part` has the rows of `whole` with steps from `first` to before `stop`."""
    old = numbers_of(part)
    for table in TABLES:
        theirs, mine = rows(whole, table, first, stop), getattr(part, table)
        mine = rows(part, table, 0, stop - first)
        assert mine.height == getattr(part, table).height
        mine = mine.with_columns(step=pl.col("step") + first)
        if "request" in mine.columns:
            mine = renamed(mine, old)
        if table == "step_requests":
            mine, theirs = mine.sort("step", "request"), theirs.sort("step", "request")
        for name in mine.columns:
            if name == "identity" and not named:
                continue
            assert mine[name].to_list() == theirs[name].to_list(), (table, name)
    assert_same_requests(whole, part, old, first, stop, named)


def assert_same_requests(whole: Trace, part: Trace, old: list[int], first: int, stop: int, named: bool) -> None:
    theirs, mine = whole.requests.rows_by_key("request", named=True), part.requests.to_dicts()
    assert {r for r, (row,) in theirs.items() if first < row["arrival_step"] < stop} <= set(old)
    for row in mine:
        number = old[row["request"]]
        (wanted,) = theirs[number]
        for name in STATIC:
            if named or name not in ("request_id", "tenant"):
                assert row[name] == wanted[name] or row[name] != row[name], (number, name)
        assert row["arrival_step"] == max(0, wanted["arrival_step"] - first)
        began, ended = wanted["first_step"], wanted["finish_step"]
        assert row["first_step"] == (began - first if began is not None and first <= began < stop else None)
        told = ended is not None and ended < stop
        if told and "toy" in str(whole.path) and ended == stop - 1:  # after a call without a step: see `in_order`
            told = row["finish_reason"] is not None
        if told:
            assert row["finish_step"] == max(0, ended - first)  # see `in_order`
            assert (row["finish_ns"], row["finish_reason"]) == (wanted["finish_ns"], wanted["finish_reason"])
            assert row["output_tokens"] == wanted["output_tokens"]
            assert row["cached_tokens"] == wanted["cached_tokens"]
        else:
            assert row["finish_reason"] is None
        if began is not None and began < stop:
            assert row["cached_tokens"] == wanted["cached_tokens"]
    chains, all_chains = part.chains(), whole.chains()
    for new, number in enumerate(old):
        own = chains.hashes[chains.identities[chains.indptr[new] : chains.indptr[new + 1]]]
        full = all_chains.hashes[all_chains.identities[all_chains.indptr[number] : all_chains.indptr[number + 1]]]
        assert not named or own.tolist() == full[: len(own)].tolist()
        row = part.requests.row(new, named=True)
        assert len(own) >= min(len(full), row["prompt_tokens"] // int(part.header["granule"]))


def assert_verified(part: Trace, whole: Trace | None = None) -> None:
    """Nothing contradicts but what did so before: random runs do not tell all their settings."""
    known = set() if whole is None else {check["name"] for check in verify(whole)["checks"] if check["mismatches"]}
    assert known <= {"simulation"}
    found = verify(part)
    if part.header["inexact"] == ["carried-state"] and not known:
        (simulated,) = [check for check in found["checks"] if check["name"] == "simulation"]
        assert simulated["skipped"] is None
    assert [check for check in found["checks"] if check["mismatches"] and check["name"] not in known] == []


def some_steps(trace: Trace, seed: int) -> list[tuple[int, int]]:
    steps = trace.steps.height
    if not steps:
        return []
    rng = np.random.default_rng(seed)
    found = [tuple(sorted(rng.choice(steps + 1, 2, replace=False).tolist())) for _ in range(2)]
    return [(0, steps), *found]


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_cuts_of_the_samples(name: str, tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / f"{name}.kvt")
    steps = whole.steps.height
    for first, stop in [(0, steps), (0, 1), (1, 2), (100, 300), (steps - 1, steps), (steps // 2, steps)]:
        part = made(whole, tmp_path / "part.kvt", first, stop)
        assert part.complete == (whole.complete or stop < steps)
        assert_same_stretch(whole, part, first, stop)
        assert_verified(part)
        assert ("carried-state" in part.header["inexact"]) == (first > 0)
    carried = made(whole, tmp_path / "part.kvt", 100, None)
    checks = {check["name"]: check for check in verify(carried)["checks"]}
    for checked in ("free queue order", "longest hit", "preemption costs", "hits", "frees", "simulation"):
        assert checks[checked]["checked"] > 0
        assert checks[checked]["skipped"] is None


def test_cuts_of_random_simulated_runs(tmp_path: Path) -> None:
    carried = preempted = 0
    for seed in range(150):
        whole = simulated(seed, tmp_path)
        if not in_order(whole):
            continue
        for first, stop in some_steps(whole, seed):
            part = made(whole, tmp_path / "part.kvt", first, stop)
            assert_same_stretch(whole, part, first, stop)
            assert_verified(part, whole)
            carried += len(part.header["cut"]["carried"])
            begun = part.snapshot()
            preempted += sum(live.preemptions > 0 for live in begun.live) if begun else 0
    assert carried > 200
    assert preempted > 20


def test_a_snapshot_is_the_pool_that_the_events_rebuild(tmp_path: Path) -> None:
    checked = 0
    for seed in range(60):
        whole = simulated(1000 + seed, tmp_path)
        for first, stop in some_steps(whole, seed)[1:]:
            part = made(whole, tmp_path / "part.kvt", first, stop)
            begun = part.snapshot()
            if begun is None:
                assert first == 0
                continue
            before = whole.block_events.filter(pl.col("step") < first).height
            pool = follow(whole, upto=before).state
            assert begun.queue.tolist() == pool.free.tolist()
            held = {
                block: int(part.chains().hashes[i])
                for block, i in zip(begun.blocks.tolist(), begun.identities, strict=True)
            }
            assert held == {b: int(whole.chains().hashes[i]) for b, i in enumerate(pool.identities.tolist()) if i >= 0}
            old = numbers_of(part)
            assert {old[live.request]: live.table for live in begun.live if live.table} == pool.tables
            checked += len(pool.tables)
    assert checked > 60


def in_order(trace: Trace) -> bool:
    """Whether rows come in the order of their steps. Where a call preempts all and makes no step, its rows belong to
    the step to come, and what happens after it to the one before: no stretch of the log has either alone."""
    return bool(trace.block_events["step"].is_sorted())


def test_cuts_of_toy_runs_with_every_operation(tmp_path: Path) -> None:
    parts = 0
    for seed in range(250):
        whole = toy(seed, tmp_path)
        if not whole.steps.height:
            continue
        part = made(whole, tmp_path / "part.kvt", 0, None)
        assert part.complete
        assert not part.lossy
        assert_same_stretch(whole, part, 0, whole.steps.height + 1)
        # Operations that name their blocks may name any request, also one that has ended.
        if generate.random_settings(seed).explicit or not in_order(whole):
            continue
        for first, stop in some_steps(whole, seed)[1:]:
            part = made(whole, tmp_path / "part.kvt", first, stop)
            assert part.complete
            assert not part.lossy
            assert_same_stretch(whole, part, first, stop)
            parts += 1
    assert parts > 150


def test_a_cut_of_a_cut_is_the_cut(tmp_path: Path) -> None:
    for whole in [open_trace(SAMPLES / "thrash.kvt"), *(simulated(seed, tmp_path) for seed in range(2000, 2030))]:
        steps = whole.steps.height
        if steps < 12:
            continue
        outer = made(whole, tmp_path / "outer.kvt", 3, steps - 2)
        again = made(outer, tmp_path / "again.kvt", 4, steps - 8)
        once = made(whole, tmp_path / "once.kvt", 7, steps - 5)
        assert_verified(again, whole)
        for table in (*TABLES, "requests", "step_spans"):
            mine, wanted = getattr(again, table), getattr(once, table)
            assert mine.drop("identity", strict=False).equals(wanted.drop("identity", strict=False)), table
        assert hashes(again, again.block_events["identity"]) == hashes(once, once.block_events["identity"])
        first, second = again.snapshot(), once.snapshot()
        assert first is not None
        assert second is not None
        assert first.live == second.live
        assert first.queue.tolist() == second.queue.tolist()
        assert first.blocks.tolist() == second.blocks.tolist()


def test_neighbouring_cuts_hold_every_row_once(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    parts = [made(whole, tmp_path / f"{a}.kvt", a, b) for a, b in pairwise([0, 200, 201, 700, whole.steps.height])]
    for table in TABLES:
        assert sum(getattr(part, table).height for part in parts) == getattr(whole, table).height
    assert sum(part.info["logged_events"] for part in parts) == whole.info["logged_events"]


def test_times_choose_the_steps_that_began_then(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    starts = whole.steps["start_ns"].to_list()
    for begin, end in [(10**9, 15 * 10**8), (None, starts[5]), (starts[40], None), (starts[7], starts[7] + 1)]:
        path = tmp_path / "part.kvt"
        with path.open("wb") as file:
            found = cut.cut_times(whole, file, begin, end, uncached_first=True)
        wanted = [i for i, t in enumerate(starts) if (begin is None or t >= begin) and (end is None or t < end)]
        assert found.steps == (wanted[0], wanted[-1] + 1)
        assert_same_stretch(whole, open_trace(path), *found.steps)
    for begin, end in [(10**12, None), (starts[3] + 1, starts[4]), (starts[3] + 1, starts[3] + 2)]:
        with pytest.raises(UsageError, match="no step"):
            cut.cut_times(whole, io.BytesIO(), begin, end)


# ---------------------------------------------------------------- chosen requests


def assert_same_of_chosen(whole: Trace, part: Trace, numbers: list[int]) -> None:
    """All that is told of the requests, blocks apart; steps are those in which one of them ran."""
    wanted = pl.Series(numbers, dtype=pl.Int32)
    ran = whole.step_requests.filter(pl.col("request").is_in(wanted.implode()))
    kept = ran["step"].unique().sort().to_list()
    steps = whole.steps.filter(pl.col("step").is_in(kept))
    for name in ("start_ns", "end_ns", "free_blocks", "running", "waiting"):
        assert part.steps[name].to_list() == steps[name].to_list(), name
    to_old = dict(enumerate(kept))
    for table in ("step_requests", "lookups", "preemptions"):
        mine = renamed(getattr(part, table), numbers)
        theirs = getattr(whole, table).filter(pl.col("request").is_in(wanted.implode()))
        if table == "preemptions":  # of a step in which perhaps none of them ran
            mine, theirs = mine.drop("step"), theirs.drop("step")
        else:
            mine = mine.with_columns(step=pl.col("step").replace_strict(to_old, default=None, return_dtype=pl.Int32))
        assert mine.rows() == theirs.rows(), table
    assert not part.block_events.height
    mine, theirs = part.requests, whole.requests.filter(pl.col("request").is_in(wanted.implode()))
    same = (*STATIC, "output_tokens", "cached_tokens", "preemptions", "finish_ns", "finish_reason", "chain_granules")
    for name in same:
        assert [x for x in mine[name].to_list() if x == x] == [x for x in theirs[name].to_list() if x == x], name
    for name in ("first_step", "last_step"):
        told = [None if s is None else to_old[s] for s in mine[name].to_list()]
        assert told == theirs[name].to_list(), name
    chains, all_chains = part.chains(), whole.chains()
    for new, number in enumerate(numbers):
        own = chains.hashes[chains.identities[chains.indptr[new] : chains.indptr[new + 1]]]
        full = all_chains.hashes[all_chains.identities[all_chains.indptr[number] : all_chains.indptr[number + 1]]]
        assert own.tolist() == full.tolist()


def test_chosen_requests(tmp_path: Path) -> None:
    traces = [open_trace(SAMPLES / "thrash.kvt"), open_trace(SAMPLES / "chat.kvt")]
    traces += [simulated(seed, tmp_path) for seed in range(3000, 3060)]
    traces += [toy(seed, tmp_path, explicit=0, ids=0) for seed in range(60)]
    for i, whole in enumerate(traces):
        total = whole.requests.height
        if not total:
            continue
        rng = np.random.default_rng(i)
        numbers = sorted(rng.choice(total, rng.integers(1, total + 1), replace=False).tolist())
        part = chosen(whole, tmp_path / "part.kvt", numbers)
        assert part.complete == whole.complete
        assert "chosen-requests" in part.header["inexact"]
        assert part.header["cut"]["requests"] == ranges(np.array(numbers))
        assert_same_of_chosen(whole, part, numbers)
        if "toy" not in str(whole.path):
            assert_verified(part)


def test_chosen_requests_of_a_cut_stay_what_they_were(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    middle = made(whole, tmp_path / "middle.kvt", 100, 400)
    numbers = list(range(0, middle.requests.height, 3))
    part = chosen(middle, tmp_path / "part.kvt", numbers)
    assert_same_of_chosen(middle, part, numbers)
    assert_verified(part)


def test_imports_are_cut_by_request_and_by_arrival(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        f'{{"timestamp": {100 * i}, "input_length": {512 * (i % 3 + 1)}, "output_length": 2, '
        f'"hash_ids": {list(range(i % 3 + 1))}}}'
        for i in range(20)
    ]
    source.write_text("\n".join(lines) + "\n")
    importers.run("mooncake", source, tmp_path / "in.kvt")
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"{i % 7}\n" for i in range(500)))
    importers.run("ids", ids, tmp_path / "ids.kvt")
    for name in ("in", "ids"):
        whole = open_trace(tmp_path / f"{name}.kvt")
        for numbers in ([0], [1, 2, 5], list(range(whole.requests.height))):
            part = chosen(whole, tmp_path / "part.kvt", numbers)
            mine = part.requests.drop("request", "type", "turn", "parent", strict=False)
            theirs = whole.requests.filter(pl.col("request").is_in(numbers))
            assert mine.equals(theirs.select(mine.columns), null_equal=True)
            assert part.header["inexact"] == whole.header["inexact"]
            own = part.chains()
            full = whole.chains()
            wanted = np.concatenate(
                [full.hashes[full.identities[full.indptr[n] : full.indptr[n + 1]]] for n in numbers]
            )
            assert own.hashes[own.identities].tolist() == wanted.tolist()
    path = tmp_path / "part.kvt"
    with path.open("wb") as file:
        found = cut.cut_times(open_trace(tmp_path / "in.kvt"), file, 500_000_000, 900_000_000)
    assert found.requests == 4
    assert open_trace(path).requests["arrival_ns"].to_list() == [10**8 * i for i in range(5, 9)]
    with pytest.raises(UsageError, match="does not tell when"):
        cut.cut_times(open_trace(tmp_path / "ids.kvt"), io.BytesIO(), 0, 1)
    with pytest.raises(UsageError, match="has no scheduler steps"):
        cut.cut_steps(open_trace(tmp_path / "in.kvt"), io.BytesIO(), 0, 1)


# ---------------------------------------------------------------- rekeyed


def test_siphash_gives_the_authors_vector() -> None:
    key = np.frombuffer(bytes(range(16)), "<u8").copy()
    value = np.frombuffer(bytes(range(8)), "<u8")[0]
    assert int(keyed(key, value)) == int.from_bytes(bytes.fromhex("6224939a79f5f593"), "little")


def test_rekeying_keeps_equality_and_nothing_else(tmp_path: Path) -> None:
    traces = [open_trace(SAMPLES / "thrash.kvt")]
    traces += [simulated(seed, tmp_path) for seed in range(4000, 4030)]
    traces += [toy(seed, tmp_path, empty=0.0, explicit=0) for seed in range(40)]
    for i, whole in enumerate(trace for trace in traces if in_order(trace)):
        for first, stop in some_steps(whole, i):
            plain = made(whole, tmp_path / "plain.kvt", first, stop)
            part = made(whole, tmp_path / "part.kvt", first, stop, rekey=True)
            assert_same_stretch(whole, part, first, stop, named=False)
            for table in (*TABLES, "step_spans"):
                assert getattr(part, table).equals(getattr(plain, table)), table
            mine, wanted = part.chains(), plain.chains()
            assert mine.identities.tolist() == wanted.identities.tolist()
            assert not set(mine.hashes.tolist()) & set(wanted.hashes.tolist())
            assert len(set(mine.hashes.tolist())) == len(mine.hashes)
            tenants = dict(zip(plain.requests["tenant"], part.requests["tenant"], strict=True))
            assert len(set(tenants.values())) == len(tenants)
            assert all((a == 0) == (b == 0) for a, b in tenants.items())
            names = dict(zip(plain.requests["request_id"], part.requests["request_id"], strict=True))
            assert not any(name and name == new for name, new in names.items())
            if "toy" not in str(whole.path):
                assert_verified(part, whole)
    assert not {"host", "pid"} & part.header.keys()
    again = made(whole, tmp_path / "again.kvt", first, stop, rekey=True)
    assert not set(again.chains().hashes.tolist()) & set(part.chains().hashes.tolist())


def test_rekeyed_names_keep_the_order_that_breaks_ties(tmp_path: Path) -> None:
    for seed in range(40):
        whole = simulated(seed, tmp_path, policy="priority")
        part = made(whole, tmp_path / "part.kvt", 0, None, rekey=True)
        order = part.requests["request_id"].arg_sort().to_list()
        assert order == whole.requests["request_id"].arg_sort().to_list()
        one, two = ([c for c in verify(trace)["checks"] if c["name"] == "simulation"] for trace in (whole, part))
        assert one == two


def test_rekey_leaves_none_alone() -> None:
    values = np.array([0, 5, 5, 7], np.uint64)
    rekey(np.array([1, 2], np.uint64), values, True)
    assert values[0] == 0
    assert values[1] == values[2] != values[3]


# ---------------------------------------------------------------- what cannot be cut


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    whole = open_trace(SAMPLES / "thrash.kvt")
    for first, stop, said in [
        (5, 5, "are none"),
        (5, 4, "are none"),
        (1245, None, "not there"),
        (9999, 10000, "not there"),
    ]:
        with pytest.raises(UsageError, match=said):
            cut.cut_steps(whole, io.BytesIO(), first, stop)
    for numbers, said in [([], "name some"), ([192], "no request 192"), ([-1], "no request -1")]:
        with pytest.raises(UsageError, match=said):
            cut.cut_requests(whole, io.BytesIO(), np.array(numbers, np.int64))
    assert made(whole, tmp_path / "part.kvt", 1000, 99999).steps.height == 245


def test_a_damaged_trace_is_cut_where_it_is_whole(tmp_path: Path) -> None:
    data = bytearray((SAMPLES / "thrash.kvt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.kvt").write_bytes(data)
    whole, broken = open_trace(SAMPLES / "thrash.kvt"), open_trace(tmp_path / "bad.kvt")
    steps = broken.steps.height
    assert 100 < steps < whole.steps.height
    part = made(broken, tmp_path / "part.kvt", 20, 100)
    assert part.complete
    assert_same_stretch(whole, part, 20, 100)
    assert not made(broken, tmp_path / "part.kvt", 20, None).complete
    with pytest.raises(UsageError, match="not there"):
        cut.cut_steps(broken, io.BytesIO(), steps, None)
    with pytest.raises(KvtraceError, match="holes"):
        cut.cut_steps(open_trace(tmp_path / "bad.kvt", recover="skip"), io.BytesIO(), 1, 2)


def test_segments_and_killed_runs_are_cut(tmp_path: Path) -> None:
    own = generate.Settings(seed=3, steps=400, frame_commits=20)
    generate.write(own, tmp_path / "run", segment_bytes=8192)
    whole = open_trace(tmp_path / "run.kvt")
    assert len(whole.files) > 1
    part = made(whole, tmp_path / "part.kvt", 50, 300)
    assert_same_stretch(whole, part, 50, 300)


def test_memory_follows_what_is_alive(tmp_path: Path) -> None:
    from kvtrace_traces.cut.cut import _Source
    from kvtrace_traces.cut.follower import Follower

    whole = toy(7, tmp_path, steps=12000, explicit=0, ids=0, arrivals=0.5, blocks=60, budget=30, frame_commits=50)
    assert whole.requests.height > 2500
    follower = Follower(_Source(whole, None).words, False)
    follower.run()
    assert follower._small.shape[1] < 2000
    assert follower._nodes.shape[1] < 3000
