"""Block-level hooks for engines in which each request has one append-only block table (see ``header.follows_tables``).

The log then names a block when it is handed out or hit, and the reader follows the tables: what a request fills and
frees needs no block numbers. Evictions need no hook at all: a cached block that is handed out was evicted.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.state import ADMITTING, CALLS, OUTSIDE, RUNNING, UPDATING
from kvtrace_traces.schema import NO_REQUEST

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks


def install(hooks: Hooks) -> None:
    """Put the hooks on the block pool and the manager of ``hooks``."""
    pool = hooks.manager.block_pool
    hooks.patch(pool, "get_new_blocks", lambda original: _get_new_blocks(hooks, original))
    hooks.patch(pool, "touch", lambda original: _touch(hooks, original))
    hooks.patch(pool, "cache_full_blocks", lambda original: _cache_full_blocks(hooks, original))
    freeing = _Freeing()
    hooks.patch(hooks.manager, "free", lambda original: _free(hooks, original, freeing))
    hooks.patch(pool, "free_blocks", lambda original: _free_blocks(hooks, original, freeing))
    install_rare(hooks)


def install_rare(hooks: Hooks) -> None:
    """Hooks that any engine gets: identities forgotten, and operations on parts of blocks."""
    pool, log = hooks.manager.block_pool, hooks.log

    def make_reset(original: Any) -> Any:
        def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
            done = original(*args, **kwargs)
            if done and not log.closed:
                try:
                    hooks.notes.settle()
                    log.ext("RESET")
                    log.events += 1
                    hooks.commit_between_steps()
                except Exception as error:
                    log.fail(error)
            return done

        return reset_prefix_cache

    def make_evict(original: Any) -> Any:
        def evict_blocks(block_ids: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                ids = list(block_ids)
                cached = [b for b in ids if pool.blocks[b].block_hash is not None]
                if cached and not log.closed:
                    hooks.notes.settle()
                    log.ext("EVICT", *cached)
                    log.events += len(cached)
                    hooks.commit_between_steps()
                block_ids = type(block_ids)(ids) if not isinstance(block_ids, (set, list, tuple)) else block_ids
            except Exception as error:
                log.fail(error)
            return original(block_ids, *args, **kwargs)

        return evict_blocks

    def make_inexact(original: Any) -> Any:
        def partial(*args: Any, **kwargs: Any) -> Any:
            try:
                hooks.notes.settle()
                hooks.inexact("partial-block")
            except Exception as error:
                log.fail(error)
            return original(*args, **kwargs)

        return partial

    hooks.patch(pool, "reset_prefix_cache", make_reset)
    hooks.patch(pool, "evict_blocks", make_evict)
    for name in ("cache_partial_block", "move_block_hashes", "unpin_blocks"):
        hooks.patch(pool, name, make_inexact)


class _Freeing:
    """Whether a request's whole table is being freed, which the log states in one operation."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = False


def _get_new_blocks(hooks: Hooks, original: Any) -> Any:
    log, state, note = hooks.log, hooks.state, hooks.notes.kept.append

    def get_new_blocks(num_blocks: int) -> Any:
        blocks = original(num_blocks)
        if state.phase in CALLS:
            note(blocks)
        elif not log.closed:
            try:
                hooks.notes.settle()
                hooks.inexact("unattributed-blocks")
                log.ext("ALLOCX", NO_REQUEST, 0, *[b.block_id for b in blocks])
                log.events += num_blocks
            except Exception as error:
                log.fail(error)
        return blocks

    return get_new_blocks


def _touch(hooks: Hooks, original: Any) -> Any:
    log, state, note, hit = hooks.log, hooks.state, hooks.notes.kept.append, hooks.notes.hit

    def touch(blocks: Any) -> Any:
        try:
            # Up to 0.12 the blocks come as a tuple with one list per group.
            flat = blocks[0] if len(blocks) and isinstance(blocks[0], (list, tuple)) else blocks
            ids = [b.block_id for b in flat]
            if ids and not log.closed:
                if state.phase == ADMITTING:
                    note((hit, ids))
                else:
                    hooks.notes.settle()
                    hooks.inexact("unattributed-blocks")
                    log.ext("HITX", NO_REQUEST, 0, *ids)
                    log.events += len(ids)
        except Exception as error:
            log.fail(error)
        return original(blocks)

    return touch


