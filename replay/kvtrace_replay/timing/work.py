"""What each step of a trace had to do, and how long it took.

A row of a step is *decode* where one token past the prompt is computed, else *prefill*: a piece of a prompt, or of a
sequence that is computed again after a preemption. Work is counted as `costs.WORK` says, without the moves of blocks,
which a trace does not time.

A step lasts from the output before it to its own output, so that asynchronous scheduling, in which steps overlap,
counts no time twice, and what the engine does between two steps counts with the later one. Where the engine had
nothing to do in between (every request it knew had finished, or its calls scheduled nothing), the step lasts from its
own begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.timing.costs import WORK
from kvtrace_traces.trace import Trace

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
#: The columns of `StepWork.work`.
COLUMNS = WORK[:5]
KINDS = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class StepWork:
    """The steps of a trace, engine by engine, in order.

    `engine_index`: int16[n]; `step`: int32[n]; `work`: float64[n, 5], columns COLUMNS; `duration_ns`: float64[n], NaN
    where the trace does not tell; `waited`: bool[n], whether the engine had nothing to do before it.
    """

    engine_index: npt.NDArray[np.int16]
    step: npt.NDArray[np.int32]
    work: F64
    duration_ns: F64
    waited: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.step)

    @property
    def kind(self) -> npt.NDArray[np.int8]:
        """int8[n]: the kind of batch, as an index into KINDS."""
        prefill, decode = self.work[:, 1] > 0, self.work[:, 3] > 0
        return np.where(prefill & decode, 2, np.where(decode, 1, 0)).astype(np.int8)


def step_work(trace: Trace) -> StepWork:
    """The work and the durations of every step of `trace`; engines are kept apart, and follow each other."""
    parts = [_of_engine(trace, int(header["engine_index"])) for header in trace.engines]
    return StepWork(
        np.concatenate([part.engine_index for part in parts]),
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.work for part in parts]),
        np.concatenate([part.duration_ns for part in parts]),
        np.concatenate([part.waited for part in parts]),
    )


def _of_engine(trace: Trace, index: int) -> StepWork:
    mine = pl.col("engine_index") == index
    steps = trace.steps.filter(mine).sort("step")
    requests = trace.requests.filter(mine)
    spans = trace.step_spans.filter(mine & (pl.col("tokens") > 0)).join(
        requests.select("request", "prompt_tokens"), on="request", how="left"
    )
    waited = _waited(steps, requests)
    return StepWork(
        steps["engine_index"].to_numpy(),
        steps["step"].to_numpy(),
        _work(steps["step"].to_numpy().astype(np.int64), spans),
        _durations_ns(steps, waited),
        waited,
    )


def _work(numbers: I64, spans: pl.DataFrame) -> F64:
    """float64[n, 5]: the work of the steps `numbers` (rising), from the stretches in which requests were scheduled.

    Within a stretch everything is linear in the step, so sums of slopes and intercepts over the steps are enough, and
    the rows of a step need not be unfolded. Sums are whole numbers modulo 2^64, hence exact where the result is.
    """
    first = spans["first_step"].to_numpy().astype(np.int64)
    stop = first + spans["steps"].to_numpy()
    tokens = spans["tokens"].to_numpy().astype(np.int64)
    computed = spans["computed_before"].to_numpy().astype(np.int64)
    prompt = spans["prompt_tokens"].fill_null(2**31 - 1).to_numpy().astype(np.int64)
    # One token at a time is prefill until the prompt is computed; more at a time always is.
    turn = np.where(tokens == 1, np.clip(first + prompt - computed, first, stop), stop)
    token = _summed(numbers, first, turn, np.zeros_like(tokens), tokens)
    at_zero = computed - tokens * first  # tokens computed before, were the stretch to begin at step 0
    pair = _summed(numbers, first, turn, tokens * tokens, tokens * at_zero + tokens * (tokens + 1) // 2)
    row = _summed(numbers, turn, stop, np.zeros_like(tokens), np.ones_like(tokens))
    context = _summed(numbers, turn, stop, np.ones_like(tokens), at_zero + 1)
    return np.column_stack([np.ones(len(numbers)), token, pair, row, context]).astype(np.float64)


def _summed(numbers: I64, first: I64, stop: I64, slope: I64, intercept: I64) -> I64:
    """int64[n]: at each step s of `numbers`, the sum of slope * s + intercept of the stretches, first <= s < stop."""
    begins, ends = np.searchsorted(numbers, first), np.searchsorted(numbers, stop)
    change = np.zeros((2, len(numbers) + 1), np.int64)
    for total, each in zip(change, (slope, intercept), strict=True):
        np.add.at(total, begins, each)
        np.subtract.at(total, ends, each)
    slopes, intercepts = change[:, :-1].cumsum(axis=1)
    found: I64 = slopes * numbers + intercepts
    return found


def _waited(steps: pl.DataFrame, requests: pl.DataFrame) -> npt.NDArray[np.bool_]:
    """bool[n]: whether the engine had nothing to do just before a step."""
    numbers = steps["step"].to_numpy()
    ended = requests.drop_nulls("finish_step").select(pl.max_horizontal("arrival_step", "finish_step")).to_series()
    began, done = np.sort(requests["arrival_step"].to_numpy()), np.sort(ended.to_numpy())
    before = np.concatenate([[-1], numbers[:-1]]) if len(numbers) else numbers
    known = np.searchsorted(began, before, side="right")
    finished = np.searchsorted(done, before, side="right")
    found: npt.NDArray[np.bool_] = (known <= finished) | (steps["empty_calls"].to_numpy() > 0)
    return found


def _durations_ns(steps: pl.DataFrame, waited: npt.NDArray[np.bool_]) -> F64:
    start = steps["start_ns"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    ends = steps["end_ns"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    last = np.fmax.accumulate(np.concatenate([[np.nan], ends[:-1]])) if len(ends) else ends
    from_begin = np.isnan(last) | (waited & (start > last))
    found: F64 = ends - np.where(from_begin, start, last)
    return found
