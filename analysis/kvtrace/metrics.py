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
    mine = pl.col("engine_index") == header["engine_index"]
    steps = trace.steps.filter(mine).select("step", "start_ns", pl.col("free_blocks").cast(pl.Int64))
    usable = capacity_blocks(header)
    if usable is None or steps.is_empty():
        empty = {"step": pl.Int32, "used": pl.Int64, "cached_idle": pl.Int64, "free": pl.Int64}
        return pl.DataFrame(schema=empty)
    idle = _cached_idle(trace.block_events.filter(mine))
    return (
        # The engine counts free blocks right after scheduling: the events up to then have the time it began.
        steps.join_asof(idle, left_on="start_ns", right_on="time_ns", strategy="backward", check_sortedness=False)
        .with_columns(cached_idle=pl.min_horizontal(pl.col("cached_idle").fill_null(0), "free_blocks"))
        .select(
            "step",
            used=usable - pl.col("free_blocks"),
            cached_idle=pl.col("cached_idle").cast(pl.Int64),
            free=pl.col("free_blocks") - pl.col("cached_idle"),
        )
    )


def _cached_idle(events: pl.DataFrame) -> pl.DataFrame:
    """How many blocks hold an identity and no request, after each event: time_ns, cached_idle."""
    kind = pl.col("kind").cast(pl.String)
    return (
        events.lazy()
        .with_columns(
            epoch=(kind == "reset").cum_sum(),  # a reset forgets every identity, whatever rows it is told by
            references=pl.when(kind.is_in(["allocate", "hit"])).then(1).when(kind == "free").then(-1).otherwise(0),
            cached=pl.when(kind.is_in(["fill", "hit"]))
            .then(1)
            .when(kind.is_in(["allocate", "evict", "reset"]))
            .then(0)
            .when(kind == "free")
            .then(pl.col("identity").is_not_null().cast(pl.Int32)),
        )
        .with_columns(
            references=pl.col("references").cum_sum().over("block"),
            cached=pl.col("cached").forward_fill().over("block", "epoch").fill_null(0),
        )
        .with_columns(idle=((pl.col("references") <= 0) & (pl.col("cached") == 1)).cast(pl.Int64))
        .with_columns(change=pl.col("idle") - pl.col("idle").shift(1).over("block", "epoch").fill_null(0))
        .select("time_ns", cached_idle=pl.col("change").cum_sum().over("epoch"))
        .collect()
    )
