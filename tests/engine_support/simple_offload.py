"""Real engines with vLLM's SimpleCPUOffloadConnector, and what its scheduler side itself says of a run.

As with engine.py, use a process of its own for the functions that make engines; `offload.judge` wants another one.
"""

from __future__ import annotations

from typing import Any

from .offload import BLOCK_BYTES, recorded


class Ledger:
    """Writes down what the connector's scheduler side plans, and of which ends it hears.

    `jobs`: as offload.Ledger, one for each request's blocks in a copy, one for a copy that is no request's. Whose
    blocks are in a copy is told by the blocks that are taken on the host: once for each request, in the order in which
    the connector has them in its own list of the copy's requests, and at the end of each request that then has any
    left. `evicted`: blocks that were forgotten on the host for that. `kinds`: jobs of requests of a step, of requests
    that had finished, and of none.
    """

    def __init__(self, scheduler: Any) -> None:
        self.jobs: dict[Any, dict[str, Any]] = {}
        self.calls = -1
        self.evicted = 0
        self.kinds = {"running": 0, "finished": 0, "none": 0, "reset": 0}
        self._taken: list[tuple[str | None, list[int]]] = []  # on the host: for whom, if that is known yet
        self._finishing: str | None = None
        self._offered: dict[str, int] = {}
        connector = self.connector = scheduler.connector
        side = self.side = connector.scheduler_manager
        wrap(scheduler, "schedule", self._schedule)
        wrap(connector, "get_num_new_matched_tokens", self._match)
        wrap(connector, "request_finished_all_groups", self._finish)
        wrap(connector, "build_connector_meta", self._plan)
        wrap(side.cpu_block_pool, "get_new_blocks", self._take)
        wrap(side, "update_connector_output", self._in_order)
        wrap(side, "_cleanup_load_request", self._end_load)
        wrap(side, "_process_store_event", self._end_stores)
        wrap(side, "reset", self._reset)

    def _schedule(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return inner(*args, **kwargs)

    def _match(self, inner: Any, request: Any, computed: int) -> Any:
        tokens, later = inner(request, computed)
        self._offered[request.request_id] = tokens
        return tokens, later

    def _finish(self, inner: Any, request: Any, blocks: Any) -> Any:
        self._finishing = request.request_id
        answer = inner(request, blocks)
        self._finishing = None
        return answer

    def _take(self, inner: Any, count: int) -> Any:
        pool = self.side.cpu_block_pool
        known = len(pool.cached_block_hash_to_block)
        blocks = inner(count)
        self.evicted += known - len(pool.cached_block_hash_to_block)
        self._taken.append((self._finishing, [block.block_id for block in blocks]))
        return blocks

    def _reset(self, inner: Any) -> Any:
        self._taken.clear()  # and given back
        self.kinds["reset"] += sum(job["done"] is None for job in self.jobs.values())
        return inner()

    def _plan(self, inner: Any, output: Any) -> Any:
        meta = inner(output)
        for name, state in self.side._reqs_to_load.items():
            if meta.load_event >= 0 and state.load_event == meta.load_event:
                blocks = list(state.transfer_meta.gpu_block_ids)
                # A request has one load at a time.
                self.jobs["load", name, meta.load_event] = self._job(name, "load", blocks, self._offered[name])
        if meta.store_event >= 0:
            source = dict(zip(meta.store_cpu_blocks, meta.store_gpu_blocks, strict=True))
            running = list(self.side._store_event_to_reqs.get(meta.store_event, ()))
            # Those of finished requests come last in the copy; they were taken before it was planned.
            for name, mine in sorted(self._taken, key=lambda taken: taken[0] is not None):
                self.kinds["finished" if name else "running" if running else "none"] += 1
                owner = name or (running.pop(0) if running else None)
                blocks = [source.pop(block) for block in mine]
                self.jobs["store", meta.store_event, len(self.jobs)] = self._job(owner, "store", blocks, None)
            assert not source
            assert not running
            self._taken.clear()
        assert not self._taken
        return meta

    def _job(self, request: str | None, kind: str, blocks: list[int], tokens: int | None) -> dict[str, Any]:
        return {
            "request": request, "kind": kind, "blocks": blocks, "tokens": tokens, "call": self.calls, "done": None,
        }  # fmt: skip

    def _in_order(self, inner: Any, output: Any) -> Any:
        if output.finished_recving:
            begun = [*self.side._reqs_to_load, *self.side._abandoned_reqs_to_load]
            output.finished_recving = dict.fromkeys(sorted(output.finished_recving, key=begun.index))
        ended = getattr(output.kv_connector_worker_meta, "completed_store_events", None)
        if ended:
            output.kv_connector_worker_meta.completed_store_events = dict(sorted(ended.items()))
        return inner(output)

    def _end_load(self, inner: Any, name: str) -> Any:
        state = self.side._reqs_to_load.get(name) or self.side._abandoned_reqs_to_load.get(name)
        if state is not None and state.load_event is not None:
            self.jobs["load", name, state.load_event]["done"] = self.calls
        return inner(name)

    def _end_stores(self, inner: Any, event: int) -> Any:
        for key, job in self.jobs.items():
            if key[:2] == ("store", event):
                job["done"] = self.calls
        return inner(event)


def wrap(owner: Any, name: str, hook: Any) -> None:
    """Have `hook(inner, ...)` called for `owner.name(...)`."""
    inner = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: hook(inner, *args, **kwargs))


def connector(cpu_blocks: int, lazy: bool) -> dict[str, Any]:
    """EngineConfig.extra for the connector with room for so many blocks on the host."""
    from vllm.config import KVTransferConfig

    # One of its blocks is a null block, in which nothing is stored.
    told = {"cpu_bytes_to_use": (cpu_blocks + 1) * BLOCK_BYTES, "lazy_offload": lazy}
    config = KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector", kv_role="kv_both", kv_connector_extra_config=told
    )
    return {"kv_transfer_config": config}


def real_engine(
    model: str,
    folder: str | None,
    seed: int,
    cpu_blocks: int,
    lazy: bool,
    polls: int = 0,
    copy_loads: bool = True,
    workload: str = "mixed",
    engine_settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """As `offload.real_engine`, and `kinds` as in Ledger."""
    from .simple_worker import on_the_cpu

    ledgers = []

    def ledger(scheduler: Any) -> Ledger:
        ledgers.append(Ledger(scheduler))
        return ledgers[-1]

    with on_the_cpu(polls, copy_loads) as backends:
        result = recorded(
            model,
            folder,
            seed,
            workload,
            engine_settings,
            connector(cpu_blocks, lazy),
            ledger,
            lambda: backends[-1].moved,
        )
    return {**result, "kinds": ledgers[0].kinds}
