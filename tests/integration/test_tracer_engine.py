"""The tracer against the engine's own word: pool states, KV events, statistics and requests of real runs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_support import scenarios
from engine_support.worker import Worker
from kvtrace_traces import open_trace

pytestmark = pytest.mark.engine

BATCHES, SEEDS_A_BATCH = 8, 16


@pytest.fixture(scope="module")
def live_worker() -> Iterator[Worker]:
    """A process for real engines; see `scenarios.real_engine` for why the random runs have another."""
    with Worker() as process:
        yield process


happened: Counter[str] = Counter()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_runs_of_the_scheduler(batch: int, engine_worker: Worker, tiny_model: Path, tmp_path: Path) -> None:
    """Random settings and workloads, sync and async: the rebuilt pool is the engine's, at random steps."""
    for seed in range(batch * SEEDS_A_BATCH, (batch + 1) * SEEDS_A_BATCH):
        found = engine_worker.call(
            scenarios.random_stub, folder=str(tmp_path / str(seed)), model=str(tiny_model), seed=seed
        )
        assert found["wrong"] == [], f"seed {seed}: {found['wrong']}"
        assert found["inexact"] == []
        happened.update({key: value for key, value in found.items() if isinstance(value, int)})


def test_the_random_runs_were_no_walk_in_the_park() -> None:
    """Together they saw everything that a trace can hold."""
    if not happened:
        pytest.skip("the random runs were not selected")
    for what in ("allocate", "hit", "fill", "free", "evict", "reset", "preemptions", "aborted"):
        assert happened[what] > 0, f"no {what} in {dict(happened)}"


SMALL = {"num_blocks": 40, "max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 16}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("shared_prefixes", {"kv_events": True, **SMALL}),
        ("multi_turn", {"kv_events": True, **SMALL}),
        ("duplicates", {"kv_events": True, "block_size": 64, **SMALL}),
        ("thrashing", {"kv_events": True, **SMALL}),
        ("thrashing", {"scheduling_policy": "priority", **SMALL}),
        ("thrashing", {"prefix_caching": False, **SMALL}),
        ("long_prompts", {"kv_events": True, **SMALL, "max_num_batched_tokens": 64}),
        ("mixed", {"kv_events": True, "granule": 8, "stagger": True, **SMALL}),
        ("mixed", {"prefix_caching": False, "granule": 1, "stagger": True, **SMALL}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(v) for k, v in value.items() if k not in SMALL),
)
def test_real_engine(
    kind: str, settings: dict[str, Any], live_worker: Worker, weighted_model: Path, tmp_path: Path
) -> None:
    """The whole engine with a model whose outputs depend on its KV cache; the same tokens without the tracer."""
    folder = tmp_path / "trace"
    traced = live_worker.call(
        scenarios.real_engine, folder=str(folder), kind=kind, seed=7, model=str(weighted_model), **settings
    )
    found = scenarios.judge(folder)
    assert found["wrong"] == []
    assert found["inexact"] == []
    if settings.get("prefix_caching", True) and kind != "long_prompts":
        assert found["hit"] > 0
    if kind == "thrashing":
        assert found["preemptions"] > 0
        assert "evict" in found or not settings.get("prefix_caching", True)
    if "granule" in settings:
        assert found["granule"] == settings["granule"]
    plain = {key: value for key, value in settings.items() if key != "granule"}
    bare = live_worker.call(scenarios.real_engine, folder=None, kind=kind, seed=7, model=str(weighted_model), **plain)
    assert bare["tokens"] == traced["tokens"]


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}, {"scheduling_policy": "priority"}], ids=str)
def test_every_way_of_recording_says_the_same(
    settings: dict[str, Any], engine_worker: Worker, tiny_model: Path, tmp_path: Path
) -> None:
    """Engines with several groups or windows are recorded block by block and at once, others by notes of a call that
    are written out later: on an engine of one group all must agree."""
    found = engine_worker.call(
        scenarios.all_ways, folder=str(tmp_path), model=str(tiny_model), seed=5, settings=settings
    )
    assert found["events"] > 1000
    assert found["preemptions"] > 0
    assert found["aborted"] > 0
    assert all(found["equal"].values()), found


def test_frames_come_however_steps_are_grouped(engine_worker: Worker, tiny_model: Path, tmp_path: Path) -> None:
    frames = engine_worker.call(scenarios.short_bursts, folder=str(tmp_path), model=str(tiny_model), frame_bytes=2000)
    assert frames > 10


def test_nothing_is_kept_after_the_end(engine_worker: Worker, tiny_model: Path, tmp_path: Path) -> None:
    assert engine_worker.call(scenarios.kept_after_the_end, folder=str(tmp_path), model=str(tiny_model)) == 0


def test_a_call_under_way_is_in_the_log_when_the_process_ends(tiny_model: Path, tmp_path: Path) -> None:
    """As after Ctrl-C in the midst of a step of an engine that nobody shuts down."""
    code = f"""
from engine_support.scenarios import traced
from engine_support.stub import StubEngine
with traced({str(tmp_path / "log")!r}):
    stub = StubEngine({str(tiny_model)!r})
stub.asks = False
stub.add([5] * 40, 5)
stub.step()
stub.add(list(range(10, 80)), 5)
stub.scheduler.schedule()
raise KeyboardInterrupt
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert "KeyboardInterrupt" in done.stderr, done.stderr[-2000:]
    info = open_trace(tmp_path / "log").info
    assert info["complete"]
    assert (info["steps"], info["dropped"]) == (2, 0)
    assert info["events"] > 5
