"""What is read of a log that was cut, damaged or torn apart: all whole commits before it, and nothing made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generate
import pytest
import slow_reader
from compare import TABLES, assert_same, rows

from kvtrace_traces import KvtraceError, Trace, open_trace, wire

SMALL = generate.Settings(seed=3, steps=6, frame_commits=3, arrivals=0.6, blocks=12)
LONG = generate.Settings(seed=11, steps=160, frame_commits=6, arrivals=0.7, blocks=12, rare=0.05)


def commits(data: bytes) -> list[wire.Commit]:
    return list(wire.commits(data))


def end_of(commit: wire.Commit) -> int:
    return commit.offset + wire.HEAD_BYTES + len(commit.body)


def reread(path: Path, data: bytes, recover: str = "tail") -> Trace:
    path.write_bytes(data)
    return open_trace(path, recover=recover)


def stated(trace: Trace) -> int:
    """Block events that were read, those derived by the reader not counted."""
    events = trace.block_events
    logged_evictions = 0 if not events.height else events.filter(events["kind"] == "evict")["request"].null_count()
    return events.filter(events["kind"] != "evict").height + logged_evictions


@pytest.fixture
def small(tmp_path: Path) -> bytes:
    return generate.write(SMALL, tmp_path / "small")[0].read_bytes()


@pytest.fixture
def long(tmp_path: Path) -> bytes:
    return generate.write(LONG, tmp_path / "long")[0].read_bytes()


def test_cut_at_any_byte_every_whole_commit_before_reads(tmp_path: Path, small: bytes) -> None:
    found = commits(small)
    expected: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for cut in range(len(small)):
        whole = [c for c in found if end_of(c) <= cut]
        if not whole:
            with pytest.raises(KvtraceError):
                reread(tmp_path / "cut.kvt", small[:cut])
            continue
        trace = reread(tmp_path / "cut.kvt", small[:cut])
        if len(whole) not in expected:
            expected[len(whole)] = slow_reader.read([small[: end_of(whole[-1])]])
        assert_same(trace, expected[len(whole)])
        assert not trace.complete
        assert trace.warnings
        assert not trace.damaged_frames or any(small[end_of(whole[-1]) : cut])
    assert len(expected) == len(found) - 1 or len(expected) == len(found)


def test_every_flipped_bit_is_reported_and_never_read_as_data(tmp_path: Path, small: bytes) -> None:
    found = commits(small)
    expected = [slow_reader.read([small[: end_of(c)]]) for c in found]
    for bit in range(8 * len(small)):
        data = bytearray(small)
        data[bit // 8] ^= 1 << bit % 8
        hit = next((i for i, c in enumerate(found) if end_of(c) > bit // 8 >= c.offset), 0)
        try:
            trace = reread(tmp_path / "flip.kvt", bytes(data))
        except KvtraceError:
            assert hit == 0, f"bit {bit}: one flipped bit must not cost more than its commit"
            continue
        assert not trace.complete or trace.damaged_frames, f"bit {bit}"
        assert_same(trace, expected[hit - 1])


def test_strict_refuses_what_tail_and_skip_read(tmp_path: Path, long: bytes) -> None:
    found = commits(long)
    middle = found[len(found) // 2]
    data = bytearray(long)
    data[middle.offset + 20] ^= 0xFF
    path = tmp_path / "bad.kvt"
    with pytest.raises(KvtraceError, match="damaged at byte"):
        reread(path, bytes(data), "strict")
    tail, skip = reread(path, bytes(data), "tail"), reread(path, bytes(data), "skip")
    assert_same(tail, slow_reader.read([long[: middle.offset]]))
    assert_same(skip, slow_reader.read([bytes(data)], "skip"))
    assert tail.block_events.height < skip.block_events.height
    for trace in (tail, skip):
        assert trace.damaged_frames == 1
        assert not trace.complete
        assert trace.losses["reason"][0] == "damage"
    assert reread(path, long, "strict").complete


@pytest.mark.parametrize("recover", ["tail", "skip"])
@pytest.mark.parametrize("seed", range(40))
def test_emitted_is_read_plus_dropped(tmp_path: Path, seed: int, recover: str) -> None:
    settings = generate.random_settings(seed)
    settings.steps, settings.frame_commits, settings.explicit, settings.ids = 100, 5, 0.0, 0
    _, emitted = generate.play(settings)
    path = generate.write(settings, tmp_path / "log")[0]
    data = path.read_bytes()
    found = commits(data)
    first = 1 + seed % (len(found) - 2)
    last = min(len(found) - 2, first + seed % 9)
    data = data[: found[first].offset] + data[end_of(found[last]) :]
    trace = reread(tmp_path / "less.kvt", data, recover)
    assert_same(trace, slow_reader.read([data], recover))
    assert stated(trace) + trace.dropped == emitted
    assert trace.damaged_frames
    assert not trace.complete


@pytest.mark.parametrize("recover", ["tail", "skip"])
def test_a_lost_page_in_the_middle(tmp_path: Path, recover: str) -> None:
    settings = generate.Settings(seed=2, steps=400, frame_commits=10, arrivals=0.8)
    _, emitted = generate.play(settings)
    data = bytearray(generate.write(settings, tmp_path / "log")[0].read_bytes())
    assert len(data) > 4 * 4096
    data[8192:12288] = bytes(4096)
    trace = reread(tmp_path / "hole.kvt", bytes(data), recover)
    assert trace.damaged_frames == 1
    assert not trace.complete
    assert_same(trace, slow_reader.read([bytes(data)], recover))
    assert stated(trace) + trace.dropped == emitted


def test_a_removed_commit_is_seen_wherever_it_stood(tmp_path: Path, small: bytes) -> None:
    found = commits(small)
    for i, commit in enumerate(found[1:-1], 1):
        data = small[: commit.offset] + small[end_of(commit) :]
        trace = reread(tmp_path / "less.kvt", data)
        assert trace.damaged_frames == 1
        assert not trace.complete
        assert_same(trace, slow_reader.read([small[: end_of(found[i - 1])]]))


@pytest.mark.parametrize("recover", ["tail", "skip"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_tail_that_stands_there_twice_is_read_once(tmp_path: Path, long: bytes, recover: str, ended: bool) -> None:
    found = commits(long)
    whole = long if ended else long[: found[-1].offset]
    expected = slow_reader.read([whole])
    for commit in found[5 : -1 : len(found) // 9]:
        trace = reread(tmp_path / "twice.kvt", whole + whole[commit.offset :], recover)
        assert trace.damaged_frames
        assert not trace.complete
        assert_same(trace, expected)


@pytest.mark.parametrize("recover", ["tail", "skip"])
@pytest.mark.parametrize("missing", [0, 1, 2, -1])
def test_a_missing_segment(tmp_path: Path, recover: str, missing: int) -> None:
    settings = generate.Settings(seed=4, steps=700, frame_commits=5, arrivals=0.8, blocks=40)
    emitted = generate.play(settings)[1]
    files = generate.write(settings, tmp_path / "log", segment_bytes=8192)
    assert len(files) >= 4
    files[missing].unlink()
    trace = open_trace(tmp_path, recover=recover)
    assert not trace.complete
    if missing == -1:
        assert any("further segment" in note for note in trace.warnings)
        assert_same(trace, slow_reader.read([f.read_bytes() for f in files[:-1]]))
        return
    assert trace.losses.height
    assert trace.lossy
    if recover == "skip" or missing:
        kept = files[:missing] if recover == "tail" else [f for f in files if f.exists()]
        if recover == "tail":
            assert_same(trace, slow_reader.read([f.read_bytes() for f in kept]))
        elif missing == 0:
            assert trace.steps.height
        assert stated(trace) + trace.dropped == emitted
    with pytest.raises(KvtraceError):
        open_trace(tmp_path, recover="strict")


def test_a_segment_that_was_only_made_ready_is_no_damage(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "log.kvt").write_bytes(small)
    (tmp_path / "log.1.kvt").write_bytes(bytes(8192))
    for path in (tmp_path, tmp_path / "log.kvt"):
        trace = open_trace(path)
        assert trace.complete
        assert any("never written" in note for note in trace.warnings)
    with pytest.raises(KvtraceError):
        open_trace(tmp_path / "log.1.kvt")


def test_a_copy_in_the_same_folder_is_not_read_twice(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "log.kvt").write_bytes(small)
    (tmp_path / "copy.kvt").write_bytes(small[: len(small) // 2])
    trace = open_trace(tmp_path)
    assert_same(trace, slow_reader.read([small]))
    assert trace.complete
    assert any("copy" in note for note in trace.warnings)


def test_zeros_behind_the_last_commit_are_room_that_was_not_used(tmp_path: Path, small: bytes) -> None:
    found = commits(small)
    trace = reread(tmp_path / "open.kvt", small[: found[-1].offset] + bytes(10_000))
    assert not trace.damaged_frames
    assert not trace.lossy
    assert not trace.complete
    assert "no end record" in trace.warnings[0]


def test_what_end_counts_and_was_not_read_is_dropped(tmp_path: Path, small: bytes) -> None:
    last = commits(small)[-1]
    end = json.loads(last.body)
    end["events"] += 5
    body = json.dumps(end).encode()
    body += b" " * (-len(body) % 4)
    trace = reread(tmp_path / "more.kvt", small[: last.offset] + wire.head(wire.END, 0, last.seq, body) + body)
    assert trace.dropped == 5
    assert not trace.complete


def test_tables_are_what_the_schema_says(tmp_path: Path, small: bytes) -> None:
    from kvtrace_traces import tables

    trace = reread(tmp_path / "log.kvt", small)
    for name in (*TABLES, "step_spans", "losses"):
        assert dict(getattr(trace, name).schema) == tables.schema(name)
    assert sum(s["steps"] for s in rows(trace, "step_spans")) == trace.step_requests.height


def test_a_file_named_like_a_segment_is_another_log(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "run.kvt").write_bytes(small)
    generate.write(LONG, tmp_path / "run.1")
    trace = open_trace(tmp_path / "run.kvt")
    assert len(trace.engines) == 1
    assert trace.warnings == ["run.1.kvt beside it is of another run, and left out"]
    assert_same(trace, slow_reader.read([small]))
    assert len(open_trace(tmp_path).engines) == 2
