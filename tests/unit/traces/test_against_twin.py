"""The compiled reader and its slow twin read the same from any log."""

from __future__ import annotations

from pathlib import Path

import generate
import pytest
from compare import assert_readers_agree

ROOT = Path(__file__).parents[3]
SAMPLES = sorted((ROOT / "traces/samples").glob("*.kvt"))


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_random_logs(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        files = generate.write(generate.random_settings(seed), tmp_path / f"log{seed}")
        trace = assert_readers_agree(files[0], files)
        assert trace.complete, f"seed {seed}: {trace.losses}"
        assert not trace.dropped
        derived = trace.block_events.filter((trace.block_events["kind"] == "evict")).height
        assert trace.block_events.height >= trace.info["logged_events"] >= trace.block_events.height - derived


@pytest.mark.parametrize("seed", range(1000, 1030))
def test_random_logs_in_small_windows_and_segments(tmp_path: Path, seed: int) -> None:
    settings = generate.random_settings(seed)
    settings.steps, settings.frame_commits = 150, 10
    files = generate.write(settings, tmp_path / "log", segment_bytes=8192)
    trace = assert_readers_agree(files[0], files)
    assert trace.complete, trace.losses


def test_request_numbers_too_far_apart_for_narrow_owners(tmp_path: Path) -> None:
    settings = generate.Settings(seed=5, steps=80, arrivals=0.9)
    commits, _ = generate.play(settings)
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
