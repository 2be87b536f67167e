"""Views that a kernel computes are those of their SQL, row by row; brute force checks both (`test_views.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples, sql
from kvtrace.views import views
from kvtrace_traces import tables

# Where preemptions of a step cannot be told from one another, SQL takes any of them; see `test_views.py`.
EXACT_ONLY = ("misses",)
FAST = [name for name, view in views().items() if view.fast is not None]


def rows(traces: list[kvtrace.Trace], view: str) -> list[str]:
    found = sql.Database([trace.reader for trace in traces]).query(f"FROM {view}")
    return sorted(map(repr, found.rows()))


def same(traces: list[kvtrace.Trace], view: str, monkeypatch: pytest.MonkeyPatch) -> int:
    fast = rows(traces, view)
    slow = {name: each._replace(fast=None) for name, each in views().items()}
    with monkeypatch.context() as patch:
        patch.setattr(sql, "views", lambda: slow)
        assert rows(traces, view) == fast
    return len(fast)


@pytest.mark.parametrize("view", FAST)
def test_kernel_and_sql_agree(view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"block_lifetimes", "misses", "occupancy", "prefixes", "request_blocks", "reuse"} <= set(FAST)
    make = toys.plain_toy if view in EXACT_ONLY else toys.toy
    found = sum(same([make(seed, tmp_path)], view, monkeypatch) for seed in range(20))
    assert found > 30
    for name in samples.names():
        assert same([kvtrace.open(samples.path(name))], view, monkeypatch)
    told_by_imports = view in ("request_blocks", "prefixes", "reuse")
    assert (same([toys.imported(1, tmp_path)], view, monkeypatch) > 0) == told_by_imports


@pytest.mark.parametrize("view", FAST)
def test_over_several_traces_and_engines(
    view: str, two_engines: Path, thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = [kvtrace.open(two_engines), kvtrace.open(thrash), toys.imported(2, tmp_path)]
    assert same(traces, view, monkeypatch) > same(traces[1:], view, monkeypatch) > 0


def test_of_a_cut(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kvtrace_cli("cut", thrash, "-o", tmp_path / "part.kvt", "--steps", "400:700").code == 0
    part = kvtrace.open(tmp_path / "part.kvt")
    for view in FAST:
        assert same([part], view, monkeypatch) > 0
    assert part.sql("SELECT count(*) FROM block_tables WHERE taken_by = 'carried' AND free_step IS NOT NULL").item() > 0


def test_a_view_is_kept_from_the_second_query_on(thrash: Path) -> None:
    database = sql.Database([kvtrace.open(thrash).reader])
    first, second, third = (database.query("FROM latencies ORDER BY ALL") for _ in range(3))
    assert first.equals(second)
    assert second.equals(third)
    assert "latencies" not in database._views
    assert "preemptions" in database._views


class Scripted:
    """A trace of one engine with these events of block 1: kind, request, time."""

    path = Path("scripted.kvt")

    def __init__(self, events: list[tuple[str, int | None, int]]) -> None:
        self.engines = [{"engine_index": 0, "block_size": 16, "num_blocks": 4}]
        rows = [(0, n, time, request, kind, 1, 7, 0) for n, (kind, request, time) in enumerate(events)]
        self.block_events = pl.DataFrame(rows, tables.schema("block_events"), orient="row")


def test_a_block_held_for_its_copy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[str, int | None, int]] = [("hit", None, 20), ("free", 0, 30), ("free", None, 50)]
    trace = Scripted(
        [("fill", 0, 10), *copied[:2], ("hit", 1, 40), copied[2], ("free", 1, 60), ("evict", 2, 100), ("fill", 2, 100),
         ("hit", None, 110), ("free", None, 120), ("free", 2, 130), ("evict", None, 200)]
    )  # fmt: skip
    query = (
        "SELECT uses, first_use_ns, last_use_ns, ended_by, evicted_by, idle_ns FROM block_lifetimes ORDER BY fill_ns"
    )
    wanted = [(1, 40, 40, "evict", 2, 40), (0, None, None, "evict", None, 70)]
    assert sql.Database([trace]).query(query).rows() == wanted
    slow = {name: each._replace(fast=None) for name, each in views().items()}
    monkeypatch.setattr(sql, "views", lambda: slow)
    assert sql.Database([trace]).query(query).rows() == wanted
