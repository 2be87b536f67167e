"""vLLM's OffloadingConnector in a real engine whose worker moves real bytes, and the tracer beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_support import offload
from engine_support.worker import Worker

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process for real engines, which must not import the reader."""
    with Worker() as process:
        yield process


RUNS: list[tuple[int, dict[str, Any]]] = [
    (7, {"cpu_blocks": 400}),
    (8, {"cpu_blocks": 30, "polls": 2}),
    (9, {"cpu_blocks": 24, "eviction_policy": "arc", "polls": 1, "offload_prompt_only": False}),
    (10, {"cpu_blocks": 64, "blocks_per_chunk": 2, "offload_prompt_only": False}),
    (11, {"cpu_blocks": 50, "store_threshold": 2}),
]


@pytest.mark.parametrize(("seed", "settings"), RUNS, ids=[f"seed{seed}" for seed, _ in RUNS])
def test_the_trace_says_what_the_connector_says(
    seed: int, settings: dict[str, Any], worker: Worker, weighted_model: Path, tmp_path: Path
) -> None:
    """Every transfer with its blocks, request, bytes, first and last step; cached tokens with what was loaded."""
    folder = tmp_path / "trace"
    folder.mkdir()
    ran = worker.call(offload.real_engine, model=str(weighted_model), folder=str(folder), seed=seed, **settings)
    found = offload.judge(folder)
    assert found["wrong"] == []
    assert found["inexact"] == ["kv-connector"]
    assert {kind: found[kind] for kind in ("store", "load")} == ran["blocks"]
    assert found["bytes"] == ran["moved"]
    assert min(ran["blocks"].values()) > 5
    told = found["offload"]
    per_chunk = settings.get("blocks_per_chunk", 1)
    assert (told["policy"], told["blocks_per_chunk"]) == (settings.get("eviction_policy", "lru"), per_chunk)
    assert told["chunks"] == settings["cpu_blocks"] // per_chunk
    assert (ran["evicted"] > 0) == (settings["cpu_blocks"] < 50 or per_chunk == 2)


def test_loads_carry_the_keys_and_values(worker: Worker, weighted_model: Path) -> None:
    """The same tokens with the tier as without; others if loads copy nothing, so the bytes that move do matter."""
    model = str(weighted_model)
    plain = worker.call(offload.real_engine, model=model, folder=None, seed=7, cpu_blocks=None)
    tier = worker.call(offload.real_engine, model=model, folder=None, seed=7, cpu_blocks=400, polls=1)
    empty = worker.call(offload.real_engine, model=model, folder=None, seed=7, cpu_blocks=400, copy_loads=False)
    assert tier["tokens"] == plain["tokens"]
    assert sum(n or 0 for n in tier["cached"]) > sum(n or 0 for n in plain["cached"])
    changed = sum(mine != theirs for mine, theirs in zip(empty["tokens"], plain["tokens"], strict=True))
    assert changed > 5
    assert empty["blocks"]["load"] > 5


@pytest.mark.parametrize(
    ("seed", "settings", "engine_settings"),
    [
        (1, {"cpu_blocks": 400}, {"max_num_seqs": 2}),
        (2, {"cpu_blocks": 40, "polls": 1, "offload_prompt_only": False}, {"max_num_seqs": 3}),
        (3, {"cpu_blocks": 50, "eviction_policy": "arc", "blocks_per_chunk": 2}, {"max_num_seqs": 2}),
        (4, {"cpu_blocks": 60, "store_threshold": 2, "polls": 2}, {"max_num_seqs": 4, "max_num_batched_tokens": 96}),
    ],
    ids=["large", "polls", "arc-chunks", "threshold"],
)
def test_a_run_with_a_tier_is_predicted_from_one_without(
    seed: int,
    settings: dict[str, Any],
    engine_settings: dict[str, Any],
    worker: Worker,
    weighted_model: Path,
    tmp_path: Path,
) -> None:
    """Recorded without the connector, simulated with it, and held against the real engine with it: the same transfers
    in the same steps, with the same blocks, and the same cached tokens."""
    folder = tmp_path / "trace"
    folder.mkdir()
    run: dict[str, Any] = {
        "model": str(weighted_model), "seed": seed, "workload": "cycling", "engine_settings": engine_settings,
    }  # fmt: skip
    worker.call(offload.real_engine, folder=str(folder), cpu_blocks=None, **run)
    real = worker.call(offload.real_engine, folder=None, **run, **settings)
    mine = simulated(folder, settings)
    assert mine["cached"] == real["cached"]
    assert mine["jobs"] == [list(job) for job in real["jobs"]]
    assert mine["preemptions"] == real["preemptions"]
    assert mine["bytes"] == real["moved"]
    assert real["blocks"]["load"] > 20


def simulated(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the compiled scheduler makes of a recorded trace with a tier, in the words of `offload.real_engine`."""
    from kvtrace_replay.schedulers.recorded import recorded
    from kvtrace_replay.schedulers.settings import own_settings
    from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Offload
    from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload
    from kvtrace_traces import open_trace

    source = recorded(open_trace(folder))
    tier = Offload(
        blocks=settings["cpu_blocks"],
        policy=settings.get("eviction_policy", "lru"),
        blocks_per_chunk=settings.get("blocks_per_chunk", 1),
        store_threshold=settings.get("store_threshold", 0),
        prompt_only=settings.get("offload_prompt_only", True),
        steps=settings.get("polls", 0),
    )
    run = simulate_offload(source, own_settings(source.header), tier, events=True)
    moved = iter(run.logs["moved"][:, 0].tolist())
    return {
        "cached": run.requests[:, 3].tolist(),
        "jobs": [
            [step, "load" if load else "store", request, [next(moved) for _ in range(blocks)], tokens if load else None]
            for step, load, request, blocks, tokens, _ in run.transfers.tolist()
        ],
        "preemptions": run.preemptions,
        "bytes": {"store": run.stored_bytes, "load": run.loaded_bytes},
    }


def test_a_traced_run_is_the_same_run(worker: Worker, weighted_model: Path, tmp_path: Path) -> None:
    """Tokens, cached tokens, preemptions and transfers do not change with the tracer on."""
    folder = tmp_path / "trace"
    folder.mkdir()
    settings = {"cpu_blocks": 30, "polls": 2}
    traced = worker.call(offload.real_engine, model=str(weighted_model), folder=str(folder), seed=8, **settings)
    bare = worker.call(offload.real_engine, model=str(weighted_model), folder=None, seed=8, **settings)
    assert traced == bare
