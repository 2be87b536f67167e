"""`block_lifetimes` in one compiled pass over the block events: the rows of its SQL, much faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_traces.compile import njit
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

HIT, FILL, FREE, EVICT, RESET = (BLOCK_EVENT_KINDS.index(kind) for kind in ("hit", "fill", "free", "evict", "reset"))
ENDS = ("evict", "reset", "fill")
NO_TIME = np.iinfo(np.int64).min
# Columns of the int64 table of lives; NO_TIME where there is none.
FILL_N, FILL_NS, FIRST_USE, LAST_USE, LAST_FREE, EVICT_N, EVICT_NS = range(7)
# Columns of the int32 table; -1 where there is none.
BLOCK, IDENTITY, REQUEST, FILL_STEP, USES, FREES, EVICT_STEP, NEXT = range(8)


def lifetimes(trace: Any) -> pl.DataFrame:
    """The rows of the view for all engines of a trace, by fill."""
    events = trace.block_events
    parts = [_of_engine(engine) for engine in events.partition_by("engine_index", maintain_order=True)]
    return pl.concat(parts) if parts else _of_engine(events)


def _of_engine(events: pl.DataFrame) -> pl.DataFrame:
    index = int(events["engine_index"][0]) if events.height else 0
    kind = events["kind"].to_physical().to_numpy()
    step, time_ns = events["step"].to_numpy(), events["time_ns"].to_numpy()
    block, identity, request = (
        np.ascontiguousarray(events[name].fill_null(-1).to_numpy(), np.int32)
        for name in ("block", "identity", "request")
    )
    fills = int(np.count_nonzero((kind == FILL) & (identity >= 0)))
    wide, narrow = np.full((7, fills), NO_TIME, np.int64), np.full((8, fills), -1, np.int32)
    blocks = int(block.max()) + 2 if block.size else 1
    _follow(kind, step, time_ns, block, identity, request, np.full(blocks, -1, np.int32), wide, narrow)
    _date_ends(np.flatnonzero(kind == RESET), step, time_ns, wide, narrow, ended := np.full(fills, -1, np.int8))
    return _frame(index, wide, narrow, ended)


@njit(nogil=True)
def _follow(
    kind: U8, step: I32, time_ns: I64, block: I32, identity: I32, request: I32, life: I32, wide: I64, narrow: I32
) -> None:
    """Fills the tables of lives. `life` int32[blocks]: the one that each block is in, -1 for none; events count for the
    last fill of their block."""
    made = 0
    for n in range(kind.size):
        what = kind[n]
        if identity[n] < 0 or (what != FILL and what != HIT and what != FREE and what != EVICT):
            continue
        at = np.intp(block[n])
        k = np.intp(life[at])
        if what == FILL:
            if k >= 0:
                narrow[NEXT, k] = made
            k = np.intp(made)
            life[at] = made
            made += 1
            narrow[BLOCK, k], narrow[IDENTITY, k], narrow[REQUEST, k] = block[n], identity[n], request[n]
            narrow[FILL_STEP, k], narrow[USES, k], narrow[FREES, k] = step[n], 0, 0
            wide[FILL_N, k], wide[FILL_NS, k] = n, time_ns[n]
        elif k < 0:
            continue
        elif what == HIT:
            narrow[USES, k] += 1
            if wide[FIRST_USE, k] == NO_TIME or time_ns[n] < wide[FIRST_USE, k]:
                wide[FIRST_USE, k] = time_ns[n]
            wide[LAST_USE, k] = max(wide[LAST_USE, k], time_ns[n])
        elif what == FREE:
            narrow[FREES, k] += 1
            wide[LAST_FREE, k] = max(wide[LAST_FREE, k], time_ns[n])
        else:
            if wide[EVICT_N, k] == NO_TIME:
                wide[EVICT_N, k] = n
                wide[EVICT_NS, k] = time_ns[n]
                narrow[EVICT_STEP, k] = step[n]
            else:
                wide[EVICT_NS, k] = min(wide[EVICT_NS, k], time_ns[n])
                narrow[EVICT_STEP, k] = min(narrow[EVICT_STEP, k], step[n])


@njit(nogil=True)
def _date_ends(resets: I64, step: I32, time_ns: I64, wide: I64, narrow: I32, ended: I8) -> None:
    """Sets what ended each life, and dates its end: at the first reset after its fill, its eviction, or the next fill
    of its block, whichever came first; `ended` int8: place in ENDS, -1 for still cached."""
    reset = 0
    for k in range(ended.size):
        while reset < resets.size and resets[reset] < wide[FILL_N, k]:
            reset += 1
        following = np.intp(narrow[NEXT, k])
        next_n = wide[FILL_N, following] if following >= 0 else NO_TIME
        evict_n = wide[EVICT_N, k]
        other = evict_n if evict_n != NO_TIME else next_n
        if reset < resets.size and (other == NO_TIME or resets[reset] < other):
            ended[k] = 1
            narrow[EVICT_STEP, k] = step[resets[reset]]
            wide[EVICT_NS, k] = time_ns[resets[reset]]
        elif evict_n != NO_TIME:
            ended[k] = 0
        elif following >= 0:
            ended[k] = 2
            narrow[EVICT_STEP, k] = narrow[FILL_STEP, following]
            wide[EVICT_NS, k] = wide[FILL_NS, following]


def _frame(index: int, wide: I64, narrow: I32, ended: I8) -> pl.DataFrame:
    def time(column: int) -> pl.Series:
        return _known(wide[column], wide[column] != NO_TIME)

    def small(column: int) -> pl.Series:
        return _known(narrow[column], narrow[column] >= 0)

    evict_ns, fill_ns = time(EVICT_NS), pl.Series(wide[FILL_NS])
    let_go = narrow[FREES] == narrow[USES] + 1
    return pl.DataFrame(
        {
            "engine_index": pl.repeat(index, len(fill_ns), dtype=pl.Int16, eager=True),
            "block": pl.Series(narrow[BLOCK]),
            "identity": pl.Series(narrow[IDENTITY]),
            "request": small(REQUEST),
            "fill_step": pl.Series(narrow[FILL_STEP]),
            "fill_ns": fill_ns,
            "uses": pl.Series(narrow[USES].astype(np.int64)),
            "first_use_ns": time(FIRST_USE),
            "last_use_ns": time(LAST_USE),
            "ended_by": pl.Series(ENDS, dtype=pl.Enum(ENDS)).gather(_known(ended.astype(np.uint32), ended >= 0)),
            "evict_step": small(EVICT_STEP),
            "evict_ns": evict_ns,
            "lifetime_ns": evict_ns - fill_ns,
            "idle_ns": evict_ns - _known(wide[LAST_FREE], let_go & (wide[LAST_FREE] != NO_TIME)),
        }
    )


def _known(values: Any, known: Any) -> pl.Series:
    """The values, null where they are not known."""
    made = pl.Series(np.ascontiguousarray(values))
    return made if known.all() else pl.select(pl.when(pl.Series(known)).then(made)).to_series()
