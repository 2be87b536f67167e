"""`misses` in one compiled pass over the block events and one over the lookups: the rows of its SQL, much faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace.views.event_arrays import pieces
from kvtrace.views.extra import frame
from kvtrace.views.fast_chains import Blocks, blocks_of, engines
from kvtrace_traces.compile import njit
from kvtrace_traces.rows import E_IDENTITY, E_STEP, FILLED

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int32).max
COLD, CAPACITY, PREEMPTION, SHORT, UNREAD = range(5)
KINDS = ("cold", "capacity", "preemption", "short", "unread")


def misses(trace: Any) -> pl.DataFrame:
    """The rows of the view for all engines of a trace, by lookup."""
    return pl.concat([_of_engine(trace, engine) for engine in engines(trace)])


def _of_engine(trace: Any, engine: dict[str, Any]) -> pl.DataFrame:
    mine = pl.col("engine_index") == engine["engine_index"]
    lookups = trace.lookups.filter(mine)
    held = blocks_of(trace, engine)
    known = held.requests.select("request", "no_cache_read").with_row_index("row")
    rows = lookups.join(known, on="request", how="inner", maintain_order="left")
    highest = _highest(rows, trace.preemptions.filter(mine), frame("carried_requests", trace).filter(mine))
    found = np.zeros((5, rows.height), np.int64)
    step, asked, hit = (rows[name].to_numpy() for name in ("step", "tokens_asked", "tokens_hit"))
    _split(
        rows["row"].to_numpy(), step, asked, hit, highest, rows["no_cache_read"].to_numpy(), held.indptr,
        held.identities, _first_fills(trace, engine, held), held.size, found,
    )  # fmt: skip
    return rows.select(
        *lookups.columns, *(pl.Series(f"{kind}_tokens", column) for kind, column in zip(KINDS, found, strict=True))
    )


def _highest(rows: pl.DataFrame, lost: pl.DataFrame, carried: pl.DataFrame) -> I64:
    """int64 by lookup: the most tokens that its request had computed when it was preempted before, at most as many as
    it asks for now; 0 for a first admission."""
    before = carried.filter(pl.col("tokens_lost") > 0).select(
        "request", pl.lit(-1, pl.Int32).alias("step"), "tokens_lost"
    )
    lost = pl.concat([before, lost.select("request", "step", "tokens_lost")])
    if not lost.height:
        return np.zeros(rows.height, np.int64)
    most = lost.select("request", "step", highest=pl.col("tokens_lost").cum_max().over("request")).sort(
        "step", maintain_order=True
    )
    asked = rows.select("request", "step", "tokens_asked", "after_preemption").with_row_index("n").sort("step")
    told = asked.join_asof(most, on="step", by="request", strategy="backward", check_sortedness=False).sort("n")
    least = pl.min_horizontal(pl.col("highest").fill_null(0), "tokens_asked")
    highest = told.select(pl.when("after_preemption").then(least).otherwise(0).cast(pl.Int64)).to_series()
    return np.ascontiguousarray(highest.to_numpy())


def _first_fills(trace: Any, engine: dict[str, Any], held: Blocks) -> I32:
    """int32 by identity: the first step in which some request filled a block with it; NEVER for none."""
    first = np.full(int(held.identities.max(initial=-1)) + 1, NEVER, np.int32)
    if first.size:
        carried = frame("carried_blocks", trace).filter(pl.col("engine_index") == engine["engine_index"])
        cached = carried["identity"].drop_nulls().to_numpy()
        first[cached[cached < first.size]] = -1
        for piece in pieces(trace, engine):
            _fills(piece.narrow, piece.kinds, first)
    return first


@njit
def _fills(events: I32, kinds: U8, first: I32) -> None:
    for n in range(kinds.size):
        if kinds[n] == FILLED and 0 <= events[E_IDENTITY, n] < first.size:
            one = np.intp(np.uint32(events[E_IDENTITY, n]))
            first[one] = min(first[one], events[E_STEP, n])


@njit
def _split(
    row: Any, step: I32, asked: I32, hit: I32, highest: I64, no_read: Any, indptr: I64, identities: I32, first: I32,
    size: int, found: I64,
) -> None:  # fmt: skip
    """Fills `found` int64[5, lookups], a row for each of KINDS."""
    for n in range(row.size):
        wanted, tokens_hit = np.int64(asked[n]), np.int64(hit[n])
        findable = max(wanted - 1, np.int64(0)) // size * size
        had = max(tokens_hit, highest[n])
        capacity = np.int64(0)
        if not no_read[n]:
            begin, end = indptr[row[n]], indptr[row[n] + 1]
            for position in range(had // size, min(findable // size, end - begin)):
                if first[np.intp(np.uint32(identities[begin + position]))] < step[n]:
                    capacity += (position + 1) * size - max(position * size, had)
        found[CAPACITY, n] = capacity
        found[PREEMPTION, n] = max(0, highest[n] - tokens_hit)
        found[SHORT, n] = max(0, wanted - max(findable, had))
        found[UNREAD, n] = max(0, findable - had) if no_read[n] else 0
        found[COLD, n] = wanted - tokens_hit - capacity - found[PREEMPTION, n] - found[SHORT, n] - found[UNREAD, n]
