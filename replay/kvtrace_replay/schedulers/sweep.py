"""`simulate`: one recorded trace, many settings of the scheduler that recorded it; a row for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from kvtrace_replay.capacity import parse_amount
from kvtrace_replay.cores import cores
from kvtrace_replay.policies.registry import find_policy
from kvtrace_replay.schedulers.arrivals import at_rate
from kvtrace_replay.schedulers.imported import imported_settings, needs_blocks, requests_reaching
from kvtrace_replay.schedulers.latencies import SUMMARY, summary
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import NATIVE, POLICIES, VARIABLE, Settings, own_settings
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun
from kvtrace_replay.schedulers.vllm_v1.run import Run, compile_for, simulate_run
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import UsageError

ENGINES = ("vllm-v1",)
WHOLE = ("block_size", "max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")


@dataclass(frozen=True)
class HostTier:
    """Host memory that a connector of vLLM's copies blocks to: `room` in any form of `parse_amount`; who is dropped,
    "lru" or "arc"; which `connector`, and when it stores (`vllm_v1.offload.connectors.STORES`)."""

    room: str | int
    policy: str = "lru"
    connector: str = "offloading"
    store: str = "fill"


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell of a grid. `run` is None where `failed` says why there is none; `why` names what keeps a prediction
    from being bound to be exact (empty: it is)."""

    recorded: Recorded
    settings: Settings
    arrivals: str
    run: Run | OffloadRun | None
    failed: str | None
    why: tuple[str, ...]
    engine: str = "vllm-v1"
    rate: str | None = None
    tier: HostTier | None = None


#: Names of what keeps a prediction from being exact, and what they mean. Exact always means: given equal tokens.
WHY = {
    "wall-clock-arrivals": "requests came or were aborted while the engine ran; in another run they meet other steps",
    "unfinished-requests": "the trace ends before some requests do; they run to their maximum here",
    "aborted-beyond-record": "an aborted request got further than recorded; the tokens it made there are not known",
    "cache-reset": "the prefix cache was reset while recording; that is not simulated",
    "untested-engine": "the trace was recorded from an engine version that the tracer was never checked on",
    "newer-engine": "the engine is newer than the rules known here (0.32)",
    "multimodal": "the model takes images or sound, whose encoder budget is not simulated",
    "lora": "a limit on adapters in a batch is not simulated",
    "data-parallel": "data-parallel engines may hold back prefills together",
    "pipeline-parallel": "pipeline parallelism schedules more batches ahead than are simulated",
    "policy": "no engine has this eviction policy to be compared with",
    "victim": "no engine chooses whom it preempts by this rule",
    "transfer-time": "how many steps a copy takes is a matter of the clock; here its end is heard of in its own call",
    "carried-state": "the trace begins with a run under way at its own settings, which no engine takes over to others",
    "untold-state": "the cut does not tell all of the state that it begins with",
    "lossy": "a part of the log is missing",
    "timing-model": "a model of what steps cost decides which requests meet; an engine takes a little more or less",
    "no-engine": "the requests are of an import, which no engine served: vLLM 0.32's rules and unknown outputs",
}


def simulate(
    trace: Any,
    settings: Mapping[str, Any] | None = None,
    *,
    engine: str = "vllm-v1",
    engine_index: int | None = None,
    arrivals: str = "step",
    timing: Profile | None = None,
    rate: str | float | None = None,
    seed: int = 0,
    step_rows: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Run the requests of one engine of `trace` again at every combination of `settings`.

    Args:
        trace: a `kvtrace_traces` Trace.
        settings: names of `settings.VARIABLE` to a value or a list of values; what is not named is the trace's own.
            `num_blocks` takes a number, or an amount such as `10k`, `8GiB` or `65536tok` of usable blocks.
        engine: the scheduler's model, one of ENGINES.
        arrivals: a name of `recorded.ARRIVALS`.
        timing: what steps cost; without, nothing is timed. rate, seed: as `arrivals.at_rate` takes them, for "time".
        threads: runs at a time; default one per core.
        progress: called with (cells done, cells in all).

    Returns a cell per combination, the last setting varying fastest. A cell that cannot be run says why, unless it is
    the only one: then UsageError is raised, as for a setting that vLLM refuses or a name that is none. KvtraceError
    for a trace that cannot be simulated.
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine} is none of {', '.join(ENGINES)}")
    source = requests_reaching(trace, engine_index, arrivals, carried=True)
    own = imported_settings(source) if source.header.get("source") == "import" else own_settings(source.header)
    source.arrivals(arrivals)  # complains before anything runs
    if rate is not None:
        if arrivals != "time":
            raise UsageError("--rate is of --arrivals time")
        source = at_rate(source, rate, seed)
    cells = grid(source, own, settings or {})
    for asked, _ in cells:
        needs_blocks(asked)

    for chosen in {chosen.policy: chosen for _, chosen in cells if isinstance(chosen, Settings)}.values():
        compile_for(source, chosen)

    def one(chosen: Settings | str) -> tuple[Run | None, str | None]:
        if isinstance(chosen, str):
            return None, chosen
        costs = None if timing is None else timing.step_costs(chosen.block_size)
        try:
            return simulate_run(source, chosen, arrivals=arrivals, costs=costs, step_rows=step_rows), None
        except UsageError as error:
            return None, str(error)

    done: list[tuple[Run | None, str | None]] = []
    with ThreadPoolExecutor(min(threads or cores(), len(cells))) as pool:
        for result in pool.map(one, [chosen for _, chosen in cells]):
            done.append(result)
            if progress:
                progress(len(done), len(cells))
    if len(cells) == 1 and done[0][1] is not None:
        raise UsageError(done[0][1])
    return [
        Cell(
            source,
            asked,
            arrivals,
            run,
            failed,
            why_not_exact(trace, source, asked, own, arrivals, run),
            engine,
            None if rate is None else str(rate),
        )
        for (asked, _), (run, failed) in zip(cells, done, strict=True)
    ]


