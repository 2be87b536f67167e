"""Closed-loop simulations by vLLM 0.4.2's rules, as frames. See `simulations` for those of vLLM V1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from kvtrace.api import Trace
from kvtrace.simulation_options import profile_for, rates, refuse_lossy
from kvtrace_replay.schedulers.latencies import SUMMARY, request_times
from kvtrace_replay.schedulers.vllm_v0.run import RunV0
from kvtrace_replay.schedulers.vllm_v0.sweep import VARIABLE, CellV0, rows, simulate_grid
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError

COUNTS = ("evictions", "hit_tokens", "lookup_tokens")


@dataclass(frozen=True, eq=False)
class SimulatedV0:
    """The cells of a grid, each with the index of its engine; `several`: whether the trace has more than one engine."""

    cells: list[tuple[int, CellV0]]
    several: bool
    timing: Profile | None = None

    def frame(self) -> pl.DataFrame:
        """One row per cell: the columns of `kvtrace simulate --engine vllm-v0 --json`."""
        found = pl.DataFrame(rows([cell for _, cell in self.cells]), infer_schema_length=None).with_columns(
            *(pl.col(name).cast(pl.Float64) for name in SUMMARY),
            *(pl.col(name).cast(pl.Int64) for name in COUNTS),
            pl.col("defects").cast(pl.String),
            pl.col("exact").cast(pl.Boolean),
        )
        if not self.several:
            return found
        index = pl.Series("engine_index", [index for index, _ in self.cells], dtype=pl.Int16)
        return found.select(index, pl.all())

    def varied(self) -> list[str]:
        """The settings that are not the same in all cells."""
        names = [name for name in VARIABLE if len({cell.asked.get(name) for _, cell in self.cells}) > 1]
        names += ["rate"] if len({cell.rate for _, cell in self.cells}) > 1 else []
        return ["engine_index", *names] if self.several else names

    def per_request(self) -> pl.DataFrame:
        """One row per request and cell that ran, with the settings that vary in front."""
        return self._all(_requests)

    def per_step(self) -> pl.DataFrame:
        """One row per call of the engine and cell that ran, with the settings that vary in front."""
        return self._all(lambda run: _numbered(run.step_columns(), "call"))

    def _all(self, make: Callable[[RunV0], pl.DataFrame]) -> pl.DataFrame:
        names, frames = self.varied(), []
        for index, cell in self.cells:
            if cell.run is not None:
                asked = {**cell.asked, "engine_index": index, "rate": cell.rate}
                values = [asked.get(name) for name in names]
                lead = [pl.lit(value).alias(name) for name, value in zip(names, values, strict=True)]
                frames.append(make(cell.run).select(*lead, pl.all()))
        if not frames:
            raise KvtraceError("no combination of these settings can be run; the table says why")
        return pl.concat(frames)


def _requests(run: RunV0) -> pl.DataFrame:
    columns = run.request_columns()
    frame = _numbered(columns, "request")
    if run.duration_ns is None:
        return frame
    times = request_times(run.times, run.tokens - run.prompt)
    return frame.with_columns(**{name: pl.Series(told).fill_nan(None) for name, told in times.items()})


def _numbered(columns: dict[str, Any], number: str) -> pl.DataFrame:
    frame = pl.DataFrame(columns)
    return frame if number in frame.columns else frame.with_row_index(number)


def simulate_v0_trace(
    trace: Trace,
    settings: dict[str, Any],
    *,
    arrivals: str | None = None,
    timing: str | Profile | None = None,
    rate: str | float | Sequence[str | float] | None = None,
    allow_lossy: bool = False,
    **options: Any,
) -> SimulatedV0:
    """The cells of every engine of a trace. `timing` as `simulate` takes it; other arguments and errors as in
    `kvtrace_replay`'s `simulate_grid`."""
    refuse_lossy(trace, allow_lossy)
    arrivals = arrivals or ("all" if rate is None else "time")
    kinds = settings.get("preemption") or []
    hybrid = "hybrid" in ([kinds] if isinstance(kinds, str) else kinds)
    # 0.4.2 is another engine on another device as a rule: its times are those of a profile that was named.
    profile = profile_for(trace, timing, arrivals) if timing is not None or arrivals == "time" or hybrid else None
    cells = []
    for header in trace.engines:
        index = int(header["engine_index"])
        for each in rates(rate):
            found = simulate_grid(
                trace.reader, settings, engine_index=index, arrivals=arrivals, timing=profile, rate=each, **options
            )
            cells += [(index, cell) for cell in found]
    return SimulatedV0(cells, len(trace.engines) > 1, profile)
