"""Block-level hooks for engines in which each request has one append-only block table (see ``header.follows_tables``).

The log then names a block when it is handed out or hit, and the reader follows the tables: what a request fills and
frees needs no block numbers. Evictions need no hook at all: a cached block that is handed out was evicted.
"""

from __future__ import annotations

import inspect
import struct
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.identity import EngineChain, as_number
from kvtrace_tracer.state import ADMITTING, OUTSIDE, RUNNING
from kvtrace_traces.schema import NO_REQUEST, OPS

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

ALLOC, ALLOCN, HIT = OPS["ALLOC"].code, OPS["ALLOCN"].code, OPS["HIT"].code
FILL, FILL1, FREE, PREEMPT = OPS["FILL"].code, OPS["FILL1"].code, OPS["FREE"].code, OPS["PREEMPT"].code

_FILL1 = struct.Struct("<Iq")


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
                log.ext("RESET")
                log.events += 1
                hooks.commit_between_steps()
            return done

        return reset_prefix_cache

    def make_evict(original: Any) -> Any:
        def evict_blocks(block_ids: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                ids = list(block_ids)
                cached = [b for b in ids if pool.blocks[b].block_hash is not None]
                if cached and not log.closed:
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
    log, state = hooks.log, hooks.state
    append, fromlist, wait = log.words.append, log.words.fromlist, state.pending.append

    def get_new_blocks(num_blocks: int) -> Any:
        blocks = original(num_blocks)
        try:
            phase = state.phase
            if phase == RUNNING:
                block = blocks[0].block_id
                wait(block)
                if num_blocks == 1:  # nearly all of decoding
                    append(block << 4 | ALLOC)
                    return blocks
                log.events -= 1  # counted with its owner
            elif log.closed:
                return blocks
            elif phase != ADMITTING:
                hooks.inexact("unattributed-blocks")
                log.ext("ALLOCX", NO_REQUEST, 0, *[b.block_id for b in blocks])
                log.events += num_blocks
                return blocks
            if num_blocks == 1:
                append(blocks[0].block_id << 4 | ALLOC)
            else:
                append(num_blocks << 4 | ALLOCN)
                fromlist([b.block_id for b in blocks])
            log.events += num_blocks
        except Exception as error:
            log.fail(error)
        return blocks

    return get_new_blocks


def _touch(hooks: Hooks, original: Any) -> Any:
    log, state = hooks.log, hooks.state
    append, fromlist = log.words.append, log.words.fromlist

    def touch(blocks: Any) -> Any:
        try:
            # Up to 0.12 the blocks come as a tuple with one list per group.
            flat = blocks[0] if len(blocks) and isinstance(blocks[0], (list, tuple)) else blocks
            ids = [b.block_id for b in flat]
            if ids and not log.closed:
                if state.phase == ADMITTING:
                    append(len(ids) << 4 | HIT)
                    fromlist(ids)
                    state.admitted.filled = len(ids)  # type: ignore[union-attr]
                else:
                    hooks.inexact("unattributed-blocks")
                    log.ext("HITX", NO_REQUEST, 0, *ids)
                log.events += len(ids)
        except Exception as error:
            log.fail(error)
        return original(blocks)

    return touch


def _cache_full_blocks(hooks: Hooks, original: Any) -> Any:
    log, chain, entries, grow = hooks.log, hooks.chain, hooks.state.entries, hooks.grow
    append, frombytes = log.words.append, log.words.frombytes
    number, pack, engine_chain = as_number(hooks.keyed), _FILL1.pack, isinstance(chain, EngineChain)
    hash_block_size = getattr(hooks.manager.block_pool, "hash_block_size", None)
    granule = chain.granule

    # Identities are then the engine's hashes, one a block.
    plain = engine_chain and granule == hash_block_size == hooks.block_size

    def record(request: Any, num_cached_blocks: int, num_full_blocks: int, block_size: int) -> None:
        entry = entries[request.request_id]
        count = num_full_blocks - num_cached_blocks
        if count <= 0:
            return
        if entry.filled != num_cached_blocks:
            raise RuntimeError(f"block {num_cached_blocks} of a request cached after block {entry.filled}")
        entry.filled = num_full_blocks
        log.events += count
        stop = num_full_blocks * block_size // granule
        if stop > entry.chain:
            grow(entry, request, stop)
        append(entry.number << 4 | FILL)
        append(count)

    def masked(blocks: Any, start: int, stop: int) -> None:
        if any(b.is_null for b in blocks[start:stop]):
            raise RuntimeError("a null block in the table of a request")

    parameters = list(inspect.signature(original).parameters)
    if parameters[:6] != [
        "request", "blocks", "num_cached_blocks", "num_full_blocks", "block_size", "kv_cache_group_id",
    ]:  # fmt: skip
        raise RuntimeError(f"cache_full_blocks{tuple(parameters)} is not known to this tracer")

    if "block_mask" in parameters:

        def cache_full_blocks(
            request: Any, blocks: Any, num_cached_blocks: int, num_full_blocks: int, block_size: int,
            kv_cache_group_id: int, block_mask: Any = None,
        ) -> Any:  # fmt: skip
            result = original(
                request, blocks, num_cached_blocks, num_full_blocks, block_size, kv_cache_group_id, block_mask
            )
            try:
                entry = entries[request.request_id]
                if plain and entry.chain == num_cached_blocks == num_full_blocks - 1 == entry.filled:
                    # One more block of generated tokens: nearly all of decoding.
                    frombytes(pack(entry.number << 4 | FILL1, number(request.block_hashes[num_cached_blocks])))
                    entry.chain = entry.filled = num_full_blocks
                    log.events += 1
                elif block_mask is None:
                    record(request, num_cached_blocks, num_full_blocks, block_size)
                else:
                    raise RuntimeError("only some of a request's blocks were cached")
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
            masked(blocks, num_cached_blocks, num_full_blocks)
            record(request, num_cached_blocks, num_full_blocks, block_size)
        except Exception as error:
            log.fail(error)
        return result

    return cache_full_blocks_before_masks


def _free(hooks: Hooks, original: Any, freeing: _Freeing) -> Any:
    log, state, tables = hooks.log, hooks.state, hooks.tables
    entries, append = state.entries, log.words.append
    assert tables is not None

    def free(request: Any, *args: Any, **kwargs: Any) -> Any:
        rid = request.request_id
        try:
            entry = entries.get(rid)
            held = len(tables.get(rid, ()))
            if entry is not None:
                if request.is_finished():
                    if held:
                        append(entry.number << 4 | FREE)
                        append(held)
                    del entries[rid]
                else:
                    if state.pending and hooks.priority:
                        # The victim may own blocks of this very call, which the engine will not list.
                        log.ext("OWN", *hooks.search_owners())
                        log.events += len(state.pending)
                        state.pending.clear()
                    log.words.extend((entry.number << 4 | PREEMPT, max(0, request.num_computed_tokens), held))
                    state.gone.append(rid)
                log.events += held
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
                    hooks.inexact("unattributed-blocks")
                    log.ext("FREEX", NO_REQUEST, 0, *[b.block_id for b in ordered_blocks])
                    log.events += len(ordered_blocks)
            except Exception as error:
                log.fail(error)
        return original(ordered_blocks, *args, **kwargs)

    return free_blocks
