"""Hooks on vLLM's OffloadingConnector: which blocks go to the slower tier and back, for whom, and when that ended.

The connector's scheduler side plans its transfers once a step, in ``build_connector_meta``, and hears of their ends in
``update_connector_output`` (vLLM 0.32.0, ``kv_connector/v1/offloading``); a transfer is a job with a number. Where no
connector is configured, or another one, nothing is hooked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvtrace_traces.schema import MOVE_LOAD, MOVE_STORE, NO_REQUEST, NOT_TOLD

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

HOST = 1
"""The tier that the connector copies to; what its manager does below that is not told to the scheduler."""


def install(hooks: Hooks) -> None:
    """Put the hooks on the offloading connectors of ``hooks``' scheduler, if it has any."""
    for connector in offloading(hooks.scheduler):
        transfers = _Transfers(hooks, connector)
        hooks.patch(connector, "build_connector_meta", transfers.planning)
        hooks.patch(connector, "update_connector_output", transfers.hearing)
        hooks.patch(connector, "reset_cache", transfers.forgetting)
        for name in ("request_finished", "request_finished_all_groups"):
            hooks.patch(connector, name, transfers.finishing)


def offloading(scheduler: Any) -> Iterator[Any]:
    """The connectors of a scheduler that plan transfers as OffloadingConnector does; several may stand in one."""
    connector = getattr(scheduler, "connector", None)
    for one in getattr(connector, "_connectors", None) or (() if connector is None else (connector,)):
        side = getattr(one, "connector_scheduler", None)
        if all(hasattr(side, name) for name in ("manager", "_jobs", "_req_status")):
            yield one


def describe(scheduler: Any) -> dict[str, Any] | None:
    """What the header tells of the slower tier; None without a connector that this module follows."""
    for connector in offloading(scheduler):
        side = connector.connector_scheduler
        manager, config = side.manager, getattr(side, "config", None)
        policy = type(getattr(manager, "_policy", None)).__name__
        return {
            "connector": type(connector).__name__,
            "manager": type(manager).__name__,
            "chunks": getattr(manager, "_num_chunks", None),
            "blocks_per_chunk": getattr(config, "blocks_per_chunk", None),
            "policy": policy.removesuffix("CachePolicy").lower() if policy.endswith("CachePolicy") else None,
            "store_threshold": getattr(manager, "store_threshold", None),
            "prompt_only": getattr(config, "offload_prompt_only", None),
            "workers": getattr(config, "num_workers", None),
        }
    return None


class _Transfers:
    """The transfers of one connector. ``under_way``: job -> (number in the log, whether a load, workers to go);
    ``finished``: numbers of requests that have finished since the last call, which plans what of theirs is stored."""

    def __init__(self, hooks: Hooks, connector: Any) -> None:
        self.hooks = hooks
        self.side = connector.connector_scheduler
        config = getattr(self.side, "config", None)
        self.workers = int(getattr(config, "num_workers", 1) or 1)
        self.block_bytes = int(hooks.block_bytes or 0)
        self.under_way: dict[int, tuple[int, bool, int]] = {}
        self.finished: dict[str, int] = {}

    def planning(self, original: Any) -> Any:
        log = self.hooks.log

        def build_connector_meta(scheduler_output: Any) -> Any:
            meta = original(scheduler_output)
            try:
                # Most steps of decoding plan nothing.
                if (meta.load_jobs or meta.store_jobs) and not log.closed:
                    for job, transfer in meta.load_jobs.items():
                        self.begin(job, transfer.req_id, transfer.dst_spec, True)
                    for job, transfer in meta.store_jobs.items():
                        self.begin(job, transfer.req_id, transfer.src_spec, False)
                if self.finished:
                    self.finished.clear()
            except Exception as error:
                log.fail(error)
            return meta

        return build_connector_meta

    def begin(self, job: int, rid: str, device: Any, load: bool) -> None:
        """Log that a transfer begins; ``device``: the spec with the engine's own blocks."""
        hooks = self.hooks
        blocks = [int(block) for block in device.block_ids]
        entry = hooks.state.entries.get(rid)
        owner = self.finished.get(rid, NO_REQUEST) if entry is None else entry.number
        number = hooks.state.transfers
        hooks.state.transfers = number + 1
        status = self.side._req_status.get(rid)
        first, tokens = NO_REQUEST, 0
        if len(device.group_sizes) == 1 and status is not None:
            # A load's blocks follow one another in the request's table. A store may leave some out, and its blocks may
            # be another's by now, so that where they stand in the table is all that says what they hold.
            at = int(device.block_indices[0])
            if load or status.group_states[0].block_ids[at : at + len(blocks)] == blocks:
                first = at
        if load and status is not None:
            request = hooks.scheduler.requests.get(rid)
            if request is not None:
                tokens = max(0, request.num_computed_tokens - status.num_locally_computed_tokens)
        size = len(blocks) * self.block_bytes
        hooks.log.ext(
            "MOVE", number, owner,
            (MOVE_LOAD if load else MOVE_STORE) | HOST << 8, tokens, first, size & 0xFFFFFFFF, size >> 32, *blocks,
        )  # fmt: skip
        hooks.log.events += len(blocks)
        self.under_way[job] = number, load, self.workers

    def hearing(self, original: Any) -> Any:
        log = self.hooks.log

        def update_connector_output(connector_output: Any) -> Any:
            result = original(connector_output)
            if not log.closed:
                try:
                    meta = connector_output.kv_connector_worker_meta
                    completed = getattr(meta, "completed_jobs", None)
                    if completed:
                        self.end(completed, getattr(meta, "transfer_stats", None))
                except Exception as error:
                    log.fail(error)
            return result

        return update_connector_output

    def finishing(self, original: Any) -> Any:
        log, entries = self.hooks.log, self.hooks.state.entries

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

    def end(self, completed: dict[int, int], stats: Any) -> None:
        """Log which transfers have ended. Sizes come in the order of the jobs, by direction, and one time for all."""
        hooks = self.hooks
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
        now = time.monotonic_ns() - hooks.clock_ns
        for job, (number, load, left) in known:
            left -= completed[job]
            size = told[load].pop(0) if told.get(load) else NOT_TOLD
            if left > 0:
                self.under_way[job] = number, load, left
                continue
            del self.under_way[job]
            figures = (now, size, took.get(load, NOT_TOLD))
            hooks.log.ext("MOVED", number, *(word for n in figures for word in (n & 0xFFFFFFFF, n >> 32)))
