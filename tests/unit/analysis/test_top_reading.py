"""`kvtrace top` reads a growing log piece by piece, and knows at any moment what reading all of it would tell."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "traces"))  # the generator of random logs stands there

import generate

import kvtrace
from kvtrace.top.engine import Engine
from kvtrace.top.render import Look, frame
from kvtrace.top.watch import Watch
from kvtrace_traces import KvtraceError, open_trace, wire
from kvtrace_traces.exporters.idle import idle_blocks
from kvtrace_traces.follow import Follower
from kvtrace_traces.writer import LogWriter

SAMPLES = sorted((Path(__file__).parents[3] / "traces/samples").glob("*.kvt"))
SIZE = 1 << 22  # of what a writer has allocated ahead


def told(engine: Engine) -> dict[str, Any]:
    sums = engine.totals
    return {
        "steps": sums.steps, "tokens": sums.prefill + sums.decode, "prefill": sums.prefill, "asked": sums.asked,
        "hit": sums.hit, "preemptions": sums.preemptions, "evictions": sums.evictions, "requests": engine.arrived,
        "finished": engine.finished, "free": engine.free_blocks, "idle": engine.blocks.idle,
    }  # fmt: skip


def expected(path: Path) -> dict[str, Any]:
    """The same from the whole log, by the reader that decodes it from its start."""
    trace = open_trace(path)
    steps, events = trace.steps, trace.block_events
    first = trace.lookups.filter(~pl.col("after_preemption"))
    spans = trace.step_requests.join(trace.requests.select("request", "prompt_tokens"), on="request", how="left")
    inside = pl.min_horizontal("tokens", (pl.col("prompt_tokens") - pl.col("computed_before")).clip(0))
    idle = idle_blocks(
        events["time_ns"].to_numpy(), events["kind"].to_physical().cast(pl.UInt8).to_numpy(),
        events["block"].fill_null(-1).to_numpy(), events["identity"].fill_null(-1).to_numpy(),
        np.array([1 << 62]), trace.header["num_blocks"],
    )  # fmt: skip
    free = int(steps["free_blocks"][-1]) if steps.height else 0
    return {
        "steps": steps.height, "tokens": steps["tokens"].sum(), "prefill": spans.select(inside.sum()).item(),
        "asked": first["tokens_asked"].sum(), "hit": first["tokens_hit"].sum(), "preemptions": trace.preemptions.height,
        "evictions": (events["kind"] == "evict").sum(), "requests": trace.requests.height,
        "finished": trace.requests["finish_step"].is_not_null().sum(), "free": free,
        "idle": int(idle[0]),
    }  # fmt: skip


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
@pytest.mark.parametrize("padded", [False, True], ids=["cut", "zeros behind"])
def test_a_growing_log(path: Path, padded: bool, tmp_path: Path) -> None:
    """Cut at any byte; as a copy that is still under way, or in a file whose rest is allocated and empty."""
    data, rng = path.read_bytes(), random.Random(7)
    cuts = [*sorted(rng.sample(range(200, len(data)), 150)), len(data)]
    checked = set(rng.sample(cuts, 12)) | {cuts[-1]}
    growing = tmp_path / "growing.kvt"
    growing.write_bytes(bytes(SIZE) if padded else b"")
    watch, done = Watch(growing), 0
    try:
        for cut in cuts:
            with growing.open("r+b") as file:
                file.seek(done)
                file.write(data[done:cut])
            done = cut
            watch.look()
            if cut not in checked or not watch.engines:
                continue
            part = tmp_path / "part.kvt"
            part.write_bytes(data[:cut])
            (watched,) = watch.engines
            assert told(watched.engine) == expected(part), f"at byte {cut}"
            assert watched.engine.losses == []
            assert watched.log.damaged == 0
    finally:
        watch.close()
    (watched,) = watch.engines
    assert watched.log.ended == open_trace(path).complete


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_the_curve_is_that_of_a_replay(path: Path, tmp_path: Path) -> None:
    data, growing = path.read_bytes(), tmp_path / "growing.kvt"
    watch, rows = Watch(growing), 0
    for cut in (len(data) // 5, len(data) // 2, len(data)):
        growing.write_bytes(data[:cut])
        watch.look()
        curve = watch.engines[0].engine.curve
        assert curve.rate == 1
        replayed = kvtrace.replay(growing, policy="lru", capacity=curve.capacities)
        assert curve.token_hit_ratios() == pytest.approx(replayed["token_hit_ratio"].to_list(), abs=1e-12)
        rows += replayed["token_hits"].sum()
    watch.close()
    assert rows > 0


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_logs(first: int, tmp_path: Path) -> None:
    """Every operation of the format, read in pieces; the curve against replays."""
    compared = 0
    for seed in range(first, first + 50):
        (file,) = generate.write(generate.random_settings(seed), tmp_path / f"log{seed}")
        data, growing, rng = file.read_bytes(), tmp_path / f"growing{seed}.kvt", random.Random(seed)
        growing.write_bytes(b"")
        watch = Watch(growing)
        for cut in [*sorted(rng.sample(range(len(data)), 5)), len(data)]:
            growing.write_bytes(data[:cut])
            watch.look()
        watch.close()
        (watched,) = watch.engines
        ours, theirs = told(watched.engine), expected(file)
        odd = generate.random_settings(seed).explicit  # gives up blocks that nobody holds, loads for who is running
        if odd:
            theirs["idle"] = ours["idle"]
        assert ours == theirs, f"seed {seed}"
        assert watched.engine.losses == []
        compared += 0 if odd else compare_curves(watched.engine, file)
    assert compared > 20


def compare_curves(engine: Engine, file: Path) -> int:
    capacities = engine.curve.capacities
    rows = kvtrace.replay(file, policy="lru", capacity=capacities)
    ratios = dict(rows.select("capacity_blocks", "token_hit_ratio").iter_rows())
    several = 0
    for capacity, ratio in zip(capacities, engine.curve.token_hit_ratios(), strict=True):
        if ratio is not None and ratios[capacity] is not None:
            assert ratio == pytest.approx(ratios[capacity], abs=1e-12), f"{file.name} at {capacity}"
            several += 1
    return several


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_a_live_writer(seed: int, tmp_path: Path) -> None:
    """The tracer's own writer, in small windows and segments, with a look after every few commits."""
    settings = generate.random_settings(seed)
    settings.steps, settings.frame_commits, settings.arrivals, settings.explicit = 300, 10, 0.9, 0
    commits, events = generate.play(settings)
    folder = tmp_path / "live"
    folder.mkdir()
    writer = LogWriter(str(folder / "log"), generate.header(settings), segment_bytes=8192, window_bytes=4096)
    watch, rng, at = Watch(folder), random.Random(seed), 0
    while at < len(commits):
        n = rng.randint(1, 40)
        part = commits[at : at + n]
        if at and part[0][0]:  # a frame may begin a segment
            writer.rotate()
        generate.put(writer, part, 8192)
        at += n
        watch.look()
        if rng.random() < 0.05:
            assert told(watch.engines[0].engine) == expected(folder / "log.kvt")
        assert watch.engines[0].status == "recording"
    writer.close({"time_ns": 0, "commits": len(commits), "events": events})
    assert len(list(folder.glob("*.kvt"))) > 1
    watch.look()
    watch.close()
    (watched,) = watch.engines
    assert watched.status == "ended"
    assert watched.engine.losses == []
    assert told(watched.engine) == expected(folder)


