"""Describes the engine at the head of its log: what was run, on what, and where the trace may be inexact."""

from __future__ import annotations

import os
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from kvtrace_tracer import offload
from kvtrace_traces import wire

TESTED_ENGINES = ("0.32.0",)
"""vLLM versions whose real runs the test suite compares with their traces."""


def describe(scheduler: Any, granule: int) -> dict[str, Any]:
    """The header's JSON object for a vLLM V1 ``scheduler``. Reads attributes only."""
    config = scheduler.vllm_config
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    settings = scheduler.scheduler_config
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    groups = [_group(group) for group in scheduler.kv_cache_config.kv_cache_groups]
    version = _engine_version()
    block_bytes = _bytes_per_block(scheduler.kv_cache_config)
    block_size = groups[0]["block_size"] if groups else scheduler.block_size
    return {
        "source": "vllm",
        "engine": "vllm",
        "engine_version": version,
        "engine_index": _engine_index(parallel),
        "run_id": secrets.token_hex(8),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock_monotonic_ns": time.monotonic_ns(),
        "clock_wall_ns": time.time_ns(),
        "host": wire.host_id(),
        "pid": os.getpid(),
        "rank": _plain(getattr(parallel, "rank", 0)),
        "python": sys.version.split()[0],
        "device": _device(config),
        "model": _model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_dtype": _plain(getattr(cache, "cache_dtype", None)),
        "max_model_len": _plain(scheduler.max_model_len),
        "layers": sum(group["layers"] for group in groups),
        "groups": groups,
        "block_size": block_size,
        "hash_block_size": getattr(pool, "hash_block_size", block_size),
        "granule": granule,
        "num_blocks": pool.num_gpu_blocks,
        "bytes_per_block": block_bytes,
        "bytes_per_token": None if block_bytes is None else block_bytes // block_size,
        "prefix_caching": bool(manager.enable_caching),
        "hash_algorithm": _plain(getattr(cache, "prefix_caching_hash_algo", None)),
        "scheduler": {
            "class": type(scheduler).__name__,
            "policy": _plain(getattr(settings, "policy", "fcfs")),
            "async_scheduling": any(c.__name__ == "AsyncScheduler" for c in type(scheduler).__mro__),
            "max_num_seqs": _plain(settings.max_num_seqs),
            "max_num_batched_tokens": _plain(settings.max_num_batched_tokens),
            "max_num_scheduled_tokens": _plain(scheduler.max_num_scheduled_tokens),
            "chunked_prefill": _chunked(settings),
            "long_prefill_token_threshold": _plain(getattr(settings, "long_prefill_token_threshold", 0)),
            "long_prefill_token_threshold_adaptive": _plain(
                getattr(settings, "long_prefill_token_threshold_adaptive", False)
            ),
            "max_num_partial_prefills": _plain(getattr(settings, "max_num_partial_prefills", None)),
            "max_num_active_seqs": _plain(getattr(settings, "max_num_active_seqs", None)),
            "reserve_full_isl": _plain(getattr(settings, "scheduler_reserve_full_isl", None)),
            "watermark": _plain(getattr(settings, "watermark", None)),
            "watermark_blocks": _plain(getattr(manager, "watermark_blocks", 0)),
            "num_lookahead_tokens": _plain(getattr(scheduler, "num_lookahead_tokens", 0)),
            "max_concurrent_batches": _plain(getattr(config, "max_concurrent_batches", None)),
            "max_loras": _plain(getattr(getattr(config, "lora_config", None), "max_loras", None)),
            "multimodal": bool(getattr(model, "is_multimodal_model", False)),
        },
        "parallel": {
            "tensor": _plain(getattr(parallel, "tensor_parallel_size", 1)),
            "pipeline": _plain(getattr(parallel, "pipeline_parallel_size", 1)),
            "data": _plain(getattr(parallel, "data_parallel_size", 1)),
        },
        "offload": offload.describe(scheduler),
        "inexact": _inexact(scheduler, groups, version),
    }


