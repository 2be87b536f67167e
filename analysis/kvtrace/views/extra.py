"""What a trace holds beside the tables of the schema, as tables: its headers and its chains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from kvtrace.views.declare import ENGINE, REQUEST
from kvtrace_traces.schema import Column, Table
from kvtrace_traces.snapshot import Snapshot
from kvtrace_traces.tables import dtype

EXTRA: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "engines",
            "one row per engine (scheduler), from its header",
            (
                ENGINE,
                Column("source", "str", "", "where the trace comes from: the engine's name, `import`, `simulated`"),
                Column("engine", "str", "", "what ran", True),
                Column("engine_version", "str", "", "its version", True),
                Column("model", "str", "", "the model it served", True),
                Column("block_size", "i32", "tokens", "tokens in a block"),
                Column("granule", "i32", "tokens", "tokens that an identity of a chain stands for"),
                Column("capacity_blocks", "i32", "blocks", "usable blocks: the engine's figure without the null block",
                       True),
                Column("bytes_per_token", "i64", "bytes", "keys and values of a token", True),
                Column("bytes_per_block", "i64", "bytes", "keys and values of a block", True),
                Column("budget_tokens", "i32", "tokens", "most tokens that a step may schedule", True),
                Column("exact", "bool", "", "the tracer could follow everything (no reason in `inexact`)"),
            ),
        ),
        Table(
            "chains",
            "one row per request and granule of its tokens, prompt and output",
            (
                ENGINE,
                REQUEST,
                Column("granule", "i32", "granule", "0-based place of the granule in the request"),
                Column("identity", "i32", "identity", "stands for all tokens up to the end of the granule"),
            ),
        ),
        Table(
            "identities",
            "one row per identity",
            (
                ENGINE,
                Column("identity", "i32", "identity", "dense number, as in the other tables"),
                Column("hash", "u64", "", "the keyed hash that the log has for it"),
            ),
        ),
        Table(
            "carried_requests",
            "one row per request that was under way where a cut begins; none in other traces",
            (
                ENGINE,
                REQUEST,
                Column("computed_tokens", "i32", "tokens", "tokens that it had computed, or in a call under way"),
                Column("tokens_lost", "i32", "tokens", "the most that a preemption had cost it"),
            ),
        ),
        Table(
            "carried_tables",
            "one row per block that a request held where a cut begins",
            (
                ENGINE,
                REQUEST,
                Column("position", "i32", "blocks", "0-based place of the block in the request"),
                Column("block", "i32", "block", "the block's number in the engine"),
            ),
        ),
        Table(
            "carried_blocks",
            "one row per block that was cached or held where a cut begins",
            (
                ENGINE,
                Column("block", "i32", "block", "the block's number in the engine"),
                Column("identity", "i32", "identity", "what it held; null if it was not cached", True),
                Column("holders", "i32", "requests", "requests that held it"),
            ),
        ),
    )
}  # fmt: skip


def frame(table: str, trace: Any) -> pl.DataFrame:
    """A frame of a table of EXTRA. `trace` has `engines`, `chains(engine_index)` and `snapshot(engine_index)`."""
    make = {
        "engines": _engines, "chains": _chains, "identities": _identities, "carried_requests": _carried_requests,
        "carried_tables": _carried_tables, "carried_blocks": _carried_blocks,
    }  # fmt: skip
    rows = make[table](trace)
    return rows.cast({column.name: dtype(column) for column in EXTRA[table].columns})


def _engines(trace: Any) -> pl.DataFrame:
    return pl.DataFrame([_engine(header) for header in trace.engines], schema=_schema("engines"))


def _engine(header: dict[str, Any]) -> dict[str, Any]:
    blocks, scheduler = header.get("num_blocks"), header.get("scheduler") or {}
    size = header["block_size"]
    return {
        **{column.name: header.get(column.name) for column in EXTRA["engines"].columns},
        "granule": header.get("granule") or size,
        "source": header.get("source") or "unknown",
        "capacity_blocks": int(blocks) - 1 if blocks else None,
        "budget_tokens": scheduler.get("max_num_scheduled_tokens") or scheduler.get("max_num_batched_tokens"),
        "exact": not [name for name in header.get("inexact") or () if name != "carried-state"],  # which is told
    }


def _chains(trace: Any) -> pl.DataFrame:
    parts = []
    for header in trace.engines:
        chains = trace.chains(header["engine_index"])
        lengths = np.diff(np.asarray(chains.indptr, np.int64))
        granules = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(chains.indptr[:-1], lengths)
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": np.full(granules.size, header["engine_index"], np.int16),
                    "request": np.repeat(np.arange(lengths.size, dtype=np.int32), lengths),
                    "granule": granules.astype(np.int32),
                    "identity": np.ascontiguousarray(chains.identities, np.int32),
                }
            )
        )
    return pl.concat(parts)


def _identities(trace: Any) -> pl.DataFrame:
    parts = []
    for header in trace.engines:
        hashes = np.ascontiguousarray(trace.chains(header["engine_index"]).hashes, np.uint64)
        index = np.full(hashes.size, header["engine_index"], np.int16)
        parts.append(
            pl.DataFrame({"engine_index": index, "identity": np.arange(hashes.size, dtype=np.int32), "hash": hashes})
        )
    return pl.concat(parts)


def _snapshots(trace: Any) -> Iterator[tuple[int, Snapshot]]:
    """The states that engines begin with, by engine; of those that do not begin idle."""
    for header in trace.engines:
        begun = trace.snapshot(header["engine_index"]) if "cut" in header else None
        if begun is not None:
            yield header["engine_index"], begun


def _carried_requests(trace: Any) -> pl.DataFrame:
    rows = [(i, one.request, one.computed, one.lost) for i, begun in _snapshots(trace) for one in begun.live]
    return pl.DataFrame(rows, _schema("carried_requests"), orient="row")


def _carried_tables(trace: Any) -> pl.DataFrame:
    rows = [
        (i, one.request, position, block)
        for i, begun in _snapshots(trace) for one in begun.live for position, block in enumerate(one.table or ())
    ]  # fmt: skip
    return pl.DataFrame(rows, _schema("carried_tables"), orient="row")


def _carried_blocks(trace: Any) -> pl.DataFrame:
    held = _carried_tables(trace).group_by("engine_index", "block").agg(pl.len().cast(pl.Int32).alias("holders"))
    schema = {name: dtype for name, dtype in _schema("carried_blocks").items() if name != "holders"}
    rows = [
        pl.DataFrame({"engine_index": i, "block": begun.blocks, "identity": begun.identities}, schema)
        for i, begun in _snapshots(trace) if begun.blocks.size
    ]  # fmt: skip
    cached = pl.concat([pl.DataFrame(schema=schema), *rows])
    found = cached.join(held, on=["engine_index", "block"], how="full", coalesce=True)
    return (
        found.with_columns(pl.col("holders").fill_null(0))
        .sort("engine_index", "block")
        .select(list(_schema("carried_blocks")))
    )


def _schema(table: str) -> dict[str, Any]:
    return {column.name: dtype(column) for column in EXTRA[table].columns}