def grid(source: Recorded, own: Settings, settings: Mapping[str, Any]) -> list[tuple[Settings, Settings | str]]:
    """Every combination: its settings, and the same again or why vLLM refuses them."""
    unknown = set(settings) - set(VARIABLE)
    if unknown:
        raise UsageError(f"no setting is called {', '.join(sorted(unknown))}: known are {', '.join(VARIABLE)}")
    named = [name for name in VARIABLE if settings.get(name) is not None]
    lists = [[_value(name, value, own) for value in _listed(settings[name])] for name in named]
    cells: list[tuple[Settings, Settings | str]] = []
    for values in itertools.product(*lists):
        changes = dict(zip(named, values, strict=True))
        size = changes.get("block_size", own.block_size)
        if "block_size" in changes:
            source.stride(size)
        if "num_blocks" in changes:
            changes["num_blocks"] = _num_blocks(changes["num_blocks"], source, size)
        asked = own.changed_to(**changes)
        try:
            if changes:
                asked.check()
            cells.append((asked, asked))
        except UsageError as error:
            if math.prod(map(len, lists)) == 1:
                raise
            cells.append((asked, str(error)))
    return cells


def _value(name: str, value: Any, own: Settings) -> Any:
    """The value as `Settings` has it. Raises UsageError for one that no engine takes, whatever the others are."""
    option = "--" + name.replace("_", "-")
    if name == "scheduling_policy" and value not in POLICIES:
        raise UsageError(f"{option} {value} is none of {', '.join(POLICIES)}")
    if name in ("prefix_caching", "chunked_prefill", "async_scheduling") and not isinstance(value, bool):
        raise UsageError(f"{option} {value!r} is neither True nor False")
    if name == "policy":
        return policy_called(value)
    if name == "watermark":
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
            raise UsageError(f"{option} {value} must be a share of the blocks, from 0 to below 1")
        if value and not own.rules.watermark:
            raise UsageError(f"{option} {value}: the recorded version of vLLM has no watermark, it came with 0.24")
        return float(value)
    if name in WHOLE:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UsageError(f"{option} {value!r} is no whole number")
        return int(value)
    return value


def _num_blocks(value: Any, source: Recorded, block_size: int) -> int:
    """The engine's figure, null block included. Amounts in bytes or tokens are floored."""
    per_block = source.header.get("bytes_per_block")
    scaled = None if per_block is None else int(per_block) * block_size // int(source.header["block_size"])
    return parse_amount(value, block_size, scaled, "--num-blocks")


