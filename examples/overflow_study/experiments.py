"""What the study runs: requests, memory and ways to preempt, and what each run of the simulated engine is reduced to.

Everything runs on the simulated scheduler and block manager of vLLM 0.4.2, with all requests queued at the start and
the clock of a profile. Each experiment is a function that returns a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.schedulers.vllm_v0.layout import KINDS, S_KIND
from kvtrace_replay.schedulers.vllm_v0.requests import RequestsV0
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import SettingsV0
from kvtrace_replay.timing.catalogue import find_gpu, find_model
from kvtrace_replay.timing.profile import Profile
from kvtrace_replay.timing.roofline import Efficiency, of
from kvtrace_traces.errors import KvtraceError

F64 = npt.NDArray[np.float64]
GPU, MODEL = "a100-40gb", "yarn-llama-2-7b-64k"
PROMPT, OUTPUT = 1500, 1024  # tokens of a request of the published study
WAYS = ("recompute", "swap", "swap-pageable", "hybrid")
COPIES = "per-block-layer-tensor"  # as vLLM 0.4.2 copies: each layer's keys and values of a block on their own
MEMORY_BYTES = int(find_gpu(GPU).memory_bytes)
PREFILL_KIND = KINDS.index("prefill")
AS_IS, MENDED = "0.4.2", "0.4.2, spare-block mended"
BIN_S = 1.0  # over which throughput and occupancy are averaged


@dataclass(frozen=True)
class Size:
    """How much of the study to run: the points of each experiment."""

    block_sizes: tuple[int, ...]
    evicted: tuple[int, ...]
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    small_cases: int
    sensitivity: bool


FULL = Size(
    block_sizes=(8, 16, 32, 64, 128, 256),
    evicted=(128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    lengths=(2048, 2560, 3072, 4096, 5120, 6144, 8192, 10240, 12288, 16384),
    shares=tuple(percent / 100 for percent in range(8, 51)),
    small_cases=8,
    sensitivity=True,
)
#: For the sensitivity of the answers to the profile: fewer points, no small cases.
COARSE = replace(FULL, shares=tuple(percent / 100 for percent in range(8, 51, 2)), small_cases=0, sensitivity=False)
SMALL = Size(
    block_sizes=(8, 32, 128),
    evicted=(128, 512, 4096, 16384),
    lengths=(2560, 4096, 8192, 16384),
    shares=(0.08, 0.12, 0.16, 0.20, 0.24, 0.26, 0.30, 0.34, 0.40, 0.46, 0.50),
    small_cases=3,
    sensitivity=False,
)


def profile(
    efficiency: float | None = None, link_gb_per_s: float | None = None, copy_us: float | None = None
) -> Profile:
    """The roofline profile of the device and the model; with another share of the bf16 rate (in attention two thirds
    of it, as by default), another link, or another time for each copy."""
    gpu = find_gpu(GPU)
    if link_gb_per_s is not None:
        gpu = replace(gpu, link_bytes_per_s=link_gb_per_s * 1e9)
    assumed = Efficiency()
    if efficiency is not None:
        share = assumed.attention / assumed.compute
        assumed = replace(assumed, compute=efficiency, attention=efficiency * share)
    if copy_us is not None:
        assumed = replace(assumed, copy_us=copy_us)
    return of(gpu, find_model(MODEL), assumed)


def tokens_in(share: float, timing: Profile) -> int:
    """Tokens whose keys and values fit `share` of the device's memory."""
    return int(share * MEMORY_BYTES) // timing.block_bytes(1)


@dataclass(frozen=True, eq=False)
class Case:
    """Requests, all queued at the start, and the engine that serves them. `prompt`, `output`: int64[n], tokens."""

    prompt: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]
    memory_tokens: int
    block_size: int = 16
    mend: frozenset[str] = frozenset()

    @classmethod
    def alike(cls, n: int, prompt: int, output: int, memory_tokens: int, block_size: int = 16) -> Case:
        return cls(np.full(n, prompt, np.int64), np.full(n, output, np.int64), memory_tokens, block_size)

    @property
    def requests(self) -> RequestsV0:
        return RequestsV0(self.prompt, self.output)

    @property
    def need_tokens(self) -> int:
        """With which no request ever waits for a block: all of them complete, each with a block to spare."""
        return int((self.prompt + self.output + 2 * self.block_size).sum() * 1.05)

    def settings(self, memory_tokens: int, **more: Any) -> SettingsV0:
        """0.4.2's defaults; the length of the model is cut to the longest request, as it must be to start at all with
        little memory, and the budget of a call follows it. As much CPU memory as is ever needed."""
        longest = int((self.prompt + self.output).max())
        length = 1 << (longest - 1).bit_length()
        return SettingsV0(
            num_gpu_blocks=memory_tokens // self.block_size,
            num_cpu_blocks=self.need_tokens // self.block_size,
            block_size=self.block_size,
            max_model_len=length,
            max_num_batched_tokens=max(length, 2048),
            mend=self.mend,
            **more,
        )


