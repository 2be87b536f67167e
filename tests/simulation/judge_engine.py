"""Runs vLLM's own Scheduler or AsyncScheduler, of whatever version is first on sys.path, on scripted requests.

A program of its own (see judge.py): `python judge_engine.py FD [SOURCES]` reads pickled cases from stdin and writes
pickled results to the file descriptor FD. It imports nothing of this project but, for the installed vLLM (no SOURCES),
`engine_support.stub`, so that old versions of vLLM run with the dependencies that are there.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import inspect
import os
import pickle
import sys
import traceback
from collections import deque
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

STOP = 2  # the stop token; scripted tokens and prompts are larger
#: Packages that old versions import at start and never use here.
ABSENT = {"diskcache", "gguf"}


class _Loose(SimpleNamespace):
    """A configuration in which everything that is not said is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Mock(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes empty modules of packages that are not installed, if they are known to be unused."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module = _Mock(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _filled(function: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Return what of `known` the signature takes, and None for what else it requires."""
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in known:
            arguments[name] = known[name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments[name] = None
    return arguments


def _make_loose(case: dict[str, Any]) -> Any:
    """Make a scheduler of the vLLM at hand with a configuration of only what it asks for."""
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    s = case["settings"]
    size = s["block_size"]
    known = {
        "block_size": size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32, "use_mla": False,
        "sliding_window": None, "attention_chunk_size": None,
    }  # fmt: skip
    spec = FullAttentionSpec(**_filled(FullAttentionSpec, known))
    groups = [KVCacheGroupSpec(["layer"], spec)]
    kv_config = KVCacheConfig(
        **_filled(KVCacheConfig, {"num_blocks": s["num_blocks"], "kv_cache_tensors": [], "tensors": {},
                                  "kv_cache_groups": groups})
    )  # fmt: skip
    config = _Loose(
        scheduler_config=_Loose(
            max_num_seqs=s["max_num_seqs"],
            max_num_batched_tokens=s["max_num_batched_tokens"],
            max_model_len=s["max_model_len"],
            policy=s["scheduling_policy"],
            chunked_prefill_enabled=s["chunked_prefill"],
            enable_chunked_prefill=s["chunked_prefill"],
            long_prefill_token_threshold=s["long_prefill_token_threshold"],
            long_prefill_token_threshold_adaptive=False,
            scheduler_reserve_full_isl=True,
            watermark=s["watermark"],
            async_scheduling=s["async_scheduling"],
            prefill_schedule_interval=1,
            max_num_encoder_input_tokens=0,
            encoder_cache_size=0,
        ),
        cache_config=_Loose(
            block_size=size, num_gpu_blocks=s["num_blocks"], enable_prefix_caching=s["prefix_caching"],
            prefix_caching_hash_algo="sha256", mamba_cache_mode="none",
        ),
        model_config=_Loose(
            max_model_len=s["max_model_len"], is_encoder_decoder=False, is_multimodal_model=False, uses_mrope=False,
            supports_multimodal_inputs=False, runner_type="generate", is_diffusion=False,
        ),
        parallel_config=_Loose(
            pipeline_parallel_size=1, data_parallel_size=1, data_parallel_rank=0, data_parallel_index=0,
            decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=1,
        ),
        observability_config=_Loose(per_request_spec_decode_metrics="none"),
        aux_output_config=_Loose(enabled=False),
        num_speculative_tokens=0, num_lookahead_tokens=0, num_prefill_lookahead_tokens=0, max_in_flight_tokens=None,
        max_concurrent_batches=2 if s["async_scheduling"] else 1, use_v2_model_runner=False, is_mm_encoder_only=False,
        ec_manager_config=_Loose(get_encoder_cache_manager_obj=lambda: None),
    )  # fmt: skip
    registry = MagicMock()
    registry.supports_multimodal_inputs.return_value = False
    cls = AsyncScheduler if s["async_scheduling"] else Scheduler
    manager = _Loose(
        should_advance=lambda *args, **kwargs: False,
        accept_tokens=lambda *args, **kwargs: True,
        grammar_bitmask=lambda *args, **kwargs: None,
    )
    known = {
        "vllm_config": config, "kv_cache_config": kv_config, "structured_output_manager": manager, "block_size": size,
        "hash_block_size": size, "mm_registry": registry, "include_finished_set": False, "log_stats": True,
    }  # fmt: skip
    return cls(**{name: value for name, value in known.items() if name in inspect.signature(Scheduler).parameters})


def _make_stub(case: dict[str, Any]) -> Any:
    """Make a scheduler of the installed vLLM as the other tests do, with vLLM's own configuration."""
    from engine_support.stub import StubEngine

    s = dict(case["settings"])
    return StubEngine(case["model"], observe=False, **s).scheduler


def _hash_function() -> Any:
    for place in ("vllm.utils.hashing", "vllm.utils"):
        try:
            return importlib.import_module(place).sha256
        except (ImportError, AttributeError):
            continue
    raise ImportError("sha256")


def _hasher(size: int) -> Any:
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "get_request_block_hasher"):
        return None  # 0.10.0: the cache manager makes the hashes
    function = _hash_function()
    kv_cache_utils.init_none_hash(*[function][: len(inspect.signature(kv_cache_utils.init_none_hash).parameters)])
    return kv_cache_utils.get_request_block_hasher(size, function)


class Judge:
    """One run: drives the scheduler as EngineCore does and takes down what its block pool does."""

    def __init__(self, case: dict[str, Any], scheduler: Any, newer_loop: bool) -> None:
        self.case, self.scheduler, self.newer_loop = case, scheduler, newer_loop
        self.settings = case["settings"]
        self.manager, self.pool = scheduler.kv_cache_manager, scheduler.kv_cache_manager.block_pool
        self.events: list[Any] = []
        self.steps: list[Any] = []
        self.lookups: list[Any] = []
        self.preemptions: list[Any] = []
        count = len(case["requests"])
        self.numbers = {spec["request_id"] or f"r{number}": number for number, spec in enumerate(case["requests"])}
        self.requests: list[Any] = [None] * count
        self.rows: list[list[Any]] = [[None, None, None, None, 0, None] for _ in range(count)]
        self.begun, self.in_call, self.current = 0, False, -1
        self.empty, self.preempted = 0, []
        self.held: dict[int, int] = {}  # block -> identity
        self.identities: dict[Any, int] = {}  # vLLM's hash -> identity, one to one
        self.hashes: dict[int, Any] = {}
        self.pending: dict[str, tuple[int, int]] = {}
        self.hasher = _hasher(self.settings["block_size"]) if self.settings["prefix_caching"] else None
        self._observe()

    # ------------------------------------------------------------------------------------------------- observation

    def _observe(self) -> None:
        for owner, name, hook in (
            (self.pool, "get_new_blocks", self._get_new_blocks),
            (self.pool, "touch", self._touch),
            (self.pool, "cache_full_blocks", self._cache_full_blocks),
            (self.pool, "free_blocks", self._free_blocks),
            (self.manager, "allocate_slots", self._allocate_slots),
            (self.manager, "get_computed_blocks", self._get_computed_blocks),
            (self.manager, "free", self._free),
            (self.scheduler, "_free_request", self._free_request),
        ):
            self._wrap(owner, name, hook)

    @staticmethod
    def _wrap(owner: Any, name: str, hook: Any) -> None:
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: hook(inner, *args, **kwargs))

    def emit(self, kind: str, request: int, block: int, identity: int | None) -> None:
        step = self.begun if self.in_call else max(self.begun - 1, 0)
        self.events.append((step, kind, request, block, identity))

    def number(self, name: str) -> int:
        return self.numbers[name]

    def identity_of(self, block: Any) -> int | None:
        identity = None if block.block_hash is None else self.identities[block.block_hash]
        assert identity == self.held.get(block.block_id), (block, identity, self.held.get(block.block_id))
        return identity

    def _get_new_blocks(self, inner: Any, count: int) -> Any:
        blocks = inner(count)
        for block in blocks:
            if block.block_id in self.held:
                self.emit("evict", self.current, block.block_id, self.held.pop(block.block_id))
            assert block.block_hash is None
            self.emit("allocate", self.current, block.block_id, None)
        return blocks

    def _touch(self, inner: Any, blocks: Any) -> Any:
        flat = [one for group in blocks for one in group] if blocks and isinstance(blocks, tuple) else blocks
        flat = [one for item in flat for one in (item if isinstance(item, list | tuple) else [item])]
        result = inner(blocks)
        for block in flat:
            self.emit("hit", self.current, block.block_id, self.identity_of(block))
        return result

    def _cache_full_blocks(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(inner).bind(*args, **kwargs).arguments
        result = inner(*args, **kwargs)
        number = self.number(bound["request"].request_id)
        chain = self.case["requests"][number]["chain"]
        for index in range(bound["num_cached_blocks"], bound["num_full_blocks"]):
            block, identity = bound["blocks"][index], chain[index]
            assert self.identities.setdefault(block.block_hash, identity) == identity
            assert self.hashes.setdefault(identity, block.block_hash) == block.block_hash
            self.held[block.block_id] = identity
            self.emit("fill", number, block.block_id, identity)
        return result

    def _free_blocks(self, inner: Any, blocks: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = list(blocks)
        for block in blocks:
            self.emit("free", self.current, block.block_id, self.identity_of(block))
        return inner(blocks, *args, **kwargs)

    def _allocate_slots(self, inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.current = self.number(request.request_id)
        result = inner(request, *args, **kwargs)
        asked = self.pending.pop(request.request_id, None)
        spec = self.case["requests"][self.current]
        if result is not None and asked is not None and self.settings["prefix_caching"] and not spec["no_read"]:
            self.lookups.append((self.begun, self.current, *asked, self.rows[self.current][4] > 0))
        return result

    def _get_computed_blocks(self, inner: Any, request: Any) -> Any:
        result = inner(request)
        self.pending = {request.request_id: (request.num_tokens, result[1])}
        return result

    def _free(self, inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        number = self.current = self.number(request.request_id)
        if not request.is_finished():  # a preemption
            tables = self.manager.coordinator.single_type_managers
            blocks = sum(len(table.req_to_blocks.get(request.request_id, ())) for table in tables)
            self.preemptions.append((self.begun, number, blocks, request.num_computed_tokens))
            self.preempted.append(number)
            self.rows[number][4] += 1
        return inner(request, *args, **kwargs)

    def _free_request(self, inner: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        row = self.rows[self.number(request.request_id)]
        row[2] = max(self.begun - 1, 0)
        row[5] = {"FINISHED_LENGTH_CAPPED": "length", "FINISHED_STOPPED": "stop", "FINISHED_ABORTED": "abort"}[
            request.status.name
        ]
        return inner(request, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------------- the engine

    def run(self) -> dict[str, Any]:
        specs, depth, queue = self.case["requests"], 2 if self.settings["async_scheduling"] else 1, deque()
        self.limit = 1000 + 10 * sum(spec["prompt"] + spec["output"] for spec in specs)
        absent, stuck, has_requests = set(range(len(specs))), 0, self.scheduler.has_requests
        while True:
            self._arrive([n for n in sorted(absent) if specs[n]["arrival_step"] <= self.begun], absent)
            self._abort(absent)
            if not queue and not has_requests():
                if not absent:
                    break
                following = min(specs[n]["arrival_step"] for n in absent)
                self._arrive([n for n in sorted(absent) if specs[n]["arrival_step"] == following], absent)
                continue
            if has_requests():
                batch = self._call()
                executed = batch[0].total_num_scheduled_tokens > 0
                stuck = 0 if executed else stuck + 1
                if stuck > 20 or self.begun > self.limit:
                    return {"error": "endless"}
                queue.append(batch)
                if len(queue) < depth and (executed or (self.newer_loop and has_requests())):
                    continue
            if queue:
                self.scheduler.update_from_output(*queue.popleft())
        return {
            "events": self.events, "steps": self.steps, "lookups": self.lookups, "preemptions": self.preemptions,
            "requests": [tuple(row) for row in self.rows], "empty_after": self.empty,
        }  # fmt: skip

    def _arrive(self, numbers: list[int], absent: set[int]) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        for number in numbers:
            absent.discard(number)
            spec = self.case["requests"][number]
            prompt, _output = self.case["tokens"][number]
            stops = [STOP] if spec["output"] < spec["max_tokens"] else []
            arguments = {"max_tokens": spec["max_tokens"], "ignore_eos": True, "stop_token_ids": stops}
            if spec["no_read"]:
                arguments["prompt_logprobs"] = 1
            known = {
                "request_id": spec["request_id"] or f"r{number}",
                "prompt_token_ids": list(prompt),
                "sampling_params": SamplingParams(**arguments),
                "arrival_time": spec["arrival_time"],
                "priority": spec["priority"],
                "block_hasher": self.hasher,
                "client_index": 0,
            }
            request = self.requests[number] = Request(**_filled(Request, known))
            self.scheduler.add_request(request)

    def _abort(self, absent: set[int]) -> None:
        from vllm.v1.request import RequestStatus

        specs = self.case["requests"]
        due = [n for n, spec in enumerate(specs) if n not in absent and spec["abort_step"] is not None]
        for number in sorted(due, key=lambda n: (specs[n]["abort_step"], specs[n]["abort_calls"])):
            after, calls = specs[number]["abort_step"], specs[number]["abort_calls"]
            if after < self.begun - 1 or (after == self.begun - 1 and self.empty >= calls):
                self.scheduler.finish_requests([self.requests[number].request_id], RequestStatus.FINISHED_ABORTED)

    def _call(self) -> Any:
        scheduler = self.scheduler
        known = {r.request_id: (r.num_computed_tokens, r.num_tokens + r.num_output_placeholders)
                 for r in scheduler.running}  # fmt: skip
        self.in_call, self.pending = True, {}
        output = scheduler.schedule()
        self.in_call = False
        names, tokens, rows = list(output.num_scheduled_tokens), [], []
        for name, count in output.num_scheduled_tokens.items():
            number, request = self.number(name), scheduler.requests[name]
            before = request.num_computed_tokens - count
            rows.append((number, count, before))
            computed, total = known.get(name, (before, request.num_tokens))
            position = total - request.num_prompt_tokens
            outputs = self.case["tokens"][number][1]
            sampled = [outputs[position] if position < len(outputs) else 3] if computed + count >= total else []
            tokens.append(sampled)
            row = self.rows[number]
            if row[0] is None:
                row[0], row[3] = self.begun, before
            row[1] = self.begun
        if rows:
            queues = ("waiting", "skipped_waiting", "kv_holding_waiting")
            waiting = sum(len(getattr(scheduler, name, ())) for name in queues)
            free = self.pool.get_num_free_blocks()
            self.steps.append((rows, free, len(scheduler.running), waiting, self.preempted, self.empty))
            self.begun += 1
            self.empty, self.preempted = 0, []
        else:
            self.empty += 1
        return output, self._output(names, tokens)

    @staticmethod
    def _output(names: list[str], tokens: list[list[int]]) -> Any:
        import numpy as np
        from vllm.v1.outputs import ModelRunnerOutput

        known = {
            "req_ids": names, "req_id_to_index": {name: index for index, name in enumerate(names)},
            "sampled_token_ids": tokens, "prompt_logprobs_dict": {}, "pooler_output": [], "spec_token_ids": None,
            "logprobs": None,
        }  # fmt: skip
        types = {one.name: str(one.type) for one in dataclasses.fields(ModelRunnerOutput)}
        if "ndarray" in types["sampled_token_ids"]:  # 0.11.1
            known["sampled_token_ids"] = [np.array(one, dtype=np.int64) for one in tokens]
        return ModelRunnerOutput(**{key: value for key, value in known.items() if key in types})


def main() -> None:
    """Serve cases until stdin ends."""
    answers = os.fdopen(int(sys.argv[1]), "wb")
    sources = sys.argv[2] if len(sys.argv) > 2 else ""
    if sources:
        sys.path.insert(0, sources)
        sys.meta_path.append(_Absent())
    import vllm

    core = (Path(vllm.__file__).parent / "v1" / "engine" / "core.py").read_text()
    newer_loop = "model_executed or self.scheduler.has_requests()" in core
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            made = _make_stub(case) if case.get("model") else _make_loose(case)
            result = Judge(case, made, newer_loop).run()
        except Exception:
            result = {"error": traceback.format_exc()}
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
