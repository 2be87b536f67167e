"""Real engines with vLLM's OffloadingConnector, and what its manager itself says of a run.

As with engine.py, use a process of its own for the functions that make engines; `judge` wants another one.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import scenarios, workloads
from .engine import EngineConfig, engine
from .workloads import drive

JOB = ("kind", "request", "blocks", "tokens")
LOOKUP = ("request", "tokens_asked", "tokens_hit", "after_preemption")
BLOCK_BYTES = 16384  # of the tiny models at 32 tokens a block: vLLM keeps their cache in 16 bits


class Ledger:
    """Writes down what a connector's manager (CPUOffloadingManager) and worker interface are asked and answer.

    `jobs`: one dict a transfer: request id, kind, blocks (of the engine), tokens (of a load), call (index of the call
    of `schedule` that planned it), done (index of the last call before its end was heard of; None if it was not).
    `log`: what the manager did, in order: (what, keys).
    """

    def __init__(self, scheduler: Any) -> None:
        self.jobs: dict[int, dict[str, Any]] = {}
        self.log: list[tuple[str, list[str]]] = []
        self.calls = -1
        connector = scheduler.connector
        side = connector.connector_scheduler
        manager = side.manager
        schedule, build = scheduler.schedule, connector.build_connector_meta
        hear = connector.update_connector_output

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return schedule(*args, **kwargs)

        def planned(output: Any) -> Any:
            meta = build(output)
            for kind, jobs in (("load", meta.load_jobs), ("store", meta.store_jobs)):
                for job, transfer in jobs.items():
                    device = transfer.dst_spec if kind == "load" else transfer.src_spec
                    self.jobs[job] = {
                        "request": transfer.req_id, "kind": kind, "blocks": [int(b) for b in device.block_ids],
                        "call": self.calls, "done": None, "tokens": None,
                    }  # fmt: skip
                    if kind == "load":
                        request, status = scheduler.requests[transfer.req_id], side._req_status[transfer.req_id]
                        spared = request.num_computed_tokens - status.num_locally_computed_tokens
                        self.jobs[job]["tokens"] = spared
            return meta

        def heard(output: Any) -> Any:
            meta = output.kv_connector_worker_meta
            for job in () if meta is None else meta.completed_jobs:
                self.jobs[job]["done"] = self.calls
            return hear(output)

        scheduler.schedule, connector.build_connector_meta = counted, planned
        connector.update_connector_output = heard
        for name in ("prepare_store", "complete_store", "prepare_load", "complete_load", "on_request_finished"):
            setattr(manager, name, self._written(name, getattr(manager, name)))

    @property
    def evicted(self) -> int:
        """Chunks that had to go from the host."""
        return sum(len(keys) for what, keys in self.log if what == "evict")

    def _written(self, name: str, original: Any) -> Any:
        def method(*args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            if name == "on_request_finished":
                return answer
            keys = answer.keys_to_store if name == "prepare_store" and answer is not None else args[0]
            if name == "prepare_store" and answer is not None:
                self.log.append(("evict", [key.hex() for key in answer.evicted_keys]))
            what = "refuse" if name == "prepare_store" and answer is None else name
            self.log.append((what, [key.hex() for key in keys]))
            return answer

        return method


def connector(cpu_blocks: int, **more: Any) -> dict[str, Any]:
    """EngineConfig.extra for the connector with the memcpy worker and room for so many blocks on the host.

    `more` goes into its configuration: eviction_policy, store_threshold, blocks_per_chunk, offload_prompt_only; polls
    and copy_loads of the worker.
    """
    from vllm.config import KVTransferConfig

    told: dict[str, Any] = {"spec_name": "MemcpySpec", "spec_module_path": "engine_support.memcpy_worker"}
    told |= {"cpu_bytes_to_use": cpu_blocks * BLOCK_BYTES, **more}
    config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=told)
    return {"kv_transfer_config": config}


def cycling(seed: int, prefixes: int = 6, rounds: int = 4, length: int = 230) -> list[workloads.Arrival]:
    """All at once: prefixes that come back when a small cache has forgotten them, which it does one after the other."""
    rng = random.Random(seed)
    heads = [workloads.tokens(rng, length + rng.randrange(40)) for _ in range(prefixes)]
    return [
        workloads.Arrival(head + workloads.tokens(rng, rng.randrange(1, 60)), rng.randrange(2, 40))
        for _ in range(rounds)
        for head in rng.sample(heads, prefixes)
    ]


def real_engine(
    model: str,
    folder: str | None,
    seed: int,
    cpu_blocks: int | None,
    workload: str = "mixed",
    engine_settings: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A run of a real `LLM`, recorded to `folder` or not; without the connector if `cpu_blocks` is None. `workload`:
    `mixed` reuses what fell out of a small cache, preempts and aborts; or `cycling`.

    Returns tokens and cached tokens by request, preemptions, transfers (step and JOB), bytes moved by the worker,
    blocks moved by kind, and evicted chunks. What the engine said is left in `folder`/engine.pickle for `judge`.
    """
    if cpu_blocks is None:
        return recorded(model, folder, seed, workload, engine_settings)

    def moved() -> dict[str, int]:
        from .memcpy_worker import MemcpySpec

        return MemcpySpec.workers.pop().moved

    extra = connector(cpu_blocks, **more)
    return recorded(model, folder, seed, workload, engine_settings, extra, Ledger, moved)


