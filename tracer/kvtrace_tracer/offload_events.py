"""Hooks on vLLM's SimpleCPUOffloadConnector, which makes one copy a step of all stores, and one of all loads.

Its scheduler side plans both in ``build_connector_meta`` and hears of their ends in ``update_connector_output``: of a
load by its request, of a step's stores by the number of their copy, its event (vLLM 0.32.0, ``v1/simple_kv_offload``).
A copy may hold blocks of several requests: each request's are a transfer of their own here. In its lazy mode it stores
what stands next in the engine's queue of free blocks, which is no request's: one transfer, and no request.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.offload_moves import Moves
from kvtrace_traces.schema import NO_REQUEST

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks


def plans(connector: Any) -> bool:
    """Whether ``connector`` plans transfers as SimpleCPUOffloadConnector does. It does nothing, and has no scheduler
    side, without prefix caching."""
    side = getattr(connector, "scheduler_manager", None)
    return all(hasattr(side, name) for name in ("cpu_block_pool", "_reqs_to_load", "_store_event_to_blocks"))


def install(hooks: Hooks, connector: Any) -> None:
    """Put the hooks on ``connector`` and its scheduler side."""
    transfers = _Transfers(hooks, connector)
    hooks.patch(connector, "update_state_after_alloc", transfers.admitting)
    hooks.patch(connector, "build_connector_meta", transfers.planning)
    hooks.patch(connector, "update_connector_output", transfers.hearing)
    hooks.patch(connector, "request_finished_all_groups", transfers.finishing)
    hooks.patch(transfers.side, "_select_eager_blocks_to_store", transfers.selecting)


def describe(connector: Any) -> dict[str, Any]:
    """What the header tells of ``connector``. One of the blocks on the host is the null block, which holds nothing."""
    side = connector.scheduler_manager
    lazy = bool(getattr(side, "_lazy_mode", False))
    blocks = getattr(side, "num_cpu_blocks", None)
    return {
        "manager": type(side).__name__,
        "chunks": None if blocks is None else blocks - 1,
        "blocks_per_chunk": 1,
        "policy": "lru",
        "store_threshold": 0,
        "prompt_only": False,
        "workers": getattr(side, "_expected_worker_count", None),
        "backend": str(getattr(side, "_info_labelvalues", ("cpu",))[0]),
        "lazy_offload": lazy,
        "lazy_target_blocks": getattr(side, "_target_free", None) if lazy else None,
    }


class _Transfers(Moves):
    """The transfers of one connector. ``admitted``: request id -> (tokens, place of the first block in its table) of
    loads that this call will plan; ``owners``: block -> number of the request for which it was chosen to be stored
    with the next call; ``queued``: the last choice made when a request finished. Under way are ``loads``: request id
    -> number in the log; and ``stores``: event -> (numbers in the log, workers to go)."""

    def __init__(self, hooks: Hooks, connector: Any) -> None:
        super().__init__(hooks)
        self.side = connector.scheduler_manager
        self.workers = int(getattr(self.side, "_expected_worker_count", 1) or 1)
        self.admitted: dict[str, tuple[int, int]] = {}
        self.owners: dict[int, int] = {}
        self.queued: Any = None
        self.loads: dict[str, int] = {}
        self.stores: dict[int, tuple[list[int], int]] = {}

    def admitting(self, original: Any) -> Any:
        log = self.log

        def update_state_after_alloc(request: Any, blocks: Any, num_external_tokens: int) -> Any:
            result = original(request, blocks, num_external_tokens)
            if num_external_tokens and not log.closed:
                try:
                    self.admit(request.request_id, blocks.get_block_ids(), num_external_tokens)
                except Exception as error:
                    log.fail(error)
            return result

        return update_state_after_alloc

    def admit(self, rid: str, tables: tuple[list[int], ...], tokens: int) -> None:
        """Remember what is known only now of a load that the call will plan: where in the table its blocks stand."""
        state = self.side._reqs_to_load.get(rid)
        if state is None:
            return
        ids, first = state.transfer_meta.gpu_block_ids, NO_REQUEST
        if len(tables) == 1 and ids and ids[0] in tables[0]:
            at = tables[0].index(ids[0])
            if tables[0][at : at + len(ids)] == ids:
                first = at
        self.admitted[rid] = tokens, first

    def selecting(self, original: Any) -> Any:
        log = self.log

        def _select_eager_blocks_to_store(state: Any, block_ids_by_group: Any) -> Any:
            chosen = original(state, block_ids_by_group)
            try:
                if chosen[0]:  # hardly ever while a request decodes
                    self.owners.update(dict.fromkeys(chosen[0], self.number(state.request.request_id)))
            except Exception as error:
                log.fail(error)
            return chosen

        return _select_eager_blocks_to_store

    def finishing(self, original: Any) -> Any:
        log = self.log

        def request_finished_all_groups(request: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(request, *args, **kwargs)
            try:
                queue = self.side._pending_finished_stores
                if queue and queue[-1] is not self.queued:
                    # What was selected, and at times one more: a prompt's last, not quite full block.
                    self.queued = queue[-1]
                    self.owners.update(dict.fromkeys(self.queued.gpu_block_ids, self.number(request.request_id)))
            except Exception as error:
                log.fail(error)
            return result

        return request_finished_all_groups

    def planning(self, original: Any) -> Any:
        log = self.log

        def build_connector_meta(scheduler_output: Any) -> Any:
            meta = original(scheduler_output)
            try:
                if not log.closed:
                    if meta.load_event >= 0:
                        self.plan_loads(meta.load_event_to_reqs[meta.load_event])
                    if meta.store_event >= 0:
                        self.plan_stores(meta.store_event, meta.store_gpu_blocks)
                self.admitted.clear()
                self.owners.clear()
                self.queued = None
            except Exception as error:
                log.fail(error)
            return meta

        return build_connector_meta

    def plan_loads(self, names: list[str]) -> None:
        """Log that the loads of these requests begin."""
        for rid in names:
            blocks = self.side._reqs_to_load[rid].transfer_meta.gpu_block_ids
            tokens, first = self.admitted.get(rid, (0, NO_REQUEST))
            self.loads[rid] = self.begin(self.number(rid), True, blocks, tokens, first)

    def plan_stores(self, event: int, blocks: list[int]) -> None:
        """Log that the stores of a step begin. What they hold needs no place in a table: they are held as they are."""
        owners = self.owners
        numbers = [
            self.begin(owner, False, list(mine))
            for owner, mine in groupby(blocks, key=lambda block: owners.get(block, NO_REQUEST))
        ]
        self.stores[event] = numbers, self.workers

    def hearing(self, original: Any) -> Any:
        log = self.log

        def update_connector_output(connector_output: Any) -> Any:
            result = original(connector_output)
            if not log.closed:
                try:
                    meta = connector_output.kv_connector_worker_meta
                    completed = getattr(meta, "completed_store_events", None)
                    if completed or connector_output.finished_recving:
                        self.hear(connector_output.finished_recving or (), completed or {})
                except Exception as error:
                    log.fail(error)
            return result

        return update_connector_output

    def hear(self, loaded: Any, completed: dict[int, int]) -> None:
        """Log which transfers have ended; the connector hears of those from before a reset too. A copy has ended when
        all workers have told so. How many bytes it was, and how long it took, nobody tells."""
        now = self.now()
        for rid in loaded:
            number = self.loads.pop(rid, None)
            if number is not None:
                self.end(number, now)
        for event, count in completed.items():
            if event not in self.stores:
                continue
            numbers, left = self.stores.pop(event)
            if left > count:
                self.stores[event] = numbers, left - count
                continue
            for number in numbers:
                self.end(number, now)
