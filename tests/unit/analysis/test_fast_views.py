"""Views that a kernel computes are those of their SQL, row by row; brute force checks both (`test_views.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples, sql
from kvtrace.views import views

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
