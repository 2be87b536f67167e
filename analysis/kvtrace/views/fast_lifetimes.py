"""`block_lifetimes` in one compiled pass over the block events: the rows of its SQL, much faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace.views.event_arrays import NO_TIME, block_count, known, pieces
from kvtrace.views.extra import frame
from kvtrace_traces.compile import njit
from kvtrace_traces.rows import E_BLOCK, E_IDENTITY, E_REQUEST, E_STEP
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

HIT, FILL, FREE, EVICT, RESET = (BLOCK_EVENT_KINDS.index(kind) for kind in ("hit", "fill", "free", "evict", "reset"))
ENDS = ("evict", "reset", "fill")
BY_EVICT, BY_RESET, BY_FILL = range(3)
CHUNK = 1 << 20
# Rows of the int64 table of lives; NO_TIME where there is none.
FILL_NS, FIRST_USE, LAST_USE, EVICT_NS, LIFETIME, IDLE, WIDE = range(7)
# Rows of the int32 table; -1 where there is none.
BLOCK, IDENTITY, REQUEST, FILL_STEP, USES, EVICTED_BY, EVICT_STEP, NARROW = range(8)
# Columns of what is known of the life that a block is in: int64 and int32.
L_FILL_NS, L_FIRST, L_LAST, L_FREED, L_END_NS = range(5)
L_IDENTITY, L_REQUEST, L_STEP, L_USES, L_HOLDERS, L_EVICTED_BY, L_END_STEP, L_ENDED, L_WIDTH = range(9)
NO_LIFE, LIVES = -2, -1  # in L_ENDED, else a place in ENDS


def lifetimes(trace: Any) -> pl.DataFrame:
    """The rows of the view for all engines of a trace, in the order in which their blocks are filled anew."""
    return pl.concat([frame for header in trace.engines for frame in _of_engine(trace, header)], rechunk=False)


def _of_engine(trace: Any, header: dict[str, Any]) -> Iterator[pl.DataFrame]:
    blocks = block_count(trace, header)
    times, others = np.zeros((blocks, 5), np.int64), np.zeros((blocks, L_WIDTH), np.int32)
    others[:, L_ENDED] = NO_LIFE
    _carry(trace, header, times, others)
    wide, narrow, ended, made = *_table(max(CHUNK, blocks)), 0
    for piece in pieces(trace, header):
        if made + len(piece.times) > len(ended):
            yield _frame(header, wide[:, :made], narrow[:, :made], ended[:made])
            wide, narrow, ended, made = *_table(max(CHUNK, blocks, len(piece.times))), 0
        made = _follow(piece.narrow, piece.times, piece.kinds, times, others, wide, narrow, ended, made)
    if made + blocks > len(ended):
        yield _frame(header, wide[:, :made], narrow[:, :made], ended[:made])
        wide, narrow, ended, made = *_table(blocks), 0
    made = _still_cached(times, others, wide, narrow, ended, made)
    yield _frame(header, wide[:, :made], narrow[:, :made], ended[:made])


def _carry(trace: Any, header: dict[str, Any], times: I64, others: I32) -> None:
    """Set the lives of the blocks that are cached where a cut begins."""
    carried = frame("carried_blocks", trace).filter(
        (pl.col("engine_index") == header["engine_index"]) & pl.col("identity").is_not_null()
    )
    block = carried["block"].to_numpy()
    times[block] = NO_TIME
    others[block, L_IDENTITY], others[block, L_REQUEST] = carried["identity"].to_numpy(), -1
    others[block, L_STEP], others[block, L_ENDED] = -1, LIVES
    others[block, L_HOLDERS], others[block, L_EVICTED_BY] = carried["holders"].to_numpy(), -1


def _table(rows: int) -> tuple[I64, I32, I8]:
    return np.empty((WIDE, rows), np.int64), np.empty((NARROW, rows), np.int32), np.empty(rows, np.int8)


@njit
def _follow(
    events: I32, event_ns: I64, kinds: U8, times: I64, others: I32, wide: I64, narrow: I32, ended: I8, made: int
) -> int:
    """Adds the lives that are over to the tables, behind the `made` ones, and returns how many there are then.

    `times` int64[blocks, 5], `others` int32[blocks, L_WIDTH]: the life that each block is in. Events count for the last
    fill of their block, so a life is written down when its block is filled again.
    """
    for n in range(kinds.size):
        what = kinds[n]
        if what == RESET:
            for one in range(len(times)):
                if others[one, L_ENDED] == LIVES:
                    others[one, L_ENDED] = BY_RESET
                    others[one, L_END_STEP], times[one, L_END_NS] = events[E_STEP, n], event_ns[n]
            continue
        if events[E_IDENTITY, n] < 0 or (what != FILL and what != HIT and what != FREE and what != EVICT):
            continue
        block = np.intp(np.uint32(events[E_BLOCK, n]))
        now = event_ns[n]
        state = others[block, L_ENDED]
        if what == FILL:
            if state != NO_LIFE:
                if state == LIVES:
                    others[block, L_ENDED] = BY_FILL
                    others[block, L_END_STEP], times[block, L_END_NS] = events[E_STEP, n], now
                _write(block, times, others, wide, narrow, ended, made)
                made += 1
            others[block, L_IDENTITY], others[block, L_REQUEST] = events[E_IDENTITY, n], events[E_REQUEST, n]
            others[block, L_STEP], others[block, L_ENDED] = events[E_STEP, n], LIVES
            others[block, L_USES], others[block, L_HOLDERS] = 0, 1
            others[block, L_EVICTED_BY] = -1
            times[block, L_FILL_NS], times[block, L_FIRST] = now, NO_TIME
            times[block, L_LAST], times[block, L_FREED] = NO_TIME, NO_TIME
        elif state == NO_LIFE:
            continue
        elif what == HIT:
            others[block, L_HOLDERS] += 1
            if events[E_REQUEST, n] < 0:
                continue  # a connector holds it while it copies it
            others[block, L_USES] += 1
            if times[block, L_FIRST] == NO_TIME or now < times[block, L_FIRST]:
                times[block, L_FIRST] = now
            times[block, L_LAST] = max(times[block, L_LAST], now)
        elif what == FREE:
            others[block, L_HOLDERS] -= 1
            times[block, L_FREED] = max(times[block, L_FREED], now)
        elif state == LIVES:
            others[block, L_ENDED] = BY_EVICT
            others[block, L_EVICTED_BY] = events[E_REQUEST, n]
            others[block, L_END_STEP], times[block, L_END_NS] = events[E_STEP, n], now
        elif state == BY_EVICT:
            if others[block, L_EVICTED_BY] < 0:
                others[block, L_EVICTED_BY] = events[E_REQUEST, n]
            others[block, L_END_STEP] = min(others[block, L_END_STEP], events[E_STEP, n])
            times[block, L_END_NS] = min(times[block, L_END_NS], now)
    return made


@njit
def _still_cached(times: I64, others: I32, wide: I64, narrow: I32, ended: I8, made: int) -> int:
    """Adds the lives whose blocks were not filled again."""
    for block in range(len(times)):
        if others[block, L_ENDED] != NO_LIFE:
            _write(block, times, others, wide, narrow, ended, made)
            made += 1
    return made


@njit(cache=False)
def _write(block: Any, times: I64, others: I32, wide: I64, narrow: I32, ended: I8, k: int) -> None:
    over = others[block, L_ENDED] != LIVES
    begun, end = times[block, L_FILL_NS], times[block, L_END_NS]
    freed = times[block, L_FREED]
    narrow[BLOCK, k], narrow[IDENTITY, k] = block, others[block, L_IDENTITY]
    narrow[REQUEST, k], narrow[FILL_STEP, k] = others[block, L_REQUEST], others[block, L_STEP]
    narrow[USES, k], narrow[EVICTED_BY, k] = others[block, L_USES], others[block, L_EVICTED_BY]
    narrow[EVICT_STEP, k] = others[block, L_END_STEP] if over else -1
    wide[FILL_NS, k] = begun
    wide[FIRST_USE, k], wide[LAST_USE, k] = times[block, L_FIRST], times[block, L_LAST]
    wide[EVICT_NS, k] = end if over else NO_TIME
    wide[LIFETIME, k] = end - begun if over and begun != NO_TIME else NO_TIME
    # Else a request still holds it, or nobody is known to have let it go.
    let_go = over and others[block, L_HOLDERS] == 0 and freed != NO_TIME
    wide[IDLE, k] = end - freed if let_go else NO_TIME
    ended[k] = others[block, L_ENDED]


def _frame(header: dict[str, Any], wide: I64, narrow: I32, ended: I8) -> pl.DataFrame:
    def time(row: int) -> pl.Series:
        return known(wide[row], wide[row] != NO_TIME)

    def small(row: int) -> pl.Series:
        return known(narrow[row], narrow[row] >= 0)

    return pl.DataFrame(
        {
            "engine_index": pl.repeat(header["engine_index"], len(ended), dtype=pl.Int16, eager=True),
            "block": pl.Series(narrow[BLOCK]),
            "identity": pl.Series(narrow[IDENTITY]),
            "request": small(REQUEST),
            "fill_step": small(FILL_STEP),
            "fill_ns": time(FILL_NS),
            "uses": pl.Series(narrow[USES]),
            "first_use_ns": time(FIRST_USE),
            "last_use_ns": time(LAST_USE),
            "ended_by": pl.Series(ENDS, dtype=pl.Enum(ENDS)).gather(known(ended.astype(np.uint32), ended >= 0)),
            "evicted_by": small(EVICTED_BY),
            "evict_step": small(EVICT_STEP),
            "evict_ns": time(EVICT_NS),
            "lifetime_ns": time(LIFETIME),
            "idle_ns": time(IDLE),
        }
    )
