"""What vLLM itself says about a run: the truth that a trace is compared with.

Everything here is set on *instances* (one scheduler and its cache manager), from the outside and with the
engine's own figures where it keeps any (prefix-cache statistics, KV events, `Request.num_preemptions`), so
that it shares nothing with the tracer's hooks on the classes. Read against vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Observer:
    """Watches one scheduler from `Observer(scheduler)` on; requests are numbered in `add_request` order.

    `steps`: one dict a `schedule()` call: scheduled {request: tokens}, computed_before {request: tokens},
    total, preempted [request], running, waiting, free_blocks (the last three after the call).
    `lookups`: one dict an admission: call, request, tokens_asked, tokens_hit, after_preemption. Here `call`
    is the index into `steps`. `preemptions`: call, request, blocks, computed. `kv_events`: (call, event) with
    vLLM's own event objects. `cache_stats`: vLLM's PrefixCacheStats, summed.
    """

    scheduler: Any
    steps: list[dict[str, Any]] = field(default_factory=list)
    lookups: list[dict[str, Any]] = field(default_factory=list)
    preemptions: list[dict[str, Any]] = field(default_factory=list)
    kv_events: list[tuple[int, Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    cache_stats: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scheduler, manager = self.scheduler, self.scheduler.kv_cache_manager
        self._replaced: list[tuple[Any, str]] = []
        self._replace(scheduler, "add_request", self._add_request)
        self._replace(scheduler, "schedule", self._schedule)
        self._replace(scheduler, "_preempt_request", self._preempt)
        self._replace(manager, "record_prefix_cache_stats", self._record_lookup)
        self._replace(manager, "make_prefix_cache_stats", self._take_stats)
        self._replace(manager, "take_events", self._take_events)

    def _replace(self, owner: Any, name: str, replacement: Any) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: replacement(inner, *args, **kwargs))
        self._replaced.append((owner, name))

    def detach(self) -> None:
        """Stop watching; the scheduler is as it was."""
        for owner, name in self._replaced:
            delattr(owner, name)
        self._replaced.clear()

    def _add_request(self, inner: Any, request: Any) -> Any:
        self.numbers[request.request_id] = len(self.requests)
        self.requests.append(request)
        return inner(request)

    def _schedule(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        # Lookups and preemptions of this call come before its row is appended and so carry its index.
        output = inner(*args, **kwargs)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        number = self.numbers
        running, waiting = self.scheduler.get_request_counts()
        call = len(self.steps)
        self.steps.append(
            {
                "scheduled": {number[key]: tokens for key, tokens in output.num_scheduled_tokens.items()},
                "computed_before": {number[key]: tokens for key, tokens in computed.items()},
                "total": output.total_num_scheduled_tokens,
                "preempted": [row["request"] for row in self.preemptions if row["call"] == call],
                "running": running,
                "waiting": waiting,
                "free_blocks": self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            }
        )
        return output

    def _preempt(self, inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        tables = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.preemptions.append(
            {
                "call": len(self.steps),
                "request": self.numbers[request.request_id],
                "blocks": sum(len(table.req_to_blocks.get(request.request_id, ())) for table in tables),
                "computed": request.num_computed_tokens,
            }
        )
        return inner(request, *args, **kwargs)

    def _record_lookup(self, inner: Any, request: Any, num_hits: int) -> Any:
        # vLLM calls this once per admission (Scheduler.schedule), not for lookups whose request then had to
        # wait.
        self.lookups.append(
            {
                "call": len(self.steps),
                "request": self.numbers[request.request_id],
                "tokens_asked": request.num_tokens,
                "tokens_hit": num_hits,
                "after_preemption": request.num_preemptions > 0,
            }
        )
        return inner(request, num_hits)

    def _take_stats(self, inner: Any) -> Any:
        stats = inner()
        if stats is not None:
            for name in ("requests", "queries", "hits"):
                for key in (name, f"preempted_{name}"):
                    self.cache_stats[key] = self.cache_stats.get(key, 0) + getattr(stats, key)
        return stats

    def _take_events(self, inner: Any) -> Any:
        events = inner()
        self.kv_events.extend((len(self.steps) - 1, event) for event in events)
        return events

    def events_as_dicts(self) -> list[dict[str, Any]]:
        """Return the KV events as plain dicts: call, kind, block_hashes (bytes or int), parent, token_ids."""
        return [
            {
                "call": call,
                "kind": type(event).__name__,
                "block_hashes": list(getattr(event, "block_hashes", ())),
                "parent": getattr(event, "parent_block_hash", None),
                "token_ids": list(getattr(event, "token_ids", ())),
            }
            for call, event in self.kv_events
        ]

    def request_rows(self) -> list[dict[str, Any]]:
        """Return one dict a request: request, request_id, prompt and output tokens, preemptions, status."""
        return [
            {
                "request": number,
                "request_id": request.request_id,
                "prompt": list(request.prompt_token_ids),
                "output": list(request.output_token_ids),
                "preemptions": request.num_preemptions,
                "status": request.status.name,
            }
            for number, request in enumerate(self.requests)
        ]


def pool_state(scheduler: Any) -> dict[str, Any]:
    """Return the whole state of the block pool, indexed by block id (block 0 is the null block).

    ref_cnt: list of int. block_hash: list of bytes or None (without the group id). free_queue: block ids, the
    next to be handed out first. tables: {request_id: [block ids, per KV group]}. running, waiting: request
    ids in order.
    """
    from vllm.v1.core.kv_cache_utils import get_block_hash

    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    groups = manager.coordinator.single_type_managers
    holders = dict.fromkeys(key for group in groups for key in group.req_to_blocks)
    return {
        "ref_cnt": [block.ref_cnt for block in pool.blocks],
        "block_hash": [
            None if block.block_hash is None else bytes(get_block_hash(block.block_hash)) for block in pool.blocks
        ],
        "free_queue": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "tables": {
            key: [[block.block_id for block in group.req_to_blocks.get(key, ())] for group in groups] for key in holders
        },
        "running": [request.request_id for request in scheduler.running],
        "waiting": [request.request_id for request in scheduler.waiting],
    }