def test_engines_that_start_later(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    watch = Watch(folder)
    watch.look()
    assert watch.engines == []
    (folder / "next.1.kvt").write_bytes(bytes(4096))  # made ready, not begun
    data = SAMPLES[0].read_bytes()
    for i in range(3):
        (folder / f"e{i}.kvt").write_bytes(again(data, run_id=f"run{i}", engine_index=i))
        watch.look()
        assert len(watch.engines) == i + 1
    assert [told(w.engine) for w in watch.engines] == [expected(SAMPLES[0])] * 3
    (folder / "copy.kvt").write_bytes(again(data, run_id="run1", engine_index=1))
    (folder / "other.kvt").write_bytes(b"no log at all, but long enough to be looked at")
    watch.look()
    watch.close()
    assert len(watch.engines) == 3
    assert len(watch.notes) == 1
    assert "other.kvt" in watch.notes[0]


def again(data: bytes, **more: Any) -> bytes:
    """A log with other fields in its header."""
    import json

    head = wire.read_commit(data, wire.PREFIX.size)
    assert isinstance(head, wire.Commit)
    body = json.dumps({**json.loads(head.body), **more}).encode()
    body += b" " * (-len(body) % 4)
    rest = data[head.offset + wire.HEAD_BYTES + len(head.body) :]
    return data[: head.offset] + wire.head(head.kind, head.flags, head.seq, body) + body + rest


def commit_at(data: bytes, number: int) -> wire.Commit:
    return [commit for commit in wire.commits(data) if commit.kind == wire.OPS][number]


def test_a_head_that_is_half_stored(tmp_path: Path) -> None:
    """The writer stores tag, length and checksum in one go, but a reader may come in between."""
    data = SAMPLES[0].read_bytes()
    commit = commit_at(data, 40)
    path = tmp_path / "log.kvt"
    torn = bytearray(data[: commit.offset + wire.HEAD_BYTES + len(commit.body)]) + bytes(4096)
    torn[commit.offset + 8 : commit.offset + 12] = bytes(4)
    path.write_bytes(torn)
    watch = Watch(path)
    watch.look()
    engine, log = watch.engines[0].engine, watch.engines[0].log
    before = engine.totals.steps
    path.write_bytes(data)
    watch.look()
    watch.close()
    assert 0 < before < engine.totals.steps
    assert (log.damaged, engine.losses, told(engine)) == (0, [], expected(SAMPLES[0]))


@pytest.mark.parametrize("length", [1, 200, 70_000])
def test_damage_is_passed_over(length: int, tmp_path: Path) -> None:
    """What follows it is read from the next frame on, and it is said that something is missing."""
    data = bytearray(b"".join([SAMPLES[1].read_bytes()]))
    commit = commit_at(bytes(data), 10)
    data[commit.offset + 20 : commit.offset + 20 + length] = os.urandom(length)
    path = tmp_path / "log.kvt"
    path.write_bytes(data)
    watch = Watch(path)
    for _ in range(3):
        watch.look()
    watch.close()
    (watched,) = watch.engines
    skipped = open_trace(path, recover="skip")
    assert watched.log.damaged == 1
    assert len(watched.engine.losses) >= 1
    assert watched.log.ended
    assert watched.engine.totals.steps == skipped.steps.height
    assert watched.engine.totals.preemptions == skipped.preemptions.height


def test_a_commit_that_is_not_there(tmp_path: Path) -> None:
    data = SAMPLES[1].read_bytes()
    commit = commit_at(data, 10)
    path = tmp_path / "log.kvt"
    path.write_bytes(data[: commit.offset] + data[commit.offset + wire.HEAD_BYTES + len(commit.body) :])
    watch = Watch(path)
    watch.look()
    watch.close()
    (watched,) = watch.engines
    assert watched.log.damaged == 1
    assert watched.engine.losses == ["a part of the log is missing"]
    assert watched.engine.totals.steps == open_trace(path, recover="skip").steps.height


def test_a_segment_that_is_not_there(tmp_path: Path) -> None:
    long_log(1002, tmp_path, segment_bytes=8192)
    (tmp_path / "log.1.kvt").unlink()
    watch = Watch(tmp_path)
    watch.look()
    watch.close()
    (watched,) = watch.engines
    assert watched.log.ended
    assert watched.engine.losses == ["a part of the log is missing"]
    assert watched.engine.totals.steps == open_trace(tmp_path, recover="skip").steps.height


def test_only_what_was_appended_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SAMPLES[1].read_bytes() if len(SAMPLES[1].read_bytes()) > 1 << 16 else SAMPLES[0].read_bytes()
    path = tmp_path / "log.kvt"
    opened: list[int] = []
    read: list[tuple[int, int]] = []
    real_open, real_pread = os.open, os.pread

    def spied_open(file: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(file).endswith(".kvt"):
            opened.append(flags)
        return real_open(file, flags, *more, **named)

    def spied_pread(fd: int, size: int, at: int) -> bytes:
        got = real_pread(fd, size, at)
        read.append((at, len(got)))
        return got

    half = commit_at(data, 300).offset
    path.write_bytes(data[:half])
    monkeypatch.setattr(os, "open", spied_open)
    monkeypatch.setattr(os, "pread", spied_pread)
    watch = Watch(path)
    watch.look()
    assert min(at for at, _ in read) < half
    read.clear()
    watch.look()
    assert sum(size for _, size in read) == 0
    with path.open("ab") as file:
        file.write(data[half:])
    watch.look()
    watch.close()
    assert min(at for at, _ in read) == half
    assert opened
    assert all(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0 for flags in opened)


def test_a_look_takes_a_bounded_time(tmp_path: Path) -> None:
    path = tmp_path / "log.kvt"
    path.write_bytes(SAMPLES[1].read_bytes())
    watch = Watch(path)
    watch.look(seconds=0.0)
    (watched,) = watch.engines
    assert watched.behind
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (20 << 20))
    assert watched.status == "reading, 20 MiB to go"
    some = watched.engine.totals.steps
    path.write_bytes(SAMPLES[1].read_bytes())
    assert some < expected(path)["steps"]
    looks = 1
    while watch.engines[0].behind:
        watch.look(seconds=0.0)
        looks += 1
    watch.close()
    assert looks > 3
    assert told(watched.engine) == expected(path)


def long_log(seed: int, folder: Path, segment_bytes: int | None = None) -> Path:
    """A random log of many frames. Its first file."""
    settings = generate.random_settings(seed)
    settings.steps, settings.frame_commits, settings.arrivals, settings.explicit = 300, 10, 0.9, 0
    return generate.write(settings, folder / "log", segment_bytes)[0]


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("seed", [1002, 1003, 1005, 1007, 1008])
def test_joining_a_long_log(seed: int, share: float, tmp_path: Path) -> None:
    """From a frame on: what can be told from there is that of the whole log."""
    path = long_log(seed, tmp_path)
    whole, trace = expected(path), open_trace(path)
    watch = Watch(path, keep_bytes=int(share * path.stat().st_size))
    watch.look()
    watch.close()
    (watched,) = watch.engines
    engine = watched.engine
    assert watched.log.ended
    assert engine.losses == []
    assert engine.joined is not None
    assert 0 < engine.joined < whole["steps"]
    assert engine.totals.steps == whole["steps"] - engine.joined
    late = trace.steps.filter(pl.col("step") >= engine.joined)
    assert engine.totals.prefill + engine.totals.decode == late["tokens"].sum()
    assert engine.free_blocks == late["free_blocks"][-1]
    assert engine.idle_blocks <= engine.free_blocks
    assert sum(engine.occupancy()) == engine.capacity
    text = "\n".join(frame("t", watched, 80, 24, Look()))
    assert f"read from step {engine.joined:,} on" in text


def test_joining_the_last_segment(tmp_path: Path) -> None:
    long_log(1002, tmp_path, segment_bytes=8192)
    assert len(list(tmp_path.glob("*.kvt"))) > 2
    watch = Watch(tmp_path, keep_bytes=100)
    watch.look()
    watch.close()
    engine = watch.engines[0].engine
    whole = open_trace(tmp_path)
    assert engine.joined is not None
    assert engine.totals.steps == whole.steps.height - engine.joined < whole.steps.height / 2


def test_what_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "log.kvt"
    path.write_bytes(b"something else that is long enough")
    with pytest.raises(KvtraceError, match="log"):
        Follower(path).look()
    with pytest.raises(KvtraceError, match="does not exist"):
        Follower(tmp_path / "none").look()
    data = bytearray(SAMPLES[0].read_bytes())
    data[wire.PREFIX.size + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(KvtraceError, match="header does not read"):
        Follower(path).look()
    path.write_bytes(again(SAMPLES[0].read_bytes(), block_size=0))
    with pytest.raises(KvtraceError, match="block_size is 0"):
        Follower(path).look()
