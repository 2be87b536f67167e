"""`SettingsV0`: the configuration of a simulated vLLM 0.4.2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.vllm_v0.layout import PREEMPTIONS, VICTIMS
from kvtrace_traces.errors import UsageError

F64 = npt.NDArray[np.float64]

GIB = 1 << 30
LARGEST = 2**31 - 1
SWAP_SPACE_GIB = 4.0  # `EngineArgs.swap_space`

#: What is wrong in 0.4.2, by name. `SettingsV0.mend` takes these, and a run counts how often it met each.
DEFECTS = {
    "swap-space": "a victim that the CPU pool has no room for ends the whole engine; mended: it is recomputed",
    "livelock": "a swapped request that fits the GPU pool only without the watermark waits for ever, and all others "
    "with it; mended: the watermark is not kept where the whole pool is free",
    "leak": "a swapped request that can never return is dropped with its CPU blocks; mended: they are given back",
    "no-return": "a preempted request is dropped, though its tokens fit the pool, for the watermark or for a block "
    "that it does not need; mended: neither is asked for where the whole pool is free",
    "spare-block": "a decoding request without a free block preempts others, though its last block has room; mended: "
    "it asks for a block when it needs one",
}


@dataclass(frozen=True, eq=False)
class SettingsV0:
    """What decides the behaviour of vLLM 0.4.2's scheduler and block manager, chunked prefill and prefix caching off.

    Attributes:
        num_gpu_blocks, num_cpu_blocks: blocks of each pool; there is no null block.
        block_size, max_num_batched_tokens, max_model_len: tokens. watermark: share of the GPU blocks that an admission
            leaves free. max_num_seqs: most requests running.
        preemption: "recompute" (what 0.4.2 does with requests of one sequence), "swap" (its other way, forced), or
            "hybrid": for each victim the cheaper, recomputation where they are equal or the CPU pool has no room.
        victim: "last" of those running that the call has not scheduled yet (what 0.4.2 does), or of these the one with
            "most-blocks" or "fewest-blocks" (the last of several).
        mend: names of DEFECTS that the simulated engine does not have.
        recompute_cost: of a victim with t tokens: a float, times t, or float64[t + 1 or more]. swap_cost: out and in,
            of one with b blocks: a float, times b, or float64[b + 1 or more]. For "hybrid" only; in any unit.
    """

    num_gpu_blocks: int
    num_cpu_blocks: int = 0
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    watermark: float = 0.01
    preemption: str = "recompute"
    victim: str = "last"
    mend: frozenset[str] = frozenset()
    recompute_cost: float | F64 | None = None
    swap_cost: float | F64 | None = None

    @property
    def watermark_blocks(self) -> int:
        """`BlockSpaceManagerV1.__init__`: truncated."""
        return int(self.watermark * self.num_gpu_blocks)

    def changed_to(self, **changes: Any) -> SettingsV0:
        """These settings with `changes`; None leaves one as it is. Nothing is checked: see `check`."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def check(self) -> None:
        """Raises UsageError, one line, for what is no setting, and for what vLLM 0.4.2 refuses to start with."""
        for name, least in (
            ("num_gpu_blocks", 1), ("num_cpu_blocks", 0), ("block_size", 1), ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1), ("max_model_len", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole or not least <= int(value) <= LARGEST:
                raise UsageError(f"{option(name)} {value} must be a whole number from {least} to {LARGEST}")
        if isinstance(self.watermark, bool) or not isinstance(self.watermark, Real) or not 0 <= self.watermark < 1:
            raise UsageError(f"--watermark {self.watermark} must be a share of the blocks, from 0 to below 1")
        if self.preemption not in PREEMPTIONS:
            raise UsageError(f"--preemption {self.preemption} is none of {', '.join(PREEMPTIONS)}")
        if self.victim not in VICTIMS:
            raise UsageError(f"--victim {self.victim} is none of {', '.join(VICTIMS)}")
        unknown = sorted(set(self.mend) - set(DEFECTS))
        if unknown or isinstance(self.mend, str):
            raise UsageError(f"no defect is called {self.mend if not unknown else unknown[0]}: {', '.join(DEFECTS)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs {self.max_num_seqs}: "
                "vLLM 0.4.2 does not start so"
            )
        if self.max_num_batched_tokens < self.max_model_len:
            raise UsageError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below the model's {self.max_model_len} "
                "tokens: vLLM 0.4.2 does not start so without chunked prefill"
            )
        if self.preemption == "hybrid" and (self.recompute_cost is None or self.swap_cost is None):
            raise UsageError(
                "--preemption hybrid needs to know what recomputing and swapping cost: name a profile with --timing"
            )

    def costs(self, most_tokens: int) -> tuple[F64, F64]:
        """float64: what recomputing t tokens, and swapping b blocks, cost, as far as requests of up to `most_tokens`
        can ask. One entry where none does."""
        if self.preemption != "hybrid":
            return np.zeros(1), np.zeros(1)
        # A request that runs has at most a token for which it has no block yet.
        most = min(most_tokens, self.num_gpu_blocks * self.block_size + 1)
        return (
            _curve(self.recompute_cost, most, "recompute_cost"),
            _curve(self.swap_cost, -(-most // self.block_size), "swap_cost"),
        )


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _curve(cost: float | F64 | None, most: int, name: str) -> F64:
    values = np.asarray(cost, np.float64)
    if values.ndim == 0:
        values = np.arange(most + 1) * values
    if values.ndim != 1 or values.size <= most or not np.isfinite(values).all() or (values < 0).any():
        raise UsageError(f"{name} must be a number, or {most + 1} numbers, finite and not negative")
    return np.ascontiguousarray(values)


def swap_space_blocks(gib: float, bytes_per_block: int | None) -> int:
    """CPU blocks in `gib` GiB of swap space, floored as in `Worker.determine_num_available_blocks`."""
    if not isinstance(gib, Real) or not math.isfinite(gib) or gib < 0:
        raise UsageError(f"--swap-space {gib} must be GiB of memory, 0 or more")
    if not bytes_per_block:
        if gib:
            raise UsageError("--swap-space needs the bytes of a block, which this trace does not know: give CPU blocks")
        return 0
    return min(int(float(gib) * GIB // bytes_per_block), LARGEST)


def settings_of(header: Mapping[str, Any], swap_space_gib: float = SWAP_SPACE_GIB, **changes: Any) -> SettingsV0:
    """The settings of an engine like the one that recorded `header`, but of version 0.4.2, with `changes`.

    The number of blocks is the recorded engine's. The budget of tokens is 0.4.2's default, for that of a newer engine
    counts on chunked prefill. Where no number of CPU blocks is given, `swap_space_gib` is converted with the trace's
    bytes of a block; a new block size without numbers of blocks keeps the bytes.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    own_size = int(header["block_size"])
    size = int(given.setdefault("block_size", own_size))
    if size < 1:
        raise UsageError(f"--block-size {size} must be a whole number from 1 to {LARGEST}")
    given.setdefault("num_gpu_blocks", max(int(header["num_blocks"]) * own_size // size, 1))
    length = given.setdefault("max_model_len", header.get("max_model_len"))
    if not length:
        raise UsageError("the trace does not tell the longest sequence of its model: give --max-model-len")
    given.setdefault("max_num_batched_tokens", max(int(length), 2048))
    seqs = int((header.get("scheduler") or {}).get("max_num_seqs") or 256)
    given.setdefault("max_num_seqs", min(seqs, int(given["max_num_batched_tokens"])))
    if "num_cpu_blocks" not in given:
        own_bytes = header.get("bytes_per_block")
        per_block = int(own_bytes) * size // own_size if own_bytes else None
        swaps = given.get("preemption", "recompute") != "recompute"
        given["num_cpu_blocks"] = swap_space_blocks(swap_space_gib, per_block) if swaps or per_block else 0
    return SettingsV0(**given)
