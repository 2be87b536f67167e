"""A Mooncake file opened as it is holds what importing it and opening the trace gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from kvtrace_replay import from_trace
from kvtrace_traces import KvtraceError, UsageError, importers, open_trace
from kvtrace_traces.importers import source as sources
from kvtrace_traces.importers.opened import numbered, open_import, recognised

BY_CHANCE = ("run_id", "created", "log_format", "segment")


def some_requests(seed: int) -> list[dict[str, Any]]:
    """Records of growing conversations: with names or not, with times or not, their ids small or large, prefix ids or
    ids of content."""
    rng = random.Random(seed)
    named, timed, content = rng.random() < 0.5, rng.random() < 0.8, rng.random() < 0.3
    stride = rng.choice((1, 1, 3, 2**50))
    alive: list[list[int]] = []
    following, rows = 0, []
    for number in range(rng.randrange(1, 60)):
        if not alive or rng.random() < 0.3:
            alive.append([])
        blocks = rng.choice(alive)
        fresh = rng.randrange(0, 5)
        blocks += [rng.randrange(9) if content else (following + i) * stride for i in range(fresh)]
        following += fresh
        row: dict[str, Any] = {
            "input_length": max(0, 512 * len(blocks) - rng.randrange(512)),
            "output_length": rng.randrange(9),
            "hash_ids": list(blocks),
        }
        if timed:
            row["timestamp"] = number * 250
        if named and rng.random() < 0.9:
            row["request_id"] = f"request \u00e9 {number}" if rng.random() < 0.2 else f"r{number}"
        rows.append(row)
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("seed", range(16))
def test_it_is_what_the_import_holds(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "trace.jsonl", some_requests(seed))
    if seed % 2:  # the file in many parts, and so its requests in many batches
        monkeypatch.setattr(sources.Source.chunks, "__defaults__", (1000,))
    opened = open_import(path)
    importers.run("mooncake", path, tmp_path / "trace.kvt")
    trace = open_trace(tmp_path / "trace.kvt")
    header = {name: value for name, value in trace.header.items() if name not in BY_CHANCE}
    assert {name: value for name, value in opened.header.items() if name not in BY_CHANCE} == header
    assert opened.requests.equals(trace.requests)
    assert opened.requests.schema == trace.requests.schema
    mine: Any
    its: Any
    for mine, its in zip(opened.chains(), trace.chains(), strict=True):
        assert mine.dtype == its.dtype
        assert mine.tolist() == its.tolist()
    for mine, its in ((opened.raw_ids(), trace.raw_ids()), (opened.raw_hashes(), trace.raw_hashes())):
        assert (mine is None) == (its is None)
        assert mine is None or mine.tolist() == its.tolist()
    for table in ("steps", "lookups", "preemptions", "block_events", "losses"):
        assert getattr(opened, table).equals(getattr(trace, table))
    mine, its = from_trace(opened), from_trace(trace)
    assert mine.identities.tolist() == its.identities.tolist()
    assert mine.prompt_tokens.tolist() == its.prompt_tokens.tolist()


@pytest.mark.parametrize("most", [5, 1 << 20, 1 << 64])
def test_ids_are_numbered_in_order_of_first_use(most: int) -> None:
    rng = random.Random(most)
    for _ in range(50):
        ids = [rng.randrange(most) for _ in range(rng.randrange(16))]
        order = list(dict.fromkeys(ids))
        values, unique = numbered(np.array(ids, np.uint64))
        assert values.tolist() == [order.index(value) for value in ids]
        assert unique.tolist() == order


def test_only_what_the_first_record_tells_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("", "\n\n", "no JSON\n", "[1]\n", '{"hash_ids": [1]}\n', "\xff\n"):
        path.write_text(text, encoding="latin-1")
        assert recognised(path) is None
    mine = {"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]}
    assert recognised(written(path, [mine])) == "mooncake"
    assert recognised(written(path, [{**mine, "chat_id": 3}])) is None
    assert recognised(tmp_path) is None
    assert recognised(tmp_path / "missing") is None
    with pytest.raises(UsageError, match="`kvtrace import` makes a trace of it"):
        open_import(written(path, [{"other": 1}]))


def test_a_bad_record_is_named_by_its_line(tmp_path: Path) -> None:
    rows = some_requests(3)
    path = written(tmp_path / "a.jsonl", [*rows, {**rows[0], "input_length": -1}])
    with pytest.raises(KvtraceError, match=rf"a.jsonl, line {len(rows) + 1}: input_length is -1"):
        _ = open_import(path).requests


def test_tables_that_it_has_not_are_empty_and_others_do_not_exist(tmp_path: Path) -> None:
    opened = open_import(written(tmp_path / "a.jsonl", some_requests(1)))
    assert isinstance(opened.offloads, pl.DataFrame)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = opened.nothing
