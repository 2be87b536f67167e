"""The demo and its page: true sentences, one file, nothing from outside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace.reports import charts, demo
from kvtrace.reports.page import Page, Panel, Section, build


@pytest.fixture
def found() -> demo.Findings:
    return demo.Findings(
        capacity=100, is_own=True, block_size=16, engine=0.30, lru=0.30, fifo=0.25, opt=0.40, unbounded=0.6,
        doubled=0.45, doubled_tokens=1234,
    )  # fmt: skip


def test_demo_prints_and_writes_a_page(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvtrace-demo.html").write_text("an older one")
    done = kvtrace_cli("demo")
    assert done.code == 0
    for piece in ("capacity", "lru", "fifo", "opt", "sql> SELECT", "kvtrace-demo.html", "Twice the cache"):
        assert piece in done.out
    assert max(map(len, (line for line in done.out.splitlines() if "  " in line))) <= 100
    page = (tmp_path / "kvtrace-demo.html").read_text("utf-8")
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=|url\(|@import", outside)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<details>") == 2


def test_sentences_carry_the_figures_of_the_replay(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    rows = demo.replay_grid(trace)
    found = demo.find(trace, rows)
    own = trace.header["num_blocks"] - 1
    again = kvtrace.replay(trace, capacity=[own, 2 * own, "inf"])
    ratios = again["token_hit_ratio"].to_list()
    assert (found.capacity, found.lru, found.doubled, found.unbounded) == (own, *ratios)
    assert found.doubled_tokens == again["token_hits"][1] - again["token_hits"][0]


def test_doubling_in_words(found: demo.Findings) -> None:
    assert demo.doubling(found) == (
        "Twice the cache (200 blocks instead of 100) would find 45.0% of the prompt tokens instead of 30.0%: "
        "1,234 tokens of prefill saved."
    )
    little = demo.Findings(**{**vars(found), "doubled": 0.301, "doubled_tokens": 3})
    assert "would change little" in demo.doubling(little)
    assert demo.doubling(demo.Findings(**{**vars(found), "doubled": None})) == ""


def test_verdict_in_words(found: demo.Findings) -> None:
    text = demo.verdict(found)
    assert text.startswith("With its cache of 100 blocks (1,600 tokens) the engine found 30.0% of the prompt tokens.")
    assert "FIFO finds 25.0%" in text
    assert "10.0 points" in text
    none = demo.Findings(None, False, 16, *[None] * 7)
    assert demo.verdict(none) == ""


def test_an_import_gets_shares_of_its_distinct_blocks() -> None:
    assert demo.capacities({"num_blocks": 0}, 1000) == [10, 20, 50, 100, 200, 500, "inf"]
    assert demo.capacities({"num_blocks": 0}, 2) == [1, "inf"]
    assert demo.capacities({"num_blocks": 101}, 1000) == [25, 50, 75, 100, 150, 200, 400, "inf"]


def test_text_of_a_trace_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    rows = pl.DataFrame({"policy": [evil], "capacity_blocks": [4], "token_hit_ratio": [0.5]})
    figure = charts.hit_ratio_by_capacity(rows, 4, 0.5)
    panel = Panel(evil, evil, figure, rows, title=evil, run=evil)
    page = build(Page(evil, evil, [(evil, evil)], [(evil, evil)], [Section(evil, [panel], evil)], [evil]))
    assert evil not in page
    assert page.count("<script>") == 2 + page.count("<script>alert")
    (data,) = re.findall(r'<script type="application/json">(.*)</script>', page)
    assert json.loads(data)["figure"]["data"][0]["name"] == evil


def test_the_unbounded_cache_stands_right_of_all_others() -> None:
    rows = pl.DataFrame({"policy": ["lru"] * 3, "capacity_blocks": [10, 20, None], "token_hit_ratio": [0.1, 0.2, 0.3]})
    figure = charts.hit_ratio_by_capacity(rows, None, None)
    assert figure["data"][0]["x"] == [10, 20, 40]
    assert figure["layout"]["xaxis"]["ticktext"] == ["10", "20", "∞"]


def test_long_runs_are_thinned_and_keep_their_sums() -> None:
    steps = 5 * charts.POINTS + 3
    used = pl.DataFrame({"step": range(steps), "used": 4, "cached_idle": 3, "free": 2})
    figure = charts.occupancy_by_step(used, [7])
    assert len(figure["data"][0]["x"]) <= charts.POINTS
    assert {trace["y"][0] for trace in figure["data"][:3]} == {4, 3, 2}
    assert figure["data"][3]["x"] == [7]
