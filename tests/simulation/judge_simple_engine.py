"""Runs vLLM's own Scheduler with its own SimpleCPUOffloadConnector on scripted requests: `judge_engine` with it.

A program of its own (see judge.py). Real are the scheduler and both sides of the connector; only the copies below them
copy nothing, and are not over as often as is told. Of copies that end together the ledger says the order.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
import sys
import traceback
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import judge_engine


def make(case: dict[str, Any]) -> Any:
    """A scheduler with a connector, as StubEngine makes it; also its configuration."""
    from vllm.config import KVTransferConfig
    from vllm.v1.simple_kv_offload.manager import SimpleCPUOffloadScheduler

    from engine_support.stub import StubEngine

    offload = case["offload"]
    config = KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"lazy_offload": offload["lazy"]},
    )
    original = SimpleCPUOffloadScheduler._derive_cpu_config

    def sized(kv_cache_config: Any, capacity: int) -> Any:  # a stub has no cache whose bytes could be divided
        return dataclasses.replace(kv_cache_config, num_blocks=offload["chunks"] + 1)

    SimpleCPUOffloadScheduler._derive_cpu_config = staticmethod(sized)
    try:
        return StubEngine(case["model"], observe=False, kv_transfer_config=config, **case["settings"])
    finally:
        SimpleCPUOffloadScheduler._derive_cpu_config = staticmethod(original)


class SimpleJudge(judge_engine.Judge):
    """As Judge; `transfers` and `host` as in twin_simple.SimpleRun."""

    def __init__(self, case: dict[str, Any], stub: Any) -> None:
        pool = stub.scheduler.kv_cache_manager.block_pool
        if "cache_full_blocks" in vars(pool):  # the tracer's, which takes anything
            own = type(pool).cache_full_blocks.__get__(pool)
            pool.cache_full_blocks.__signature__ = inspect.signature(own)
        super().__init__(case, stub.scheduler, True)
        from vllm.v1.simple_kv_offload.worker import SimpleCPUOffloadWorker

        from engine_support.simple_offload import Ledger
        from engine_support.simple_worker import MemcpyBackend

        self.hasher = judge_engine._hasher(self.settings["block_size"])
        self.ledger = Ledger(stub.scheduler)
        stub.scheduler.use_v2_model_runner = case["offload"]["runner"] == 2
        self.host: list[tuple[Any, ...]] = []
        self.owners: dict[int, int] = {}  # of blocks whose request is gone before they are free
        self.draining: list[int] = []
        self._wrap(self.manager, "pop_blocks_for_free", self._pop_blocks)
        self._wrap(self.scheduler, "_drain_deferred_frees", self._drain)
        side = stub.scheduler.connector.scheduler_manager
        for name in ("update_state_after_alloc", "build_connector_meta", "request_finished_all_groups"):
            self._wrap(side, name, self._for_nobody)
        self._wrap(side, "update_connector_output", self._for_nobody)
        pool, queue = side.cpu_block_pool, side.cpu_block_pool.free_block_queue
        self._wrap(queue, "popleft_n", self._host_take)
        self._wrap(queue, "remove", self._host_pin)
        self._wrap(queue, "append_n", self._host_give)
        self._wrap(pool, "_insert_block_hash", self._host_cache)
        self.before: list[int] = []  # steps begun before a call, and with it
        self.after: list[int] = []
        self.worker = SimpleCPUOffloadWorker(stub.config, stub.scheduler.kv_cache_config, 0)
        self.worker._backend = MemcpyBackend(case["offload"]["polls"], True)
        self.worker._backend.init({}, {})
        self.resets = list(case["offload"]["resets"])
        self.alive = 0  # calls so far when there was last a request
        self._wrap(self.scheduler, "has_requests", self._has_requests)

    # ------------------------------------------------------------------------------------------------- observation

    def _for_nobody(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """What the connector does to the engine's blocks it does for itself."""
        before, self.current = self.current, -1
        result = inner(*args, **kwargs)
        self.current = before
        return result

    def _host_take(self, inner: Any, count: int) -> Any:
        blocks = inner(count)
        self.host += [("take", block.block_id) for block in blocks]
        return blocks

    def _host_pin(self, inner: Any, block: Any) -> Any:
        self.host.append(("pin", block.block_id))
        return inner(block)

    def _host_give(self, inner: Any, blocks: Any) -> Any:
        self.host += [("give", block.block_id) for block in blocks]
        return inner(blocks)

    def _host_cache(self, inner: Any, block_hash: Any, block: Any, **kwargs: Any) -> Any:
        self.host.append(("cache", block.block_id, self.identities[block_hash]))
        return inner(block_hash, block, **kwargs)

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

    # ---------------------------------------------------------------------------------------------------- the engine

    def _has_requests(self, inner: Any) -> bool:
        """In its lazy mode the connector may keep an engine awake for good: with less room on the host than the engine
        has cached blocks, what it stores drives out what it stored before. Then the run ends a while after the last
        request."""
        calls = len(self.before)
        if self.scheduler.has_unfinished_requests() or self.scheduler.has_finished_requests():
            self.alive = calls
        return inner() and calls - self.alive < 10

    def _call(self) -> Any:
        if self.resets and self.begun >= self.resets[0]:
            self.resets.pop(0)
            if self.scheduler.reset_prefix_cache():
                self.held.clear()
            self.scheduler.reset_connector_cache()
        step = self.begun
        output, result = super()._call()
        self.before.append(step)
        self.after.append(self.begun)
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
        self.worker.bind_connector_metadata(meta)
        self.worker.start_load_kv()
        self.worker.wait_for_save()
        _, received = self.worker.get_finished(set())
        told = self.worker.build_connector_worker_meta()
        self.worker.clear_connector_metadata()
        return KVConnectorOutput(finished_recving=received, kv_connector_worker_meta=told)

    def run(self) -> dict[str, Any]:
        result = super().run()
        if "error" in result:
            return result
        transfers = [
            (
                self.before[job["call"]],
                job["kind"],
                None if job["request"] is None else self.number(job["request"]),
                job["blocks"],
                job["tokens"] or 0,
                None if job["done"] is None else max(self.after[job["done"]] - 1, 0),
            )
            for job in self.ledger.jobs.values()
        ]
        told = {"transfers": transfers, "evicted": self.ledger.evicted, "kinds": self.ledger.kinds, "host": self.host}
        return result | told


def main() -> None:
    """Serve cases until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "wb")
    from engine_support.scenarios import traced
    from engine_support.simple_worker import on_the_cpu

    with on_the_cpu():
        while True:
            try:
                case = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                with traced(case["folder"]):
                    stub = make(case)
                result = SimpleJudge(case, stub).run()
                stub.close()
            except Exception:
                result = {"error": traceback.format_exc()}
            pickle.dump(result, answers)
            answers.flush()


if __name__ == "__main__":
    main()
