"""Checks a trace against itself: everything the log says of the engine must follow from the rest of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay import pool
from kvtrace_replay.verify_simulation import simulation, skip_simulation, unknown_tokens
from kvtrace_replay.verify_tables import across, check
from kvtrace_traces.errors import KvtraceError

#: Reasons to be inexact that do not keep a trace from being followed: the state that a cut begins with is told.
FOLLOWED_ALL_THE_SAME = ("untested-engine", "carried-state")


def verify(trace: Any, allow_lossy: bool = False) -> dict[str, Any]:
    """Run all checks on ``trace`` (:class:`kvtrace_traces.Trace`).

    Returns ``{"requests", "mismatches", "checks": [{"name", "rule", "checked", "mismatches", "first", "skipped"}]}``:
    ``checked`` counts what was looked at, ``first`` says in words where the first mismatch is, ``skipped`` why a check
    could not be made. Raises :class:`KvtraceError` for a lossy trace unless ``allow_lossy``.
    """
    if trace.lossy and not allow_lossy:
        raise KvtraceError(f"{trace.path} is lossy (see `kvtrace info`): --allow-lossy checks what is left")
    checks: list[dict[str, Any]] = []
    for header in trace.engines:
        checks += _engine(trace, header)
    return {
        "requests": trace.requests.height,
        "mismatches": sum(check["mismatches"] for check in checks),
        "checks": checks,
    }


def _engine(trace: Any, header: dict[str, Any]) -> list[dict[str, Any]]:
    index = header["engine_index"]

    def mine(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.filter(pl.col("engine_index") == index)

    begun = trace.snapshot(index)
    carried = [] if begun is None else begun.live
    checks = _requests(trace, mine, {live.request: live.preemptions for live in carried})
    if header.get("source") == "import":
        return checks + _skip("an import has no scheduler steps and no block events")
    exact = not [name for name in header["inexact"] if name not in FOLLOWED_ALL_THE_SAME]
    checks += _steps(mine(trace.steps), mine(trace.step_spans), mine(trace.requests), header, exact)
    events = mine(trace.block_events)
    if not exact:
        return checks + _skip(f"the trace is marked inexact: {', '.join(header['inexact'])}")
    if trace.lossy and trace.recover == "skip":
        return checks + _skip("a part in the middle of the log is missing")
    return [*checks, *across(trace, mine, begun), *_pool(trace, header, events, mine), simulation(trace, header)]


def _skip(why: str) -> list[dict[str, Any]]:
    pool_check = check("block pool", "the block events rebuild the engine's pool", 0, 0, skipped=why)
    return [pool_check, skip_simulation(why)]


def _requests(trace: Any, mine: Any, before: dict[int, int]) -> list[dict[str, Any]]:
    """What is told of requests in several tables agrees. ``before``: preemptions before the trace began, by request."""
    requests, lookups, preemptions = mine(trace.requests), mine(trace.lookups), mine(trace.preemptions)
    first = lookups.filter(~pl.col("after_preemption")).group_by("request").agg(pl.col("tokens_hit", "step").first())
    loads = (
        mine(trace.offloads).filter(pl.col("kind") == "load").group_by("request", "step").agg(pl.col("tokens").sum())
    )
    joined = requests.join(first, on="request").join(loads, on=["request", "step"], how="left")
    wrong = joined.filter(pl.col("cached_tokens") != pl.col("tokens_hit") + pl.col("tokens").fill_null(0))
    counted = preemptions.group_by("request").agg(pl.len().cast(pl.Int32).alias("n"))
    told = requests.select("request", "preemptions").join(counted, on="request", how="left")
    earlier = pl.col("request").replace_strict(before, default=0, return_dtype=pl.Int32)
    unequal = told.filter(pl.col("preemptions") != pl.col("n").fill_null(0) + earlier)
    order = requests.filter(
        (pl.col("first_step") < pl.col("arrival_step"))
        | (pl.col("last_step") < pl.col("first_step"))
        | (pl.col("finish_step") < pl.col("last_step"))
        | (pl.col("output_tokens") > pl.col("max_tokens"))
    )
    return [
        check("cached tokens", "a request's cached tokens are its first lookup's hit, and what is loaded with it",
              joined.height, wrong.height, _first_request(wrong)),
        check("preemption counts", "a request's preemptions are the rows of the preemptions table", told.height,
               unequal.height, _first_request(unequal)),
        check("request order", "arrival, first step, last step and finish follow each other, and no request "
               "generates more than its maximum", requests.height, order.height, _first_request(order)),
    ]  # fmt: skip


def _first_request(frame: pl.DataFrame) -> str | None:
    return f"request {frame['request'][0]}" if frame.height else None


def _steps(
    steps: pl.DataFrame, spans: pl.DataFrame, requests: pl.DataFrame, header: dict[str, Any], exact: bool
) -> list[dict[str, Any]]:
    """Each step's totals are the sums over its requests, and computed tokens go on where they stopped."""
    n = int(steps["step"].max() or 0) + 2 if steps.height else 1  # type: ignore[arg-type]
    tokens, count = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    begin = spans["first_step"].to_numpy()
    end = begin + spans["steps"].to_numpy()
    for where, sign in ((begin, 1), (end, -1)):
        np.add.at(tokens, where, sign * spans["tokens"].to_numpy().astype(np.int64))
        np.add.at(count, where, sign)
    at = steps["step"].to_numpy()
    wrong = (np.cumsum(tokens)[at] != steps["tokens"].to_numpy()) | (
        np.cumsum(count)[at] != steps["requests"].to_numpy()
    )
    checks = [
        check("step totals", "the tokens and requests of a step are the sums over its requests", steps.height,
               int(wrong.sum()), f"step {at[wrong][0]}" if wrong.any() else None),
    ]  # fmt: skip
    budget = header.get("scheduler", {}).get("max_num_scheduled_tokens")
    if isinstance(budget, int):
        over = steps.filter(pl.col("tokens") > budget)
        checks.append(
            check("token budget", f"no step schedules more than {budget} tokens", steps.height, over.height,
                   f"step {over['step'][0]}" if over.height else None)
        )  # fmt: skip
    if exact:
        ordered = spans.sort("request", "first_step").with_columns(
            expected=(pl.col("computed_before") + pl.col("steps") * pl.col("tokens")).shift(1).over("request")
        )
        # Only a preemption, after which a request is looked up anew, may set it back.
        back = ordered.filter(pl.col("computed_before") != pl.col("expected")).group_by("request").agg(pl.len())
        excess = back.join(requests.select("request", "preemptions"), on="request").filter(
            pl.col("len") > pl.col("preemptions")
        )
        checks.append(
            check("computed tokens", "a request goes on where its last step stopped, unless it was preempted",
                   ordered.height, excess.height, _first_request(excess))
        )  # fmt: skip
    return checks


