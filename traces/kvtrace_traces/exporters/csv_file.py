"""A CSV with a line per reference: ``request``, ``id``, ``time_ns``, ``tokens``, ``output_tokens`` (of the request's
prompt and output), as ``kvtrace import csv`` reads it. A request without blocks is one line without an id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_traces.exporters import exporter
from kvtrace_traces.exporters.references import references, summary, written

_ROWS = 1 << 20  # written at a time


@exporter("csv", "a CSV with a line per reference: request, id, time_ns, tokens, output_tokens")
def write(trace: Any, out: Path, force: bool) -> dict[str, Any]:
    """Write the references of ``trace``, one a line; see the module."""
    found = references(trace)
    lengths = np.diff(found.indptr)
    # Rows are references, and one for each request that has none.
    rows = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(np.maximum(lengths, 1), out=rows[1:])
    times = found.frame["arrival_ns"]
    requests = pl.DataFrame(
        {
            "request": found.frame["request"],
            "time_ns": pl.select(pl.when(times >= 0).then(times)).to_series(),
            "tokens": found.frame["prompt_tokens"],
            "output_tokens": found.frame["output_tokens"],
        }
    )
    with written(out, force) as file:
        file.write(b"request,id,time_ns,tokens,output_tokens\n")
        first = 0
        while first < len(lengths):
            last = max(first + 1, int(np.searchsorted(rows, rows[first] + _ROWS, "right")) - 1)
            many = np.maximum(lengths[first:last], 1)
            part = requests.slice(first, last - first).select(pl.all().gather(np.repeat(np.arange(len(many)), many)))
            some = np.repeat(lengths[first:last] > 0, many)
            ids = np.zeros(len(some), np.uint64)
            ids[some] = found.ids[found.indptr[first] : found.indptr[last]]
            named = pl.select(pl.when(pl.Series(some)).then(pl.Series(ids))).to_series().alias("id")
            part = part.with_columns(named).select("request", "id", "time_ns", "tokens", "output_tokens")
            part.write_csv(file, include_header=False)
            first = last
    return summary(out, found)