def _cache_full_blocks(hooks: Hooks, original: Any) -> Any:
    log, state, note, fill = hooks.log, hooks.state, hooks.notes.kept.append, hooks.notes.fill

    parameters = list(inspect.signature(original).parameters)
    if parameters[:6] != [
        "request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size", "kv_cache_group_id",
    ]:  # fmt: skip
        raise RuntimeError(f"cache_full_blocks{tuple(parameters)} is not known to this tracer")

    def filled(request: Any, start: int, stop: int) -> None:
        if not log.closed:
            note((fill, request, start, stop))
            if state.phase == OUTSIDE:
                hooks.notes.settle()

    if "block_mask" in parameters:

        def cache_full_blocks(
            request: Any, blocks: Any, num_cached_blocks: int, num_full_blocks: int, block_size: int,
            kv_cache_group_id: int, block_mask: Any = None,
        ) -> Any:  # fmt: skip
            result = original(
                request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, block_mask
            )
            if (state.phase == RUNNING or state.phase == UPDATING) and block_mask is None:  # nearly all of decoding
                note((fill, request, num_cached_blocks, num_full_blocks))
                return result
            try:
                if block_mask is not None:
                    raise RuntimeError("only some of a request's blocks were cached")
                filled(request, num_cached_blocks, num_full_blocks)
            except Exception as error:
                log.fail(error)
            return result

        return cache_full_blocks

    def cache_full_blocks_before_masks(
        request: Any, blocks: Any, num_cached_blocks: int, num_full_blocks: int, block_size: int,
        kv_cache_group_id: int, **more: Any,
    ) -> Any:  # fmt: skip
        result = original(request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, **more)
        try:
            if any(b.is_null for b in blocks[num_cached_blocks:num_full_blocks]):
                raise RuntimeError("a null block in the table of a request")
            filled(request, num_cached_blocks, num_full_blocks)
        except Exception as error:
            log.fail(error)
        return result

    return cache_full_blocks_before_masks


def _free(hooks: Hooks, original: Any, freeing: _Freeing) -> Any:
    log, state, tables, notes = hooks.log, hooks.state, hooks.tables, hooks.notes
    entries, note, give_up, preempt = state.entries, notes.kept.append, notes.free, notes.preempt
    assert tables is not None

    def free(request: Any, *args: Any, **kwargs: Any) -> Any:
        rid = request.request_id
        try:
            if rid in entries:
                held = len(tables.get(rid, ()))
                if request.is_finished():
                    note((give_up, rid, held))
                else:
                    if hooks.priority:
                        # The victim may own blocks of this very call, which the engine will not list.
                        notes.tell_owners()
                    note((preempt, rid, request.num_computed_tokens, held))
                freeing.now = True
                if state.phase == OUTSIDE:
                    hooks.commit_between_steps()
        except Exception as error:
            log.fail(error)
        try:
            return original(request, *args, **kwargs)
        finally:
            freeing.now = False

    return free


def _free_blocks(hooks: Hooks, original: Any, freeing: _Freeing) -> Any:
    log = hooks.log

    def free_blocks(ordered_blocks: Any, *args: Any, **kwargs: Any) -> Any:
        if not freeing.now and not log.closed:
            try:
                ordered_blocks = list(ordered_blocks)  # it may be an iterator that runs once
                if ordered_blocks:
                    hooks.notes.settle()
                    hooks.inexact("unattributed-blocks")
                    log.ext("FREEX", NO_REQUEST, 0, *[b.block_id for b in ordered_blocks])
                    log.events += len(ordered_blocks)
            except Exception as error:
                log.fail(error)
        return original(ordered_blocks, *args, **kwargs)

    return free_blocks
