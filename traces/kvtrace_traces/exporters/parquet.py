"""A folder of Parquet files, one per table, that DuckDB, Polars or Spark read without kvtrace.

Beside the tables of the schema: ``chains.parquet`` (request, granule, identity), ``identities.parquet`` (identity, its
64-bit hash) and ``info.json``. Tables are written in pieces, two at once: block events as the log is played, so that
they never lie in memory as a whole, beside all others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_traces import rows, tables
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.exporters import exporter, step_rows
from kvtrace_traces.parquet.file import File, Values, of_series, where_negative
from kvtrace_traces.play import PIECE, Events
from kvtrace_traces.schema import TABLES

ROW_GROUP = 1 << 20
PAGE = PIECE  # rows that are encoded at a time, as many as are decoded: they are still in the processor's cache
WRITTEN = (*TABLES, "chains", "identities")


@exporter("parquet", "a folder of Parquet files, one per table")
def write(trace: Any, out: Path, force: bool, beside: Callable[[Any, Path], None] | None = None) -> dict[str, Any]:
    """Write the folder ``out``. It appears whole or not at all; an existing one is replaced only with ``force``.

    ``beside``: what else to write there, given the trace and the folder; it runs at the same time as the rest.
    """
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
        sizes = _write_tables(trace, part, beside)
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


def _write_tables(trace: Any, folder: Path, beside: Callable[[Any, Path], None] | None) -> dict[str, dict[str, int]]:
    """Rows and bytes of each file written."""
    with ThreadPoolExecutor(2) as pool:
        # A trace decodes in one thread: all tables but block events are those of the other.
        events = pool.submit(_write_block_events, trace, folder)
        more = pool.submit(beside, trace, folder) if beside else None
        written = {name: _write(trace, name, folder) for name in WRITTEN if name != "block_events"}
        written["block_events"] = events.result()
        if more:
            more.result()
    return {name: {"rows": written[name], "bytes": (folder / f"{name}.parquet").stat().st_size} for name in WRITTEN}


def _write(trace: Any, table: str, folder: Path) -> int:
    return write_pieces(_pieces(trace, table), folder / f"{table}.parquet")


def _pieces(trace: Any, table: str) -> Iterator[pl.DataFrame]:
    """The frames of a table, one after the other; at least one."""
    if table == "step_requests":
        return step_rows.pieces(trace.step_spans, PAGE)
    if table == "chains":
        return _chains(trace)
    return iter([_identities(trace) if table == "identities" else getattr(trace, table)])


def _write_block_events(trace: Any, folder: Path) -> int:
    if not hasattr(trace, "pieces"):
        return _write(trace, "block_events", folder)
    with File(folder / "block_events.parquet", tables.schema("block_events"), ROW_GROUP) as file:
        for header in trace.engines:
            index = int(header["engine_index"])
            for piece in trace.pieces(index):
                file.add(_columns(index, piece), len(piece.times))
    return file.rows


def _columns(index: int, piece: Events) -> dict[str, Values]:
    return {
        "engine_index": Values(np.full(len(piece.times), index, np.int16)),
        "step": Values(piece.narrow[rows.E_STEP]),
        "time_ns": Values(piece.times),
        "request": where_negative(piece.narrow[rows.E_REQUEST]),
        "kind": Values(piece.kinds),
        "block": where_negative(piece.narrow[rows.E_BLOCK]),
        "identity": where_negative(piece.narrow[rows.E_IDENTITY]),
        "group": where_negative(piece.groups),
    }


def write_pieces(pieces: Iterable[pl.DataFrame], path: Path) -> int:
    """Write frames of equal columns, at least one, to one Parquet file; returns the rows."""
    file: File | None = None
    with ExitStack() as until_closed:
        for piece in pieces:
            if file is None:
                file = until_closed.enter_context(File(path, piece.schema, ROW_GROUP))
            for start in range(0, piece.height, PAGE):
                page = piece.slice(start, PAGE)
                file.add({name: of_series(page[name]) for name in page.columns}, page.height)
    assert file is not None
    return file.rows


def _chains(trace: Any) -> Iterator[pl.DataFrame]:
    """Some requests at a time; at least one frame for each engine."""
    for header in trace.engines:
        index = header["engine_index"]
        chains = trace.chains(index)
        bounds = [0]
        while bounds[-1] < len(chains.indptr) - 1:
            past = int(np.searchsorted(chains.indptr, chains.indptr[bounds[-1]] + PAGE, "right")) - 1
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
