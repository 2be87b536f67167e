"""A folder of Parquet files, one per table, that DuckDB, Polars or Spark read without kvtrace.

Beside the tables of the schema: ``chains.parquet`` (request, granule, identity), ``identities.parquet`` (identity, its
64-bit hash) and ``info.json``. Whole numbers that run along are delta-packed, then compressed with zstd at its fastest
level: slower ones make files a few per cent smaller and take twice as long. Tables are written in pieces, two at once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

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
    for name in names:  # decoded here: a trace is not made to be decoded by several threads
        if name in TABLES and name != "step_requests":
            getattr(trace, name)
    largest_first = sorted(names, key=lambda name: name not in ("block_events", "step_requests", "chains"))
    with ThreadPoolExecutor(2) as pool:
        written = dict(
            zip(
                largest_first,
                pool.map(lambda name: write_pieces(_pieces(trace, name), folder / f"{name}.parquet"), largest_first),
                strict=True,
            )
        )
    return {name: {"rows": written[name], "bytes": (folder / f"{name}.parquet").stat().st_size} for name in names}


def _pieces(trace: Any, table: str) -> Iterator[pl.DataFrame]:
    """The frames of a table, one after the other."""
    if table == "step_requests":
        return step_rows.pieces(trace.step_spans, ROW_GROUP)
    frame = {"chains": _chains, "identities": _identities}[table](trace) if table not in TABLES else None
    return slices(getattr(trace, table) if frame is None else frame)


def slices(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame in pieces of at most ROW_GROUP rows; an empty one is one piece."""
    for start in range(0, max(frame.height, 1), ROW_GROUP):
        yield frame.slice(start, ROW_GROUP)


def write_pieces(pieces: Iterator[pl.DataFrame], path: Path) -> int:
    """Write frames of equal columns, at least one, to one Parquet file, a row group each. Returns the rows."""
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
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=dictionary,
                    column_encoding=dict.fromkeys(whole, "DELTA_BINARY_PACKED") or None,
                )
            writer.write_table(table, row_group_size=ROW_GROUP)
            rows += int(table.num_rows)
    finally:
        if writer is not None:
            writer.close()
    return rows


def _chains(trace: Any) -> pl.DataFrame:
    parts = []
    for header in trace.engines:
        index = header["engine_index"]
        chains = trace.chains(index)
        lengths = np.diff(chains.indptr)
        requests = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        granules = np.arange(len(requests), dtype=np.int64) - np.repeat(chains.indptr[:-1], lengths)
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": np.full(len(requests), index, np.int16),
                    "request": requests,
                    "granule": granules.astype(np.int32),
                    "identity": chains.identities,
                }
            )
        )
    return pl.concat(parts)


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
