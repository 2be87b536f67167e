"""Comparing what two readers make of a log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import slow_reader

from kvtrace_traces import Trace, open_trace

TABLES = ("requests", "steps", "step_requests", "lookups", "preemptions", "block_events")


def rows(trace: Trace, table: str) -> list[dict[str, Any]]:
    """The rows of a table as dicts, without the engine, NaN as None."""
    frame = getattr(trace, table).drop("engine_index")
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in frame.to_dicts()
    ]


def assert_same(trace: Trace, expected: dict[str, list[dict[str, Any]]]) -> None:
    """Every table holds exactly the expected rows, in order."""
    for table in (*TABLES, *({"offloads"} & set(expected))):
        got = rows(trace, table)
        for i, (mine, theirs) in enumerate(zip(got, expected[table], strict=False)):
            assert mine == theirs, f"{table}[{i}]"
        assert len(got) == len(expected[table]), table


def assert_readers_agree(path: Path, files: list[Path], recover: str = "tail") -> Trace:
    """Open `path` with the compiled reader, and compare with the slow one's reading of `files`."""
    trace = open_trace(path, recover=recover)
    assert_same(trace, slow_reader.read([f.read_bytes() for f in files], recover))
    return trace
