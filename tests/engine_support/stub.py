"""vLLM's real scheduler and cache manager with a made-up model: thousands of steps a second.

`StubEngine` loops `schedule()`, a scripted `ModelRunnerOutput`, `update_from_output()` as `EngineCore.step`
does, for any block size, and with `async_scheduling` keeps two steps in flight as
`EngineCore.step_with_batch_queue` does (vLLM 0.32.0). Async scheduling is forced off by the CPU platform, so
this is where it can be tested. As with engine.py, use a process of its own.

    stub = StubEngine(model=str(tiny_llama(folder)), num_blocks=200, block_size=16, async_scheduling=True)
    stub.add([5, 6, 7] * 20, max_tokens=40)
    stub.run()
    stub.outputs[0]
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from .engine import ENVIRONMENT
from .observe import Observer
from .workloads import STOP


def scripted_token(request: int, position: int, vocab: int = 512) -> int:
    """The default script: the token of output `position` of `request`, random but the same in every run."""
    return 3 + random.Random(request * 1_000_003 + position).randrange(vocab - 3)


class StubEngine:
    """The real Scheduler or AsyncScheduler of one engine without workers.

    Parameters are vLLM's; `num_blocks` includes the null block; `extra` holds further EngineArgs.
    `token(request, position)` scripts the outputs. Attributes: scheduler, outputs (list of token lists by
    request number), observer (Observer, or None with `observe=False`, as for measurements), requests (vLLM's
    Request objects), steps (calls of `schedule`), asks (whether it asks for grammars while the model runs, as
    engines do since 0.12), meanwhile (called with `steps` while the model would run: engines take in aborts
    then). Times and priorities of arrival are the request's number, so that ties cannot depend
    on the clock.
    """

    def __init__(
        self,
        model: str,
        *,
        num_blocks: int = 200,
        block_size: int = 16,
        max_model_len: int = 2048,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        scheduling_policy: str = "fcfs",
        watermark: float | None = None,
        async_scheduling: bool = False,
        kv_events: bool = False,
        log_stats: bool = True,
        observe: bool = True,
        token: Callable[[int, int], int] = scripted_token,
        **extra: Any,
    ) -> None:
        os.environ.update(ENVIRONMENT)
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        # EngineCore.__init__ begins so; without it a plugin would never hear of this scheduler.
        load_general_plugins()
        if kv_events:
            extra["kv_events_config"] = {"enable_kv_cache_events": True, "publisher": "null"}
        if watermark is not None:
            extra["watermark"] = watermark
        args = EngineArgs(
            model=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=32,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=prefix_caching,
            enable_chunked_prefill=chunked_prefill,
            long_prefill_token_threshold=long_prefill_token_threshold,
            scheduling_policy=scheduling_policy,
            **extra,
        )
        self.config: Any = args.create_engine_config()
        config = self.config
        config.cache_config.block_size = block_size
        config.cache_config.num_gpu_blocks = num_blocks
        config.scheduler_config.async_scheduling = async_scheduling
        heads, head = config.model_config.get_total_num_kv_heads(), config.model_config.get_head_size()
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=head, dtype=torch.float32)
        layers = [f"model.layers.{index}.self_attn.attn" for index in range(2)]
        self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=block_size,
            log_stats=log_stats,
        )
        self._hasher: Any = None
        if prefix_caching:
            hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
            init_none_hash(hash_function)
            self._hasher = get_request_block_hasher(block_size, hash_function)
        self.observer = Observer(self.scheduler) if observe else None
        self.requests: list[Any] = []
        self.outputs: list[list[int]] = []
        self.finish_reasons: list[str | None] = []
        self.steps = 0
        self.asks = True
        self.meanwhile: Callable[[int], None] | None = None
        self._numbers: dict[str, int] = {}
        self._scripts: list[list[int] | None] = []
        self._token = token
        self._depth = 2 if async_scheduling else 1
        self._in_flight: deque[tuple[Any, Any]] = deque()
        # What a worker would know: tokens of each request sampled so far, counted when their step is
        # scheduled.
        self._sampled: dict[str, int] = {}

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        output: list[int] | None = None,
        arrival_time: float | None = None,
        name: str = "r",
        no_read: bool = False,
    ) -> int:
        """Queue a request; return its number, which ends its id, after `name`.

        It generates `output`, ending at STOP, or else what the script says, without a stop token. `no_read`: it asks
        for something for which vLLM does not read the prefix cache.
        """
        from vllm import SamplingParams
        from vllm.v1.request import Request

        number = len(self.requests)
        self._scripts.append(output)
        request = Request(
            request_id=f"{name}{number}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                ignore_eos=True,
                stop_token_ids=[] if output is None else [STOP],
                prompt_logprobs=1 if no_read else None,
            ),
            pooling_params=None,
            arrival_time=float(number) if arrival_time is None else arrival_time,
            cache_salt=cache_salt,
            priority=priority,
            block_hasher=self._hasher,
        )
        self._numbers[request.request_id] = number
        self.requests.append(request)
        self.outputs.append([])
        self.finish_reasons.append(None)
        self.scheduler.add_request(request)
        return number

    def abort(self, request: int) -> None:
        """Abort a request; nothing happens if it is done."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([self.requests[request].request_id], RequestStatus.FINISHED_ABORTED)

    def alive(self, request: int) -> bool:
        """Whether a request has not ended yet."""
        return self.requests[request].request_id in self.scheduler.requests

    def step(self) -> None:
        """Schedule once if there is anything to; take in the oldest step's output once enough are in flight.

        This follows EngineCore.step_with_batch_queue: with room in the queue and something scheduled, no
        output is taken. With a depth of one it is EngineCore.step.
        """
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.steps += 1
            if self.asks and self.steps % 4:  # where sampling has to wait, the engine asks later or not at all
                self.scheduler.get_grammar_bitmask(scheduled)
            self._in_flight.appendleft((scheduled, self._execute(scheduled)))
            if self.meanwhile is not None:
                self.meanwhile(self.steps)
            executed = scheduled.total_num_scheduled_tokens > 0
            if len(self._in_flight) < self._depth and (executed or self.scheduler.has_requests()):
                return
        if self._in_flight:
            self._take(*self._in_flight.pop())

    def ran_dry(self) -> bool:
        """Asynchronous scheduling: whether the outputs of all steps have arrived."""
        return self._depth > 1 and not self._under_way()

    def runs_dry(self) -> bool:
        """Whether outputs are under way, and the next call would schedule nothing for want of them."""
        scheduler = self.scheduler
        waiting = scheduler.get_request_counts()[1]
        return self._under_way() and not waiting and not any(self._wants_tokens(one) for one in scheduler.running)

    def _under_way(self) -> bool:
        return any(scheduled.total_num_scheduled_tokens for scheduled, _ in self._in_flight)

    def _wants_tokens(self, request: Any) -> bool:
        """`Scheduler.schedule`: not if the output under way is its last."""
        computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
        if placeholders and computed + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens:
            return False
        known = request.num_tokens + placeholders
        return min(known - computed, self.scheduler.max_model_len - 1 - computed) > 0

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._in_flight) or self.scheduler.has_requests()

    def run(self, max_steps: int = 200_000) -> None:
        """Step until nothing is left; RuntimeError if `max_steps` are not enough."""
        for _ in range(max_steps):
            if not self.busy:
                return
            self.step()
        raise RuntimeError(f"not done after {max_steps} steps")

    def _execute(self, scheduled: Any) -> Any:
        """Make the output of a step: one token for each request whose known tokens are computed with it."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = list(scheduled.num_scheduled_tokens)
        tokens: list[list[int]] = []
        for name in names:
            request = self.scheduler.requests[name]
            # `_update_after_schedule` has counted this step's tokens as computed: what is not a partial
            # prefill samples.
            if request.is_prefill_chunk:
                tokens.append([])
                continue
            position = self._sampled.get(name, 0)
            self._sampled[name] = position + 1
            number = self._numbers[name]
            script = self._scripts[number]
            if script is None:
                tokens.append([self._token(number, position)])
            else:  # past its end it is about to stop: an output on the way after the last
                tokens.append([script[position] if position < len(script) else STOP])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=tokens,
        )

    def _take(self, scheduled: Any, output: Any) -> None:
        for engine_outputs in self.scheduler.update_from_output(scheduled, output).values():
            for row in engine_outputs.outputs:
                number = self._numbers[row.request_id]
                self.outputs[number].extend(row.new_token_ids)
                if row.finish_reason is not None:
                    self.finish_reasons[number] = str(row.finish_reason)

    def result(self) -> dict[str, Any]:
        """Return the same as engine.Engine.result but for `config` and the `tokens` of requests."""
        assert self.observer is not None
        rows = self.observer.request_rows()
        first = {}
        for lookup in self.observer.lookups:
            if not lookup["after_preemption"]:
                first.setdefault(lookup["request"], lookup["tokens_hit"])
        for row in rows:
            row["num_cached_tokens"] = first.get(row["request"])
            row["finish_reason"] = self.finish_reasons[row["request"]]
        return {
            "requests": rows,
            "steps": self.observer.steps,
            "lookups": self.observer.lookups,
            "preemptions": self.observer.preemptions,
            "kv_events": self.observer.events_as_dicts(),
            "cache_stats": self.observer.cache_stats,
        }

    def close(self) -> None:
        """Shut the scheduler down."""
        self.scheduler.shutdown()
