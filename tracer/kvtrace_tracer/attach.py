"""Opens the log of one scheduler and puts the hooks on it."""

from __future__ import annotations

import logging
import math
import os
import re
import weakref
from typing import Any

from kvtrace_tracer import header as headers
from kvtrace_tracer.identity import EngineChain, OwnChain, keyed_hash
from kvtrace_tracer.log import Log
from kvtrace_tracer.settings import Settings
from kvtrace_traces.writer import LogWriter

_logger = logging.getLogger("vllm.kvtrace")


def attach(scheduler: Any, settings: Settings) -> Log:
    """Record ``scheduler`` (vLLM V1) from now on. Raises whatever goes wrong before there is a log; the log returned is
    closed where the hooks did not fit."""
    from kvtrace_tracer.hooks import Hooks

    pool = scheduler.kv_cache_manager.block_pool
    hash_block_size = int(getattr(pool, "hash_block_size", scheduler.block_size))
    sizes = [int(g.kv_cache_spec.block_size) for g in scheduler.kv_cache_config.kv_cache_groups] or [hash_block_size]
    granule = _granule(settings.granule, hash_block_size, sizes)
    header = headers.describe(scheduler, granule)
    keyed = keyed_hash(settings.key)
    chain: EngineChain | OwnChain
    if granule % hash_block_size or not header["prefix_caching"]:
        chain = OwnChain(keyed, granule, _extra_keys())
    else:
        chain = EngineChain(keyed, granule, hash_block_size)
    writer = _open(header, settings)
    reference = weakref.ref(scheduler)

    def on_stop() -> None:
        hooks = getattr(reference(), "_kvtrace", None)
        if hooks is not None:
            hooks.remove()

    def close() -> None:
        # At exit the engine may still be there, and a call under way. (Of one that was freed in mid-call, or after a
        # call that raised, that call is not in the log.)
        hooks = getattr(reference(), "_kvtrace", None)
        if hooks is not None and not log.closed:
            try:
                hooks.notes.settle()
            except Exception as error:
                log.fail(error)
        log.close()

    log = Log(writer, header["clock_monotonic_ns"], on_stop)
    # Runs when the engine is freed, and at exit where the process gives it the chance.
    weakref.finalize(scheduler, close)
    os.register_at_fork(after_in_child=_forget(log))
    try:
        # Kept on the scheduler alone: a reference from the log would keep the engine alive for ever.
        scheduler._kvtrace = Hooks(scheduler, log, header, chain, keyed)
    except Exception as error:
        log.fail(error)  # says so, once
        return log
    _logger.debug("kvtrace: recording to %s (granule %d tokens)", writer.path, granule)
    return log


def _forget(log: Log) -> Any:
    reference = weakref.ref(log)

    def in_child() -> None:
        mine = reference()
        if mine is not None:
            mine.abandon()

    return in_child


def _granule(asked: int | None, hash_block_size: int, block_sizes: list[int]) -> int:
    if asked is None:
        return hash_block_size
    common = math.gcd(asked, *block_sizes)
    if common != asked:
        _logger.warning(
            "kvtrace: --granule %d does not divide the block size %s: recording at %d, which serves both",
            asked, block_sizes[0], common,
        )  # fmt: skip
    return common


def _open(header: dict[str, Any], settings: Settings) -> LogWriter:
    """Create ``<model>-e<engine_index>-<pid>.kvt``, or with ``-2``, ``-3``... if this process traced such an engine."""
    os.makedirs(settings.out, exist_ok=True)
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(str(header["model"]).rstrip("/"))).strip("-.") or "model"
    stem = os.path.join(settings.out, f"{model[:80]}-e{header['engine_index']}-{os.getpid()}")
    header["tracer"] = {"granule": settings.granule, "max_bytes": settings.max_bytes}
    for n in range(1, 10_000):
        try:
            return LogWriter(stem if n == 1 else f"{stem}-{n}", header, settings.max_bytes)
        except FileExistsError:
            continue
    raise FileExistsError(f"{stem}.kvt and 9,999 others exist")


def _extra_keys() -> Any:
    """vLLM's function for what, beside token ids, makes blocks differ (adapter, cache salt, images)."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    def extra_keys(request: Any, start: int, end: int) -> Any:
        return generate_block_hash_extra_keys(request, start, end, 0)[0]

    return extra_keys
