"""Hooks on vLLM's OffloadingConnector, whose transfers are jobs with a number.

The connector's scheduler side plans its transfers once a step, in ``build_connector_meta``, and hears of their ends in
``update_connector_output`` (vLLM 0.32.0, ``kv_connector/v1/offloading``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtrace_tracer.offload_moves import Moves
from kvtrace_traces.schema import NO_REQUEST, NOT_TOLD

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks


def plans(connector: Any) -> bool:
    """Whether ``connector`` plans transfers as OffloadingConnector does."""
    side = getattr(connector, "connector_scheduler", None)
    return all(hasattr(side, name) for name in ("manager", "_jobs", "_req_status"))


def install(hooks: Hooks, connector: Any) -> None:
    """Put the hooks on ``connector``."""
    transfers = _Transfers(hooks, connector)
    hooks.patch(connector, "build_connector_meta", transfers.planning)
    hooks.patch(connector, "update_connector_output", transfers.hearing)
    hooks.patch(connector, "reset_cache", transfers.forgetting)
    for name in ("request_finished", "request_finished_all_groups"):
        hooks.patch(connector, name, transfers.finishing)


def describe(connector: Any) -> dict[str, Any]:
    """What the header tells of ``connector``."""
    side = connector.connector_scheduler
    manager, config = side.manager, getattr(side, "config", None)
    policy = type(getattr(manager, "_policy", None)).__name__
    return {
        "manager": type(manager).__name__,
        "chunks": getattr(manager, "_num_chunks", None),
        "blocks_per_chunk": getattr(config, "blocks_per_chunk", None),
        "policy": policy.removesuffix("CachePolicy").lower() if policy.endswith("CachePolicy") else None,
        "store_threshold": getattr(manager, "store_threshold", None),
        "prompt_only": getattr(config, "offload_prompt_only", None),
        "workers": getattr(config, "num_workers", None),
    }


class _Transfers(Moves):
    """The transfers of one connector. ``under_way``: job -> (number in the log, whether a load, workers to go);
    ``finished``: numbers of requests that have finished since the last call, which plans what of theirs is stored."""

    def __init__(self, hooks: Hooks, connector: Any) -> None:
        super().__init__(hooks)
        self.side = connector.connector_scheduler
        config = getattr(self.side, "config", None)
        self.workers = int(getattr(config, "num_workers", 1) or 1)
        self.under_way: dict[int, tuple[int, bool, int]] = {}
        self.finished: dict[str, int] = {}

    def planning(self, original: Any) -> Any:
        log = self.log

        def build_connector_meta(scheduler_output: Any) -> Any:
            meta = original(scheduler_output)
            try:
                # Most steps of decoding plan nothing.
                if (meta.load_jobs or meta.store_jobs) and not log.closed:
                    for job, transfer in meta.load_jobs.items():
                        self.plan(job, transfer.req_id, transfer.dst_spec, True)
                    for job, transfer in meta.store_jobs.items():
                        self.plan(job, transfer.req_id, transfer.src_spec, False)
                if self.finished:
                    self.finished.clear()
            except Exception as error:
                log.fail(error)
            return meta

        return build_connector_meta

    def plan(self, job: int, rid: str, device: Any, load: bool) -> None:
        """Log that a transfer begins; ``device``: the spec with the engine's own blocks."""
        blocks = [int(block) for block in device.block_ids]
        owner = self.number(rid)
        if owner == NO_REQUEST:
            owner = self.finished.get(rid, NO_REQUEST)
        status = self.side._req_status.get(rid)
        first, tokens = NO_REQUEST, 0
        if len(device.group_sizes) == 1 and status is not None:
            # A load's blocks follow one another in the request's table. A store may leave some out, and its blocks may
            # be another's by now, so that where they stand in the table is all that says what they hold.
            at = int(device.block_indices[0])
            if load or status.group_states[0].block_ids[at : at + len(blocks)] == blocks:
                first = at
        if load and status is not None:
            request = self.hooks.scheduler.requests.get(rid)
            if request is not None:
                tokens = max(0, request.num_computed_tokens - status.num_locally_computed_tokens)
        self.under_way[job] = self.begin(owner, load, blocks, tokens, first), load, self.workers

    def hearing(self, original: Any) -> Any:
        log = self.log

        def update_connector_output(connector_output: Any) -> Any:
            result = original(connector_output)
            if not log.closed:
                try:
                    meta = connector_output.kv_connector_worker_meta
                    completed = getattr(meta, "completed_jobs", None)
                    if completed:
                        self.hear(completed, getattr(meta, "transfer_stats", None))
                except Exception as error:
                    log.fail(error)
            return result

        return update_connector_output

    def finishing(self, original: Any) -> Any:
        log, entries = self.log, self.hooks.state.entries

        def request_finished(request: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                entry = entries.get(request.request_id)
                if entry is not None and not log.closed:
                    self.finished[request.request_id] = entry.number
            except Exception as error:
                log.fail(error)
            return original(request, *args, **kwargs)

        return request_finished

    def forgetting(self, original: Any) -> Any:
        def reset_cache(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.under_way.clear()  # what ends after it is of no use to the connector
            return result

        return reset_cache

    def hear(self, completed: dict[int, int], stats: Any) -> None:
        """Log which transfers have ended. Sizes come in the order of the jobs, by direction, and one time for all."""
        known = [(job, self.under_way[job]) for job in completed if job in self.under_way]
        told: dict[bool, list[int]] = {}
        took: dict[bool, int] = {}
        for load, name in ((True, "load"), (False, "store")):
            one = getattr(stats, name, None)
            sizes = [int(size) for size in getattr(one, "sizes", ())]
            mine = sum(of_load == load for _, (_, of_load, _) in known)
            if self.workers == 1 and len(sizes) == mine and len(known) == len(completed):
                told[load] = sizes
                if mine == 1 and one is not None:
                    took[load] = max(0, int(one.time * 1e9))
        now = self.now()
        for job, (number, load, left) in known:
            left -= completed[job]
            size = told[load].pop(0) if told.get(load) else NOT_TOLD
            if left > 0:
                self.under_way[job] = number, load, left
                continue
            del self.under_way[job]
            self.end(number, now, size, took.get(load, NOT_TOLD))
