"""vLLM's SimpleCPUOffloadConnector in a real engine whose worker moves real bytes, and the tracer beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_support import offload, simple_offload
from engine_support.worker import Worker

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process for real engines, which must not import the reader."""
    with Worker() as process:
        yield process


SMALL: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 4}
RUNS: list[tuple[int, dict[str, Any]]] = [
    (7, {"lazy": False, "cpu_blocks": 400}),
    (8, {"lazy": False, "cpu_blocks": 40, "polls": 2}),
    (9, {"lazy": False, "cpu_blocks": 60, "polls": 1, "workload": "cycling", "engine_settings": SMALL}),
    (10, {"lazy": True, "cpu_blocks": 400}),
    (11, {"lazy": True, "cpu_blocks": 40, "polls": 2}),
    (12, {"lazy": True, "cpu_blocks": 60, "polls": 1, "workload": "cycling", "engine_settings": SMALL}),
]


@pytest.mark.parametrize(("seed", "settings"), RUNS, ids=[f"seed{seed}" for seed, _ in RUNS])
def test_the_trace_says_what_the_connector_says(
    seed: int, settings: dict[str, Any], worker: Worker, weighted_model: Path, tmp_path: Path
) -> None:
    """Every transfer with its blocks, request, bytes, first and last step; cached tokens with what was loaded."""
    folder = tmp_path / "trace"
    folder.mkdir()
    ran = worker.call(simple_offload.real_engine, model=str(weighted_model), folder=str(folder), seed=seed, **settings)
    found = offload.judge(folder)
    assert found["wrong"] == []
    assert found["inexact"] == ["kv-connector"]
    assert {kind: found[kind] for kind in ("store", "load")} == ran["blocks"]
    assert found["bytes"] == ran["moved"]
    assert min(ran["blocks"].values()) > 5
    assert found["evict"] > 50
    assert (ran["evicted"] > 0) == (settings["cpu_blocks"] < 100)
    lazy = settings["lazy"]
    whose = {name for name in ("running", "finished", "none") if ran["kinds"][name]}
    assert whose == ({"none"} if lazy else {"running", "finished"})
    budget = settings.get("engine_settings", {}).get("max_num_batched_tokens", 512)
    assert found["offload"] == {
        "connector": "SimpleCPUOffloadConnector", "manager": "SimpleCPUOffloadScheduler", "backend": "cpu",
        "chunks": settings["cpu_blocks"], "blocks_per_chunk": 1, "policy": "lru", "store_threshold": 0,
        "prompt_only": False, "workers": 1, "lazy_offload": lazy,
        "lazy_target_blocks": 2 * (budget // 32) if lazy else None,
    }  # fmt: skip


def test_loads_carry_the_keys_and_values(worker: Worker, weighted_model: Path) -> None:
    """The same tokens with the tier as without; others if loads copy nothing, so the bytes that move do matter."""
    run: dict[str, Any] = {"model": str(weighted_model), "folder": None, "seed": 7}
    plain = worker.call(offload.real_engine, cpu_blocks=None, **run)
    for lazy in (False, True):
        tier = worker.call(simple_offload.real_engine, cpu_blocks=400, lazy=lazy, polls=1, **run)
        empty = worker.call(simple_offload.real_engine, cpu_blocks=400, lazy=lazy, copy_loads=False, **run)
        assert tier["tokens"] == plain["tokens"]
        assert sum(n or 0 for n in tier["cached"]) > sum(n or 0 for n in plain["cached"])
        changed = sum(mine != theirs for mine, theirs in zip(empty["tokens"], plain["tokens"], strict=True))
        assert changed > 5
        assert empty["blocks"]["load"] > 5


@pytest.mark.parametrize(
    ("seed", "settings", "engine_settings"),
    [
        (1, {"cpu_blocks": 400, "lazy": False}, {"max_num_seqs": 2}),
        (2, {"cpu_blocks": 60, "lazy": False, "polls": 1}, {"max_num_seqs": 1}),
        (3, {"cpu_blocks": 400, "lazy": True}, {"max_num_seqs": 2, "max_num_batched_tokens": 96}),
        (4, {"cpu_blocks": 60, "lazy": True, "polls": 1}, {"max_num_seqs": 1, "max_num_batched_tokens": 96}),
    ],
    ids=["fill-large", "fill-polls", "eviction-large", "eviction-polls"],
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
    in the same steps, with the same blocks, the same cached tokens and bytes."""
    folder = tmp_path / "trace"
    folder.mkdir()
    run: dict[str, Any] = {
        "model": str(weighted_model), "seed": seed, "workload": "cycling", "engine_settings": engine_settings,
    }  # fmt: skip
    worker.call(offload.real_engine, folder=str(folder), cpu_blocks=None, **run)
    real = worker.call(simple_offload.real_engine, folder=None, **run, **settings)
    # An engine is left alone with its last request; what a connector does after that is no part of the run.
    mine = simulated(folder, settings, len(real["jobs"]))
    assert mine["cached"] == real["cached"]
    assert mine["jobs"] == [list(job) for job in real["jobs"]]
    assert mine["preemptions"] == real["preemptions"]
    assert mine["blocks"] == real["blocks"]
    assert {kind: blocks * offload.BLOCK_BYTES for kind, blocks in mine["blocks"].items()} == real["moved"]
    assert min(real["blocks"].values()) > 20


def simulated(folder: Path, settings: dict[str, Any], jobs: int) -> dict[str, Any]:
    """What the compiled scheduler makes of a recorded trace with a tier, up to its so manieth transfer, in the words of
    `offload.real_engine`."""
    from kvtrace_replay.schedulers.recorded import recorded
    from kvtrace_replay.schedulers.settings import own_settings
    from kvtrace_replay.schedulers.vllm_v1.offload.connectors import SimpleOffload
    from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload
    from kvtrace_traces import open_trace

    source = recorded(open_trace(folder))
    tier = SimpleOffload(
        blocks=settings["cpu_blocks"] + 1,
        store="eviction" if settings["lazy"] else "fill",
        steps=settings.get("polls", 0),
        runner=1,  # the one of vLLM's CPU build
    )
    run = simulate_offload(source, own_settings(source.header), tier, events=True)
    moved = iter(run.logs["moved"][:, 0].tolist())
    told: list[list[Any]] = []
    blocks = {"store": 0, "load": 0}
    for step, load, request, many, tokens, _ in run.transfers.tolist()[:jobs]:
        kind = "load" if load else "store"
        mine = [next(moved) for _ in range(many)]
        told.append([step, kind, None if request < 0 else request, mine, tokens if load else None])
        blocks[kind] += many
    after = run.transfers[jobs:]
    assert (after[:, 0] >= run.steps).all()
    return {"cached": run.requests[:, 3].tolist(), "jobs": told, "preemptions": run.preemptions, "blocks": blocks}


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_traced_run_is_the_same_run(lazy: bool, worker: Worker, weighted_model: Path, tmp_path: Path) -> None:
    """Tokens, cached tokens, preemptions and transfers do not change with the tracer on."""
    folder = tmp_path / "trace"
    folder.mkdir()
    # With room for all: what of several loads that end together is used last on the host is not defined.
    settings = {"model": str(weighted_model), "seed": 8, "cpu_blocks": 400, "lazy": lazy, "polls": 2}
    traced = worker.call(simple_offload.real_engine, folder=str(folder), **settings)
    bare = worker.call(simple_offload.real_engine, folder=None, **settings)
    assert traced == bare
    assert min(traced["blocks"].values()) > 5
