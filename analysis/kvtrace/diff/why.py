"""Why a lookup did not find a block: what had become of it by then.

A lookup sees the cache as it stands when its request is admitted: after all events before the first one with which
that request took a block. A block's identity is cached while some block holds it: from a fill on, until every block
that was filled with it has been handed out again (evict) or everything is forgotten (reset).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

REASONS = {
    "evicted": "it had been cached, and was evicted",
    "not-yet": "nobody had computed it by then",
    "reset": "it had been cached, and the prefix cache was reset",
    "not-taken": "it was cached, but the lookup did not take it",
    "unknown": "the trace does not tell of it",
}
_TOLD = ("request", "step", "time_ns")
SCHEMA: dict[str, Any] = {
    "request": pl.Int32, "position": pl.Int32, "reason": pl.String, "evicted_by": pl.Int32, "evicted_step": pl.Int32,
    "evicted_ns": pl.Int64, "filled_by": pl.Int32, "filled_step": pl.Int32,
}  # fmt: skip


def whys(trace: Any, index: int, asked: pl.DataFrame) -> pl.DataFrame:
    """What had become of blocks that first lookups did not find.

    `asked`: request (i32), position (i32, the place of a block in it). Returns a row for each, with the columns of
    SCHEMA: the reason (a key of REASONS), who evicted it and when, and who had filled it last and when.
    """
    events = trace.block_events.filter(pl.col("engine_index") == index).with_row_index("n")
    asked = _identified(trace, index, asked)
    if not events.height:
        return (
            asked.select("request", "position")
            .with_columns(reason=pl.lit("unknown"), **{name: pl.lit(None, SCHEMA[name]) for name in list(SCHEMA)[3:]})
            .select(_columns())
        )
    before = _looked_up_before(trace, index, events)
    asked = asked.join(before, on="request", how="left").with_columns(n=pl.col("n").cast(pl.Int64)).sort("n")
    turns = _turns(trace, index, events)
    resets = events.filter(pl.col("kind") == "reset").select(
        pl.col("n").cast(pl.Int64), reset_n=pl.col("n").cast(pl.Int64)
    )
    known = asked.join_asof(resets.sort("n"), on="n", strategy="backward", allow_exact_matches=False)
    for kind, names in (
        ("fill", ("filled_by", "filled_step", None)),
        ("evict", ("evicted_by", "evicted_step", "evicted_ns")),
    ):
        told = (
            turns.filter(pl.col("kind") == kind)
            .select(
                "identity",
                "n",
                pl.col("n").alias(f"{kind}_n"),
                *(pl.col(column).alias(name) for column, name in zip(_TOLD, names, strict=True) if name),
            )
            .sort("n")
        )
        known = known.join_asof(
            told, on="n", by="identity", strategy="backward", allow_exact_matches=False, check_sortedness=False
        )
    copies = turns.select("identity", "n", "copies").sort("n")
    known = known.join_asof(
        copies, on="n", by="identity", strategy="backward", allow_exact_matches=False, check_sortedness=False
    )
    last = pl.max_horizontal("fill_n", "evict_n")
    was_reset = pl.col("reset_n").fill_null(-2) > last
    reason = (
        pl.when(pl.col("identity").is_null() | pl.col("n").is_null()).then(pl.lit("unknown"))
        .when(last.is_null()).then(pl.lit("not-yet"))
        .when(was_reset & (pl.col("copies") > 0)).then(pl.lit("reset"))
        .when(pl.col("copies") > 0).then(pl.lit("not-taken"))
        .otherwise(pl.lit("evicted"))
    )  # fmt: skip
    known = known.with_columns(reason=reason)
    gone = pl.col("reason") == "evicted"
    evicted = [pl.when(gone).then(name).alias(name) for name in ("evicted_by", "evicted_step", "evicted_ns")]
    return known.with_columns(evicted).select(_columns()).sort("request", "position")


def _columns() -> list[pl.Expr]:
    return [pl.col(name).cast(kind) for name, kind in SCHEMA.items()]


def _identified(trace: Any, index: int, asked: pl.DataFrame) -> pl.DataFrame:
    """With the identity of each block, null where the chain does not reach so far."""
    header = next(header for header in trace.engines if header["engine_index"] == index)
    stride = int(header["block_size"]) // int(header.get("granule") or header["block_size"])
    chains = trace.chains(index)
    numbers = asked["request"].to_numpy()
    place = chains.indptr[numbers] + (asked["position"].to_numpy().astype(np.int64) + 1) * stride - 1
    there = place < chains.indptr[numbers + 1]
    identities = np.full(len(place), -1, np.int32)
    identities[there] = chains.identities[place[there]]
    identity = pl.Series("identity", identities)
    return asked.with_columns(pl.select(pl.when(identity >= 0).then(identity)).to_series().alias("identity"))


def _looked_up_before(trace: Any, index: int, events: pl.DataFrame) -> pl.DataFrame:
    """request, n: the first event that admitting it made, at its first lookup; before this, the lookup was made."""
    lookups = trace.lookups.filter((pl.col("engine_index") == index) & ~pl.col("after_preemption"))
    first = lookups.unique("request", keep="first", maintain_order=True).select("request", "step")
    took = events.filter(pl.col("kind").is_in(["allocate", "hit", "evict"]))
    return took.join(first, on=["request", "step"], how="semi").group_by("request").agg(pl.col("n").min())


def _turns(trace: Any, index: int, events: pl.DataFrame) -> pl.DataFrame:
    """Fills and evictions with the number of blocks that hold the identity after each, since the last reset."""
    turns = events.filter(pl.col("kind").is_in(["fill", "evict"]) & pl.col("identity").is_not_null()).select(
        pl.col("n").cast(pl.Int64), "step", "time_ns", "request", pl.col("kind").cast(pl.String), "identity"
    )
    begun = trace.snapshot(index)
    if begun is not None and len(begun.identities):
        held = pl.DataFrame({"identity": begun.identities}).filter(pl.col("identity") >= 0)
        held = held.with_columns(
            n=pl.lit(-1, pl.Int64), step=pl.lit(None, pl.Int32), time_ns=pl.lit(None, pl.Int64),
            request=pl.lit(None, pl.Int32), kind=pl.lit("fill"),
        )  # fmt: skip
        turns = pl.concat([held.select(turns.columns), turns])
    resets = events.filter(pl.col("kind") == "reset").select(pl.col("n").cast(pl.Int64))["n"].to_numpy()
    epoch = np.searchsorted(resets, turns["n"].to_numpy())
    change = pl.when(pl.col("kind") == "fill").then(1).otherwise(-1)
    return turns.with_columns(epoch=pl.Series(epoch)).with_columns(copies=change.cum_sum().over("identity", "epoch"))
