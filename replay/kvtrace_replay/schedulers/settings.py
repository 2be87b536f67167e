"""`Settings`: the configuration of a simulated engine: the trace's own, with what the user changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvtrace_replay.schedulers.families import Rules, rules_of
from kvtrace_replay.schedulers.vllm_v1.layout import VICTIMS
from kvtrace_traces.errors import KvtraceError, UsageError

POLICIES = ("fcfs", "priority")
#: The eviction policy that is the engine's own free queue.
NATIVE = "vllm"
#: The settings that can be changed, in the order of the command's options.
VARIABLE = (
    "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "prefix_caching", "chunked_prefill",
    "long_prefill_token_threshold", "scheduling_policy", "async_scheduling", "watermark", "policy", "victim",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides the behaviour of a vLLM V1 scheduler and its block pool.

    `num_blocks` includes the null block, `block_size` and the budgets are in tokens, `watermark` is a share of the
    blocks; `depth`: calls under way at once; `rules`: what this version of vLLM does; `policy`: who is evicted,
    NATIVE or a policy of the open loop; `victim`: who is preempted, one of VICTIMS.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    chunked_prefill: bool
    long_prefill_token_threshold: int
    scheduling_policy: str
    async_scheduling: bool
    watermark: float
    max_num_scheduled_tokens: int | None
    long_prefill_token_threshold_adaptive: bool
    max_num_active_seqs: int | None
    reserve_full_isl: bool
    max_model_len: int
    rules: Rules
    policy: str = NATIVE
    victim: str = NATIVE

    @property
    def depth(self) -> int:
        return 2 if self.async_scheduling else 1

    @property
    def watermark_blocks(self) -> int:
        """`KVCacheManager.__init__`: truncated."""
        return int(self.watermark * self.num_blocks)

    def changed_to(self, **changes: Any) -> Settings:
        """These settings with `changes` (names of VARIABLE; None leaves one as it is).

        A new block size without a number of blocks keeps the bytes: the number is scaled, and floored. Nothing is
        checked: see `check`.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if not given:
            return self
        if given.get("block_size") and "num_blocks" not in given and self.num_blocks:
            given["num_blocks"] = max(self.num_blocks * self.block_size // int(given["block_size"]), 2)
        if "max_num_batched_tokens" in given and self.max_num_scheduled_tokens == self.max_num_batched_tokens:
            given["max_num_scheduled_tokens"] = given["max_num_batched_tokens"]
        return replace(self, **given)

    def check(self) -> None:
        """Raises UsageError, one line, for what vLLM refuses to start with."""
        for name, least in (
            ("num_blocks", 2), ("block_size", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", 1),
            ("long_prefill_token_threshold", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise UsageError(f"{_option(name)} {value} must be a whole number from {least} to {2**31 - 1}")
        if self.scheduling_policy not in POLICIES:
            raise UsageError(f"--scheduling-policy {self.scheduling_policy} is none of {', '.join(POLICIES)}")
        if self.victim not in VICTIMS:
            raise UsageError(f"--victim {self.victim} is none of {', '.join(VICTIMS)}")
        if not 0 <= self.watermark < 1:
            raise UsageError(f"--watermark {self.watermark} must be a share of the blocks, from 0 to below 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs {self.max_num_seqs}: "
                "vLLM does not start so"
            )
        # Read in 0.32.0; what was read of the releases before 0.31 does not refuse it.
        if self.rules.threshold_spares_lone_request and self.long_prefill_token_threshold > self.max_model_len:
            raise UsageError(
                f"--long-prefill-token-threshold {self.long_prefill_token_threshold} is above the model's "
                f"{self.max_model_len} tokens: vLLM does not start so; 0 sets none"
            )
        if not self.chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise UsageError(
                f"--no-chunked-prefill needs --max-num-batched-tokens of at least the model's {self.max_model_len} "
                f"tokens, {self.max_num_batched_tokens} given: vLLM does not start so"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def own_settings(header: dict[str, Any]) -> Settings:
    """The settings that a trace was recorded at, from its engine's header.

    Raises KvtraceError where the header lacks them or names an engine whose rules are not known.
    """
    scheduler = header["scheduler"]
    try:
        rules = rules_of(str(header.get("engine_version")))
    except ValueError as error:
        raise KvtraceError(str(error)) from None
    try:
        batched = int(scheduler["max_num_batched_tokens"])
        blocks = int(header["num_blocks"])
        watermark = scheduler.get("watermark")
        if watermark is None:
            kept = int(scheduler.get("watermark_blocks") or 0)
            watermark = (kept + 0.5) / blocks if kept else 0.0  # truncated again, it gives these blocks
        chunked = scheduler.get("chunked_prefill")
        return Settings(
            num_blocks=blocks,
            block_size=int(header["block_size"]),
            max_num_seqs=int(scheduler["max_num_seqs"]),
            max_num_batched_tokens=batched,
            prefix_caching=bool(header["prefix_caching"]),
            chunked_prefill=True if chunked is None else bool(chunked),
            long_prefill_token_threshold=int(scheduler.get("long_prefill_token_threshold") or 0),
            scheduling_policy=str(scheduler.get("policy") or "fcfs"),
            async_scheduling=bool(scheduler.get("async_scheduling")),
            watermark=float(watermark),
            max_num_scheduled_tokens=int(scheduler.get("max_num_scheduled_tokens") or batched),
            long_prefill_token_threshold_adaptive=bool(scheduler.get("long_prefill_token_threshold_adaptive")),
            max_num_active_seqs=scheduler.get("max_num_active_seqs"),
            reserve_full_isl=bool(scheduler.get("reserve_full_isl")),
            max_model_len=int(header.get("max_model_len") or 2**31 - 1),
            rules=rules,
            policy=str(scheduler.get("eviction_policy") or NATIVE),
            victim=str(scheduler.get("victim") or NATIVE),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise KvtraceError(f"the trace's header does not tell its scheduler's settings ({error!r})") from None
