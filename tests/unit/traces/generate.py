"""Random but valid logs. `play` returns the commits of a run of the toy engine; `write` puts them into files."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from toy_engine import Engine, Settings

from kvtrace_traces.writer import LogWriter, write_file

__all__ = ["Engine", "Settings", "header", "play", "put", "random_settings", "write", "write_file"]


def random_settings(seed: int) -> Settings:
    """Settings that between them reach every operation and flag."""
    rng = random.Random(seed)
    return Settings(
        seed=seed,
        steps=rng.randint(1, 90),
        blocks=rng.choice([8, 12, 24, 60]),
        block_size=rng.choice([2, 4]),
        granules=rng.choice([1, 1, 2]),
        budget=rng.choice([4, 12, 30]),
        most_running=rng.choice([1, 3, 6, 12]),
        outputs_behind=rng.choice([0, 0, 1, 2]),
        priority=rng.random() < 0.3,
        full_sets=rng.choice([0, 0, 0.2, 1]),
        big=rng.choice([0, 0.3]),
        wide=rng.choice([0, 0.5]),
        explicit=rng.choice([0, 0, 0.4]),
        rare=rng.choice([0, 0.1]),
        arrivals=rng.choice([0.2, 0.5, 0.9]),
        frame_commits=rng.choice([1, 4, 10, 1000]),
        ids=rng.choice([0, 0, 0, 5]),
        unknown=rng.choice([0, 0.1]),
    )


def header(settings: Settings, **more: Any) -> dict[str, Any]:
    """The least that a header must say, and what a tracer would."""
    return {
        "source": "vllm", "engine": "toy", "engine_version": "1", "engine_index": 0, "run_id": f"toy-{settings.seed}",
        "model": "toy", "block_size": settings.block_size, "granule": settings.block_size // settings.granules,
        "num_blocks": 2 * settings.blocks, "bytes_per_block": None, "prefix_caching": True, "inexact": [], **more,
    }  # fmt: skip


def play(settings: Settings) -> tuple[list[tuple[int, bytes]], int]:
    """The commits `(flags, body)` of a run of the toy engine, and how many block events they state."""
    engine = Engine(settings)
    engine.run()
    return engine.commits, engine.events


def write(settings: Settings, stem: Path, segment_bytes: int | None = None) -> list[Path]:
    """Play and write a log: by `write_file`, or for `segment_bytes` by a `LogWriter` that rotates. Its files."""
    commits, events = play(settings)
    end = {"time_ns": 0, "commits": len(commits), "events": events}
    if segment_bytes is None:
        path = stem.with_name(stem.name + ".kvt")
        write_file(str(path), header(settings), lambda: iter(commits), lambda: end)
        return [path]
    writer = LogWriter(str(stem), header(settings), segment_bytes=segment_bytes, window_bytes=4096)
    put(writer, commits, segment_bytes)
    writer.close(end)
    files = [stem.with_name(stem.name + ".kvt")]
    while (following := stem.with_name(f"{stem.name}.{len(files)}.kvt")).exists():
        files.append(following)
    return files


def put(writer: LogWriter, commits: list[tuple[int, bytes]], segment_bytes: int = 1 << 60) -> None:
    """Write the commits, rotating before frames as the tracer does, but giving the next segment time to get ready."""
    for i, (flags, body) in enumerate(commits):
        if flags and i:
            until = time.monotonic() + 2
            while writer.segment_bytes >= segment_bytes and not writer.rotate() and time.monotonic() < until:
                time.sleep(0.0005)
        writer.write(flags, body)
        time.sleep(0.0002)  # else the writer's own thread does not get a turn, and all of it queues
