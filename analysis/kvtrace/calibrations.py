"""Profiles from Python and for the command line: what a step and a moved block cost, as a table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace_replay.timing.profile import Profile

if TYPE_CHECKING:
    from kvtrace.api import Trace

UNITS = {
    "call": "ns", "prefill_token": "ns/token", "prefill_pair": "ns/pair", "decode_row": "ns/row",
    "decode_context": "ns/token",
}  # fmt: skip
_SCHEMA = {
    "part": pl.String, "at": pl.String, "metric": pl.String, "value": pl.Float64, "unit": pl.String,
    "low": pl.Float64, "high": pl.Float64, "why": pl.String,
}  # fmt: skip


def calibrate(trace: Trace | str | os.PathLike[str], link: str | None = None) -> Profile:
    """The costs of steps, learnt from a trace's own; `link`: a GPU or a profile whose link to the host is taken over.

    Raises KvtraceError where the trace cannot tell.
    """
    import kvtrace
    from kvtrace_replay.timing.models import timing_for

    opened: Any = kvtrace.open(trace) if isinstance(trace, str | os.PathLike) else trace
    return timing_for(opened.reader, None, link)


def table(profile: Profile) -> pl.DataFrame:
    """Every figure of a profile, a row each.

    Columns: part (cost, stretch, error, link), at (the batches or the way over the link that it is about), metric,
    value (f64), unit, low and high (f64, the spread of a cost), why (the reason of a cost that is not known).
    """
    rows: list[tuple[Any, ...]] = []
    for name, value in profile.costs.items():
        low, high = profile.spread.get(name, (None, None))
        rows.append(("cost", None, name, value, UNITS[name], low, high, profile.unidentified.get(name)))
    rows.append(("stretch", None, "stretch", profile.stretch, "ratio", None, None, None))
    for error in profile.errors:
        for metric in ("steps", "median", "p95", "bias"):
            unit = "steps" if metric == "steps" else "ratio"
            rows.append(("error", error.batch, metric, float(getattr(error, metric)), unit, None, None, None))
    for way, cost in profile.link.items():
        for metric, unit in (("transfer_ns", "ns"), ("copy_ns", "ns/copy"), ("bytes_per_s", "bytes/s")):
            rows.append(("link", way, metric, getattr(cost, metric), unit, None, None, None))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")
