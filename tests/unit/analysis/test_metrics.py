"""Figures read off a run, against an obvious twin that walks the events one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import polars as pl

import kvtrace
from kvtrace import metrics


def walked(trace: kvtrace.Trace) -> list[dict[str, int]]:
    """`metrics.occupancy`, slowly."""
    usable = trace.header["num_blocks"] - 1
    events = trace.block_events.to_dicts()
    references: dict[int, int] = {}
    cached: set[int] = set()
    rows, at = [], 0
    for step in trace.steps.to_dicts():
        while at < len(events) and events[at]["time_ns"] <= step["start_ns"]:
            event = events[at]
            block, kind = event["block"], event["kind"]
            if kind in ("allocate", "hit"):
                references[block] = references.get(block, 0) + 1
            elif kind == "free":
                references[block] -= 1
            elif kind == "fill":
                cached.add(block)
            elif kind == "evict":
                cached.discard(block)
            elif kind == "reset":
                cached.clear()
            at += 1
        idle = sum(references[block] == 0 for block in cached)
        used = sum(count > 0 for count in references.values())
        rows.append({"step": step["step"], "used": used, "cached_idle": idle, "free": usable - used - idle})
    return rows


def test_occupancy_is_what_the_events_say(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    found = metrics.occupancy(trace.reader, trace.header)
    assert found.to_dicts() == walked(trace)
    usable = trace.header["num_blocks"] - 1
    assert found.select(pl.sum_horizontal("used", "cached_idle", "free").unique()).to_series().to_list() == [usable]


def test_engines_are_counted_apart(two_engines: Path, thrash: Path) -> None:
    one, two = kvtrace.open(thrash), kvtrace.open(two_engines)
    for header in two.engines:
        assert metrics.occupancy(two.reader, header).equals(metrics.occupancy(one.reader, one.header))
        assert metrics.own_hits(two.reader, header) == metrics.own_hits(one.reader, one.header)


def test_own_hits_are_the_requests_cached_tokens(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    own = metrics.own_hits(trace.reader, trace.header)
    admitted = trace.requests.filter(pl.col("cached_tokens").is_not_null())
    assert own is not None
    assert own["requests"] == admitted.height
    assert own["token_hits"] == admitted["cached_tokens"].sum()
    assert own["token_lookups"] == admitted["prompt_tokens"].sum()


def test_a_trace_without_a_cache_has_no_occupancy(thrash: Path) -> None:
    trace = kvtrace.open(thrash)
    assert metrics.occupancy(trace.reader, {**trace.header, "num_blocks": None}).is_empty()
    assert metrics.own_hits(SimpleNamespace(lookups=trace.lookups.clear()), trace.header) is None  # type: ignore[arg-type]