def recorded(
    model: str,
    folder: str | None,
    seed: int,
    workload: str,
    engine_settings: dict[str, Any] | None,
    extra: dict[str, Any] | None = None,
    ledger_of: Callable[[Any], Any] | None = None,
    moved: Callable[[], dict[str, int]] = dict,
) -> dict[str, Any]:
    """As `real_engine`, with any connector: `extra` of EngineConfig configures it, `ledger_of` a scheduler writes down
    `jobs` and `evicted` as Ledger does, `moved` tells the bytes when all is done."""
    config = EngineConfig(model=model, **({"num_blocks": 40} | (engine_settings or {})), extra=extra or {})
    arrivals = cycling(seed) if workload == "cycling" else workloads.mixed(seed, config.block_size)
    with scenarios.traced(folder), engine(config) as live:
        ledger = None if ledger_of is None else ledger_of(live.scheduler)
        drive(live, arrivals)
        result = live.result()
        told = moved()
    numbers = {row["request_id"]: row["request"] for row in result["requests"]} | {None: None}
    jobs = [] if ledger is None else [{**job, "request": numbers[job["request"]]} for job in ledger.jobs.values()]
    if folder is not None:
        kept = {key: value for key, value in result.items() if key != "config"}
        (Path(folder) / "engine.pickle").write_bytes(pickle.dumps((kept, jobs)))
    blocks = {"store": 0, "load": 0}
    for job in jobs:
        blocks[job["kind"]] += len(job["blocks"])
    return {
        "tokens": [row["tokens"] for row in result["requests"]],
        "cached": [row["num_cached_tokens"] for row in result["requests"]],
        "preemptions": len(result["preemptions"]),
        "moved": told,
        "jobs": [(steps_before(result)[job["call"]], *(job[name] for name in JOB)) for job in jobs],
        "blocks": blocks,
        "evicted": 0 if ledger is None else ledger.evicted,
    }


