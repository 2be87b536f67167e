"""Views of cuts: the rows of the whole trace, for what a cut begins with is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import kvtrace
from kvtrace import samples, sql
from kvtrace.views import views
from kvtrace_replay.pool import follow, uncached_first
from kvtrace_replay.schedulers.log import write_run
from kvtrace_traces import cut
from simulation.cases import random_case
from simulation.kernel import as_recorded, as_settings

Row = dict[str, Any]
SEEDS = range(300, 325)


def made(whole: kvtrace.Trace, path: Path, first: int) -> kvtrace.Trace:
    with path.open("wb") as file:
        cut.cut_steps(whole.reader, file, first, None, uncached_first=uncached_first(whole.header))
    return kvtrace.open(path)


def wholes(folder: Path) -> list[kvtrace.Trace]:
    found = [kvtrace.open(samples.path(name)) for name in ("thrash", "chat")]
    for seed in SEEDS:
        case = random_case(seed)
        write_run(folder / f"{seed}.kvt", as_recorded(case), as_settings(case.settings))
        found.append(kvtrace.open(folder / f"{seed}.kvt"))
    steps = [trace.block_events["step"] for trace in found]
    return [trace for trace, step in zip(found, steps, strict=True) if step.is_sorted() and trace.steps.height > 4]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[kvtrace.Trace, kvtrace.Trace, int]]:
    """(whole, cut, first step) of the samples and of random runs; each cut goes on to the end."""
    folder = tmp_path_factory.mktemp("cuts")
    found = []
    for whole in wholes(folder):
        steps = whole.steps.height
        for first in {steps // 4, steps // 2, steps - 2} - {0}:
            found.append((whole, made(whole, folder / f"part-{len(found)}.kvt", first), first))
    return found


def numbers(part: kvtrace.Trace) -> list[int]:
    about = part.header["cut"]
    new = part.requests.height - len(about["carried"])
    return [*about["carried"], *range(about["first_request"], about["first_request"] + new)]


def in_old_words(whole: kvtrace.Trace, part: kvtrace.Trace, view: str, first: int) -> tuple[list[Row], list[Row]]:
    """The rows of both, those of the cut with the whole trace's steps and requests; identities by their hashes."""
    old = numbers(part)

    def rows(trace: kvtrace.Trace, step: int, names: list[int] | None) -> list[Row]:
        hashes = trace.reader.chains().hashes
        found = trace.sql(f"FROM {view}").to_dicts()
        for row in found:
            for name, value in row.items():
                if value is not None and name.endswith("step") and not (name == "step" and value < 0):
                    row[name] = value + step
                elif value is not None and name in ("request", "evicted_by") and names is not None:
                    row[name] = names[value]
                elif value is not None and name == "identity":
                    row[name] = int(hashes[value])
        return found

    return rows(whole, 0, None), rows(part, first, old)


def test_occupancy(cuts: Any) -> None:
    told = 0
    for whole, part, first in cuts:
        theirs, mine = in_old_words(whole, part, "occupancy", first)
        assert mine == [row for row in theirs if row["step"] >= first]
        told += sum(row["used_tokens"] is not None for row in mine)
    assert told > 500


def test_block_lifetimes(cuts: Any) -> None:
    carried = idle = 0
    for whole, part, first in cuts:
        theirs, mine = in_old_words(whole, part, "block_lifetimes", first)
        events = in_old_words(whole, part, "block_events", first)[0]
        wanted = []
        for row in theirs:
            if row["evict_step"] is not None and row["evict_step"] < first:
                continue
            if row["fill_step"] < first:
                mine_now = [e for e in events if e["step"] >= first and e["block"] == row["block"]
                            and (row["evict_ns"] is None or e["time_ns"] <= row["evict_ns"])]  # fmt: skip
                used = [e["time_ns"] for e in mine_now if e["kind"] == "hit" and e["identity"] == row["identity"]]
                row |= {"request": None, "fill_step": None, "fill_ns": None, "uses": len(used), "lifetime_ns": None,
                        "first_use_ns": min(used, default=None), "last_use_ns": max(used, default=None)}  # fmt: skip
                if not any(e["kind"] == "free" for e in mine_now):
                    row["idle_ns"] = None
                carried += 1
                idle += row["idle_ns"] is not None
            wanted.append(row)
        assert ordered(mine) == ordered(wanted), (part.path, first)
    assert carried > 300
    assert idle > 20


def ordered(rows: list[Row]) -> list[str]:
    return sorted(repr(row) for row in rows)


def test_misses(cuts: Any) -> None:
    """As in the whole trace, but that what was evicted before the cut is not known to have been cached."""
    moved = capacity = preemption = 0
    for whole, part, first in cuts:
        theirs, mine = in_old_words(whole, part, "misses", first)
        wanted = [row for row in theirs if row["step"] >= first]
        cached = {
            int(whole.reader.chains().hashes[i])
            for i in follow(
                whole.reader, upto=whole.block_events.filter(pl.col("step") < first).height
            ).state.identities
            if i >= 0
        }
        known = slow_capacity(whole, first, cached, wanted)
        for row, tokens in zip(wanted, known, strict=True):
            lost = row["capacity_tokens"] - tokens
            moved += lost > 0
            capacity += tokens > 0
            preemption += row["preemption_tokens"] > 0
            row |= {"capacity_tokens": tokens, "cold_tokens": row["cold_tokens"] + lost}
        assert mine == wanted, (part.path, first)
    assert min(moved, capacity, preemption) > 10