def priced(case: Case, timing: Profile, pinned: bool = True) -> dict[str, F64]:
    """What preempting a victim costs either way, ns, for "hybrid": its prefill in a call of its own, or its blocks out
    and in again."""
    most = int((case.prompt + case.output).max()) + 2
    blocks = range(-(-most // case.block_size) + 1)
    swap = [timing.swap_ns(n, case.block_size, copies=COPIES, pinned=pinned) for n in blocks]
    return {
        "recompute_cost": np.array([timing.recompute_ns(tokens) for tokens in range(most + 1)]),
        "swap_cost": np.array(swap),
    }


def serve(case: Case, way: str, timing: Profile, **prices: Any) -> RunV0:
    """One run. `way`: one of WAYS; `prices`: for "hybrid", where not those of `priced`.

    Raises KvtraceError where a request is not served to its end: overheads are of equal work only.
    """
    pinned = way != "swap-pageable"
    if way == "hybrid" and not prices:
        prices = priced(case, timing)
    settings = case.settings(case.memory_tokens, preemption=way.removesuffix("-pageable"), **prices)
    costs = timing.step_costs(case.block_size, copies=COPIES, pinned=pinned)
    run = simulate_v0(case.requests, settings, costs=costs, step_rows=True)
    if run.ended != "done" or run.finished != case.prompt.size:
        raise KvtraceError(
            f"{way} with {case.memory_tokens} tokens of memory: ended {run.ended!r}, {run.dropped} dropped"
        )
    return run


def never(case: Case, timing: Profile) -> RunV0:
    """The same requests with memory for all at once."""
    return serve(replace(case, memory_tokens=case.need_tokens), "recompute", timing)


@dataclass(frozen=True)
class Overhead:
    """Of one run, beyond the same requests with memory for all at once, seconds.

    `overhead_s`: how much later its last call ends. `overflow_s`: the part of it that overflows themselves take: blocks
    copied out and in, tokens computed for a second time, and calls that do only this. The rest is `waiting_s`: further
    calls, because fewer requests decode together. `evicted_tokens`: of victims, each time.
    """

    duration_s: float
    overhead_s: float
    overflow_s: float
    waiting_s: float
    preemptions: int
    swaps: int
    evicted_tokens: int
    calls: int
    more_calls: int


def overhead(run: RunV0, ideal: RunV0, case: Case, way: str, timing: Profile) -> Overhead:
    """What `run` took beyond `ideal`."""
    costs = timing.step_costs(case.block_size, copies=COPIES, pinned=way != "swap-pageable")
    more = run.work.sum(axis=0) - ideal.work.sum(axis=0)
    first = np.zeros(run.calls, bool)
    first[run.told[:, 0]] = True  # calls that see a request for the first time
    again = int(((run.rows[:, S_KIND] == PREFILL_KIND) & ~first).sum())
    taken = costs.call * again
    taken += costs.prefill_token * more[0] + costs.prefill_pair * more[1]
    taken += costs.block_in * more[4] + costs.block_out * more[5]
    assert run.duration_ns is not None
    assert ideal.duration_ns is not None
    beyond = (run.duration_ns - ideal.duration_ns) / 1e9
    return Overhead(
        duration_s=run.duration_ns / 1e9,
        overhead_s=beyond,
        overflow_s=taken / 1e9,
        waiting_s=beyond - taken / 1e9,
        preemptions=run.recomputes + run.swaps,
        swaps=run.swaps,
        evicted_tokens=run.recomputed_tokens + run.blocks_swapped_out * case.block_size,
        calls=run.calls,
        more_calls=run.calls - ideal.calls,
    )


def sweep(points: Sequence[tuple[dict[str, Any], Case]], timing: Profile, ways: Sequence[str] = WAYS) -> pl.DataFrame:
    """A row for each point and way: the point's columns, `way`, and those of Overhead."""
    rows = []
    for named, case in points:
        ideal = never(case, timing)
        for way in ways:
            found = overhead(serve(case, way, timing), ideal, case, way, timing)
            rows.append({**named, "way": way, **vars(found)})
    return pl.DataFrame(rows)


def both_engines(points: Sequence[tuple[dict[str, Any], Case]], timing: Profile) -> pl.DataFrame:
    """The sweep with 0.4.2 as it is, and with its defect `spare-block` mended; column `engine`."""
    frames = []
    for engine, mend in ((AS_IS, frozenset[str]()), (MENDED, frozenset({"spare-block"}))):
        changed = [({"engine": engine, **named}, replace(case, mend=mend)) for named, case in points]
        frames.append(sweep(changed, timing))
    return pl.concat(frames)


def block_size(size: Size, timing: Profile) -> pl.DataFrame:
    """Two requests of 1500 + 1024 tokens; the same bytes of memory, 4,096 tokens or four fifths of what they need,
    in blocks of different sizes."""
    sizes = size.block_sizes
    return both_engines([({"block_size": b}, Case.alike(2, PROMPT, OUTPUT, 4096, b)) for b in sizes], timing)


def evicted(size: Size, timing: Profile) -> pl.DataFrame:
    """Two requests that fill the memory when each has n tokens: prompt 7/8 n, output n/4, memory 2 n."""
    points = [({"tokens": n}, Case.alike(2, n * 7 // 8, n // 4, 2 * n)) for n in size.evicted]
    return both_engines(points, timing)


def length(size: Size, timing: Profile) -> pl.DataFrame:
    """16 requests, prompt and output in the proportion of 1500 to 1024, in half of the device's memory."""
    memory = tokens_in(0.5, timing)
    points = []
    for tokens in size.lengths:
        prompt = round(tokens * PROMPT / (PROMPT + OUTPUT))
        points.append(({"tokens": tokens}, Case.alike(16, prompt, tokens - prompt, memory)))
    return sweep(points, timing)


def memory(size: Size, timing: Profile) -> pl.DataFrame:
    """32 requests of 1500 + 1024 tokens, against the share of the device's memory that keys and values have."""
    points = [({"memory_share": share}, at_share(share, timing)) for share in size.shares]
    return sweep(points, timing)


def at_share(share: float, timing: Profile) -> Case:
    return Case.alike(32, PROMPT, OUTPUT, tokens_in(share, timing))


def over_time(timing: Profile, share: float = 0.12, ways: Sequence[str] = ("recompute", "swap")) -> pl.DataFrame:
    """The calls of the runs of (3b) at one share of the memory: `way start_s end_s kind tokens gpu_share
    cpu_blocks`; tokens computed by the call, share of the GPU's blocks in use, blocks in use on the CPU."""
    frames = []
    for way in ways:
        run = serve(at_share(share, timing), way, timing)
        calls = pl.DataFrame(run.step_columns())
        total, cpu = run.settings.num_gpu_blocks, run.settings.num_cpu_blocks
        frames.append(calls.select(
            pl.lit(way).alias("way"),
            (pl.col("start_ns") / 1e9).alias("start_s"),
            (pl.col("end_ns") / 1e9).alias("end_s"),
            "kind",
            (pl.col("prefill_tokens") + pl.col("decode_rows")).alias("tokens"),
            ((total - pl.col("free_gpu_blocks")) / total).alias("gpu_share"),
            (cpu - pl.col("free_cpu_blocks")).alias("cpu_blocks"),
        ))  # fmt: skip
    return pl.concat(frames)


def binned(calls: pl.DataFrame) -> pl.DataFrame:
    """`over_time` in bins of BIN_S, the last, partial one left out: `way second tokens_per_s gpu_share cpu_blocks`. A
    call's tokens are spread over its time."""
    frames = []
    for (way,), part in calls.group_by("way", maintain_order=True):
        start, end = part["start_s"].to_numpy(), part["end_s"].to_numpy()
        edges = np.arange(0.0, end[-1] + 1e-9, BIN_S)
        columns = {}
        lasting = end - start
        for name, rate in (
            ("tokens_per_s", part["tokens"].to_numpy() / lasting),
            ("gpu_share", part["gpu_share"].to_numpy()),
            ("cpu_blocks", part["cpu_blocks"].to_numpy()),
        ):
            # Calls follow each other without a gap, so the integral up to an edge is piecewise linear.
            total = np.concatenate([[0.0], np.cumsum(rate * lasting)])
            columns[name] = np.diff(np.interp(edges, np.concatenate([[0.0], end]), total)) / BIN_S
        frames.append(pl.DataFrame({"way": [way] * (len(edges) - 1), "second": edges[:-1], **columns}))
    return pl.concat(frames)


EXPERIMENTS: dict[str, Callable[[Size, Profile], pl.DataFrame]] = {
    "2a-block-size": block_size,
    "2b-tokens-evicted": evicted,
    "3a-sequence-length": length,
    "3b-memory": memory,
}
