"""All metrics of a trace, as `kvtrace stats` prints them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace.metrics import hits, memory, passes, reuse, waiting
from kvtrace.metrics.declare import MISSING, Group

if TYPE_CHECKING:
    from kvtrace.api import Trace

GROUPS = (
    passes.THROUGHPUT, passes.BALANCE, memory.USE, memory.USE_OVER_TIME, memory.LIFETIMES, memory.SPREAD, hits.HITS,
    hits.HITS_BY_DEPTH, hits.HITS_BY_TURN, hits.HITS_OVER_TIME, hits.COST, reuse.REUSE, reuse.DISTANCES,
    reuse.TIMES, reuse.BY_TURN,
    reuse.WORKING_SET, reuse.HOT, waiting.PREEMPTION, waiting.LATENCY, waiting.ITL,
)  # fmt: skip
_USED_AGAIN = ("block_lifetimes", "occupancy", "preemptions", "step_phases")
_NO_TURNS = "the trace does not tell turns: only some imports do"
_SCHEMA = {
    "engine_index": pl.Int16, "group": pl.String, "metric": pl.String, "at": pl.String, "value": pl.Float64,
    "unit": pl.String, "why": pl.String,
}  # fmt: skip


def stats(trace: Trace | str | os.PathLike[str]) -> pl.DataFrame:
    """Every metric of a trace, a row for each engine and metric.

    Columns: engine_index (i16), group, metric, at (which part of the group it is about; null for all), value (f64,
    null where unknown), unit, why (the reason of a null). Definitions: `docs/metrics.md`.

    Raises KvtraceError where there is no trace.
    """
    import kvtrace
    from kvtrace.sql import Database

    opened = kvtrace.open(trace) if isinstance(trace, str | os.PathLike) else trace
    database = Database([opened], keep=_USED_AGAIN)
    engines = [int(header["engine_index"]) for header in opened.engines]
    turns = "turn" in opened.requests.columns
    known = {name: set(database.query(query)["engine_index"]) for name, (query, _) in MISSING.items()}
    rows: list[dict[str, Any]] = []
    for group in GROUPS:
        missing = {engine: _missing(group, engine, known, turns) for engine in engines}
        asked = any(why is None for why in missing.values())
        found = database.query(group.sql).to_dicts() if asked else []
        for engine in engines:
            mine = [row for row in found if row["engine_index"] == engine] if missing[engine] is None else []
            for row in mine or [{}]:
                rows += _rows(group, engine, row, missing[engine])
    return pl.DataFrame(rows, schema=_SCHEMA)


def _missing(group: Group, engine: int, known: Mapping[str, set[int]], turns: bool) -> str | None:
    """Why an engine has no value for a group; None where it has what is needed."""
    for need in group.needs:
        if need == "turns":
            if not turns:
                return _NO_TURNS
        elif engine not in known[need]:
            return MISSING[need][1]
    return None


def _rows(group: Group, engine: int, found: Mapping[str, Any], missing: str | None) -> list[dict[str, Any]]:
    rows = []
    for metric in group.metrics:
        value = found.get(metric.name)
        value = None if value is None or not math.isfinite(value) else float(value)
        rows.append(
            {
                "engine_index": engine, "group": group.name, "metric": metric.name, "at": found.get("at"),
                "value": value, "unit": metric.unit, "why": (missing or metric.none) if value is None else None,
            }
        )  # fmt: skip
    return rows


def reference() -> str:
    """The definitions, as Markdown: what `docs/metrics.md` ends with."""
    parts = []
    for group in GROUPS:
        by = f" One value for each {group.at}." if group.at else ""
        parts.append(f"## {group.title}\n\n`{group.name}`.{by}\n\n| metric | unit | formula |\n|---|---|---|")
        parts += [f"| `{metric.name}` | {metric.unit} | {metric.formula} |" for metric in group.metrics]
        parts.append("")
    return "\n".join(parts)
