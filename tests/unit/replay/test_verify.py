"""`verify` goes red: each kind of statement in a trace is made wrong, one at a time, and some check must see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace

SAMPLE = Path(__file__).resolve().parents[3] / "traces" / "samples" / "thrash.kvt"


def wrong(table: str, change: Any) -> list[str]:
    """The checks that fail when `table` of the sample is changed."""
    trace = open_trace(SAMPLE)
    trace.__dict__[table] = change(getattr(trace, table))
    return [check["name"] for check in verify(trace)["checks"] if check["mismatches"]]


def add(column: str, row: int, amount: int = 1) -> Any:
    """Adds to one value."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        here = pl.int_range(pl.len()) == row
        return frame.with_columns(
            pl.when(here)
            .then(pl.col(column) + amount)
            .otherwise(pl.col(column))
            .cast(frame[column].dtype)
            .alias(column)
        )

    return change


def drop(kind: str) -> Any:
    """Leaves out the hundredth event of a kind."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        rows = frame.with_row_index()
        gone = rows.filter(pl.col("kind") == kind)["index"][100]
        return rows.filter(pl.col("index") != gone).drop("index")

    return change


def test_the_sample_is_right() -> None:
    assert verify(open_trace(SAMPLE))["mismatches"] == 0


@pytest.mark.parametrize("kind", ["allocate", "hit", "fill", "free", "evict"])
def test_an_event_less(kind: str) -> None:
    assert wrong("block_events", drop(kind))


@pytest.mark.parametrize(
    ("table", "column", "seen_by"),
    [
        ("block_events", "block", None),
        ("block_events", "request", None),
        ("block_events", "step", "event steps"),
        ("lookups", "tokens_hit", "longest hit"),
        ("preemptions", "blocks_lost", "preemption costs"),
        ("preemptions", "tokens_lost", "preemption costs"),
        ("steps", "tokens", "step totals"),
        ("steps", "requests", "step totals"),
        ("steps", "free_blocks", "free blocks"),
        ("steps", "preempted", "preempted requests"),
        ("requests", "cached_tokens", "cached tokens"),
        ("requests", "preemptions", "preemption counts"),
        ("requests", "last_step", "first and last step"),
    ],
)
def test_a_figure_off_by_one(table: str, column: str, seen_by: str | None) -> None:
    found = wrong(table, add(column, 10))
    assert found
    assert seen_by is None or seen_by in found


def _step_that_ends_a_request() -> int:
    """The row of the step with whose output the first request ended."""
    trace = open_trace(SAMPLE)
    ended = trace.requests.filter(pl.col("finish_reason") == "length")["finish_ns"].min()
    return int(trace.steps.with_row_index().filter(pl.col("end_ns") == ended)["index"][0])


def test_an_output_that_ends_a_request_a_nanosecond_late() -> None:
    assert wrong("steps", add("end_ns", _step_that_ends_a_request())) == ["output times"]


@pytest.mark.parametrize("amount", [-(10**12), 10**12])
def test_an_output_out_of_order(amount: int) -> None:
    assert "output times" in wrong("steps", add("end_ns", 10, amount))


def test_no_lookups_at_all() -> None:
    assert "longest hit" in wrong("lookups", lambda frame: frame.head(0))
