"""All findings about a trace, ranked, as a frame."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import polars as pl

from kvtrace.advice.case import Case
from kvtrace.advice.declare import Figure, Finding, advisers
from kvtrace.api import Trace
from kvtrace.sql import Database
from kvtrace_replay.timing.models import timing_for

LEAST_REQUESTS = 30
_USED_AGAIN = ("block_lifetimes", "occupancy", "preemptions", "step_phases")
_FIGURE = pl.Struct(
    {"name": pl.String, "value": pl.Float64, "unit": pl.String, "command": pl.String, "column": pl.String,
     "where": pl.String}
)  # fmt: skip
SCHEMA: dict[str, Any] = {
    "engine_index": pl.Int16, "rank": pl.Int32, "kind": pl.String, "text": pl.String, "value": pl.Float64,
    "unit": pl.String, "low": pl.Float64, "high": pl.Float64, "uncertainty": pl.String, "worth_tokens": pl.Float64,
    "seconds": pl.Float64, "formula": pl.String, "figures": pl.List(_FIGURE), "command": pl.String,
}  # fmt: skip
IMPORT_LACKS = (
    "An import tells of requests only. What the next GiB is worth, what a tier under the cache returns and what the "
    "deployment wastes cannot be known: there is no cache, there are no steps. `kvtrace replay TRACE --capacity N` "
    "answers for caches of your choice."
)
NO_CACHE = (
    "No request looked anything up: prefix caching was off, so hits and their price cannot be told from this run. "
    "`kvtrace simulate TRACE --prefix-caching` tells what it would find."
)


def advise(trace: Trace | str | os.PathLike[str], timing: str | None = None, link: str | None = None) -> pl.DataFrame:
    """What replays of a trace say about its deployment: a row for each finding, the most valuable first.

    `timing` names what steps and copies cost: a profile, its file, or GPU:MODEL; without it the steps of the trace tell
    what a token costs. `link` names the GPU whose link to the host moves blocks.

    Columns: engine_index; rank (from 1, per engine); kind; text; value, unit, low, high and uncertainty; worth_tokens
    (prompt tokens that acting on it spares; null where that is no number) and seconds (that in time, where the trace
    tells); formula (of value, over the names of the figures); figures (name, value, unit, the command that prints it,
    its column there, and, as JSON, what the other columns of its row hold); command (that of the first figure).

    Raises KvtraceError where there is no trace, or no times to go with `link`, UsageError for unknown names.
    """
    import json

    import kvtrace

    opened = kvtrace.open(trace) if isinstance(trace, str | os.PathLike) else trace
    database = Database([opened], keep=_USED_AGAIN)
    profile = timing_for(opened.reader, timing, link) if timing or link else None
    rows: list[dict[str, Any]] = []
    for header in opened.engines:
        case = Case(opened, header, database, profile)
        found = sorted(_findings(case), key=lambda one: -1.0 if one.worth_tokens is None else one.worth_tokens)[::-1]
        for rank, finding in enumerate(found, 1):
            figures = [{**asdict(figure), "where": json.dumps(dict(figure.where))} for figure in finding.figures]
            plain = {name: getattr(finding, name) for name in SCHEMA if hasattr(finding, name)}
            rows.append({**plain, "engine_index": case.index, "rank": rank, "figures": figures})
    return pl.DataFrame([_without_nan(row) for row in rows], schema=SCHEMA, strict=False)


def _findings(case: Case) -> Iterator[Finding]:
    if case.requests < LEAST_REQUESTS:
        yield from _too_few(case)
        return
    for look in advisers().values():
        yield from look(case)
    if case.header.get("source") == "import":
        yield _unknown(case, IMPORT_LACKS)


def _too_few(case: Case) -> Iterator[Finding]:
    """What to say of a trace with too few requests."""
    known = _count(case)
    if known.value and not case.requests:
        yield _unknown(case, NO_CACHE)
        return
    text = (
        f"{case.requests:,} requests are too few to advise on: differences would be chance. Record at least "
        f"{LEAST_REQUESTS}, better thousands."
    )
    yield Finding("too-few", text, (known,), None, None, "", None, None, "none is possible")


def _unknown(case: Case, text: str) -> Finding:
    return Finding("unknown", text, (_count(case),), None, None, "", None, None, "cannot be known")


def _count(case: Case) -> Figure:
    (figure,) = case.ask(
        f"SELECT count(*) AS requests FROM requests WHERE engine_index = {case.index}", {"requests": "requests"}
    )
    return figure


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