def why_not_exact(
    trace: Any, source: Recorded, settings: Settings, own: Settings, arrivals: str, run: Run | OffloadRun | None
) -> tuple[str, ...]:
    """Names of WHY that hold. See there."""
    header = source.header
    if header.get("source") == "import":
        return ("no-engine", "policy") if settings.policy != NATIVE else ("no-engine",)
    scheduler, parallel = header["scheduler"], header.get("parallel") or {}
    aborted = source.abort_step >= -1
    online = arrivals == "step" and (bool(source.arrival_step.any()) or bool(aborted.any()))
    version = str(header.get("engine_version"))
    holds = {
        "wall-clock-arrivals": (online and settings != own) or (arrivals == "all" and bool(aborted.any())),
        "timing-model": arrivals == "time",
        "no-engine": False,  # said above
        "unfinished-requests": source.unfinished > 0,
        "aborted-beyond-record": isinstance(run, Run) and run.guessed > 0 and bool(aborted.any()),
        "transfer-time": isinstance(run, OffloadRun),
        "cache-reset": source.resets > 0,
        "untested-engine": "untested-engine" in header.get("inexact", ()),
        "newer-engine": newer_than_known(version),
        "multimodal": bool(scheduler.get("multimodal")),
        "lora": scheduler.get("max_loras") is not None and bool(source.tenant.any()),
        "data-parallel": (parallel.get("data") or 1) > 1,
        "pipeline-parallel": (parallel.get("pipeline") or 1) > 1,
        "policy": settings.policy != NATIVE,
        "victim": settings.victim != NATIVE,
        "carried-state": source.start is not None and (settings != own or settings.policy != NATIVE),
        "untold-state": source.start is not None and source.start.untold(own),
        "lossy": bool(trace.lossy),
    }
    return tuple(name for name in WHY if holds[name])


def policy_called(name: str) -> str:
    """The name of an eviction policy that can drive the pool. Raises UsageError for one that cannot, or is none."""
    if str(name).strip().lower() == NATIVE:
        return NATIVE
    found = find_policy(name)
    if found.needs_future:
        raise UsageError(
            f"--policy {found.name} looks at references still to come, and here they depend on what it does: "
            "`kvtrace replay` takes it"
        )
    if found.uses > 1 or found.open_loop:
        raise UsageError(
            f"--policy {found.called} needs what only a recorded stream has, or leaves blocks out, which the engine's "
            "pool does not: `kvtrace replay` takes it"
        )
    return found.within("prefix").called


def newer_than_known(version: str) -> bool:
    """Whether `version` is past the last minor version whose sources were read."""
    parts = version.lstrip("v").split(".")
    return len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit() and (int(parts[0]), int(parts[1])) > (0, 32)


def row_of(cell: Cell) -> dict[str, Any]:
    """The contract's row: counts of the run, times (null where nothing is timed), `exact` and `why`."""
    run, settings = cell.run, cell.settings
    done = run is not None

    def of(name: str) -> Any:
        return getattr(run, name) if done else None

    return {
        "engine": cell.engine,
        **{name: getattr(settings, name) for name in VARIABLE},
        "arrivals": cell.arrivals,
        "rate": cell.rate,
        "requests": cell.recorded.n_requests,
        "steps": of("steps"),
        "preemptions": of("preemptions"),
        "evictions": of("evictions"),
        "hit_tokens": of("hit_tokens"),
        "lookup_tokens": of("lookup_tokens"),
        "token_hit_ratio": run.hit_tokens / run.lookup_tokens if run and run.lookup_tokens else None,
        "hit_tokens_after_preemption": run.hit_tokens_after if isinstance(run, Run) else None,
        **_moved(cell),
        **_times(cell),
        "exact": (not cell.why) if done else None,
        "why": cell.failed or ", ".join(cell.why) or None,
        "seconds": of("seconds"),
    }


def _moved(cell: Cell) -> dict[str, Any]:
    """What went to host memory and came from it; null without."""
    run = cell.run if isinstance(cell.run, OffloadRun) else None
    names = ("loaded_tokens", "stored_blocks", "loaded_blocks", "stored_bytes", "loaded_bytes", "tier_evictions")
    return {
        "preemption": "recompute" if cell.tier is None else "offload",
        "cpu_offload_blocks": None if run is None else run.offload.blocks,
        "offload_policy": None if cell.tier is None else cell.tier.policy,
        "offload_connector": None if cell.tier is None else cell.tier.connector,
        "offload_store": None if cell.tier is None else cell.tier.store,
        **{name: None if run is None else getattr(run, name) for name in names},
    }


def _times(cell: Cell) -> dict[str, Any]:
    run = cell.run
    if not isinstance(run, Run) or run.clock is None:
        return dict.fromkeys(SUMMARY)
    prompt, start = cell.recorded.prompt, cell.recorded.start
    known, to_compute = prompt.copy(), prompt.copy()
    if start is not None:  # what a request had before the trace began is no work of this run
        known[: start.n_requests] = np.maximum(start.tokens, known[: start.n_requests])
        to_compute[: start.n_requests] = np.maximum(to_compute[: start.n_requests] - start.computed, 0)
    clock, begin = run.clock, None if start is None else 0
    return summary(clock.times, clock.gaps, clock.duration_ns, int(to_compute.sum()), run.tokens - known, begin)


def _listed(value: Any) -> list[Any]:
    many = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not many:
        raise UsageError("an empty list of settings: name at least one value")
    return many
