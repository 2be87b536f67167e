"""Closed-loop simulations by vLLM 0.4.2's rules, as frames. See `simulations` for those of vLLM V1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from kvtrace.api import Trace
from kvtrace_replay.schedulers.vllm_v0.run import RunV0
from kvtrace_replay.schedulers.vllm_v0.sweep import VARIABLE, CellV0, rows, simulate_grid
from kvtrace_traces.errors import KvtraceError

TIMES = ("duration_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "output_tokens_per_s")
COUNTS = ("evictions", "hit_tokens", "lookup_tokens")


@dataclass(frozen=True, eq=False)
class SimulatedV0:
    """The cells of a grid, each with the index of its engine; `several`: whether the trace has more than one engine."""

    cells: list[tuple[int, CellV0]]
    several: bool

    def frame(self) -> pl.DataFrame:
        """One row per cell: the columns of `kvtrace simulate --engine vllm-v0 --json`."""
        found = pl.DataFrame(rows([cell for _, cell in self.cells]), infer_schema_length=None).with_columns(
            *(pl.col(name).cast(pl.Float64) for name in TIMES),
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
        return ["engine_index", *names] if self.several else names

    def per_request(self) -> pl.DataFrame:
        """One row per request and cell that ran, with the settings that vary in front."""
        return self._all(lambda run: _numbered(run.request_columns(), "request"))

    def per_step(self) -> pl.DataFrame:
        """One row per call of the engine and cell that ran, with the settings that vary in front."""
        return self._all(lambda run: _numbered(run.step_columns(), "call"))

    def _all(self, make: Callable[[RunV0], pl.DataFrame]) -> pl.DataFrame:
        names, frames = self.varied(), []
        for index, cell in self.cells:
            if cell.run is not None:
                values = [index if name == "engine_index" else cell.asked.get(name) for name in names]
                lead = [pl.lit(value).alias(name) for name, value in zip(names, values, strict=True)]
                frames.append(make(cell.run).select(*lead, pl.all()))
        if not frames:
            raise KvtraceError("no combination of these settings can be run; the table says why")
        return pl.concat(frames)


def _numbered(columns: dict[str, Any], number: str) -> pl.DataFrame:
    frame = pl.DataFrame(columns)
    return frame if number in frame.columns else frame.with_row_index(number)


def simulate_v0_trace(
    trace: Trace,
    settings: dict[str, Any],
    *,
    arrivals: str,
    mend: Sequence[str] = (),
    step_rows: bool = False,
    progress: Any = None,
) -> SimulatedV0:
    """The cells of every engine of a trace. Arguments and errors as in `kvtrace_replay`'s `simulate_grid`."""
    cells = []
    for header in trace.engines:
        index = int(header["engine_index"])
        found = simulate_grid(
            trace.reader,
            settings,
            engine_index=index,
            arrivals=arrivals,
            mend=mend,
            step_rows=step_rows,
            progress=progress,
        )
        cells += [(index, cell) for cell in found]
    return SimulatedV0(cells, len(trace.engines) > 1)
