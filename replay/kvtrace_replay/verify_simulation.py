"""The strongest check of a trace: its requests, run through the engine's rules again, must give the same rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.recorded import Recorded, recorded
from kvtrace_replay.schedulers.settings import Settings, own_settings
from kvtrace_replay.schedulers.sweep import why_not_exact
from kvtrace_replay.verify_tables import check
from kvtrace_traces import open_trace
from kvtrace_traces.errors import KvtraceError, UsageError

NAME = "simulation"
RULE = (
    "the scheduler's rules, run again at the trace's own settings, give every step, lookup, preemption and block event"
)
#: What is no hindrance: a version that the tracer was never checked on is checked here; of requests that the trace does
#: not see end, what it sees must come out; and a run simulated with an eviction policy comes out again.
CHECKED_ALL_THE_SAME = ("untested-engine", "unfinished-requests", "policy")
#: Of `sweep.WHY`, what lets a simulated run reach tokens that it does not know.
UNKNOWN_TOKENS = ("unfinished-requests", "aborted-beyond-record", "no-engine")
#: The columns that must agree, by table; the last names where a row is. Times are the clock's, identities are compared
#: by their hashes.
COLUMNS = {
    "steps": ("requests", "tokens", "running", "waiting", "free_blocks", "preempted", "empty_calls", "step"),
    "step_spans": ("request", "steps", "tokens", "computed_before", "first_step"),
    "lookups": ("request", "tokens_asked", "tokens_hit", "after_preemption", "step"),
    "preemptions": ("request", "blocks_lost", "tokens_lost", "step"),
    "block_events": ("kind", "request", "block", "hash", "group", "step"),
    "requests": (
        "request", "arrival_step", "cached_tokens", "preemptions", "first_step", "last_step", "output_tokens",
        "finish_reason", "finish_step",
    ),
}  # fmt: skip


def simulation(trace: Any, header: dict[str, Any]) -> dict[str, Any]:
    """The check of one engine of `trace`; `skipped` says why where its prediction is not bound to be exact."""
    try:
        source = recorded(trace, header["engine_index"], carried=True)
        own = own_settings(source.header)
    except KvtraceError as error:
        return skip_simulation(str(error))
    why = [name for name in why_not_exact(trace, source, own, own, "step", None) if name not in CHECKED_ALL_THE_SAME]
    if why:
        return skip_simulation(f"the prediction is not bound to be exact: {', '.join(why)}")
    unknown = unknown_tokens(trace, header)
    if unknown is not None:
        return skip_simulation(unknown)
    partial = source.unfinished > 0 or not trace.complete
    back = np.flatnonzero(np.diff(source.arrival_step) < 0)
    if back.size:
        return check(NAME, RULE, source.steps, 1, f"request {back[0] + 1} arrives in a step before request {back[0]}'s")
    try:
        with tempfile.TemporaryDirectory(prefix="kvtrace-verify-") as folder:
            other = _simulated(Path(folder) / "simulated.kvt", trace, source, own)
            return _compared(trace, other, header["engine_index"], partial)
    except UsageError as error:  # a request that can never be served
        if partial:
            return skip_simulation(f"requests that the trace does not see end cannot be run to their ends: {error}")
        return check(NAME, RULE, source.steps, 1, str(error))


def unknown_tokens(trace: Any, header: dict[str, Any]) -> str | None:
    """Why a simulated run's hits are not bound to be the longest, None where they are.

    Blocks of tokens that the run did not know are cached, and hit by nobody. In its log they have names like any other,
    so that a preempted request seems to pass over blocks of its own.
    """
    why = [name for name in header.get("simulated", {}).get("why", ()) if name in UNKNOWN_TOKENS]
    if not why or not _mine(trace.preemptions, header["engine_index"]).height:
        return None
    return f"what preempted requests generated may not be known, and is then not hit again: {', '.join(why)}"


def skip_simulation(why: str) -> dict[str, Any]:
    """The check where it was not made."""
    return check(NAME, RULE, 0, 0, skipped=why)


def _simulated(path: Path, trace: Any, source: Recorded, own: Settings) -> Any:
    # Requests without an end run on to their maximum, which need not fit: what is beyond the trace does not count.
    requests = _mine(trace.requests, source.header["engine_index"]).sort("request")
    room = np.where(requests["finish_reason"].is_null(), (own.num_blocks - 1) * own.block_size, source.stop)
    write_run(path, replace(source, stop=np.minimum(source.stop, room).astype(np.int32)), own)
    return open_trace(path)


def _compared(trace: Any, other: Any, index: int, partial: bool) -> dict[str, Any]:
    """Compare every table; where the trace ends before its requests do (`partial`), as far as it goes."""
    last: Any = _mine(trace.steps, index)["step"].max()
    idle = _after_idling(_mine(trace.requests, index), last)
    checked = mismatches = 0
    first: tuple[int, str] | None = None
    for table, columns in COLUMNS.items():
        told = _table(trace, index, table, columns)
        again = _table(other, int(other.header["engine_index"]), table, columns)
        if table == "steps":
            told, again = (_without_idle_calls(frame, idle) for frame in (told, again))
        if partial:
            told, again = _as_far_as_told(table, told, again, last)
        wrong, where = _differences(table, told, again)
        checked += told.height
        mismatches += wrong
        if where and (first is None or where[0] < first[0]):
            first = where
    return check(NAME, RULE, checked, mismatches, first[1] if first else None)


def _mine(frame: pl.DataFrame, index: int) -> pl.DataFrame:
    return frame.filter(pl.col("engine_index") == index)


def _table(trace: Any, index: int, table: str, columns: tuple[str, ...]) -> pl.DataFrame:
    frame = _mine(getattr(trace, table), index)
    if table == "block_events":
        hashes = pl.Series(trace.chains(index).hashes)
        frame = frame.with_columns(hash=pl.lit(hashes).gather(pl.col("identity")))
    if table == "step_spans":
        frame = frame.sort("first_step", "request")
    return frame.select(columns)


def _after_idling(requests: pl.DataFrame, last: int) -> pl.Series:
    """The steps up to `last` before which every request that had arrived was done."""
    steps = np.arange(last + 1)
    # Who is aborted before the step that would have seen it ends, by its number, in the step before that.
    ends = requests.select(pl.max_horizontal("finish_step", "arrival_step").filter(pl.col("finish_step").is_not_null()))
    arrived = np.searchsorted(np.sort(requests["arrival_step"].to_numpy()), steps)
    ended = np.searchsorted(np.sort(ends.to_series().to_numpy()), steps)
    return pl.Series(np.flatnonzero(arrived == ended))


def _without_idle_calls(steps: pl.DataFrame, idle: pl.Series) -> pl.DataFrame:
    # Whether an idle engine's last, empty call came before the next arrival is a matter of the clock, and of no effect.
    return steps.with_columns(pl.when(~pl.col("step").is_in(idle.implode())).then("empty_calls").alias("empty_calls"))


def _as_far_as_told(
    table: str, told: pl.DataFrame, again: pl.DataFrame, last: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both tables without what may lie behind the end of the trace, whose last step is `last`.

    Of the last step, what came after its scheduler call may be missing; rows of earlier steps may not.
    """
    step = COLUMNS[table][-1]
    if table == "requests":
        ended = told["finish_step"].is_not_null()
        open_ = told.filter(~ended).join(again, on="request", how="left", suffix="_again")
        early = open_.filter(pl.col("finish_step_again") < last)["request"].implode()
        told = told.filter(ended | told["request"].is_in(early))
        return told, again.join(told.select("request"), on="request", how="semi", maintain_order="left")
    if table == "step_spans":
        again = again.filter(pl.col(step) <= last).with_columns(
            steps=pl.min_horizontal("steps", last + 1 - pl.col(step)).cast(pl.Int32)
        )
        return told, again
    due = again.filter(pl.col(step) <= last if table == "steps" else pl.col(step) < last).height
    return told, again.head(max(due, told.height))


