"""A folder of Parquet files, one per table, that DuckDB, Polars or Spark read without kvtrace.

Beside the tables of the schema: ``chains.parquet`` (request, granule, identity), ``identities.parquet`` (identity, its
64-bit hash) and ``info.json``. Whole numbers that run along are delta-packed, then compressed with Snappy, which every
reader knows: zstd makes files a tenth smaller and takes a quarter longer. Tables are written in pieces, two at once:
block events as the log is played, so that they never lie in memory as a whole, beside all others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kvtrace_traces import tables
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.exporters import exporter, step_rows
from kvtrace_traces.schema import TABLES

ROW_GROUP = 1 << 20


@exporter("parquet", "a folder of Parquet files, one per table")
def write(trace: Any, out: Path, force: bool) -> dict[str, Any]:
    """Write the folder ``out``. It appears whole or not at all; an existing one is replaced only with ``force``."""
    if out.exists():
        if not out.is_dir():
            raise UsageError(f"{out} is a file: give the name of a folder")
        if any(out.iterdir()) and not force:
            raise UsageError(f"{out} exists and is not empty: --force replaces it")
        if any(p for p in out.iterdir() if p.suffix not in (".parquet", ".json", ".sql")):
            raise UsageError(f"{out} holds other things than an export: give another folder")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        sizes = _write_tables(trace, part)
        (part / "info.json").write_text(json.dumps(trace.info, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise KvtraceError(f"{out}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    events = sizes["block_events"]["rows"]
    used = sizes["block_events"]["bytes"] + sizes["identities"]["bytes"]
    return {
        "path": str(out),
        "tables": sizes,
        "bytes": sum(size["bytes"] for size in sizes.values()),
        "bytes_per_block_event": used / events if events else None,
    }


def _write_tables(trace: Any, folder: Path) -> dict[str, dict[str, int]]:
    """Rows and bytes of each file written."""
    names = [*TABLES, "chains", "identities"]
    with ThreadPoolExecutor(2) as pool:
        # A trace decodes in one thread: all tables but block events are those of the other.
        events = pool.submit(_write, trace, "block_events", folder)
        written = {name: _write(trace, name, folder) for name in names if name != "block_events"}
        written["block_events"] = events.result()
    return {name: {"rows": written[name], "bytes": (folder / f"{name}.parquet").stat().st_size} for name in names}


def _write(trace: Any, table: str, folder: Path) -> int:
    return write_pieces(_pieces(trace, table), folder / f"{table}.parquet")


def _pieces(trace: Any, table: str) -> Iterator[pl.DataFrame]:
    """The frames of a table, one after the other; at least one."""
    if table == "step_requests":
        return step_rows.pieces(trace.step_spans, ROW_GROUP)
    if table == "block_events":
        return _block_events(trace)
    if table == "chains":
        return _chains(trace)
    return slices(_identities(trace) if table == "identities" else getattr(trace, table))


def _block_events(trace: Any) -> Iterator[pl.DataFrame]:
    if not hasattr(trace, "block_event_pieces"):
        yield from slices(trace.block_events)
        return
    yield pl.DataFrame(schema=tables.schema("block_events"))
    for _, piece in trace.block_event_pieces(ROW_GROUP):
        yield piece


def slices(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame in pieces of at most ROW_GROUP rows; an empty one is one piece."""
    for start in range(0, max(frame.height, 1), ROW_GROUP):
        yield frame.slice(start, ROW_GROUP)


def write_pieces(pieces: Iterator[pl.DataFrame], path: Path) -> int:
    """Write frames of equal columns, at least one, to one Parquet file, a row group each; a frame need only hold until
    the next is taken. Returns the rows."""
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for piece in pieces:
            table = piece.to_arrow()
            if writer is None:
                whole = [f.name for f in table.schema if f.type in (pa.int32(), pa.int64())]
                dictionary = [f.name for f in table.schema if f.name not in whole and f.type != pa.uint64()]
                writer = pq.ParquetWriter(
                    path,
                    table.schema,
                    compression="snappy",
                    use_dictionary=dictionary,
                    column_encoding=dict.fromkeys(whole, "DELTA_BINARY_PACKED") or None,
                )
            if table.num_rows:
                writer.write_table(table, row_group_size=ROW_GROUP)
            rows += int(table.num_rows)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _chains(trace: Any) -> Iterator[pl.DataFrame]:
    """Some requests at a time; at least one frame for each engine."""
    for header in trace.engines:
        index = header["engine_index"]
        chains = trace.chains(index)
        bounds = [0]
        while bounds[-1] < len(chains.indptr) - 1:
            past = int(np.searchsorted(chains.indptr, chains.indptr[bounds[-1]] + ROW_GROUP, "right")) - 1
            bounds.append(min(max(past, bounds[-1] + 1), len(chains.indptr) - 1))
        for first, past in pairwise(bounds if len(bounds) > 1 else [0, 0]):
            starts = chains.indptr[first:past]
            lengths = np.diff(chains.indptr[first : past + 1])
            begin, end = int(chains.indptr[first]), int(chains.indptr[past])
            granules = np.arange(begin, end, dtype=np.int64) - np.repeat(starts, lengths)
            yield pl.DataFrame(
                {
                    "engine_index": np.full(end - begin, index, np.int16),
                    "request": np.repeat(np.arange(first, past, dtype=np.int32), lengths),
                    "granule": granules.astype(np.int32),
                    "identity": chains.identities[begin:end],
                }
            )


def _identities(trace: Any) -> pl.DataFrame:
    parts = []
    for header in trace.engines:
        hashes = trace.chains(header["engine_index"]).hashes
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": np.full(len(hashes), header["engine_index"], np.int16),
                    "identity": np.arange(len(hashes), dtype=np.int32),
                    "hash": hashes,
                }
            )
        )
    return pl.concat(parts)