def follows_tables(header: dict[str, Any]) -> bool:
    """Whether each request has one append-only block table, so that the log need not name every block it frees."""
    names = set(header["inexact"])
    return not names & {
        "hybrid-kv-groups", "sliding-window", "state-space", "kv-connector", "context-parallel", "encoder-decoder",
    }  # fmt: skip


def _inexact(scheduler: Any, groups: list[dict[str, Any]], version: str) -> list[str]:
    config = scheduler.vllm_config
    parallel, model = config.parallel_config, config.model_config
    kinds = [group["kind"] for group in groups]
    sizes = [getattr(parallel, f"{n}_context_parallel_size", 1) for n in ("decode", "prefill")]
    found = {
        "hybrid-kv-groups": len(groups) != 1,
        "sliding-window": any("Sliding" in k or "Chunked" in k or "SWA" in k for k in kinds)
        or any(group["window"] for group in groups),
        "state-space": any("Mamba" in k or "State" in k for k in kinds),
        "speculative-decoding": getattr(config, "speculative_config", None) is not None,
        "kv-connector": getattr(config, "kv_transfer_config", None) is not None,
        "context-parallel": any(isinstance(n, int) and n > 1 for n in sizes),
        "encoder-decoder": bool(getattr(model, "is_encoder_decoder", False)) or "CrossAttentionSpec" in kinds,
        "pooling": getattr(model, "runner_type", "generate") == "pooling",
        "untested-engine": version.split("+")[0] not in TESTED_ENGINES
        or not type(scheduler).__module__.startswith("vllm."),
    }
    return [name for name, holds in found.items() if holds]


def _group(group: Any) -> dict[str, Any]:
    spec = group.kv_cache_spec
    return {
        "kind": type(spec).__name__,
        "block_size": _plain(spec.block_size),
        "layers": len(group.layer_names),
        "kv_heads": _plain(getattr(spec, "num_kv_heads", None)),
        "head_size": _plain(getattr(spec, "head_size", None)),
        "window": _plain(getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)),
    }


def _bytes_per_block(config: Any) -> int | None:
    """Bytes of one block in all layers. Groups share a block's memory, so one group's layers are counted."""
    try:
        group = config.kv_cache_groups[0]
        spec = group.kv_cache_spec
        layers = 1 if type(spec).__name__ == "UniformTypeKVCacheSpecs" else len(group.layer_names)
        return int(spec.page_size_bytes) * layers
    except Exception:
        return None


def _device(config: Any) -> str | None:
    """The accelerator's name, without starting a CUDA context that this process would not have."""
    kind = getattr(getattr(config, "device_config", None), "device_type", None)
    if kind == "cuda":
        try:
            from vllm.platforms import current_platform

            return str(current_platform.get_device_name())
        except Exception:
            return "cuda"
    return _plain(kind)


def _chunked(settings: Any) -> bool | None:
    value = getattr(settings, "enable_chunked_prefill", getattr(settings, "chunked_prefill_enabled", None))
    return None if value is None else bool(value)


def _engine_index(parallel: Any) -> int:
    """Data-parallel engines: ``data_parallel_rank`` reads 0 in every rank of a replica set, the index does not."""
    for name in ("data_parallel_index", "data_parallel_rank"):
        value = getattr(parallel, name, None)
        if isinstance(value, int):
            return value
    return 0


def _engine_version() -> str:
    try:
        import vllm

        return str(vllm.__version__)
    except Exception:
        return "unknown"


def _model_name(model: Any) -> str:
    """The name it is served under; of a path on this machine only the last part."""
    name = str(_plain(getattr(model, "served_model_name", None) or model.model))
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name


def _plain(value: Any) -> Any:
    """``value`` as JSON takes it; anything exotic as its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and value:
        return _plain(value[0])
    return getattr(value, "value", None) or str(value)