def _differences(table: str, told: pl.DataFrame, again: pl.DataFrame) -> tuple[int, tuple[int, str] | None]:
    """How many rows differ, and the step and the words of the first."""
    rows = min(told.height, again.height)
    mine, other = told.head(rows), again.head(rows)
    unequal = pl.DataFrame({name: mine[name].ne_missing(other[name]) for name in told.columns})
    wrong = unequal.select(pl.any_horizontal(pl.all()).arg_true()).to_series()
    missing = abs(told.height - again.height)
    total = wrong.len() + missing
    if not total:
        return 0, None
    at = int(wrong[0]) if wrong.len() else rows
    here = told.row(at, named=True) if at < told.height else {}
    there = again.row(at, named=True) if at < again.height else {}
    step = COLUMNS[table][-1]
    steps = [row[step] for row in (here, there) if row and row[step] is not None]
    place = f"{table} row {at} ({_place(here or there, step)})"
    if not here or not there:
        words = "is not in the trace" if there else "is not in the simulated run"
    else:
        names = [name for name in told.columns if here[name] != there[name]]
        words = ", ".join(f"{name} {_word(here[name])}, simulated {_word(there[name])}" for name in names[:3])
    return total, (min(steps, default=0), f"{place}: {words}")


def _place(row: dict[str, Any], step: str) -> str:
    words = [] if row[step] is None else [f"step {row[step]}"]
    if row.get("request") is not None:
        words.append(f"request {row['request']}")
    return ", ".join(words)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
