"""Workloads in files: what is mapped is what was saved, and only where it still fits."""

from __future__ import annotations

import os
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from kvtrace_replay import from_trace, of_trace, replay
from kvtrace_replay.workload import Workload, store
from kvtrace_traces import importers, open_trace
from kvtrace_traces.errors import KvtraceError
from unit.replay.test_against_twins import random_workload


def same(one: Workload, two: Workload) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(two, field.name))
        if isinstance(getattr(one, field.name), np.ndarray)
        else getattr(one, field.name) == getattr(two, field.name)
        for field in fields(Workload)
    )


@pytest.fixture
def trace_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "KEPT_FROM_REFS", 1)
    source = tmp_path / "source.jsonl"
    source.write_text(
        "".join(f'{{"timestamp": {i}, "input_length": 1500, "hash_ids": [1, {i}, {i + 9}]}}\n' for i in range(20))
    )
    importers.run("mooncake", source, tmp_path / "t.kvt")
    return tmp_path / "t.kvt"


def kept(trace_file: Path) -> list[Path]:
    return sorted(trace_file.parent.glob(".*.workload"))


@pytest.mark.parametrize("seed", range(30))
def test_what_is_saved_is_mapped_again(seed: int, tmp_path: Path) -> None:
    workload, _ = random_workload(random.Random(seed))
    store.save(workload, tmp_path / "w", "the key")
    mapped = store.load(tmp_path / "w", "the key")
    assert mapped is not None
    assert same(workload, mapped)
    mapped.validate()
    assert store.load(tmp_path / "w", "another key") is None


def test_a_trace_is_read_once_and_then_mapped(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = of_trace(open_trace(trace_file))
    assert len(kept(trace_file)) == 1
    monkeypatch.setattr(store, "from_trace", None)  # nothing is made a second time
    mapped = of_trace(open_trace(trace_file))
    assert not mapped.identities.flags.writeable
    assert same(made, mapped)
    row, again = (replay(workload, "lru", 5)[0] for workload in (made, mapped))
    assert {**row, "seconds": 0} == {**again, "seconds": 0}


def test_each_block_size_has_a_file_of_its_own(trace_file: Path) -> None:
    trace = open_trace(trace_file)
    assert same(of_trace(trace, 1024), from_trace(trace, 1024))
    assert same(of_trace(trace), from_trace(trace))
    assert len(kept(trace_file)) == 2


def test_a_changed_trace_is_read_again(trace_file: Path, tmp_path: Path) -> None:
    of_trace(open_trace(trace_file))
    before = trace_file.stat()
    source = tmp_path / "other.jsonl"
    source.write_text('{"timestamp": 0, "input_length": 600, "hash_ids": [3, 4]}\n')
    importers.run("mooncake", source, trace_file, force=True)
    os.utime(trace_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert of_trace(open_trace(trace_file)).n_requests == 1


@pytest.mark.parametrize(
    "damage", [b"", b"KVWORKL1", b"KVWORKL1" + b"\xff" * 8, b"KVWORKL1" + (2).to_bytes(8, "little") + b"{}"]
)
def test_a_damaged_file_is_made_again(damage: bytes, trace_file: Path) -> None:
    made = of_trace(open_trace(trace_file))
    (file,) = kept(trace_file)
    file.write_bytes(damage)
    with pytest.raises(KvtraceError, match="remove it"):
        store.load(file, "key")
    assert same(of_trace(open_trace(trace_file)), made)
    assert same(of_trace(open_trace(trace_file)), made)
    assert file.stat().st_size > len(damage)


def test_a_cut_file_is_made_again(trace_file: Path) -> None:
    made = of_trace(open_trace(trace_file))
    (file,) = kept(trace_file)
    file.write_bytes(file.read_bytes()[:-64])
    assert same(of_trace(open_trace(trace_file)), made)


def test_a_folder_that_cannot_be_written_to_is_no_error(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store.tempfile, "mkstemp", refuse)
    assert of_trace(open_trace(trace_file)).n_requests == 20
    assert kept(trace_file) == []


def test_none_is_kept_where_the_user_wants_none(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTRACE_WORKLOADS", "off")
    assert of_trace(open_trace(trace_file)).n_requests == 20
    assert kept(trace_file) == []


def test_a_trace_that_may_still_grow_is_not_kept(trace_file: Path) -> None:
    trace_file.write_bytes(trace_file.read_bytes()[:-1])  # its end record is torn
    trace = open_trace(trace_file)
    assert not trace.complete
    assert of_trace(trace).n_requests == 20
    assert kept(trace_file) == []


def test_what_other_code_made_is_made_again(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_trace(open_trace(trace_file))
    (file,) = kept(trace_file)
    monkeypatch.setattr(store, "sources_hash", lambda _: "another")
    before = file.read_bytes()
    of_trace(open_trace(trace_file))
    assert file.read_bytes() != before
