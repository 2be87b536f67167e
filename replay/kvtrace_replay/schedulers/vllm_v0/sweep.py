"""Grids of runs of vLLM 0.4.2, side by side, as result rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvtrace_replay.capacity import parse_amount
from kvtrace_replay.cores import cores
from kvtrace_replay.schedulers.arrivals import at_rate
from kvtrace_replay.schedulers.imported import requests_reaching
from kvtrace_replay.schedulers.latencies import SUMMARY, summary
from kvtrace_replay.schedulers.recorded import ARRIVALS
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, compile_v0, simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import SWAP_SPACE_GIB, SettingsV0, settings_of
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import UsageError

ENGINE = "vllm-v0"
COPIES = "per-block-layer-tensor"  # `ops.swap_blocks`
#: What can be varied, in the order of the command's options. `swap_space` is in GiB.
VARIABLE = (
    "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "watermark", "preemption", "victim",
    "swap_space",
)  # fmt: skip
WHY = "other-engine"
WHY_MEANS = "vLLM 0.4.2's rules, which no trace was recorded with: what it would have done with these requests"


@dataclass(frozen=True, eq=False)
class CellV0:
    """One cell of a grid. `asked`: the settings by name, those that were not given as the engine has them. `run` is
    None where `failed` says why there is none."""

    asked: dict[str, Any]
    arrivals: str
    requests: int
    run: RunV0 | None
    failed: str | None
    rate: str | None = None


def simulate_grid(
    trace: Any,
    settings: Mapping[str, Any],
    *,
    engine_index: int,
    arrivals: str = "all",
    mend: Sequence[str] = (),
    timing: Profile | None = None,
    pinned: bool | None = None,
    overlap: float = 0.0,
    rate: str | float | None = None,
    seed: int = 0,
    step_rows: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[CellV0]:
    """Serve the requests of one engine of `trace`, or of an import, by vLLM 0.4.2's rules, at every combination.

    Args:
        trace: a `kvtrace_traces` Trace. Lengths are enough; an import has no steps, so its requests come at once.
        settings: names of VARIABLE to a value or a list of values. `num_blocks` are GPU blocks, in any form of
            `parse_amount`. What is not named is the trace's own, or, where another engine has another, 0.4.2's default.
        arrivals: a name of `recorded.ARRIVALS`. mend: names of `settings.DEFECTS` that the engine is not to have.
        timing: what calls cost, and with "hybrid" which of two ways is the cheaper; without, nothing is timed.
        pinned: whether the CPU blocks are page-locked; None: where `timing` knows that, as vLLM's are.
        overlap: as of `StepCosts`.
        rate, seed: as `arrivals.at_rate` takes them, for "time".

    Returns a cell per combination, the last setting varying fastest. Raises UsageError for a setting that is none, and
    where the only combination cannot be run.
    """
    unknown = sorted(set(settings) - set(VARIABLE))
    if unknown:
        raise UsageError(
            f"--{unknown[0].replace('_', '-')} is no setting of vLLM 0.4.2 as it is simulated; these are: "
            f"{', '.join(name.replace('_', '-') for name in VARIABLE)}"
        )
    if arrivals not in ARRIVALS:
        raise UsageError(f"--arrivals {arrivals} is none of {', '.join(ARRIVALS)}")
    source = requests_reaching(trace, engine_index, arrivals, shares=False)
    if rate is not None:
        if arrivals != "time":
            raise UsageError("--rate is of --arrivals time")
        source = at_rate(source, rate, seed)
    header, named_rate = source.header, None if rate is None else str(rate)
    named = [name for name in VARIABLE if settings.get(name) is not None]
    grid = list(itertools.product(*(_listed(settings[name]) for name in named)))
    compile_v0()

    def one(values: tuple[Any, ...]) -> CellV0:
        asked = dict(zip(named, values, strict=True))
        try:
            chosen = _settings(header, asked, mend)
            if chosen.preemption == "hybrid" and timing is not None:
                chosen = _with_prices(chosen, timing, pinned, int(source.stop.max(initial=1)))
            chosen.check()
            costs = None
            if timing is not None:
                moves = chosen.preemption != "recompute"
                costs = replace(_step_costs(timing, chosen.block_size, pinned, moves), overlap=overlap)
            run = simulate_v0(source, chosen, arrivals=arrivals, costs=costs, step_rows=step_rows)
        except UsageError as error:
            return CellV0(asked, arrivals, source.n_requests, None, str(error), named_rate)
        return CellV0(_told(chosen, asked), arrivals, source.n_requests, run, None, named_rate)

    cells: list[CellV0] = []
    with ThreadPoolExecutor(min(cores(), len(grid))) as pool:
        for cell in pool.map(one, grid):
            cells.append(cell)
            if progress:
                progress(len(cells), len(grid))
    if len(cells) == 1 and cells[0].failed is not None:
        raise UsageError(cells[0].failed)
    return cells


def _listed(value: Any) -> list[Any]:
    many = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not many:
        raise UsageError("an empty list of settings: name at least one value")
    return many


def _settings(header: Mapping[str, Any], asked: Mapping[str, Any], mend: Sequence[str]) -> SettingsV0:
    changes = {name: value for name, value in asked.items() if name not in ("num_blocks", "swap_space")}
    if asked.get("num_blocks") is not None:
        size, own = int(changes.get("block_size") or header["block_size"]), int(header["block_size"])
        per_block = header.get("bytes_per_block")
        scaled = None if per_block is None else int(per_block) * size // own
        changes["num_gpu_blocks"] = parse_amount(asked["num_blocks"], size, scaled, "--num-blocks")
    elif not header.get("num_blocks"):
        raise UsageError("an import has no cache of its own: give --num-blocks")
    return settings_of(header, float(asked.get("swap_space", SWAP_SPACE_GIB)), mend=frozenset(mend), **changes)


def _step_costs(timing: Profile, block_size: int, pinned: bool | None, moves: bool) -> StepCosts:
    """Raises KvtraceError where blocks move and nobody knows what that costs."""
    if moves:
        timing.needs_link()
    return timing.step_costs(block_size, copies=COPIES, pinned=pinned)


def _with_prices(chosen: SettingsV0, timing: Profile, pinned: bool | None, longest: int) -> SettingsV0:
    """What a victim costs either way, ns: its prefill in a call of its own, or its blocks out and in again."""
    most = longest + 2
    blocks = range(-(-most // chosen.block_size) + 1)
    return replace(
        chosen,
        recompute_cost=np.array([timing.recompute_ns(tokens) for tokens in range(most + 1)]),
        swap_cost=np.array([timing.swap_ns(n, chosen.block_size, copies=COPIES, pinned=pinned) for n in blocks]),
    )


def _told(chosen: SettingsV0, asked: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: getattr(chosen, name) for name in VARIABLE if name not in ("num_blocks", "swap_space")}
    return {"num_blocks": chosen.num_gpu_blocks, **told, "swap_space": float(asked.get("swap_space", SWAP_SPACE_GIB))}


def rows(cells: Sequence[CellV0]) -> list[dict[str, Any]]:
    """A row per cell: the contract's columns, null where 0.4.2 has none, and what only this engine has."""
    return [_row(cell) for cell in cells]