def _pool(trace: Any, header: dict[str, Any], events: pl.DataFrame, mine: Any) -> list[dict[str, Any]]:
    steps = mine(trace.steps)
    # The scheduler's own count of free blocks is taken at the end of its call: after the last event of the call, which
    # carries its begin as time, and before any event of a later time.
    starts = steps["start_ns"].to_numpy()
    rows = np.searchsorted(events["time_ns"].to_numpy(), starts, side="right").astype(np.int64)
    followed = pool.follow(trace, header["engine_index"], at=rows)
    told = steps["free_blocks"].to_numpy()
    wrong = np.flatnonzero(followed.free_counts != told)
    checks = [
        check("free blocks", "the engine's count of free blocks is that of the rebuilt pool", len(told), len(wrong),
               f"step {steps['step'][int(wrong[0])]}" if len(wrong) else None)
    ]  # fmt: skip
    kinds = events["kind"].to_physical().to_numpy()
    n = np.bincount(kinds, minlength=8)
    checked = {
        "free queue order": n[pool.ALLOCATE],
        "reference counts": n[pool.ALLOCATE] + n[pool.HIT] + n[pool.FREE],
        "evictions": n[pool.EVICT],
        "hits": n[pool.HIT],
        "longest hit": mine(trace.lookups).height,
        "fills": n[pool.FILL],
        "frees": n[pool.FREE],
    }
    policy = header.get("scheduler", {}).get("eviction_policy") or "vllm"
    unknown = pool.uncached_first(header) is None
    for i, (name, rule) in enumerate(pool.CHECKS):
        skip = None
        if name == "free queue order" and policy != "vllm":
            skip = f"blocks were simulated under the eviction policy {policy}"
        elif name == "free queue order" and unknown:
            skip = "the order of this engine version's free queue is not known"
        elif name == "longest hit":
            skip = unknown_tokens(trace, header)
        row = int(followed.first[i])
        where = None
        if row >= 0:
            event = events.row(row, named=True)
            where = f"event {row} (step {event['step']}, {event['kind']} of block {event['block']})"
        wrong_rows = 0 if skip else int(followed.mismatches[i])
        checks.append(check(name, rule, checked[name], wrong_rows, None if skip else where, skip))
    held = {number: len(blocks) for number, blocks in followed.state.tables.items()}
    finished = set(mine(trace.requests).filter(pl.col("finish_step").is_not_null())["request"].to_list())
    left = sorted(set(held) & finished)
    checks.append(
        check("nothing kept", "a finished request holds no block", len(finished), len(left),
               f"request {left[0]} holds {held[left[0]]} blocks" if left else None)
    )  # fmt: skip
    return checks
