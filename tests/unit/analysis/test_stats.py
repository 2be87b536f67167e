"""`kvtrace stats`: every metric against plain Python, vLLM's own counts, and the conditions for pipelines."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from polars.testing import assert_frame_equal

sys.path.insert(0, str(Path(__file__).parent))

import slow_metrics
import toys

import kvtrace
from kvtrace import metrics, samples
from kvtrace.metrics import GROUPS
from kvtrace.metrics.conditions import condition


def figures(trace: kvtrace.Trace) -> slow_metrics.Figures:
    rows = kvtrace.stats(trace).to_dicts()
    assert all((row["value"] is None) == (row["why"] is not None) for row in rows)
    found = {(row["metric"], row["at"]): row["value"] for row in rows}
    assert len(found) == len(rows)
    assert {row["metric"] for row in rows} == {metric.name for group in GROUPS for metric in group.metrics}
    return {key: value for key, value in found.items() if value is not None}


def agree(trace: kvtrace.Trace) -> set[str]:
    found, wanted = figures(trace), slow_metrics.everything(trace)
    assert found.keys() == wanted.keys(), f"{trace.path}: {found.keys() ^ wanted.keys()}"
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-9), f"{key} of {trace.path}"
    return {name for name, _ in wanted}


def test_metrics_of_random_traces_equal_their_twins(tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in range(2000, 2030):
        seen |= agree(toys.plain_toy(seed, tmp_path))
    every = {metric.name for group in GROUPS for metric in group.metrics}
    # The toy engine has no token budget in its header, and does not tell turns.
    assert every - seen == {"unused_budget_ratio", "wasted_budget_ratio", "reused_block_ratio_at_turn"}


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_metrics_of_the_samples_equal_their_twins(name: str) -> None:
    assert {"unused_budget_ratio", "wasted_budget_ratio"} <= agree(kvtrace.open(samples.path(name)))


def test_metrics_of_imports_equal_their_twins(tmp_path: Path) -> None:
    for seed in range(5):
        known = agree(toys.imported(seed, tmp_path))
        assert "reuse_time_p50_s" in known
        assert "token_hit_ratio" not in known
    turns = tmp_path / "turns.jsonl"
    rows = [{"chat_id": i, "parent_chat_id": i - 1 if i % 3 else -1, "timestamp": i, "input_length": 16 * (i % 3 + 1),
             "output_length": 3, "type": "text", "turn": i % 3 + 1,
             "hash_ids": [100 * (i // 3) + k for k in range(i % 3 + 1)]} for i in range(12)]  # fmt: skip
    turns.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from kvtrace_traces import importers

    importers.run("bailian", turns, tmp_path / "turns.kvt")
    trace = kvtrace.open(tmp_path / "turns.kvt")
    assert "reused_block_ratio_at_turn" in agree(trace)
    assert figures(trace)["reused_block_ratio_at_turn", "1"] == 0
    assert figures(trace)["reused_block_ratio_at_turn", "3"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_hits_are_those_that_vllm_reported(name: str) -> None:
    trace = kvtrace.open(samples.path(name))
    found, own = figures(trace), metrics.own_hits(trace.reader, trace.header)
    assert own is not None
    assert found["token_hit_ratio", None] == own["token_hit_ratio"]
    assert found["block_hit_ratio", None] == own["block_hit_ratio"]
    assert found["lookups", None] == trace.lookups.height
    assert found["preemptions", None] == trace.requests["preemptions"].sum()
    split = [found[f"{kind}_miss_ratio", None] for kind in ("cold", "capacity", "preemption", "short", "unread")]
    assert found["token_hit_ratio_all", None] + sum(split) == pytest.approx(1)  # type: ignore[operator, arg-type]


def test_odd_traces_have_answers(tmp_path: Path, damaged: Path, cut: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"steps": 1, "arrivals": 0}, {"arrivals": 0.0, "steps": 30}, {"blocks": 60, "most_running": 1}, {"budget": 1},
    ]  # fmt: skip
    for n, settings in enumerate(odd):
        agree(toys.plain_toy(3000 + n, tmp_path, **settings))
    # Sequences longer than their prompts that are computed again in several steps, after preemptions.
    for seed in (3101, 3105):
        again = {"budget": 1, "blocks": 8, "steps": 90, "most_running": 6, "arrivals": 0.9, "block_size": 2}
        assert "preempted_p50_s" in agree(toys.plain_toy(seed, tmp_path, **again))
    for seed in range(5):
        figures(toys.toy(seed, tmp_path))
    for trace in (kvtrace.open(damaged), kvtrace.open(damaged, recover="skip"), kvtrace.open(cut)):
        assert figures(trace)
    one = toys.imported(9, tmp_path, requests=1)
    assert figures(one)["block_uses", None] >= 1  # type: ignore[operator]
    whys = dict(kvtrace.stats(one).select("metric", "why").rows())
    assert "imports tell of requests only" in whys["steps"]
    assert whys["reuse_distance_p50_blocks"] == "no block was used twice"


def test_engines_are_counted_apart(two_engines: Path, thrash: Path) -> None:
    rows = kvtrace.stats(two_engines)
    alone = kvtrace.stats(str(thrash)).drop("engine_index")
    for index in (0, 1):
        assert_frame_equal(rows.filter(engine_index=index).drop("engine_index"), alone)  # but for the last digit


def test_stats_prints_each_metric(kvtrace_cli: Callable[..., Any], thrash: Path, two_engines: Path) -> None:
    done = kvtrace_cli("stats", thrash)
    assert done.code == 0
    for group in GROUPS:
        assert group.title in done.out
        if group.name != "reuse_by_turn":
            assert all(metric.name in done.out for metric in group.metrics)
    assert "token_hit_ratio              48.75%" in done.out
    rows = json.loads(kvtrace_cli("stats", thrash, "--json").out)
    found = next(row for row in rows if row["metric"] == "token_hit_ratio")
    assert found["value"] == pytest.approx(0.487515, abs=1e-6)
    assert len(list(csv.DictReader(io.StringIO(kvtrace_cli("stats", thrash, "--csv").out)))) == len(rows)
    assert "engine 1" in kvtrace_cli("stats", two_engines).out


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["token_hit_ratio<0.4"], 0, ""),
        (["token_hit_ratio<0.4", "preemptions > 20"], 1, "failed: preemptions > 20: preemptions is 26"),
        (["token_hit_ratio<50%"], 1, "failed: token_hit_ratio<50%: token_hit_ratio is 0.487515"),
        (["steps==1245"], 1, "steps is 1245"), (["steps!=1245"], 0, ""), (["steps>=1246"], 0, ""),
        (["steps<=1.245e3"], 1, "steps is 1245"),
        (["token_hit_rate<0.4"], 2, "there is no metric 'token_hit_rate': did you mean token_hit_ratio"),
        (["slot_utilisation<0.4"], 2, "has a value for each of several parts"),
        (["zzz<1"], 2, "`kvtrace stats` lists them"), (["steps"], 2, "is no condition"),
        (["steps<x"], 2, "is no condition"),
    ],
)  # fmt: skip
def test_fail_if(kvtrace_cli: Callable[..., Any], thrash: Path, given: list[str], code: int, said: str) -> None:
    done = kvtrace_cli("stats", thrash, "--json", *[word for text in given for word in ("--fail-if", text)])
    assert done.code == code
    assert said in done.err
    assert done.err.count("\n") == (1 if said else 0)
    assert bool(done.out) == (code != 2)


def test_a_figure_that_is_not_known_fails_its_condition(
    kvtrace_cli: Callable[..., Any], tmp_path: Path, two_engines: Path
) -> None:
    trace = toys.imported(1, tmp_path)
    done = kvtrace_cli("stats", trace.path, "--fail-if", "token_hit_ratio<0.4")
    assert done.code == 1
    assert "token_hit_ratio is not known: no engine looked anything up" in done.err
    both = kvtrace_cli("stats", two_engines, "--fail-if", "token_hit_ratio<0.9")
    assert both.err.count("(engine ") == 2


def test_conditions_are_read() -> None:
    assert condition("steps <= 40%")[1:] == ("steps", "<=", 0.4)
    with pytest.raises(kvtrace.UsageError):
        condition("steps < 1 or steps > 2")


def test_names_of_metrics_are_unique() -> None:
    names = [metric.name for group in GROUPS for metric in group.metrics]
    assert len(set(names)) == len(names)


def test_lossy_traces_are_told_by_the_exit_code(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    done = kvtrace_cli("stats", damaged, "--json")
    assert done.code == 3
    assert json.loads(done.out)
    assert kvtrace_cli("stats", damaged, "--fail-if", "steps>=0").code == 1
