"""`occupancy` in one compiled pass over the block events: the rows of its SQL, much faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace.views.event_arrays import block_count, pieces
from kvtrace.views.extra import frame
from kvtrace_traces.compile import njit
from kvtrace_traces.rows import E_BLOCK, E_IDENTITY
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ALLOCATE, HIT, FILL, FREE, EVICT, RESET = (
    BLOCK_EVENT_KINDS.index(kind) for kind in ("allocate", "hit", "fill", "free", "evict", "reset")
)

# By kind: what it adds to the requests that hold the block, and whether it tells that the block is cached.
CHANGE = np.array([{ALLOCATE: 1, HIT: 1, FREE: -1}.get(kind, 0) for kind in range(len(BLOCK_EVENT_KINDS))], np.int32)
BEFORE = -(2**62)  # ns: where a cut begins
CACHED = np.array([kind in (FILL, HIT, FREE) for kind in range(len(BLOCK_EVENT_KINDS))])


def occupancy(trace: Any) -> pl.DataFrame:
    """The rows of the view for all engines of a trace whose cache is of known size, by step."""
    engines = frame("engines", trace).filter(pl.col("capacity_blocks").is_not_null())
    parts = [_of_engine(trace, row) for row in engines.iter_rows(named=True)]
    return pl.concat([pl.DataFrame(schema=_SCHEMA), *parts])


def _of_engine(trace: Any, engine: dict[str, Any]) -> pl.DataFrame:
    mine = pl.col("engine_index") == engine["engine_index"]
    steps = trace.steps.filter(mine).sort("start_ns")
    starts = np.ascontiguousarray(steps["start_ns"].to_numpy(), np.int64)
    # What happened up to the begin of each step, before it is summed up; behind the last step lies what is too late.
    held, idle = np.zeros(starts.size + 1, np.int64), np.zeros(starts.size + 1, np.int64)
    _blocks(trace, engine["engine_index"], starts, held, idle)
    tokens = np.zeros(starts.size + 1, np.int64)
    for time_ns, change in (
        (starts, steps["tokens"].to_numpy()),
        *_computed(trace, mine, steps.select(first_step="step", start_ns="start_ns")),
    ):
        np.add.at(tokens, np.searchsorted(starts, time_ns), change.astype(np.int64))
    size = engine["block_size"]
    holds, idle_blocks = np.cumsum(held)[:-1], np.cumsum(idle)[:-1]
    wasted = holds * size - np.cumsum(tokens)[:-1]
    free = steps["free_blocks"].cast(pl.Int64)
    used = (engine["capacity_blocks"] - free).alias("used")
    known = pl.lit(engine["exact"]) & (pl.col("wasted_slots") >= 0) & (pl.col("wasted_slots") <= used * size)
    cached = np.minimum(idle_blocks, free.to_numpy())
    return (
        steps.select(
            "engine_index", "step", "start_ns", used=used, cached_idle=pl.Series(cached), free=free - pl.Series(cached),
            holds=pl.Series(holds), wasted_slots=pl.Series(wasted),
        )
        .with_columns(used_tokens=pl.when(known).then(pl.col("used") * size - pl.col("wasted_slots")),
                      wasted_slots=pl.when(known).then("wasted_slots"))
        .select(list(_SCHEMA)).cast(_SCHEMA).sort("step")
    )  # fmt: skip


_SCHEMA: dict[str, Any] = {
    "engine_index": pl.Int16, "step": pl.Int32, "start_ns": pl.Int64, "used": pl.Int64, "cached_idle": pl.Int64,
    "free": pl.Int64, "holds": pl.Int64, "used_tokens": pl.Int64, "wasted_slots": pl.Int64,
}  # fmt: skip


def _blocks(trace: Any, engine_index: int, starts: I64, held: I64, idle: I64) -> None:
    header = next(header for header in trace.engines if header["engine_index"] == engine_index)
    blocks, at = block_count(trace, header), 0
    holders, idles = np.zeros(blocks, np.int32), np.zeros(blocks, np.bool_)
    carried = frame("carried_blocks", trace).filter(pl.col("engine_index") == engine_index)
    begun = carried["block"].to_numpy()
    holders[begun] = carried["holders"].to_numpy()
    idles[begun] = (carried["identity"].is_not_null() & (carried["holders"] == 0)).to_numpy()
    held[0], idle[0] = holders.sum(), idles.sum()
    for piece in pieces(trace, header):
        at = _follow(piece.narrow, piece.times, piece.kinds, starts, holders, idles, held, idle, at)


@njit
def _follow(
    events: I32, event_ns: I64, kinds: U8, starts: I64, holders: I32, idles: Bools, held: I64, idle: I64, at: int
) -> int:
    """Adds to `held` and `idle` what changes from step to step. `holders` int32[blocks] and `idles` bool[blocks]: the
    requests that hold each block, and whether it is cached and nobody does. `at`: the place of the
    step that the event before belongs to; that of the last one is returned."""
    for n in range(kinds.size):
        what = kinds[n]
        while at < starts.size and starts[at] < event_ns[n]:
            at += 1
        while at > 0 and starts[at - 1] >= event_ns[n]:
            at -= 1
        if what == RESET:
            for one in range(idles.size):
                idle[at] -= idles[one]
                idles[one] = False
            continue
        identified = events[E_IDENTITY, n] >= 0
        if events[E_BLOCK, n] < 0 or what > EVICT or (what == FILL and not identified):
            continue
        here = np.intp(np.uint32(events[E_BLOCK, n]))
        holders[here] += CHANGE[what]
        held[at] += CHANGE[what]
        now = CACHED[what] and identified and holders[here] <= 0
        idle[at] += np.int64(now) - np.int64(idles[here])
        idles[here] = now
    return at


def _computed(trace: Any, mine: pl.Expr, starts: pl.DataFrame) -> list[tuple[Any, Any]]:
    """(times, changes) of the tokens that requests have computed, beside what steps schedule: those found in the cache
    or lost by a preemption, and all of them where a request ends."""
    spans = trace.step_spans.filter(mine).join(starts, on="first_step")
    lost = trace.preemptions.filter(mine)
    acts = pl.concat(
        [
            spans.select(
                "request", step="first_step", is_span=pl.lit(1), before="computed_before", time_ns="start_ns",
                computed=pl.col("computed_before").cast(pl.Int64) + pl.col("steps").cast(pl.Int64) * pl.col("tokens"),
            ),
            lost.select(
                "request", "step", is_span=pl.lit(0), before=pl.lit(0, pl.Int32), time_ns="time_ns",
                computed=pl.lit(0, pl.Int64),
            ),
            frame("carried_requests", trace).filter(mine).select(
                "request", step=pl.lit(-1, pl.Int32), is_span=pl.lit(1), before="computed_tokens",
                time_ns=pl.lit(BEFORE, pl.Int64), computed=pl.col("computed_tokens").cast(pl.Int64),
            ),
        ]
    ).sort("request", "step", "is_span", maintain_order=True)  # fmt: skip
    changes = acts.select("time_ns", change=pl.col("before") - pl.col("computed").shift(1).over("request").fill_null(0))
    last = acts.group_by("request", maintain_order=True).agg(pl.col("computed").last())
    ended = trace.requests.filter(mine & pl.col("finish_ns").is_not_null()).join(last, on="request")
    return [
        (changes["time_ns"].to_numpy(), changes["change"].to_numpy()),
        (ended["finish_ns"].to_numpy(), -ended["computed"].to_numpy()),
    ]
