"""Block-level hooks for engines whose block tables the tracer does not follow: every operation names its blocks.

Such traces are marked inexact in the header (hybrid groups, windows, connectors...): what is logged did happen, with
the request being served at the time, but who owns which block at every moment is not promised.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.blocks import install_rare
from kvtrace_traces.schema import NO_REQUEST

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks


def install(hooks: Hooks) -> None:
    """Put the hooks on the block pool and the manager of ``hooks``."""
    from vllm.v1.core.kv_cache_utils import get_block_hash as block_hash  # strips the group from a block's key

    log, state, manager, keyed = hooks.log, hooks.state, hooks.manager, hooks.keyed
    pool = manager.block_pool
    serving = NO_REQUEST  # number of the request that the manager is working for

    def number(request: Any) -> int:
        entry = state.entries.get(request.request_id)
        return NO_REQUEST if entry is None else entry.number

    def named(name: str, group: int, blocks: Any) -> None:
        ids = [b.block_id for b in blocks if not b.is_null]
        if ids:
            log.ext(name, serving, group, *ids)
            log.events += len(ids)

    def make_serving(original: Any) -> Any:
        def serve(request: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal serving
            serving = number(request)
            try:
                return original(request, *args, **kwargs)
            finally:
                serving = NO_REQUEST

        return serve

    def make_free(original: Any) -> Any:
        def free(request: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal serving
            rid = request.request_id
            try:
                entry = state.entries.get(rid)
                if entry is not None:
                    serving = entry.number
                    if request.is_finished():
                        del state.entries[rid]
                    else:
                        held = sum(len(m.req_to_blocks.get(rid, ())) for m in manager.coordinator.single_type_managers)
                        log.ext("LOST", entry.number, max(0, request.num_computed_tokens), held)
                        state.gone.append(rid)
            except Exception as error:
                log.fail(error)
            try:
                return original(request, *args, **kwargs)
            finally:
                serving = NO_REQUEST

        return free

    def make_new(original: Any) -> Any:
        def get_new_blocks(num_blocks: int) -> Any:
            blocks = original(num_blocks)
            try:
                named("ALLOCX", NO_REQUEST, blocks)
            except Exception as error:
                log.fail(error)
            return blocks

        return get_new_blocks

    def make_touch(original: Any) -> Any:
        def touch(blocks: Any) -> Any:
            try:
                flat = [b for x in blocks for b in (x if isinstance(x, (list, tuple)) else (x,))]
                named("HITX", NO_REQUEST, flat)
            except Exception as error:
                log.fail(error)
            return original(blocks)

        return touch

    def make_free_blocks(original: Any) -> Any:
        def free_blocks(ordered_blocks: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                ordered_blocks = list(ordered_blocks)  # it may be an iterator that runs once
                named("FREEX", NO_REQUEST, [b for b in ordered_blocks if getattr(b, "pool", None) in (None, pool)])
            except Exception as error:
                log.fail(error)
            return original(ordered_blocks, *args, **kwargs)

        return free_blocks

    def make_cache(original: Any) -> Any:
        bind = inspect.signature(original).bind

        def cache_full_blocks(*args: Any, **kwargs: Any) -> Any:
            blocks: list[Any] = []
            before: list[Any] = []
            try:
                call = bind(*args, **kwargs).arguments
                blocks = call["blocks"][call["num_cached_blocks"] : call["num_full_blocks"]]
                before = [b.block_hash for b in blocks]
            except Exception as error:
                log.fail(error)
            result = original(*args, **kwargs)
            try:
                words: list[int] = []
                for block, old in zip(blocks, before, strict=True):
                    new = block.block_hash
                    if new is not None and new != old:
                        digest = keyed(block_hash(new))
                        words.append(block.block_id)
                        words.append(int.from_bytes(digest[:4], "little"))
                        words.append(int.from_bytes(digest[4:], "little"))
                if words and not log.closed:
                    log.ext("FILLX", number(call["request"]), call["kv_cache_group_id"], *words)
                    log.events += len(words) // 3
            except Exception as error:
                log.fail(error)
            return result

        return cache_full_blocks

    hooks.patch(manager, "allocate_slots", make_serving)
    hooks.patch(manager, "free", make_free)
    hooks.patch(pool, "get_new_blocks", make_new)
    hooks.patch(pool, "touch", make_touch)
    hooks.patch(pool, "free_blocks", make_free_blocks)
    hooks.patch(pool, "cache_full_blocks", make_cache)
    install_rare(hooks)
