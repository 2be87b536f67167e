"""Checks of a trace's tables against each other: what several of them tell of one thing must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from kvtrace_traces.snapshot import Live, Snapshot

_NEVER = -(1 << 62)  # ns: before anything that a trace tells of


def check(
    name: str, rule: str, checked: int, mismatches: int, first: str | None = None, skipped: str | None = None
) -> dict[str, Any]:
    """One row of what ``verify`` returns."""
    return {
        "name": name,
        "rule": rule,
        "checked": int(checked),
        "mismatches": int(mismatches),
        "first": first,
        "skipped": skipped,
    }


def across(trace: Any, mine: Any, begun: Snapshot | None = None) -> list[dict[str, Any]]:
    """Checks that need block events of an exactly followed engine. ``mine(frame)``: the rows of that engine;
    ``begun``: the state in which the trace begins."""
    carried = [] if begun is None else begun.live
    preemptions, spans, events = mine(trace.preemptions), mine(trace.step_spans), mine(trace.block_events)
    steps, requests = mine(trace.steps), mine(trace.requests)
    return [
        _costs(preemptions, spans, steps, events, carried),
        _preempted(preemptions, steps, 0 if begun is None else begun.preempted),
        _bounds(requests, spans, carried),
        _times(events, steps),
        _outputs(steps, requests, None if begun is None else begun.due_ns),
    ]


def _costs(
    preemptions: pl.DataFrame, spans: pl.DataFrame, steps: pl.DataFrame, events: pl.DataFrame, carried: Sequence[Live]
) -> dict[str, Any]:
    """A preemption costs the blocks given up at its time, and the tokens computed until then."""
    freed = (
        events.filter(pl.col("kind") == "free")
        .group_by("request", "time_ns")
        .agg(pl.len().cast(pl.Int32).alias("freed"))
    )
    ends = spans.select(
        "request",
        step=(pl.col("first_step") + pl.col("steps") - 1).cast(pl.Int32),
        computed=pl.col("computed_before") + pl.col("steps") * pl.col("tokens"),
    )
    ends = ends.join(steps.select("step", began="start_ns"), on="step", how="left").select(
        "request", "began", "computed"
    )
    before = pl.DataFrame([(live.request, None, live.computed) for live in carried], schema=ends.schema, orient="row")
    ends = pl.concat([before, ends]).with_columns(pl.col("began").fill_null(_NEVER)).sort("began")
    told = preemptions.join(freed, on=["request", "time_ns"], how="left").sort("time_ns")
    # By the clock: a call without tokens has the number of the step after it, which may be the one that resumes the
    # request, and what a reset preempts has the number of the step before. What a call does is of the moment it began.
    told = told.with_columns(before=pl.col("time_ns") - 1)
    told = told.join_asof(ends, left_on="before", right_on="began", by="request", check_sortedness=False)
    wrong = told.filter(
        (pl.col("blocks_lost") != pl.col("freed").fill_null(0))
        | (pl.col("tokens_lost") != pl.col("computed").fill_null(0))
    )
    first = f"request {wrong['request'][0]} in step {wrong['step'][0]}" if wrong.height else None
    rule = "a preempted request gave up the blocks it held, and lost the tokens it had computed"
    return check("preemption costs", rule, told.height, wrong.height, first)


def _preempted(preemptions: pl.DataFrame, steps: pl.DataFrame, before: int) -> dict[str, Any]:
    """Steps count the preemptions since the step before; what came after the last step is in none."""
    end = steps["start_ns"].max()
    rows = preemptions.filter(pl.col("time_ns") <= end).height if end is not None else 0
    told = int(steps["preempted"].sum()) - before
    rule = "the steps count as many preemptions as there are rows of them"
    return check("preempted requests", rule, rows, abs(rows - told), None)


def _bounds(requests: pl.DataFrame, spans: pl.DataFrame, carried: Sequence[Live]) -> dict[str, Any]:
    """First and last step of a request are those of its spans."""
    bounds = spans.group_by("request").agg(
        first=pl.col("first_step").min(), last=(pl.col("first_step") + pl.col("steps") - 1).max().cast(pl.Int32)
    )
    told = requests.join(bounds, on="request", how="left")
    begun = [live.request for live in carried if live.begun]  # their first step was before
    wrong = told.filter(
        (pl.col("first_step").ne_missing(pl.col("first")) & ~pl.col("request").is_in(begun))
        | pl.col("last_step").ne_missing(pl.col("last"))
    )
    first = f"request {wrong['request'][0]}" if wrong.height else None
    rule = "a request's first and last step are those in which it was scheduled"
    return check("first and last step", rule, told.height, wrong.height, first)


def _times(events: pl.DataFrame, steps: pl.DataFrame) -> dict[str, Any]:
    """Blocks are handed out and hit within scheduler calls: at the time at which their step began."""
    asked = events.filter(pl.col("kind").is_in(["allocate", "hit"])).select("step", "time_ns", "group")
    joined = asked.join(steps.select("step", "start_ns"), on="step", how="left")
    wrong = joined.filter(pl.col("time_ns").ne_missing(pl.col("start_ns")) | pl.col("group").ne_missing(0))
    first = f"step {wrong['step'][0]}" if wrong.height else None
    rule = "blocks are handed out and hit in the scheduler call of their step"
    return check("event steps", rule, joined.height, wrong.height, first)


def _outputs(steps: pl.DataFrame, requests: pl.DataFrame, due_ns: int | None) -> dict[str, Any]:
    """Outputs arrive after their call began, in the order of the calls; a request that ends by itself ends with one.
    ``due_ns``: when the output came that was due as the trace began, if one was."""
    arrived = steps.filter(pl.col("end_ns").is_not_null())
    late = arrived.filter(
        (pl.col("end_ns") < pl.col("start_ns")) | (pl.col("end_ns") < pl.col("end_ns").shift(1).fill_null(0))
    )
    ended = requests.filter(pl.col("finish_reason").cast(pl.String).is_in(["stop", "length"]))
    apart = ended.join(arrived, left_on="finish_ns", right_on="end_ns", how="anti").filter(
        pl.col("finish_ns").ne_missing(pl.lit(due_ns, pl.Int64))
    )
    first = f"step {late['step'][0]}" if late.height else None
    if apart.height and first is None:
        first = f"request {apart['request'][0]} ended, and no output arrived then"
    rule = "outputs arrive in the order of their steps, and a request that stops or is full does so with one"
    return check("output times", rule, arrived.height + ended.height, late.height + apart.height, first)
