"""`kvtrace stats --by`: key figures by group against plain Python, and what a client's name is."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import toys

import kvtrace
from kvtrace import samples
from kvtrace.clients import client_ids
from kvtrace.metrics.grouped import MISSES, grouped


def quantile(values: list[float], q: float) -> float | None:
    """Between the two nearest values, linearly."""
    if not values:
        return None
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def slowly(trace: kvtrace.Trace, group: Callable[[dict[str, Any]], str]) -> dict[str, dict[str, Any]]:
    """The figures of each group, by loops."""
    misses, latencies = trace.sql("FROM misses").to_dicts(), trace.sql("FROM latencies").to_dicts()
    found: dict[str, dict[str, Any]] = {}
    members = defaultdict(list)
    for request in trace.requests.to_dicts():
        members[group(request)].append(request)
    for name, requests in members.items():
        numbers = {request["request"] for request in requests}
        looked = [row for row in misses if row["request"] in numbers]
        first = [row for row in looked if not row["after_preemption"]]
        lost = [row for row in trace.preemptions.to_dicts() if row["request"] in numbers]
        asked = sum(row["tokens_asked"] for row in looked)
        at_first = sum(row["tokens_asked"] for row in first)
        row: dict[str, Any] = {
            "requests": len(requests),
            "scheduled": sum(request["first_step"] is not None for request in requests),
            "prompt_tokens": sum(request["prompt_tokens"] for request in requests),
            "output_tokens": sum(request["output_tokens"] or 0 for request in requests),
            "lookups": len(looked),
            "tokens_asked": asked,
            "tokens_hit": sum(row["tokens_hit"] for row in looked),
            "token_hit_ratio": sum(row["tokens_hit"] for row in first) / at_first if at_first else None,
            "token_hit_ratio_all": sum(row["tokens_hit"] for row in looked) / asked if asked else None,
            "preemptions": len(lost),
            "preempted_tokens": sum(row["tokens_lost"] for row in lost),
        }
        for kind in MISSES:
            row[f"{kind}_miss_ratio"] = sum(each[f"{kind}_tokens"] for each in looked) / asked if asked else None
        timed = [each for each in latencies if each["request"] in numbers and each["finish_reason"] != "abort"]
        for time in ("ttft", "itl", "e2e"):
            values = [each[f"{time}_ns"] / 1e9 for each in timed if each[f"{time}_ns"] is not None]
            for q in (0.5, 0.99):
                row[f"{time}_p{round(100 * q)}_s"] = quantile(values, q)
        found[name] = row
    return found


def agree(trace: kvtrace.Trace, by: str, group: Callable[[dict[str, Any]], str], **options: Any) -> int:
    found = grouped(trace, by, **options)
    wanted = slowly(trace, group)
    assert {row[by] for row in found.to_dicts()} == wanted.keys()
    for row in found.to_dicts():
        assert row.keys() == {"engine_index", by, *wanted[row[by]]}
        for name, value in wanted[row[by]].items():
            close = value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
            assert row[name] == close, (row[by], name)
    assert found["prompt_tokens"].to_list() == sorted(found["prompt_tokens"].to_list(), reverse=True)
    return found.height


def test_groups_of_random_traces_equal_their_twins(tmp_path: Path) -> None:
    groups = 0
    for seed in range(5000, 5025):
        trace = toys.plain_toy(seed, tmp_path)
        groups += agree(trace, "tenant", lambda row: f"{row['tenant']:016x}" if row["tenant"] else "none")
        groups += agree(trace, "priority", lambda row: str(row["priority"]))
        agree(trace, "client", lambda row: row["request_id"][:2], client_pattern="^.{0,2}")
    assert groups > 100


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_groups_of_the_samples_equal_their_twins(name: str) -> None:
    trace = kvtrace.open(samples.path(name))
    agree(trace, "tenant", lambda _: "none")
    agree(trace, "client", lambda row: row["request_id"][-1], client_pattern=".$")
    (row,) = grouped(trace, "tenant").to_dicts()
    whole = dict(kvtrace.stats(trace).filter(pl.col("at").is_null()).select("metric", "value").rows())
    for metric in ("token_hit_ratio", "cold_miss_ratio", "capacity_miss_ratio", "lookups", "preemptions", "ttft_p50_s"):
        assert row[metric] == pytest.approx(whole[metric])


def test_imports_have_lengths_and_no_lookups(tmp_path: Path) -> None:
    (row,) = grouped(toys.imported(1, tmp_path), "client").to_dicts()
    assert row["requests"] == 30
    assert row["lookups"] == 0
    assert row["token_hit_ratio"] is None
    with pytest.raises(kvtrace.UsageError, match="does not tell it"):
        grouped(toys.imported(2, tmp_path), "turn")
    lines = [{"chat_id": i, "parent_chat_id": -1, "timestamp": i, "input_length": 16, "output_length": 3,
              "type": "text" if i % 3 else "search", "turn": i % 2 + 1, "hash_ids": [i]}
             for i in range(12)]  # fmt: skip
    source = tmp_path / "turns.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from kvtrace_traces import importers

    importers.run("bailian", source, tmp_path / "turns.kvt")
    by_type = grouped(tmp_path / "turns.kvt", "type")
    assert dict(by_type.select("type", "requests").rows()) == {"text": 8, "search": 4}
    assert dict(grouped(tmp_path / "turns.kvt", "turn").select("turn", "requests").rows()) == {"1": 6, "2": 6}


@pytest.mark.parametrize(
    ("name", "client"),
    [
        ("chatcmpl-a19887477dab6f8b-a8fd0fea", "a19887477dab6f8b"), ("chatcmpl-alice-17-a8fd0fea", "alice-17"),
        ("cmpl-alice-0-a8fd0fea", "alice"), ("cmpl-alice-17-3", "alice-17"), ("12-0d0d0d0d", "12"), ("12", "12"),
        ("chatcmpl-alice", "alice"), ("550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440000"),
        ("", ""), ("job-ABCDEF12", "job-ABCDEF12"),
    ],
)  # fmt: skip
def test_a_client_is_what_the_engine_did_not_add(name: str, client: str) -> None:
    assert client_ids(pl.Series([name, None])).to_list() == [client, None]


def test_patterns_choose_the_client() -> None:
    names = pl.Series(["chatcmpl-alice-17-a8fd0fea", "chatcmpl-bob-3-a8fd0fea", "other"])
    assert client_ids(names, r"^chatcmpl-(\w+)-").to_list() == ["alice", "bob", "other"]
    assert client_ids(names, r"l-[a-z]+").to_list() == ["l-alice", "l-bob", "other"]
    assert client_ids(names, r"(alice)|(bob)").to_list() == ["alice", "bob", "other"]
    with pytest.raises(kvtrace.UsageError, match="no regular expression"):
        client_ids(names, "(")


def test_stats_by_on_the_command_line(kvtrace_cli: Callable[..., Any], thrash: Path, two_engines: Path) -> None:
    rows = json.loads(kvtrace_cli("stats", thrash, "--by", "tenant", "--json").out)
    assert [row["tenant"] for row in rows] == ["none"]
    shown = kvtrace_cli("stats", thrash, "--by", "tenant")
    assert shown.code == 0
    assert "48.75%" in shown.out
    assert [
        row["engine_index"] for row in json.loads(kvtrace_cli("stats", two_engines, "--by", "tenant", "--json").out)
    ] == [0, 1]
    for given, said in (
        (["--by", "nobody"], "--by nobody is none of tenant, client"),
        (["--client-pattern", "x"], "goes with --by client"),
        (["--by", "tenant", "--fail-if", "steps<1"], "leave --by out"),
        (["--by", "client", "--client-pattern", "("], "no regular"),
    ):  # fmt: skip
        done = kvtrace_cli("stats", thrash, *given)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err
