"""Traced runs that a worker process makes and compares with what the engine said of them. Plain functions of JSON."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import workloads
from .engine import EngineConfig, engine
from .oracle import Snapshots, compare
from .workloads import Arrival, drive

KINDS = ("shared_prefixes", "multi_turn", "duplicates", "block_aligned", "thrashing", "long_prompts", "mixed")


def arrivals(kind: str, seed: int, block_size: int) -> list[Arrival]:
    """The workload `kind` of `workloads`; the sizes of some follow the block size."""
    make = getattr(workloads, kind)
    return make(seed, max(block_size, 4)) if kind in ("block_aligned", "mixed") else make(seed)


def counted(folder: Path, wrong: list[str]) -> dict[str, Any]:
    """What happened in the trace, beside what was wrong."""
    from kvtrace_traces import open_trace

    trace = open_trace(folder)
    counts = dict(trace.block_events["kind"].cast(str).value_counts().iter_rows())
    return {
        "wrong": wrong,
        "preemptions": trace.preemptions.height,
        "requests": trace.requests.height,
        "inexact": trace.info["inexact"],
        "granule": trace.info["granule"],
        "aborted": trace.requests.filter(trace.requests["finish_reason"] == "abort").height,
        **counts,
    }


def random_stub(folder: str, model: str, seed: int) -> dict[str, Any]:
    """A random workload at random settings through the real scheduler with a made-up model, traced and compared."""
    from .stub import StubEngine

    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 16, 32, 48])
    caching, asynchronous = rng.random() < 0.85, rng.random() < 0.5
    policy = rng.choice(["fcfs", "fcfs", "priority"])
    granule = rng.choice([1, 2, block_size]) if rng.random() < 0.25 else None
    kind = rng.choice(KINDS)
    requests = [
        replace(
            arrival,
            priority=rng.choice([0, 0, 1, 2]) if policy == "priority" else 0,
            cache_salt=rng.choice([None, None, "tenant"]) if kind == "shared_prefixes" else None,
        )
        for arrival in arrivals(kind, seed, block_size)
    ]
    if rng.random() < 0.6:
        requests = workloads.staggered(seed, requests)
    resets = rng.random() < 0.2
    with traced(folder, granule):
        stub = StubEngine(
            model,
            block_size=block_size,
            num_blocks=-(-1024 // block_size) + 2 + rng.choice([0, 2, 10, 40, 400]) * (5 if block_size < 4 else 1),
            max_model_len=1024,
            max_num_seqs=rng.choice([2, 8, 32, 64]),
            max_num_batched_tokens=rng.choice([64, 128, 512, 2048]),
            long_prefill_token_threshold=rng.choice([0, 0, 40]),
            scheduling_policy=policy,
            prefix_caching=caching,
            async_scheduling=asynchronous,
            kv_events=caching and rng.random() < 0.6,
        )
    snapshots = Snapshots(stub.scheduler, stub.observer, seed, 0.05)

    def after_step(step: int) -> None:
        if resets and step % 50 == 49:
            stub.scheduler.reset_prefix_cache(reset_running_requests=not asynchronous)

    drive(stub, requests, after_step)
    snapshots.take(-1)
    result = stub.result()
    stub.close()
    return counted(Path(folder), compare(Path(folder), result, snapshots.states, caching))


def real_engine(
    folder: str | None, kind: str, seed: int, granule: int | None = None, stagger: bool = False, **config: Any
) -> dict[str, Any]:
    """A workload through a real `LLM` in this process, recorded to `folder`, or with None just run.

    Returns the generated tokens, so that runs with and without the tracer can be compared. What the engine said is left
    in `folder`/engine.pickle for `judge`, which must run in another process: vLLM 0.32 does not start an engine where
    llvmlite, which the reader needs, was imported before (it looks into the attributes of all modules).
    """
    settings = EngineConfig(**config)
    requests = arrivals(kind, seed, settings.block_size)
    if stagger:
        requests = workloads.staggered(seed, requests)
    with traced(folder, granule), engine(settings) as live:
        snapshots = Snapshots(live.scheduler, live.observer, seed, 0.05)
        drive(live, requests)
        snapshots.take(-1)
        result = live.result()
    if folder is not None:
        said = (result, snapshots.states, settings.prefix_caching)
        (Path(folder) / "engine.pickle").write_bytes(pickle.dumps(said))
    return {"tokens": [row["tokens"] for row in result["requests"]]}


def judge(folder: Path) -> dict[str, Any]:
    """Compare a recorded `real_engine` run with what the engine said of it."""
    result, states, caching = pickle.loads((folder / "engine.pickle").read_bytes())
    return counted(folder, compare(folder, result, states, caching))


class traced:
    """Schedulers made inside record to `folder` (None: they do not record)."""

    def __init__(self, folder: str | None, granule: int | None = None) -> None:
        self._values = {"KVTRACE_OUT": folder, "KVTRACE_GRANULE": None if granule is None else str(granule)}

    def __enter__(self) -> None:
        # vLLM loads its plugins once a process; what is recorded is asked each time a scheduler is made.
        os.environ.setdefault("KVTRACE_OUT", "armed")
        import kvtrace_tracer

        kvtrace_tracer.register()
        self._apply()

    def _apply(self) -> None:
        for name, value in self._values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def __exit__(self, *_: object) -> None:
        for name in self._values:
            os.environ.pop(name, None)


def all_ways(folder: str, model: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One run recorded in each way: by following block tables, written out while the model runs; the same, written out
    when something else is logged; and explicitly and at once, as for engines that have no such tables."""
    import polars as pl

    import kvtrace_tracer.header
    from kvtrace_traces import open_trace

    from .stub import StubEngine

    follows = kvtrace_tracer.header.follows_tables
    traces = {}
    for way in ("meanwhile", "before-the-next", "explicit"):
        place = f"{folder}/{way}"
        try:
            if way == "explicit":
                kvtrace_tracer.header.follows_tables = lambda header: False
            with traced(place):
                stub = StubEngine(
                    model, num_blocks=70, block_size=16, max_num_seqs=32, max_num_batched_tokens=512,
                    max_model_len=1024, **settings,
                )  # fmt: skip
        finally:
            kvtrace_tracer.header.follows_tables = follows
        stub.asks = way == "meanwhile"
        stub.meanwhile = _disturb(stub, seed)
        drive(stub, workloads.mixed(seed, 16) + workloads.thrashing(seed))
        stub.close()
        traces[way] = open_trace(place)
    equal = {}
    for table in ("requests", "step_requests", "lookups", "preemptions", "block_events"):
        frames = []
        for trace in traces.values():
            frame = getattr(trace, table)
            if "identity" in frame.columns:  # numbered in another order: compare what they stand for
                hashes = pl.Series(trace.chains().hashes)
                frame = frame.with_columns(identity=hashes.gather(frame["identity"].cast(pl.UInt32)))
            # Not told of every explicit row: the group.
            frames.append(frame.drop("time_ns", "arrival_ns", "finish_ns", "group", strict=False))
        equal[table] = all(frames[0].equals(other) for other in frames[1:])
    one = traces["meanwhile"]
    aborted = int((one.requests["finish_reason"] == "abort").sum())
    return {
        "equal": equal, "events": one.info["events"], "preemptions": one.preemptions.height, "aborted": aborted,
    }  # fmt: skip


