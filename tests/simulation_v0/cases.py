"""Random requests and settings, tight enough that every rule of vLLM 0.4.2's scheduler matters in some."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

DEFECTS = ("swap-space", "livelock", "leak", "no-return", "spare-block")


@dataclass(frozen=True)
class Request:
    """`arrival` and `abort` are calls of the engine, or nanoseconds where the case has costs; `arrival_time` orders."""

    prompt: int
    output: int
    arrival: int = 0
    arrival_time: float = 0.0
    abort: int | None = None


@dataclass(frozen=True)
class Settings:
    """See `kvtrace_replay.schedulers.vllm_v0.settings`."""

    num_gpu_blocks: int
    num_cpu_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    watermark: float = 0.01
    preemption: str = "recompute"
    victim: str = "last"
    mend: frozenset[str] = frozenset()
    recompute_cost_per_token: float = 1.0
    swap_cost_per_block: float = 1.0


@dataclass(frozen=True)
class Case:
    """Requests, settings, and what a call costs in nanoseconds: at all, by token of prefill, by pair of a query and a
    key in these, by decoding row, by token that these read, by block swapped in, by block swapped out; None for one
    tick a call."""

    requests: list[Request]
    settings: Settings
    costs: tuple[int, ...] | None = None

    def with_settings(self, **changes: Any) -> Case:
        return replace(self, settings=replace(self.settings, **changes))


@dataclass(frozen=True)
class _Shape:
    prompt: tuple[int, int]
    output: tuple[int, int]
    room: tuple[float, float]  # of the pool, in longest requests


SHAPES = (
    _Shape((1, 40), (1, 40), (1.0, 4.0)),  # anything
    _Shape((1, 12), (20, 80), (1.0, 3.0)),  # long outputs: much preemption
    _Shape((1, 12), (40, 60), (2.0, 6.0)),  # the same with more running at once
    _Shape((30, 90), (1, 30), (1.0, 3.0)),  # long prompts
    _Shape((1, 60), (1, 60), (0.4, 1.1)),  # a pool too small for some
    _Shape((16, 16), (24, 24), (1.0, 4.0)),  # all alike
)
#: Large victims that have grown too large to come back, beside a request that still runs.
STANDSTILL = _Shape((1, 20), (40, 90), (1.0, 1.3))


def random_case(seed: int, preemption: str | None = None) -> Case:
    """A case; the same for the same arguments."""
    rng = random.Random(f"v0 {seed}")
    how = preemption or rng.choice(["recompute", "swap", "hybrid"])
    standstill = how != "recompute" and rng.random() < 0.1
    shape = STANDSTILL if standstill else rng.choice(SHAPES)
    size = rng.choice([1, 2, 4, 4, 8, 16])
    count = rng.choice([2, 3] if standstill else [1, 3, 8, 15, 25, 40])
    lengths = [(rng.randint(*shape.prompt), rng.randint(*shape.output)) for _ in range(count)]
    if rng.random() < 0.3:  # lengths that fill blocks
        lengths = [(-(-prompt // size) * size, output) for prompt, output in lengths]
    longest = max(prompt + output for prompt, output in lengths)
    blocks = max(1, round(-(-longest // size) * rng.uniform(*shape.room)))
    model = rng.choice([longest + 10, longest + 10, longest + 10, longest, max(2, longest * 2 // 3)])
    batched = model + rng.choice([0, 0, 5, 40, 400])
    seqs = min(rng.choice([1, 2, 4, 8, 64, 64, 64, 64]), batched)
    spread = rng.choice([0, 0, 3, 20, 60])
    arrivals = [rng.randint(0, spread) for _ in range(count)]
    times = rng.choice(["order", "order", "ties", "shuffled"])
    aborts = 0.15 if rng.random() < 0.25 else 0.0
    requests = []
    for number, ((prompt, output), arrival) in enumerate(zip(lengths, arrivals, strict=True)):
        time = {"order": arrival + number / 128, "ties": rng.randint(0, 3), "shuffled": rng.randint(0, 64)}[times]
        abort = arrival + rng.randint(-1, 40) if rng.random() < aborts else None
        requests.append(Request(prompt, output, arrival, float(time), None if abort is None else max(abort, 0)))
    costs = None
    if rng.random() < 0.2:
        costs = tuple(rng.choice([0, 1, 3, 50]) for _ in range(7))
        costs = (costs[0] + 1, *costs[1:])
        requests = [
            replace(r, arrival=r.arrival * 100, abort=None if r.abort is None else r.abort * 100) for r in requests
        ]
    watermark = rng.choice([0.2, 0.3, 0.5] if standstill else [0.0, 0.01, 0.01, 0.05, 0.2, 0.5])
    settings = Settings(
        num_gpu_blocks=blocks,
        num_cpu_blocks=rng.choice([0, blocks // 2, blocks, 3 * blocks] + [20 * blocks] * 6),
        block_size=size,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        max_model_len=model,
        watermark=watermark,
        preemption=how,
        victim=rng.choice(["last"] * 8 + ["most-blocks", "fewest-blocks"]),
        mend=frozenset(d for d in DEFECTS if rng.random() < 0.5) if rng.random() < 0.3 else frozenset(),
        recompute_cost_per_token=rng.choice([0.5, 1.0]),
        swap_cost_per_block=rng.choice([0.25, 1.0, 3.0]) * size,
    )
    return Case(requests, settings, costs)


def reference(name: str) -> Case:
    """A run whose counts are pinned, with all requests there at the start: "mixed" or "alike"."""
    if name == "mixed":
        rng = random.Random(0)
        lengths = [(rng.randint(100, 1500), rng.randint(1, 200)) for _ in range(60)]
    else:
        rng = random.Random(1)
        lengths = [(rng.randint(100, 700), 200) for _ in range(64)]
    requests = [Request(prompt, output, 0, float(number)) for number, (prompt, output) in enumerate(lengths)]
    return Case(requests, Settings(600, 8000, 16, 256, 4096, 2048))


#: Of `reference`, by name and way to preempt: calls, of these prefills, recomputations, blocks out, blocks in, tokens.
REFERENCE_COUNTS = {
    ("mixed", "recompute"): (702, 37, 4, 0, 0, 56_206),
    ("mixed", "swap"): (700, 35, 0, 202, 202, 53_029),
    ("alike", "recompute"): (816, 20, 22, 0, 0, 48_258),
    ("alike", "swap"): (811, 13, 0, 616, 616, 38_580),
}


def _small(requests: list[Request], **changes: Any) -> Case:
    given = {"num_gpu_blocks": 10, "num_cpu_blocks": 100, "block_size": 16, "max_num_seqs": 8,
             "max_num_batched_tokens": 160, "max_model_len": 160, "watermark": 0.0}  # fmt: skip
    return Case(requests, Settings(**(given | changes)))


#: The smallest runs that meet a defect: name of the defect, and what `test_defects` says of each.
DEFECT_CASES = {
    # The second has 8 blocks when the first needs one of them, and 7 is all the CPU pool has.
    "swap-space": _small(
        [Request(1, 31, 0, 0.0), Request(96, 40, 0, 1.0)], num_cpu_blocks=7, watermark=0.3, preemption="swap"
    ),
    # Swapped with 8 of 10 blocks, it wants these, one more, and 3 that the watermark keeps.
    "livelock": _small([Request(1, 31, 0, 0.0), Request(96, 40, 0, 1.0)], watermark=0.3, preemption="swap"),
    # Alone with all blocks, it is swapped for want of one more, and never fits again: 10 and one more.
    "leak": _small([Request(96, 60)], preemption="swap"),
    # Alone with all blocks, it is recomputed for want of one more, and never fits again: 10 and 3 of the watermark.
    "no-return": _small([Request(96, 60)], watermark=0.3),
    # The same without a watermark: from 144 tokens on, it is preempted before each token.
    "spare-block": _small([Request(96, 60)]),
}
