"""`step_requests` expanded in pieces is the table that the trace itself expands at once."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from kvtrace_traces import exporters, open_trace, tables
from kvtrace_traces.exporters import parquet, step_rows

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "traces/samples/thrash.kvt"


def expanded(spans: pl.DataFrame) -> pl.DataFrame:
    """Row by row."""
    rows = [
        (span["engine_index"], span["first_step"] + i, span["request"], span["tokens"],
         span["computed_before"] + i * span["tokens"])
        for span in spans.iter_rows(named=True)
        for i in range(span["steps"])
    ]  # fmt: skip
    return pl.DataFrame(sorted(rows), schema=tables.schema("step_requests"), orient="row")


def random_spans(rng: random.Random) -> pl.DataFrame:
    """Spans of up to two engines; those of a request do not overlap, and some have no steps."""
    rows = []
    for engine in range(rng.randrange(1, 3)):
        for request in range(rng.randrange(1, 8)):
            step, computed = rng.randrange(20), 0
            for _ in range(rng.randrange(4)):
                steps, tokens = rng.randrange(9), rng.randrange(1, 5)
                rows.append((engine, request, step, steps, tokens, computed))
                computed += steps * tokens
                step += steps + rng.randrange(3)
    rows.sort(key=lambda row: (row[0], row[2], row[1]))
    return pl.DataFrame(rows, schema=tables.schema("step_spans"), orient="row")


@pytest.mark.parametrize("seed", range(300))
def test_any_spans_in_pieces(seed: int) -> None:
    rng = random.Random(seed)
    spans, most = random_spans(rng), rng.choice([1, 2, 7, 30, 1000])
    found = list(step_rows.pieces(spans, most))
    assert_frame_equal(pl.concat(found), expanded(spans))
    for piece in found:
        assert piece.height <= most or piece["step"].n_unique() == 1


def test_the_file_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", 1000)
    trace = open_trace(SAMPLE)
    exporters.run("parquet", trace, tmp_path / "out")
    assert "step_requests" not in vars(trace)
    for table in ("step_requests", "block_events", "requests"):
        written = pl.read_parquet(tmp_path / "out" / f"{table}.parquet")
        own = getattr(trace, table)
        assert_frame_equal(written, own, check_dtypes=False, categorical_as_str=True)
    chains = trace.chains()
    rows = [
        (0, request, granule, identity)
        for request in range(len(chains.indptr) - 1)
        for granule, identity in enumerate(chains.identities[chains.indptr[request] : chains.indptr[request + 1]])
    ]
    assert pl.read_parquet(tmp_path / "out" / "chains.parquet").rows() == rows
    assert len(rows) > 3000


@pytest.mark.parametrize("most", [1, 100, 5000])
def test_block_events_in_pieces_are_the_table(most: int) -> None:
    found = [piece for _, piece in open_trace(SAMPLE).block_event_pieces(most, keep=True)]
    assert len(found) > 1
    assert_frame_equal(pl.concat(found), open_trace(SAMPLE).block_events)
    trace = open_trace(SAMPLE)  # other tables, decoded with the events or without
    for _ in trace.block_event_pieces(most):
        pass
    for table in ("requests", "steps", "step_spans", "lookups", "preemptions"):
        assert_frame_equal(getattr(trace, table), getattr(open_trace(SAMPLE), table))
    assert_frame_equal(trace.block_events, open_trace(SAMPLE).block_events)
