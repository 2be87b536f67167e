"""The cells of a grid of settings for runs with a tier: `simulate_tier`, as `schedulers.sweep.simulate` without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvtrace_replay.schedulers.arrivals import at_rate
from kvtrace_replay.schedulers.imported import imported_settings, needs_blocks, requests_reaching
from kvtrace_replay.schedulers.latencies import summary
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings, own_settings
from kvtrace_replay.schedulers.sweep import ENGINES, Cell, HostTier, grid, why_not_exact
from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Connector, Offload, SimpleOffload
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun, simulate_offload, tier_blocks
from kvtrace_replay.timing.costs import StepCosts, TransferCosts
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import UsageError


def simulate_tier(
    trace: Any,
    settings: Mapping[str, Any],
    tier: HostTier,
    *,
    engine: str = "vllm-v1",
    engine_index: int | None = None,
    arrivals: str = "step",
    timing: Profile | None = None,
    rate: str | float | None = None,
    seed: int = 0,
    step_rows: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Run the requests of one engine of `trace` again at every combination of `settings` with a tier.

    Arguments, returned cells and errors are those of `sweep.simulate`; `timing` needs a link: without one KvtraceError
    is raised.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine} is none of {', '.join(ENGINES)}")
    source = requests_reaching(trace, engine_index, arrivals)
    own = imported_settings(source) if source.header.get("source") == "import" else own_settings(source.header)
    source.arrivals(arrivals)  # complains before anything runs
    if rate is not None:
        if arrivals != "time":
            raise UsageError("--rate is of --arrivals time")
        source = at_rate(source, rate, seed)
    if timing is not None:
        timing.needs_link()
    cells = grid(source, own, settings)
    found = []
    for asked, chosen in cells:
        needs_blocks(asked)
        run, failed = None, chosen if isinstance(chosen, str) else None
        if isinstance(chosen, Settings):
            try:
                run = run_with(source, chosen, tier, arrivals, timing, step_rows)
            except UsageError as error:
                if len(cells) == 1:
                    raise
                failed = str(error)
        why = why_not_exact(trace, source, asked, own, arrivals, run)
        if arrivals == "time":  # what a copy takes is a part of the model of time
            why = tuple(name for name in why if name != "transfer-time")
        told = None if rate is None else str(rate)
        found.append(Cell(source, asked, arrivals, run, failed, why, engine, told, tier))
        if progress:
            progress(len(found), len(cells))
    return found


def run_with(
    source: Recorded, settings: Settings, tier: HostTier, arrivals: str, timing: Profile | None, step_rows: bool = False
) -> OffloadRun:
    """One run with a tier. Raises UsageError as `simulate_offload`."""
    costs, copies = costs_of(timing, settings.block_size)
    return simulate_offload(
        source, settings, offload_of(tier, source, settings), arrivals=arrivals, costs=costs, copies=copies,
        step_rows=step_rows,
    )  # fmt: skip


def offload_of(tier: HostTier, source: Recorded, settings: Settings) -> Connector:
    """The connector's settings. Raises UsageError for room that is none."""
    blocks = tier_blocks(tier.room, source, settings.block_size)
    if tier.connector == "simple":
        return SimpleOffload(blocks=blocks, store=tier.store)
    return Offload(blocks=blocks, policy=tier.policy)


def costs_of(timing: Profile | None, block_size: int) -> tuple[StepCosts | None, TransferCosts | None]:
    """What calls and transfers take; None where nothing is timed."""
    if timing is None:
        return None, None
    return timing.step_costs(block_size), timing.transfer_costs(block_size)


def times_of(cell: Cell) -> dict[str, Any]:
    """The times of a cell's row (`latencies.SUMMARY`), where its run has a tier and a clock; else nothing."""
    run = cell.run
    if not isinstance(run, OffloadRun) or run.clock is None:
        return {}
    prompt = cell.recorded.prompt
    return summary(run.clock.times, run.clock.gaps, run.clock.duration_ns, int(prompt.sum()), run.tokens - prompt)
