"""Every view against a slow twin that walks the rows, on random small traces and on the samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import slow_views
import toys

import kvtrace
from kvtrace import samples
from kvtrace.sql import Database
from kvtrace.views import every_table, views
from kvtrace_replay.reuse import reuse_distances
from kvtrace_replay.workload.recorded import from_trace

SEEDS = 40
ALWAYS = (
    "request_blocks", "block_lifetimes", "block_tables", "reads", "step_reads", "block_reads", "shared_reads",
    "prefixes", "reuse", "clients",
)  # fmt: skip
# Operations that name blocks come between steps, where the log does not say whether a preemption was before or after
# the step of its number: engines that are followed exactly have none of these.
EXACT_ONLY = ("preemptions", "occupancy", "latencies", "misses")


def ordered(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.items()) for row in rows), key=repr)


def agree(trace: kvtrace.Trace, view: str) -> int:
    found, wanted = trace.sql(f"SELECT * FROM {view}").to_dicts(), getattr(slow_views, view)(trace)
    assert ordered(found) == ordered(wanted), f"{view} of {trace.path}"
    return len(found)


def test_views_of_random_traces_equal_their_twins(tmp_path: Path) -> None:
    rows = dict.fromkeys(ALWAYS, 0)
    for seed in range(SEEDS):
        trace = toys.toy(seed, tmp_path)
        for view in ALWAYS:
            rows[view] += agree(trace, view)
    assert min(rows.values()) > 50, rows


def test_views_of_exact_random_traces_equal_their_twins(tmp_path: Path) -> None:
    rows = dict.fromkeys(EXACT_ONLY, 0)
    for seed in range(1000, 1000 + SEEDS):
        trace = toys.plain_toy(seed, tmp_path)
        for view in EXACT_ONLY:
            rows[view] += agree(trace, view)
    assert min(rows.values()) > 50, rows


def test_views_of_imports_equal_their_twins(tmp_path: Path) -> None:
    for seed in range(10):
        trace = toys.imported(seed, tmp_path)
        for view in ("request_blocks", "prefixes", "reuse"):
            assert agree(trace, view) > 0
        for view in ("block_lifetimes", "reads", "preemptions", "occupancy", "latencies", "misses"):
            assert trace.sql(f"SELECT * FROM {view}").is_empty()


@pytest.mark.parametrize("name", ["thrash", "chat"])
@pytest.mark.parametrize("view", [*ALWAYS, *EXACT_ONLY])
def test_views_of_the_samples_equal_their_twins(name: str, view: str) -> None:
    agree(kvtrace.open(samples.path(name)), view)


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_views_agree_with_what_vllm_counted(name: str) -> None:
    trace = kvtrace.open(samples.path(name))
    one = trace.sql(
        """
        SELECT (SELECT sum(tokens_hit) FROM lookups) AS told, (SELECT sum(tokens_hit) FROM misses) AS seen,
               (SELECT count(*) FROM block_events WHERE kind = 'hit') AS hits,
               (SELECT sum(uses) FROM block_lifetimes) AS uses,
               (SELECT count(*) FROM block_events WHERE kind = 'evict') AS evictions,
               (SELECT count(evict_ns) FROM block_lifetimes) AS ends,
               (SELECT sum(tokens) FROM steps) AS scheduled,
               (SELECT max(abs(used + cached_idle + free - capacity_blocks)) FROM occupancy JOIN engines
                USING (engine_index)) AS apart,
               (SELECT count(*) FROM occupancy WHERE wasted_slots IS NULL) AS unknown
        """
    ).row(0, named=True)
    assert one["told"] == one["seen"]
    assert one["hits"] == one["uses"] > 0
    assert one["evictions"] == one["ends"] > 0
    assert one["apart"] == one["unknown"] == 0
    # What was computed is what requests needed less what the cache had, and what preemptions made them do again.
    needed = trace.sql(
        """
        SELECT (SELECT sum(prompt_tokens + output_tokens - 1) FROM requests)
               - (SELECT sum(tokens_hit) FROM lookups WHERE NOT after_preemption)
               + (SELECT sum(tokens_recomputed) FROM preemptions)
               - coalesce((SELECT sum(greatest(0, tokens_found - tokens_lost)) FROM preemptions), 0)
        """
    ).item()
    assert needed == one["scheduled"]


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_request_blocks_are_those_that_are_replayed(name: str) -> None:
    trace = kvtrace.open(samples.path(name))
    workload = from_trace(trace.reader)
    rows = trace.sql("SELECT request, identity FROM request_blocks ORDER BY request, position")
    assert np.array_equal(np.bincount(rows["request"], minlength=workload.n_requests), np.diff(workload.indptr))
    _, dense = np.unique(rows["identity"], return_inverse=True)
    _, wanted = np.unique(workload.identities, return_inverse=True)
    assert len(set(zip(dense, wanted, strict=True))) == dense.max() + 1 == wanted.max() + 1
    inside = trace.sql("SELECT request, count(*) FILTER (WHERE in_prompt) FROM request_blocks GROUP BY ALL ORDER BY 1")
    assert inside[:, 1].to_list() == workload.prompt_blocks[inside["request"].to_numpy()].tolist()


def test_reuse_distances_equal_a_list_that_moves_to_front() -> None:
    rng = np.random.default_rng(1)
    for n, blocks in [(0, 1), (1, 1), (400, 3), (5000, 60), (40_000, 3000)]:
        references = rng.integers(0, blocks, n).astype(np.int32)
        distance, previous = reuse_distances(references, blocks)
        stack: list[int] = []
        place: dict[int, int] = {}
        for i, block in enumerate(references.tolist()):
            depth = stack.index(block) if block in place else -1
            assert (distance[i], previous[i]) == (depth, place.get(block, -1))
            if depth >= 0:
                del stack[depth]
            stack.insert(0, block)
            place[block] = i
    with pytest.raises(ValueError, match=r"0\.\.2"):
        reuse_distances(np.array([3], np.int32), 3)


def test_columns_are_those_declared(thrash: Path, tmp_path: Path) -> None:
    types = {"i16": "SMALLINT", "i32": "INTEGER", "i64": "BIGINT", "u64": "UBIGINT", "f64": "DOUBLE",
             "bool": "BOOLEAN", "str": "VARCHAR"}  # fmt: skip
    for trace in (kvtrace.open(thrash), toys.toy(3, tmp_path), toys.imported(3, tmp_path)):
        for view in every_table():
            found = dict(trace.sql(f"DESCRIBE {view.name}").select("column_name", "column_type").rows())
            wanted = {column.name: types.get(column.dtype, "VARCHAR") for column in view.columns if not column.optional}
            known = {name: "VARCHAR" if kind.startswith("ENUM") else kind for name, kind in found.items()}
            assert {name: known.get(name) for name in wanted} == wanted, view.name


def test_only_columns_that_may_be_null_are(tmp_path: Path) -> None:
    for seed in range(20):
        trace = toys.toy(seed, tmp_path)
        for view in views().values():
            frame = trace.sql(f"SELECT * FROM {view.name}")
            for column in view.columns:
                assert column.nullable or not frame[column.name].null_count(), (view.name, column.name)


def test_several_traces_stay_apart(two_engines: Path, thrash: Path, tmp_path: Path) -> None:
    one = kvtrace.open(thrash)
    both = kvtrace.open(two_engines)
    chat = kvtrace.open(samples.path("chat"))
    several = Database([one, chat])
    for view in views():
        alone = one.sql(f"SELECT * FROM {view}")
        for index in (0, 1):
            part = both.sql(f"SELECT * EXCLUDE (engine_index) FROM {view} WHERE engine_index = {index}")
            assert ordered(part.to_dicts()) == ordered(alone.drop("engine_index").to_dicts()), view
        part = several.query(f"SELECT * EXCLUDE (trace) FROM {view} WHERE trace = 'thrash'")
        assert ordered(part.to_dicts()) == ordered(alone.to_dicts()), view
        assert several.query(f"SELECT * FROM {view} LIMIT 1").columns[0] == "trace"


def test_views_of_damaged_traces_do_not_fail(damaged: Path, cut: Path, tmp_path: Path) -> None:
    empty = toys.toy(1, tmp_path, steps=1, arrivals=0, ids=0)
    for trace in (kvtrace.open(damaged), kvtrace.open(damaged, recover="skip"), kvtrace.open(cut), empty):
        for view in views():
            trace.sql(f"SELECT * FROM {view}")


def test_reads_are_counted_without_being_kept() -> None:
    """Two requests read 2,000 blocks each in 50,000 steps: 200 million reads in 300 MB, and no disk to flee to."""
    requests, blocks, steps = 2, 2000, 50_000
    many = requests * blocks
    events = pl.DataFrame(
        {
            "engine_index": [0] * many, "step": [0] * many, "time_ns": [0] * many,
            "request": [i // blocks for i in range(many)], "kind": ["allocate"] * many,
            "block": range(1, many + 1), "identity": pl.Series([None] * many, dtype=pl.Int32), "group": [0] * many,
        }
    )  # fmt: skip
    spans = pl.DataFrame(
        {"engine_index": 0, "request": range(requests), "first_step": 0, "steps": steps, "tokens": 1,
         "computed_before": blocks * 16}
    )  # fmt: skip

    class Busy:
        path = Path("busy.kvt")
        engines = ({"engine_index": 0, "block_size": 16, "num_blocks": many + 1},)
        block_events, step_spans = events, spans

    Busy.steps = events.head(0)  # type: ignore[attr-defined]  # "steps" is a word of the query below
    database = Database([Busy()], unsafe=True)
    database.query("SET temp_directory = ''")
    database.query("SET memory_limit = '300MB'")
    assert database.query("SELECT count(*) FROM reads").item() == requests * blocks * steps
    assert database.query("SELECT sum(steps) FROM read_spans").item() == requests * blocks * steps
