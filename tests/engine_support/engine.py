"""The real vLLM engine inside this process, stepped by hand.

Call these in a process of their own (worker.py): importing vLLM takes about eight seconds and changes the
process (signal handlers, threads, frozen garbage collector); an engine after that takes about a second.

    with engine(EngineConfig(model=str(folder), num_blocks=60, max_model_len=512)) as live:
        drive(live, thrashing(seed=1))
        live.result()["requests"][0]["output"]
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .observe import Observer
from .workloads import STOP

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Waiting OpenMP threads spin: with two of them on two busy cores a run took up to 60 times as
    # long, and the tiny model has no work to share out anyway.
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine, in vLLM's words; `num_blocks` is `num_gpu_blocks_override`, null block included.

    The cache must hold `max_model_len` tokens and the CPU wants block sizes that are multiples of 32.
    `kv_events` makes vLLM emit BlockStored, BlockRemoved and AllBlocksCleared, collected in process. `dummy`
    for a config-only model.
    """

    model: str
    num_blocks: int = 200
    block_size: int = 32
    max_model_len: int = 1024
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    watermark: float | None = None
    kv_events: bool = False
    dummy: bool = False
    tokenizer: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Engine:
    """One live engine; requests are numbered from 0 in the order in which they were added.

    Attributes: llm (vllm.LLM), scheduler (the live Scheduler), observer (Observer, None if not asked for).
    """

    def __init__(self, config: EngineConfig, observe: bool = True) -> None:
        os.environ.update(ENVIRONMENT)
        from vllm import LLM

        self.config = config
        extra = dict(config.extra)
        if config.kv_events:
            # Collected by the observer from KVCacheManager.take_events, so nobody needs to publish them.
            extra["kv_events_config"] = {"enable_kv_cache_events": True, "publisher": "null"}
        if config.watermark is not None:
            extra["watermark"] = config.watermark
        self.llm: Any = LLM(
            model=config.model,
            load_format="dummy" if config.dummy else "auto",
            skip_tokenizer_init=not config.tokenizer,
            enforce_eager=True,
            seed=0,
            num_gpu_blocks_override=config.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.prefix_caching,
            enable_chunked_prefill=config.chunked_prefill,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            scheduling_policy=config.scheduling_policy,
            disable_log_stats=False,
            **extra,
        )
        self.scheduler: Any = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.observer = Observer(self.scheduler) if observe else None
        self.finals: dict[int, Any] = {}
        self._ids: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        output: list[int] | None = None,
    ) -> int:
        """Queue a request (temperature 0, no stop token); return its number.

        With `output` it generates these tokens and ends at STOP, if the engine has script.py's logits processor.
        """
        from vllm import SamplingParams

        number = len(self._ids)
        inputs: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if cache_salt is not None:
            inputs["cache_salt"] = cache_salt
        scripted: dict[str, Any] = {}
        if output is not None:
            scripted = {"extra_args": {"output": output}, "stop_token_ids": [STOP]}
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=self.config.tokenizer, **scripted
        )
        # The engine appends random characters to the name and returns the result; outputs carry the plain
        # name.
        name = self.llm.llm_engine.add_request(f"r{number}", inputs, params, priority=priority)
        self._ids.append(name)
        self._numbers[f"r{number}"] = number
        return number

    def abort(self, request: int) -> None:
        """Abort a request; nothing happens if it is done."""
        self.llm.llm_engine.abort_request([self._ids[request]], internal=True)

    def step(self) -> None:
        """Run one engine step."""
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.finals[self._numbers[output.request_id]] = output

    def ran_dry(self) -> bool:
        """As StubEngine: not without asynchronous scheduling."""
        return False

    def runs_dry(self) -> bool:
        """As StubEngine: not without asynchronous scheduling."""
        return False

    def alive(self, request: int) -> bool:
        """Whether a request has not ended yet."""
        return self._ids[request] in self.scheduler.requests

    @property
    def busy(self) -> bool:
        """Whether a step would do something, if only to tell the worker of requests that are gone."""
        return self.llm.llm_engine.has_unfinished_requests() or self.scheduler.has_requests()

    def reset_prefix_cache(self) -> bool:
        """Forget all identities; False (and no effect) while blocks are in use."""
        return self.llm.llm_engine.reset_prefix_cache()

    def result(self) -> dict[str, Any]:
        """Return what the engine said so far, fit for JSON but for hashes, which are bytes.

        Keys: config; requests (Observer.request_rows plus num_cached_tokens and finish_reason of the engine's
        output, null if it was aborted); steps, lookups, preemptions, kv_events, cache_stats as in Observer.
        """
        assert self.observer is not None
        rows = self.observer.request_rows()
        for row in rows:
            final = self.finals.get(row["request"])
            row["num_cached_tokens"] = None if final is None else final.num_cached_tokens
            row["finish_reason"] = None if final is None else final.outputs[0].finish_reason
            row["tokens"] = None if final is None else list(final.outputs[0].token_ids)
        return {
            "config": asdict(self.config),
            "requests": rows,
            "steps": self.observer.steps,
            "lookups": self.observer.lookups,
            "preemptions": self.observer.preemptions,
            "kv_events": self.observer.events_as_dicts(),
            "cache_stats": self.observer.cache_stats,
        }

    def close(self) -> None:
        """Shut the engine down and give its memory back, so that another can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.observer is not None:
            self.observer.detach()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.scheduler
        self.observer = None
        # vLLM freezes the heap at start (freeze_gc_heap), and frozen cycles would never be collected: this thaws it,
        # and collects.
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def engine(config: EngineConfig, observe: bool = True) -> Iterator[Engine]:
    """Start an engine and shut it down at the end."""
    live = Engine(config, observe)
    try:
        yield live
    finally:
        live.close()