def slow_capacity(whole: kvtrace.Trace, first: int, cached: set[int], rows: list[Row]) -> list[int]:
    """Missed tokens of each row whose block was cached at the begin, or filled since then and before its step."""
    size, chains = whole.header["block_size"], whole.reader.chains()
    stride = size // (whole.header.get("granule") or size)
    filled: dict[int, int] = dict.fromkeys(cached, -1)
    for event in whole.block_events.filter((pl.col("kind") == "fill") & (pl.col("step") >= first)).to_dicts():
        filled.setdefault(int(chains.hashes[event["identity"]]), event["step"])
    computed = pl.col("prompt_tokens") + pl.col("output_tokens") - (pl.col("output_tokens") > 0)
    ends = dict(whole.requests.select("request", computed).rows())
    unread = set(whole.requests.filter("no_cache_read")["request"].to_list())
    found = []
    for row in rows:
        r, asked = row["request"], row["tokens_asked"]
        had = row["tokens_hit"] + row["preemption_tokens"]
        chain = chains.hashes[chains.identities[chains.indptr[r] : chains.indptr[r + 1]]][stride - 1 :: stride]
        tokens = 0
        for position in range(
            min((asked - 1) // size, len(chain) if ends[r] is None else min(len(chain), ends[r] // size))
        ):
            known = filled.get(int(chain[position]))
            if (position + 1) * size > had and known is not None and known < row["step"] and r not in unread:
                tokens += (position + 1) * size - max(position * size, had)
        found.append(tokens)
    return found


def test_block_tables_and_reads(cuts: Any) -> None:
    for whole, part, first in cuts:
        theirs, mine = in_old_words(whole, part, "block_tables", first)
        wanted = [row for row in theirs if row["free_step"] is None or row["free_step"] >= first]
        for row in wanted:
            if row["step"] < first:
                row |= {"step": -1, "taken_by": "carried"}
        assert ordered(mine) == ordered(wanted), (part.path, first)
    for whole, part, first in cuts[2:30]:
        theirs, mine = in_old_words(whole, part, "reads", first)
        assert ordered(mine) == ordered([row for row in theirs if row["step"] >= first]), (part.path, first)


def test_reuse_of_what_was_used_in_the_cut(cuts: Any) -> None:
    told = 0
    for whole, part, first in cuts:
        theirs, mine = in_old_words(whole, part, "reuse", first)
        old, of_whole = numbers(part), {(row["request"], row["position"]): row for row in theirs}
        for row in mine:
            if row["previous_request"] is None:
                continue
            previous = old[row["previous_request"]]
            wanted = of_whole[row["request"], row["position"]]
            assert (previous, row["distance_blocks"], row["reuse_ns"]) == (
                wanted["previous_request"], wanted["distance_blocks"], wanted["reuse_ns"],
            )  # fmt: skip
            told += 1
    assert told > 100


@pytest.mark.parametrize("view", ["block_lifetimes", "misses", "occupancy"])
def test_kernel_and_sql_agree(view: str, cuts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {name: each._replace(fast=None) for name, each in views().items()}
    for _, part, _ in cuts[:30]:
        fast = sql.Database([part.reader]).query(f"FROM {view}")
        with monkeypatch.context() as patch:
            patch.setattr(sql, "views", lambda: slow)
            assert ordered(sql.Database([part.reader]).query(f"FROM {view}").to_dicts()) == ordered(fast.to_dicts())


def test_stats_count_what_a_cut_begins_with(cuts: Any) -> None:
    some = [found for found in cuts if found[1].lookups.height > 20][:4]
    assert len(some) == 4
    for whole, part, first in some:
        told = dict(kvtrace.stats(part).filter(pl.col("at").is_null()).select("metric", "value").rows())
        starts = whole.sql(f"SELECT start_ns FROM lookups JOIN steps USING (engine_index, step) WHERE step >= {first}")
        lives = whole.sql("FROM block_lifetimes").select("fill_ns", "evict_ns")
        cached = [
            lives.filter(
                (pl.col("fill_ns") < start) & (pl.col("evict_ns").is_null() | (pl.col("evict_ns") >= start))
            ).height
            for start in starts["start_ns"]
        ]
        assert told["cached_blocks_mean"] == pytest.approx(sum(cached) / len(cached))
        used = whole.sql(f"SELECT avg(used_tokens) AS mean FROM occupancy WHERE step >= {first}")["mean"][0]
        assert used == pytest.approx(part.sql("SELECT avg(used_tokens) AS mean FROM occupancy")["mean"][0])
        known = whole.sql(f"SELECT sum(cold_tokens) / sum(tokens_asked) AS cold FROM misses WHERE step >= {first}")
        assert told["cold_miss_ratio"] >= known["cold"][0]
