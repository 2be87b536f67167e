"""The compiled reader and its slow twin read the same from any log."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest
from compare import assert_readers_agree

from kvtrace_traces import walk
from kvtrace_traces.schema import EXT_OPS, OPS

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "traces/samples").glob("*.kvt"))


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_logs(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        files = generate.write(generate.random_settings(seed), tmp_path / f"log{seed}")
        trace = assert_readers_agree(files[0], files)
        assert trace.complete, f"seed {seed}: {trace.losses}"
        assert not trace.dropped
        derived = trace.block_events.filter(trace.block_events["kind"] == "evict").height
        assert trace.block_events.height >= trace.info["logged_events"] >= trace.block_events.height - derived


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_random_logs_in_small_windows_and_segments(tmp_path: Path, seed: int) -> None:
    settings = generate.random_settings(seed)
    settings.steps, settings.frame_commits, settings.arrivals = 300, 10, 0.9
    files = generate.write(settings, tmp_path / "log", segment_bytes=8192)
    assert len(files) > 1
    trace = assert_readers_agree(files[0], files)
    assert trace.complete, trace.losses


def test_every_operation_and_flag_is_generated() -> None:
    seen: set[str] = set()
    names = {op.code: name for name, op in OPS.items()}
    rare = {op.code: name for name, op in EXT_OPS.items()}
    for seed in range(60):
        for _, body in generate.play(generate.random_settings(seed))[0]:
            words = walk.words_of(body)
            for at, _ in walk.operations(words):
                name, operand = names[words[at] & 15], words[at] >> 4
                seen.add(name)
                if name == "EXT":
                    seen.add(rare.get(operand & 255, "unknown"))
                if name == "SCHED":
                    seen |= {f"SCHED {bit}" for bit in (1, 2, 4, 8) if operand & bit}
    of_cuts = {"START", "LIVE", "KNOWN", "KEPT", "QUEUE"}  # no engine writes these: `test_cut` compares what they make
    assert seen == {*OPS, *EXT_OPS, "unknown", *(f"SCHED {bit}" for bit in (1, 2, 4, 8))} - of_cuts


@pytest.mark.parametrize("seed", range(20))
def test_counting_events_without_decoding(seed: int) -> None:
    commits, events = generate.play(generate.random_settings(seed))
    assert sum(walk.block_events(body) for _, body in commits) == events


def test_request_numbers_too_far_apart_for_narrow_owners(tmp_path: Path) -> None:
    settings = generate.Settings(seed=5, steps=80, arrivals=0.9)
    engine = generate.Engine(settings)
    engine.frame()
    engine.arrive()
    engine.schedule(empty=False)
    engine.ext("IDS", *range(140_000))
    engine.requests += 70_000
    for _ in range(60):
        engine.outside()
        engine.schedule(empty=False)
        engine.update()
        engine.commit()
    path = tmp_path / "wide.kvt"
    generate.write_file(
        str(path), generate.header(settings), lambda: iter(engine.commits), lambda: {"events": engine.events}
    )
    assert assert_readers_agree(path, [path]).complete


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_real_runs(path: Path) -> None:
    if path.stat().st_size > 2_000_000:
        pytest.skip("too large for the slow reader")
    assert_readers_agree(path, [path])
