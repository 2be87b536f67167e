"""Closed-loop simulations of whole traces: every engine and combination of settings that was asked for, as frames."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace.api import Trace, open
from kvtrace.simulation_options import default_arrivals, profile_for, rates, refuse_lossy
from kvtrace.simulations_offload import (
    OF_THE_TIER,
    host_tiers,
    request_frame_offload,
    step_frame_offload,
    write_offload_trace,
)
from kvtrace_replay.schedulers.latencies import SUMMARY, request_times
from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.settings import VARIABLE
from kvtrace_replay.schedulers.sweep import Cell, row_of
from kvtrace_replay.schedulers.sweep import simulate as simulate_engine
from kvtrace_replay.schedulers.vllm_v1 import layout as at
from kvtrace_replay.schedulers.vllm_v1.offload.cells import simulate_tier, times_of
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun
from kvtrace_replay.timing.models import with_link
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import FINISH_REASONS

if TYPE_CHECKING:
    from kvtrace_replay.schedulers.vllm_v1.run import Run


MOVED = (
    "hit_tokens_after_preemption", "cpu_offload_blocks", "loaded_tokens", "stored_blocks", "loaded_blocks",
    "stored_bytes", "loaded_bytes", "tier_evictions",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Simulated:
    """The cells of a grid, each with the index of its engine; `several`: whether the trace has more than one engine;
    `timing`: what steps cost, None where nothing is timed."""

    cells: list[tuple[int, Cell]]
    several: bool
    timing: Profile | None = None

    def frame(self) -> pl.DataFrame:
        """One row per cell: the columns of `kvtrace simulate --json`."""
        found = pl.DataFrame([row_of(cell) | times_of(cell) for _, cell in self.cells], infer_schema_length=None)
        found = found.with_columns(
            *(pl.col(name).cast(pl.Float64) for name in SUMMARY),
            *(pl.col(name).cast(pl.Int64) for name in MOVED),
            pl.col("offload_policy", "offload_connector", "offload_store", "rate", "why").cast(pl.String),
            pl.col("exact").cast(pl.Boolean),
        )
        if not self.several:
            return found
        index = pl.Series("engine_index", [index for index, _ in self.cells], dtype=pl.Int16)
        return found.select(index, pl.all())

    def varied(self) -> list[str]:
        """The settings that are not the same in all cells."""
        names = [name for name in VARIABLE if len({getattr(cell.settings, name) for _, cell in self.cells}) > 1]
        names += ["rate"] if len({cell.rate for _, cell in self.cells}) > 1 else []
        names += ["preemption"] if len({cell.tier is None for _, cell in self.cells}) > 1 else []
        tiers = {cell.tier for _, cell in self.cells if cell.tier is not None}
        names += ["cpu_offload_blocks"] if len({tier.room for tier in tiers}) > 1 else []
        names += [f"offload_{name}" for name in ("policy", "connector", "store")
                  if len({getattr(tier, name) for tier in tiers}) > 1]  # fmt: skip
        return ["engine_index", *names] if self.several else names

    def per_request(self) -> pl.DataFrame:
        """One row per request and cell that ran, with the settings that vary in front."""
        return self._all(request_frame)

    def per_step(self) -> pl.DataFrame:
        """One row per step and cell that ran, with the settings that vary in front."""
        return self._all(step_frame)

    def _all(self, make: Callable[[Cell, Run | OffloadRun], pl.DataFrame]) -> pl.DataFrame:
        names = self.varied()
        frames = []
        for index, cell in self.cells:
            if cell.run is None:
                continue
            told = {**row_of(cell), "engine_index": index}
            values = [told[name] for name in names]
            lead = [pl.lit(value).alias(name) for name, value in zip(names, values, strict=True)]
            frames.append(make(cell, cell.run).select(*lead, pl.all()))
        if not frames:
            raise KvtraceError("no combination of these settings can be run; the table says why")
        return pl.concat(frames, how="diagonal_relaxed")


def simulate(
    trace: str | os.PathLike[str] | Trace,
    engine: str = "vllm-v1",
    *,
    num_blocks: int | str | Sequence[int | str] | None = None,
    block_size: int | Sequence[int] | None = None,
    max_num_seqs: int | Sequence[int] | None = None,
    max_num_batched_tokens: int | Sequence[int] | None = None,
    prefix_caching: bool | Sequence[bool] | None = None,
    chunked_prefill: bool | Sequence[bool] | None = None,
    long_prefill_token_threshold: int | Sequence[int] | None = None,
    scheduling_policy: str | Sequence[str] | None = None,
    async_scheduling: bool | Sequence[bool] | None = None,
    watermark: float | Sequence[float] | None = None,
    policy: str | Sequence[str] | None = None,
    preemption: str | Sequence[str] | None = None,
    cpu_offload: int | str | Sequence[int | str] | None = None,
    offload_policy: str | Sequence[str] | None = None,
    offload_connector: str | Sequence[str] | None = None,
    offload_store: str | Sequence[str] | None = None,
    swap_space: float | Sequence[float] | None = None,
    victim: str | Sequence[str] | None = None,
    mend: Sequence[str] = (),
    arrivals: str | None = None,
    timing: str | Profile | None = None,
    link: str | None = None,
    rate: str | float | Sequence[str | float] | None = None,
    seed: int = 0,
    pinned: bool | None = None,
    overlap: float = 0.0,
    allow_lossy: bool = False,
) -> pl.DataFrame:
    """Run a trace's requests through the scheduler that recorded them, at other settings: one row per combination.

    Every setting takes one value or several; None is the trace's own. `num_blocks` (the null block included) also
    takes an amount such as `10k`, `8GiB` or `65536tok`; a `block_size` without `num_blocks` keeps the bytes. `policy`:
    who is evicted, `vllm` for its own free queue or a policy of `replay`.
    `arrivals`: `step` (as recorded, the default), `all` (at once, the default of `vllm-v0` and of imports) or `time`:
    at the recorded times, or, with `rate`, "x2" as fast or, as a Poisson process of `seed`, so many a second.
    `timing`: what steps cost: a profile, its file or name, or GPU:MODEL; None learns it from the trace's own steps,
    where it has times; "none": nothing is timed. `link`: whose link to the host it shall have: a GPU, a profile, or a
    bandwidth such as "25GB/s".

    `preemption="offload"`: with vLLM's connector that copies blocks to host memory of size `cpu_offload` (blocks,
    `40GiB`, `65536tok`), `offload_policy` "lru" or "arc"; such runs have times where the profile has a link.
    `offload_connector`: "offloading", or "simple" (SimpleCPUOffloadConnector), whose `offload_store` is "fill" or
    "eviction".

    `engine="vllm-v0"` is vLLM 0.4.2, whose rules are in docs/vllm-v0-semantics.md. It takes num_blocks (there is no
    null block), block_size, max_num_seqs, max_num_batched_tokens, watermark, and for itself `preemption` ("recompute",
    "swap", "hybrid"), `swap_space` (GiB of host memory), `victim` ("last", "most-blocks", "fewest-blocks"), `pinned`
    (whether that memory is page-locked; None: as vLLM has it, where the profile knows), `overlap` (how much of the
    copying runs beside computing, 0 to 1) and `mend`, names of defects that it is not to have. Its rows have
    what only it does, and nulls for what only V1 does.

    Columns: engine, the settings, arrivals, requests, steps, preemptions, evictions, hit_tokens, lookup_tokens,
    token_hit_ratio, hit_tokens_after_preemption, times (`latencies.SUMMARY`), exact, why (null where exact), seconds
    (the kernel alone); a trace of several engines has engine_index in front. A combination that cannot be run has
    nulls, and says why, unless it is the only one: then UsageError is raised, as for a value that cannot be.
    KvtraceError for a trace that cannot be simulated, and for a lossy one unless `allow_lossy`.
    """
    given = {
        "num_blocks": num_blocks,
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "prefix_caching": prefix_caching,
        "chunked_prefill": chunked_prefill,
        "long_prefill_token_threshold": long_prefill_token_threshold,
        "scheduling_policy": scheduling_policy,
        "async_scheduling": async_scheduling,
        "watermark": watermark,
        "policy": policy,
        "preemption": preemption,
        "cpu_offload": cpu_offload,
        "offload_policy": offload_policy,
        "offload_connector": offload_connector,
        "offload_store": offload_store,
        "swap_space": swap_space,
        "victim": victim,
    }
    given = {name: value for name, value in given.items() if value is not None}
    opened = trace if isinstance(trace, Trace) else open(trace)
    timing = linked(opened, timing, link)
    clocked: dict[str, Any] = {"timing": timing, "rate": rate, "seed": seed}
    if engine == "vllm-v0":
        from kvtrace.simulations_v0 import simulate_v0_trace

        more: dict[str, Any] = {"pinned": pinned, "overlap": overlap, "allow_lossy": allow_lossy}
        return simulate_v0_trace(opened, given, arrivals=arrivals, mend=mend, **more, **clocked).frame()
    return simulate_trace(
        opened, given, engine=engine, arrivals=arrivals, mend=mend, allow_lossy=allow_lossy, **clocked
    ).frame()


def simulate_trace(
    trace: Trace,
    settings: dict[str, Any],
    *,
    arrivals: str | None = None,
    mend: Sequence[str] = (),
    timing: str | Profile | None = None,
    rate: str | float | Sequence[str | float] | None = None,
    allow_lossy: bool = False,
    progress: Any = None,
    **options: Any,
) -> Simulated:
    """The cells of every engine of a trace. Arguments as of `simulate`; `options` are those of
    `kvtrace_replay.simulate`.

    Raises KvtraceError for a lossy trace unless `allow_lossy`.
    """
    refuse_lossy(trace, allow_lossy)
    arrivals = arrivals or ("time" if rate is not None else default_arrivals(trace))
    profile = profile_for(trace, timing, arrivals)
    tiers = host_tiers(settings)
    if settings.get("swap_space") is not None:
        raise UsageError("--swap-space is of --engine vllm-v0, the engine that swaps")
    if mend:
        raise UsageError("--mend is of --engine vllm-v0")
    own = {name: value for name, value in settings.items() if name not in OF_THE_TIER}
    # A trace does not tell what its link costs; who asks for times is told so.
    untold = profile is not None and not profile.link and timing is None and arrivals != "time"
    cells: list[tuple[int, Cell]] = []
    for header in trace.engines:
        index = int(header["engine_index"])
        for tier, each in itertools.product(tiers, rates(rate)):
            asked: dict[str, Any] = {"engine_index": index, "arrivals": arrivals, "rate": each, "progress": progress}
            if tier is None:
                found = simulate_engine(trace.reader, own, timing=profile, **asked, **options)
            else:
                found = simulate_tier(trace.reader, own, tier, timing=None if untold else profile, **asked, **options)
            cells += [(index, cell) for cell in found]
    return Simulated(cells, len(trace.engines) > 1, profile)


def linked(trace: Trace, timing: str | Profile | None, link: str | None) -> str | Profile | None:
    """`timing`, with the link that `link` names (`timing.models.link_named`).

    Raises UsageError for a link without times, and as `profile_for` where these are not known.
    """
    if link is None:
        return timing
    profile = profile_for(trace, timing, "time")
    if profile is None:
        raise UsageError("--link is of what steps cost: leave out --timing none")
    return with_link(profile, link)


def request_frame(cell: Cell, run: Run | OffloadRun) -> pl.DataFrame:
    """What became of each request in one run. Steps are null for what never ran, `finish_*` for what never ended."""
    if isinstance(run, OffloadRun):
        return request_frame_offload(cell, run)
    out, source = run.requests, cell.recorded

    def column(which: int) -> pl.Expr:
        return pl.lit(pl.Series(out[:, which - at.O_FIRST]))

    def known(which: int) -> pl.Expr:
        return pl.when(column(which) >= 0).then(column(which))

    reasons = pl.Series([*FINISH_REASONS], dtype=pl.String)
    frame = pl.select(
        request=pl.Series(range(source.n_requests), dtype=pl.Int32),
        request_id=source.request_id,
        cached_tokens=known(at.O_CACHED),
        preemptions=pl.Series(run.preempted),
        first_step=known(at.O_FIRST),
        last_step=known(at.O_LAST),
        finish_step=known(at.O_FINISH),
        finish_reason=pl.lit(reasons).gather(known(at.O_REASON)),
        hit_tokens=column(at.O_HIT),
        prompt_tokens=pl.Series(source.prompt),
        output_tokens=pl.Series(run.tokens - source.prompt),
    )
    if run.clock is None:
        return frame
    times = request_times(run.clock.times, run.tokens - source.prompt)
    return frame.with_columns(**{name: pl.Series(told).fill_nan(None) for name, told in times.items()})


def step_frame(cell: Cell, run: Run | OffloadRun) -> pl.DataFrame:
    """What each step of one run did: a row per scheduler call with tokens."""
    if isinstance(run, OffloadRun):
        return step_frame_offload(cell, run)
    names = (
        "requests", "tokens", "running", "waiting", "free_blocks", "preempted", "empty_calls", "prefill_requests",
        "evictions",
    )  # fmt: skip
    frame = pl.DataFrame(
        {"step": pl.Series(range(len(run.rows)), dtype=pl.Int32)}
        | {name: run.rows[:, i] for i, name in enumerate(names)}
    ).with_columns(
        prefill_tokens=pl.col("tokens") - (pl.col("requests") - pl.col("prefill_requests")),
        used_blocks=run.settings.num_blocks - 1 - pl.col("free_blocks"),
    )
    if run.clock is None:
        return frame
    return frame.with_columns(start_ns=pl.Series(run.clock.steps[:, 0]), end_ns=pl.Series(run.clock.steps[:, 1]))


def check_single(trace: Trace, settings: dict[str, Any]) -> None:
    """Raise UsageError where the settings (lists by name) make more than the one run that can be written as a trace."""
    if len(trace.engines) > 1:
        raise UsageError("-o writes the run of one engine: name the file of one engine, not the folder of several")
    many = {name: len(values) for name, values in settings.items() if len(values) > 1}
    if many:
        named = ", ".join(name.replace("_", "-") for name in many)
        raise UsageError(f"-o writes one run, and these settings make {prod(many.values())}: give one value of {named}")


def write_trace(simulated: Simulated, path: Path) -> None:
    """Write the first run of `simulated` as a trace to `path`, which must not exist."""
    _, cell = simulated.cells[0]
    timing = simulated.timing
    if cell.tier is not None:
        write_offload_trace(cell, timing, path)
        return
    costs = None if timing is None else timing.step_costs(cell.settings.block_size)
    write_run(path, cell.recorded, cell.settings, cell.arrivals, why=cell.why, costs=costs)
