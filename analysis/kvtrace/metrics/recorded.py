"""Figures that are read off a recorded run itself: nothing here is replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from kvtrace_traces import Trace


def capacity_blocks(header: dict[str, Any]) -> int | None:
    """Usable blocks of an engine: its own figure without the null block. None for imports, which have no cache."""
    blocks = header.get("num_blocks")
    return int(blocks) - 1 if blocks else None


def own_hits(trace: Trace, header: dict[str, Any]) -> dict[str, Any] | None:
    """An engine's own prefix-cache hits (`header` is one of `trace.engines`), counted at each request's first
    admission.

    Tokens asked are the whole prompts; blocks are full blocks of them. None where the trace holds no lookups.
    """
    lookups = trace.lookups.filter((pl.col("engine_index") == header["engine_index"]) & ~pl.col("after_preemption"))
    if lookups.is_empty():
        return None
    block_size = header["block_size"]
    figures = lookups.select(
        requests=pl.len(),
        block_lookups=(pl.col("tokens_asked") // block_size).sum(),
        block_hits=(pl.col("tokens_hit") // block_size).sum(),
        token_lookups=pl.col("tokens_asked").cast(pl.Int64).sum(),
        token_hits=pl.col("tokens_hit").cast(pl.Int64).sum(),
    ).row(0, named=True)
    for weight in ("block", "token"):
        asked = figures[f"{weight}_lookups"]
        figures[f"{weight}_hit_ratio"] = figures[f"{weight}_hits"] / asked if asked else None
    return figures


def occupancy(trace: Trace, header: dict[str, Any]) -> pl.DataFrame:
    """What every usable block was doing after each step was scheduled.

    Columns: step (i32), used (blocks that requests hold), cached_idle (held by none, but still cached), free
    (nothing in them), all i64 and adding up to the engine's usable blocks. Empty where the trace holds no
    steps, or does not know the size of the cache.
    """
    if capacity_blocks(header) is None:
        return pl.DataFrame(schema={"step": pl.Int32, "used": pl.Int64, "cached_idle": pl.Int64, "free": pl.Int64})
    from kvtrace.sql import Database

    return Database([trace]).query(
        "SELECT step, used, cached_idle, free FROM occupancy "
        f"WHERE engine_index = {int(header['engine_index'])} ORDER BY step"
    )
