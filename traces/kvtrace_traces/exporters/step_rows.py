"""`step_requests` in pieces: expanded from its run-length form a few steps at a time, so that it never lies in memory
as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_traces import tables
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def pieces(spans: pl.DataFrame, most_rows: int) -> Iterator[pl.DataFrame]:
    """Frames of the table `step_requests`, by engine, step and request.

    `spans` is the table `step_spans`. No frame has more than `most_rows` rows, unless a single step has more. An empty
    table is one empty frame.
    """
    found = False
    for engine in spans.partition_by("engine_index", maintain_order=True):
        index = int(engine["engine_index"][0])
        for columns in _pieces_of_engine(engine, most_rows):
            found = True
            rows = len(columns["step"])
            yield tables.frame("step_requests", {"engine_index": np.full(rows, index, np.int16), **columns})
    if not found:
        yield pl.DataFrame(schema=tables.schema("step_requests"))


def _pieces_of_engine(spans: pl.DataFrame, most_rows: int) -> Iterator[dict[str, Any]]:
    # By request: the rows of a step come out in the order in which its spans are met.
    first, steps, tokens, computed, request = (
        np.ascontiguousarray(spans[name].to_numpy(), np.int32)
        for name in ("first_step", "steps", "tokens", "computed_before", "request")
    )
    some = np.flatnonzero(steps > 0)
    if not some.size:
        return
    order = some[np.argsort(first[some], kind="stable")]
    begins = first[order]
    low, past = int(begins[0]), int((first[some].astype(np.int64) + steps[some]).max())
    many = _rows_per_step(first, steps, low, past)
    bounds = _bounds(many, most_rows)
    open_spans = np.empty(0, np.int64)
    taken = 0
    for begin, end in zip(bounds[:-1] + low, bounds[1:] + low, strict=True):
        until = int(np.searchsorted(begins, end))
        open_spans = np.concatenate([open_spans, order[taken:until]])
        taken = until
        open_spans = open_spans[np.lexsort((first[open_spans], request[open_spans]))]
        counts = many[begin - low : end - low]
        at = np.cumsum(counts) - counts
        rows = int(counts.sum())
        if rows:
            out = np.empty((4, rows), np.int32)
            _expand(open_spans, first, steps, tokens, computed, request, int(begin), int(end), at, out)
            yield dict(zip(("step", "request", "tokens", "computed_before"), out, strict=True))
        open_spans = open_spans[first[open_spans].astype(np.int64) + steps[open_spans] > end]


def _rows_per_step(first: I32, steps: I32, low: int, past: int) -> I64:
    """int64[past - low]: the spans that run through each step."""
    change = np.zeros(past - low + 1, np.int64)
    np.add.at(change, first[steps > 0] - low, 1)
    np.subtract.at(change, first[steps > 0].astype(np.int64) + steps[steps > 0] - low, 1)
    return np.cumsum(change[:-1])


def _bounds(many: I64, most_rows: int) -> I64:
    """Where the pieces begin and end, counted from the first step."""
    total = np.cumsum(many)
    bounds = [0]
    while bounds[-1] < many.size:
        before = int(total[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(total, before + most_rows, "right"))))
    return np.array(bounds, np.int64)


@njit(nogil=True)
def _expand(
    chosen: I64, first: I32, steps: I32, tokens: I32, computed: I32, request: I32, begin: int, end: int, at: I64,
    out: I32,
) -> None:  # fmt: skip
    """Fills `out` int32[4, rows] with step, request, tokens and tokens computed before. `at` int64[end - begin]: where
    the rows of each step begin; they are counted up."""
    for k in range(chosen.size):
        i = chosen[k]
        for step in range(max(begin, first[i]), min(end, first[i] + steps[i])):
            row = at[step - begin]
            at[step - begin] = row + 1
            out[0, row] = step
            out[1, row] = request[i]
            out[2, row] = tokens[i]
            out[3, row] = computed[i] + (step - first[i]) * tokens[i]
