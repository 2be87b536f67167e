"""A folder of Parquet files, one per table, that DuckDB, Polars or Spark read without kvtrace.

Beside the tables of the schema: ``chains.parquet`` (request, granule, identity), ``identities.parquet`` (identity, its
64-bit hash) and ``info.json``. Whole numbers that run along are delta-packed, then compressed with zstd.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.exporters import exporter
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
        sizes = {}
        for name in [*TABLES, "chains", "identities"]:
            frame = getattr(trace, name) if name in TABLES else globals()[f"_{name}"](trace)
            path = part / f"{name}.parquet"
            rows = _write(frame, path)
            sizes[name] = {"rows": rows, "bytes": path.stat().st_size}
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


def _write(frame: pl.DataFrame, path: Path) -> int:
    table = frame.to_arrow()
    packed = [n for n, t in zip(table.column_names, table.schema.types, strict=True) if pa.types.is_integer(t)]
    plain = [n for n in packed if table.schema.field(n).type == pa.uint64()]
    packed = [n for n in packed if n not in plain and table.schema.field(n).type in (pa.int32(), pa.int64())]
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=9,
        use_dictionary=[n for n in table.column_names if n not in packed and n not in plain],
        column_encoding=dict.fromkeys(packed, "DELTA_BINARY_PACKED") or None,
    )
    return int(table.num_rows)


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
