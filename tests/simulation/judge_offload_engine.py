"""Runs vLLM's own Scheduler with its own OffloadingConnector on scripted requests: `judge_engine` with a connector.

A program of its own (see judge.py). Real are the scheduler, both sides of the connector and its manager; the worker
below them copies nothing and answers "not yet" as often as it is told. vLLM goes through two sets, whose order is
arbitrary: finished requests come here in the order in which they finished, jobs to be flushed in that of their numbers.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import traceback
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import judge_engine

CHUNK_BYTES = 4096  # what vLLM aligns a chunk to: with it a tier has as many chunks as are asked for


def make(case: dict[str, Any]) -> Any:
    """A scheduler with a connector, as StubEngine makes it; also its configuration."""
    from vllm.config import KVTransferConfig
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    from engine_support.stub import StubEngine

    offload = case["offload"]
    told = {
        "cpu_bytes_to_use": 1, "eviction_policy": offload["policy"], "blocks_per_chunk": offload["blocks_per_chunk"],
        "store_threshold": offload["store_threshold"], "offload_prompt_only": offload["prompt_only"],
    }  # fmt: skip
    config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=told)
    original = CPUOffloadingSpec.__init__

    def sized(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.num_chunks = offload["chunks"]

    CPUOffloadingSpec.__init__ = sized
    try:
        return StubEngine(case["model"], observe=False, kv_transfer_config=config, **case["settings"])
    finally:
        CPUOffloadingSpec.__init__ = original


class OffloadJudge(judge_engine.Judge):
    """As Judge; `transfers` and `tier` as in twin_offload.OffloadRun."""

    def __init__(self, case: dict[str, Any], stub: Any) -> None:
        pool = stub.scheduler.kv_cache_manager.block_pool
        if "cache_full_blocks" in vars(pool):  # the tracer's, which takes anything
            own = type(pool).cache_full_blocks.__get__(pool)
            pool.cache_full_blocks.__signature__ = inspect.signature(own)
        super().__init__(case, stub.scheduler, True)
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

        from engine_support.memcpy_worker import MemcpyWorker

        self.transfers: list[list[Any]] = []
        self.tier: list[tuple[str, list[int]]] = []
        self.rows_of: dict[int, int] = {}  # job -> its place in transfers
        self.names: dict[bytes, int] = {}
        self.gone: list[str] = []
        self.hasher = judge_engine._hasher(self.settings["block_size"])
        connector = self.connector = self.scheduler.connector
        self.side = connector.connector_scheduler
        manager = self.side.manager
        spec = SimpleNamespace(replicated_layout=False)
        self.worker = OffloadingConnectorWorker(spec, stub.config, stub.scheduler.kv_cache_config)  # type: ignore[arg-type]
        caches = SimpleNamespace(tensors=[])
        offload = case["offload"]
        self.worker.worker = MemcpyWorker(caches, offload["blocks_per_chunk"], 0, offload["polls"], True)
        self.owners: dict[int, int] = {}  # of blocks whose request is gone before they are free
        self._wrap(self.manager, "pop_blocks_for_free", self._pop_blocks)
        self.draining: list[int] = []
        self._wrap(self.scheduler, "_drain_deferred_frees", self._drain)
        self._wrap(connector, "build_connector_meta", self._planned)
        self._wrap(connector, "update_connector_output", self._heard)
        for name in ("prepare_store", "complete_store", "prepare_load", "complete_load"):
            self._wrap(manager, name, getattr(self, f"_{name}"))

    # ------------------------------------------------------------------------------------------------- observation

    def keys(self, keys: Any) -> list[int]:
        if any(key not in self.names for key in keys):
            for spec, request in zip(self.case["requests"], self.requests, strict=True):
                if request is not None:
                    hashes = (bytes(one) + bytes(4) for one in request.block_hashes)
                    self.names.update(zip(hashes, spec["chain"], strict=False))
        return [self.names[bytes(key)] for key in keys]

    def _prepare_store(self, inner: Any, keys: Any, context: Any) -> Any:
        answer = inner(keys, context)
        if answer is None:
            self.tier.append(("refuse", sorted(self.keys(keys))))
        elif answer.keys_to_store:
            if answer.evicted_keys:
                self.tier.append(("evict", self.keys(answer.evicted_keys)))
            self.tier.append(("store", self.keys(answer.keys_to_store)))
        return answer

    def _complete_store(self, inner: Any, keys: Any, context: Any, *args: Any) -> Any:
        self.tier.append(("stored", sorted(self.keys(keys))))
        return inner(keys, context, *args)

    def _prepare_load(self, inner: Any, keys: Any, context: Any) -> Any:
        self.tier.append(("load", sorted(self.keys(keys))))
        return inner(keys, context)

    def _complete_load(self, inner: Any, keys: Any, context: Any) -> Any:
        self.tier.append(("loaded", sorted(self.keys(keys))))
        return inner(keys, context)

    def _pop_blocks(self, inner: Any, request: Any) -> Any:
        blocks = inner(request)
        self.owners[id(blocks)] = self.number(request.request_id)
        return blocks

    def _drain(self, inner: Any) -> Any:
        done = self.scheduler.processed_step_seq
        self.draining = [self.owners.pop(id(blocks)) for at, blocks in self.scheduler.deferred_frees if at <= done]
        return inner()

    def _free_blocks(self, inner: Any, blocks: Any, *args: Any, **kwargs: Any) -> Any:
        if self.draining:
            self.current = self.draining.pop(0)
        return super()._free_blocks(inner, blocks, *args, **kwargs)

    def _free_request(self, inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.gone.append(request.request_id)
        return super()._free_request(inner, request, *args, **kwargs)

    def _planned(self, inner: Any, output: Any) -> Any:
        assert set(self.gone) == set(output.finished_req_ids), (self.gone, output.finished_req_ids)
        output.finished_req_ids, self.gone = self.gone, []
        meta = inner(output)
        output.finished_req_ids = set(output.finished_req_ids)
        meta.jobs_to_flush = dict.fromkeys(sorted(meta.jobs_to_flush))
        for kind, jobs in (("load", meta.load_jobs), ("store", meta.store_jobs)):
            for job, transfer in jobs.items():
                device = transfer.dst_spec if kind == "load" else transfer.src_spec
                tokens = 0
                if kind == "load":
                    request = self.scheduler.requests[transfer.req_id]
                    tokens = (
                        request.num_computed_tokens - self.side._req_status[transfer.req_id].num_locally_computed_tokens
                    )
                self.rows_of[job] = len(self.transfers)
                blocks = [int(block) for block in device.block_ids]
                self.transfers.append([self.begun, kind, self.number(transfer.req_id), blocks, tokens, None])
        return meta

    def _heard(self, inner: Any, output: Any) -> Any:
        meta = output.kv_connector_worker_meta
        for job in () if meta is None else meta.completed_jobs:
            self.transfers[self.rows_of[job]][5] = max(self.begun - 1, 0)
        return inner(output)

    # ---------------------------------------------------------------------------------------------------- the engine

    def _call(self) -> Any:
        step = self.begun
        output, result = super()._call()
        for name in output.num_scheduled_tokens:
            row = self.rows[self.number(name)]
            if row[0] == step == row[1]:
                stats = self.scheduler.requests[name].prefill_stats
                row[3] = stats.num_cached_tokens if stats is not None else row[3]
        result.kv_connector_output = self._execute(output.kv_connector_metadata)
        return output, result

    def _execute(self, meta: Any) -> Any:
        """What the model runner calls in one step (0.32.0: execute_model and KVConnectorModelRunnerMixin)."""
        from vllm.v1.outputs import KVConnectorOutput

        self.worker.handle_preemptions(meta)
        self.worker.start_kv_transfers(meta)
        self.worker.prepare_store_kv(meta)
        loads = dict(self.worker._load_jobs)
        _, received = self.worker.get_finished(set())
        told = self.worker.build_connector_worker_meta()
        order = [loads[job] for job in (told.completed_jobs if told else ()) if job in loads]
        assert set(order) == received
        return KVConnectorOutput(finished_recving=dict.fromkeys(order), kv_connector_worker_meta=told)  # type: ignore[arg-type]

    def run(self) -> dict[str, Any]:
        result = super().run()
        if "error" in result:
            return result
        return {**result, "transfers": [tuple(row) for row in self.transfers], "tier": self.tier}


def main() -> None:
    """Serve cases until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "wb")
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            from engine_support.scenarios import traced

            with traced(case["folder"]):
                stub = make(case)
            result = OffloadJudge(case, stub).run()
            stub.close()
        except Exception:
            result = {"error": traceback.format_exc()}
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