def _row(cell: CellV0) -> dict[str, Any]:
    run = cell.run

    def of(name: str) -> Any:
        return None if run is None else getattr(run, name)

    return {
        "engine": ENGINE,
        **{name: cell.asked.get(name) for name in VARIABLE},
        "num_cpu_blocks": None if run is None else run.settings.num_cpu_blocks,
        "arrivals": cell.arrivals,
        "rate": cell.rate,
        "requests": cell.requests,
        "steps": of("steps"),
        "prefill_steps": of("prefill_steps"),
        "decode_steps": of("decode_steps"),
        "preemptions": None if run is None else run.recomputes + run.swaps,
        "recomputes": of("recomputes"),
        "swaps": of("swaps"),
        "blocks_swapped_out": of("blocks_swapped_out"),
        "blocks_swapped_in": of("blocks_swapped_in"),
        "recomputed_tokens": of("recomputed_tokens"),
        "evictions": None,
        "hit_tokens": None,
        "lookup_tokens": None,
        **_times(cell),
        "finished": of("finished"),
        "dropped": of("dropped"),
        "ended": of("ended"),
        "defects": None if run is None else ", ".join(f"{name} {n}" for name, n in run.defects.items()) or None,
        "exact": None if run is None else False,
        "why": cell.failed or WHY,
        "seconds": of("seconds"),
    }


def _times(cell: CellV0) -> dict[str, Any]:
    run = cell.run
    if run is None or run.duration_ns is None:
        return dict.fromkeys(SUMMARY)
    return summary(run.times, run.gaps, run.duration_ns, int(run.prompt.sum()), run.tokens - run.prompt)