def _disturb(stub: Any, seed: int) -> Callable[[int], None]:
    """Aborts and adds requests while a step is under way; the same ones in each run."""

    def meanwhile(step: int) -> None:
        rng = random.Random(seed * 100_003 + step)
        if rng.random() < 0.05:
            stub.abort(rng.randrange(len(stub.requests)))
        if step < 200 and rng.random() < 0.05:
            stub.add(workloads.tokens(rng, 30), 20)

    return meanwhile


def short_bursts(folder: str, model: str, frame_bytes: int) -> int:
    """Asynchronous runs of two steps each, after one of one step; returns how many frames were begun."""
    import kvtrace_tracer.log

    from .stub import StubEngine

    usual, kvtrace_tracer.log.FRAME_BYTES = kvtrace_tracer.log.FRAME_BYTES, frame_bytes
    try:
        with traced(folder):
            stub = StubEngine(model, num_blocks=200, async_scheduling=True)
        log, frames = stub.scheduler._kvtrace.log, 0
        begin_frame = log.begin_frame

        def begin() -> None:
            nonlocal frames
            frames += 1
            begin_frame()

        log.begin_frame = begin
        for i in range(300):
            stub.add([7 + i] * 40, 2 if i else 1)
            stub.run()
        stub.close()
    finally:
        kvtrace_tracer.log.FRAME_BYTES = usual
    return frames


def kept_after_the_end(folder: str, model: str) -> int:
    """Notes that remain where hooks stay behind, as someone else wrapped them, after the recording failed."""
    from .stub import StubEngine

    with traced(folder):
        stub = StubEngine(model, num_blocks=200)
    manager = stub.scheduler.kv_cache_manager
    for target, name in (
        (manager, "get_computed_blocks"),
        *((manager.block_pool, name) for name in ("get_new_blocks", "cache_full_blocks", "touch")),
    ):
        inner = getattr(target, name)
        setattr(target, name, lambda *a, inner=inner, **k: inner(*a, **k))
    hooks = stub.scheduler._kvtrace
    hooks.log.fail(RuntimeError("on purpose"))
    for i in range(50):
        stub.add([5 + i] * 40, 20)
    stub.run()
    stub.close()
    return len(hooks.notes.kept)