def judge(folder: Path) -> dict[str, Any]:
    """Compare a recorded run with what the engine said of it; `wrong` holds the differences."""
    import polars as pl

    from kvtrace_replay.verify import verify
    from kvtrace_traces import open_trace

    from . import oracle

    result, jobs = pickle.loads((folder / "engine.pickle").read_bytes())
    trace = open_trace(folder, recover="strict")
    checks = verify(trace)["checks"]
    wrong = [f"verify: {check['name']}: {check['first']}" for check in checks if check["mismatches"]]
    if not trace.complete:
        wrong.append(f"incomplete: {trace.warnings}")
    wrong += oracle._steps(trace, result)
    wrong += lookups(trace, result)
    wrong += transfers(trace, result, jobs)
    cached = dict(trace.requests.select("request", "cached_tokens").rows())
    for row in result["requests"]:
        if row["num_cached_tokens"] is not None and cached[row["request"]] != row["num_cached_tokens"]:
            wrong.append(f"request {row['request']}: cached {cached[row['request']]}, {row['num_cached_tokens']}")
    kinds = dict(trace.block_events["kind"].cast(str).value_counts().iter_rows())
    return {
        "wrong": wrong,
        "inexact": trace.info["inexact"],
        "offload": trace.header["offload"],
        "bytes": dict(trace.offloads.group_by("kind").agg(pl.col("bytes").sum()).cast({"kind": str}).rows()),
        **kinds,
    }


def lookups(trace: Any, result: dict[str, Any]) -> list[str]:
    """The differences between lookups; in a call those with a load are told first."""
    steps = steps_before(result)
    engine = [(steps[r["call"]], *(r[name] for name in LOOKUP)) for r in result["lookups"]]
    wrong = [] if sorted(trace.lookups.select("step", *LOOKUP).rows()) == sorted(engine) else ["lookups differ"]
    for again in (False, True):
        part = trace.lookups.filter(trace.lookups["after_preemption"] == again)
        ours = (part.height, part["tokens_asked"].sum(), part["tokens_hit"].sum())
        name = "preempted_" if again else ""
        told = tuple(result["cache_stats"].get(name + key, 0) for key in ("requests", "queries", "hits"))
        if told != ours:
            wrong.append(f"{name}cache statistics {ours}, vLLM's own {told}")
    return wrong


def steps_before(result: dict[str, Any]) -> list[int]:
    """For each call of `schedule` the number of steps before it; what happens in an empty call is of the next step."""
    steps, count = [], 0
    for call in result["steps"]:
        steps.append(count)
        count += call["total"] > 0
    return steps


def transfers(trace: Any, result: dict[str, Any], jobs: list[dict[str, Any]]) -> list[str]:
    """The differences between the trace's transfers, with their block rows, and the connector's jobs."""
    steps = steps_before(result)
    begun = [at + (call["total"] > 0) - 1 for at, call in zip(steps, result["steps"], strict=True)]
    mine = trace.offloads.rows(named=True)
    if len(mine) != len(jobs):
        return [f"{len(mine)} transfers, the connector has {len(jobs)}"]
    moves = trace.block_events.filter(trace.block_events["kind"].is_in(["store", "load"]))
    blocks = iter(moves.select("kind", "request", "step", "block", "identity").rows())
    wrong = []
    for i, (row, job) in enumerate(zip(mine, jobs, strict=True)):
        told = [next(blocks) for _ in range(row["blocks"])]
        expected = {
            "kind": job["kind"], "request": job["request"], "blocks": len(job["blocks"]), "tokens": job["tokens"],
            "step": steps[job["call"]], "tier": 1, "bytes": len(job["blocks"]) * BLOCK_BYTES,
            "done_step": None if job["done"] is None else max(begun[job["done"]], 0),
        }  # fmt: skip
        for name, value in expected.items():
            if row[name] != value:
                wrong.append(f"transfer {i}: {name} {row[name]}, the connector has {value}")
        if [(k, r, s, b) for k, r, s, b, _ in told] != [
            (job["kind"], job["request"], row["step"], block) for block in job["blocks"]
        ]:
            wrong.append(f"transfer {i}: blocks {told}, the connector has {job}")
        if any(identity is None for *_, identity in told):
            wrong.append(f"transfer {i}: a block without identity: {told}")
        if job["done"] is not None and not row["time_ns"] <= row["done_ns"]:
            wrong.append(f"transfer {i}: ended before it began")
    return wrong
