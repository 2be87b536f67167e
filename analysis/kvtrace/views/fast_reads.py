"""`block_tables`, `read_spans` and what is counted of them, in compiled passes: the rows of their SQL, much faster."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace.views.event_arrays import block_count, known, pieces
from kvtrace.views.extra import frame
from kvtrace_traces.compile import njit
from kvtrace_traces.rows import ALLOCATED, E_BLOCK, E_REQUEST, E_STEP, FREED, HITS

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

MOST_GROUPS = 64
TAKERS = ("allocate", "hit", "carried")
ALLOCATE, HIT, CARRIED = range(3)
# Rows of the tables of blocks taken, int32. FREE_STEP is -1 where the block was not let go.
REQUEST, POSITION, BLOCK, STEP, FREE_STEP = range(5)
# Rows of the spans of requests, int32; and of read spans.
FIRST, STEPS, TOKENS, COMPUTED = range(4)
R_REQUEST, R_POSITION, R_BLOCK, R_FIRST, R_STEPS, R_TOKENS, R_COMPUTED = range(7)


class Taken(NamedTuple):
    """Blocks that requests took, in that order: `rows` int32[5, n], `groups` int16, `takers` uint8, places in
    TAKERS."""

    rows: I32
    groups: I16
    takers: U8


def block_tables(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None where an engine has more than MOST_GROUPS groups."""
    parts = []
    for header in trace.engines:
        taken = _taken(trace, header)
        if taken is None:
            return None
        rows, groups, takers = taken
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(header["engine_index"], len(groups), dtype=pl.Int16, eager=True),
                    "request": rows[REQUEST], "group": known(groups, groups >= 0), "position": rows[POSITION],
                    "block": rows[BLOCK],
                    "taken_by": pl.Series(TAKERS, dtype=pl.Enum(TAKERS)).gather(pl.Series(takers.astype(np.uint32))),
                    "step": rows[STEP], "free_step": known(rows[FREE_STEP], rows[FREE_STEP] >= 0),
                }
            )
        )  # fmt: skip
    return pl.concat(parts, rechunk=False)


def _taken(trace: Any, header: dict[str, Any]) -> Taken | None:
    carried = frame("carried_tables", trace).filter(pl.col("engine_index") == header["engine_index"])
    takes, most_request, low_group, high_group = carried.height, -1, 0, 0
    most_request = int(carried["request"].to_numpy().max(initial=-1))
    for piece in pieces(trace, header):
        takes += int(np.count_nonzero((piece.kinds == ALLOCATED) | (piece.kinds == HITS)))
        most_request = max(most_request, int(piece.narrow[E_REQUEST].max(initial=-1)))
        low_group = min(low_group, int(piece.groups.min(initial=0)))
        high_group = max(high_group, int(piece.groups.max(initial=0)))
    if low_group < -1 or high_group >= MOST_GROUPS:
        return None
    taken = Taken(np.empty((5, takes), np.int32), np.empty(takes, np.int16), np.empty(takes, np.uint8))
    held = np.zeros((high_group + 2, most_request + 1), np.int32)
    newest, before = np.full(block_count(trace, header), -1, np.int32), np.empty(takes, np.int32)
    made, odd = 0, 0
    if carried.height:
        begun = np.full((4, carried.height), -1, np.int32)
        begun[E_REQUEST], begun[E_BLOCK] = carried["request"].to_numpy(), carried["block"].to_numpy()
        kinds, no_groups = np.full(carried.height, ALLOCATED, np.uint8), np.zeros(carried.height, np.int16)
        made, odd = _take(begun, kinds, no_groups, held, newest, before, *taken, 0, 0)
        taken.takers[:made] = CARRIED
    for piece in pieces(trace, header):
        made, odd = _take(piece.narrow, piece.kinds, piece.groups, held, newest, before, *taken, made, odd)
    taken = Taken(taken.rows[:, :made], taken.groups[:made], taken.takers[:made])
    if odd:  # taken by requests that had let go of more than they held
        whole = taken.rows[POSITION] >= 0
        taken = Taken(taken.rows[:, whole], taken.groups[whole], taken.takers[whole])
    return taken


@njit
def _take(
    events: I32, kinds: U8, event_groups: I16, held: I32, newest: I32, before: I32, rows: I32, groups: I16, takers: U8,
    made: int, odd: int,
) -> tuple[int, int]:  # fmt: skip
    """Adds the blocks taken behind the `made` ones, and dates the end of those that are let go. Returns how many there
    are then, and how many of them have no place (-1).

    `held` int32[groups + 1, requests]: blocks of each; `newest` int32[blocks]: the row that took each last and still
    has it, `before` int32, by row: the one before it that does; -1 for none.
    """
    for n in range(kinds.size):
        what, request = kinds[n], events[E_REQUEST, n]
        if request < 0 or (what != ALLOCATED and what != HITS and what != FREED):
            continue
        group, block = event_groups[n], np.intp(np.uint32(events[E_BLOCK, n]))
        # Its own row, if it has the block: mostly the first or second that is looked at.
        last, row = np.int32(-1), newest[block]
        while row >= 0 and (rows[REQUEST, row] != request or groups[row] != group):
            last, row = row, before[row]
        if row >= 0:
            if last >= 0:
                before[last] = before[row]
            else:
                newest[block] = before[row]
        whose = np.intp(group) + 1
        if what == FREED:
            held[whose, request] -= 1
            if row >= 0:
                rows[FREE_STEP, row] = events[E_STEP, n]
            continue
        place = held[whose, request]
        held[whose, request] = place + 1
        odd += place < 0
        rows[REQUEST, made], rows[POSITION, made], rows[BLOCK, made] = request, max(place, -1), block
        rows[STEP, made], rows[FREE_STEP, made] = events[E_STEP, n], -1
        groups[made], takers[made] = group, HIT if what == HITS else ALLOCATE
        before[made], newest[block] = newest[block], made
        made += 1
    return made, odd


# -------------------------------------------------------------------------------------------------------------- reading


class Reading(NamedTuple):
    """Stretches of steps in which requests read blocks: `rows` int32[7, n], `groups` int16."""

    rows: I32
    groups: I16


def read_spans(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None as for `block_tables`."""
    parts = []
    for header in trace.engines:
        reading = _reading(trace, header)
        if reading is None:
            return None
        rows, groups = reading
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(header["engine_index"], len(groups), dtype=pl.Int16, eager=True),
                    "request": rows[R_REQUEST], "group": known(groups, groups >= 0), "position": rows[R_POSITION],
                    "block": rows[R_BLOCK], "first_step": rows[R_FIRST], "steps": rows[R_STEPS],
                    "tokens": rows[R_TOKENS], "computed_before": rows[R_COMPUTED],
                }
            )
        )  # fmt: skip
    return pl.concat(parts, rechunk=False)


def _reading(trace: Any, header: dict[str, Any]) -> Reading | None:
    taken = _taken(trace, header)
    if taken is None:
        return None
    mine = (pl.col("engine_index") == header["engine_index"]) & (pl.col("tokens") > 0)
    table = trace.step_spans.filter(mine).sort("request", "first_step", maintain_order=True)
    spans = np.empty((4, table.height), np.int32)
    for row, name in zip(spans, ("first_step", "steps", "tokens", "computed_before"), strict=True):
        row[:] = table[name].to_numpy()
    request = table["request"].to_numpy()
    requests = 1 + max(int(taken.rows[REQUEST].max(initial=-1)), int(request.max(initial=-1)))
    indptr = np.searchsorted(request, np.arange(requests + 1)).astype(np.int64)
    size = int(header["block_size"])
    found = _read(taken.rows, taken.groups, indptr, spans, size, np.empty((7, 0), np.int32), taken.groups[:0])
    reading = Reading(np.empty((7, found), np.int32), np.empty(found, np.int16))
    _read(taken.rows, taken.groups, indptr, spans, size, *reading)
    return reading


@njit
def _read(taken: I32, groups: I16, indptr: I64, spans: I32, size: int, rows: I32, row_groups: I16) -> int:
    """Fills the stretches in which each block taken was read, where there is room for them, and returns how many there
    are. `indptr` int64: the `spans` of each request."""
    found = 0
    write = row_groups.size > 0
    for n in range(groups.size):
        request = np.intp(np.uint32(taken[REQUEST, n]))
        begin = np.int64(taken[POSITION, n]) * size
        free = taken[FREE_STEP, n]
        for s in range(indptr[request], indptr[request + 1]):
            first, tokens = np.int64(spans[FIRST, s]), np.int64(spans[TOKENS, s])
            computed = np.int64(spans[COMPUTED, s])
            last = first + spans[STEPS, s] - 1
            if free >= 0:
                last = min(last, np.int64(free))
            from_step = max(first + max(begin - computed, np.int64(0)) // tokens, np.int64(taken[STEP, n]))
            if from_step > last:
                continue
            if write:
                rows[R_REQUEST, found], rows[R_POSITION, found] = taken[REQUEST, n], taken[POSITION, n]
                rows[R_BLOCK, found], rows[R_FIRST, found] = taken[BLOCK, n], from_step
                rows[R_STEPS, found], rows[R_TOKENS, found] = last - from_step + 1, tokens
                rows[R_COMPUTED, found] = computed + (from_step - first) * tokens
                row_groups[found] = groups[n]
            found += 1
    return found


# ------------------------------------------------------------------------------------------------------ what is counted


def step_reads(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None as for `block_tables`."""
    parts = []
    for header in trace.engines:
        reading = _reading(trace, header)
        if reading is None:
            return None
        past = _past(reading)
        blocks, tokens = np.zeros(past + 1, np.int64), np.zeros(past + 1, np.int64)
        _per_step(reading.rows, int(header["block_size"]), blocks, tokens)
        blocks, tokens = np.cumsum(blocks), np.cumsum(tokens)
        some = np.flatnonzero(blocks)
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(header["engine_index"], len(some), dtype=pl.Int16, eager=True),
                    "step": some.astype(np.int32), "blocks": blocks[some], "tokens": tokens[some],
                }
            )
        )  # fmt: skip
    return pl.concat(parts)


def block_reads(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None as for `block_tables`."""
    parts = []
    for header in trace.engines:
        reading = _reading(trace, header)
        if reading is None:
            return None
        rows = reading.rows
        blocks, requests = (int(rows[row].max(initial=-1)) + 1 for row in (R_BLOCK, R_REQUEST))
        begins = np.zeros(requests + 1, np.int64)
        np.cumsum(np.bincount(rows[R_REQUEST], minlength=requests), out=begins[1:])
        order = np.empty(rows.shape[1], np.int32)
        _by_request(rows, begins[:-1].copy(), order)
        found = np.zeros((2, blocks), np.int64)
        _per_block(rows, order, np.full(blocks, -1, np.int32), found)
        some = np.flatnonzero(found[1])
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(header["engine_index"], len(some), dtype=pl.Int16, eager=True),
                    "block": some.astype(np.int32), "times": found[0, some], "requests": found[1, some],
                }
            )
        )  # fmt: skip
    return pl.concat(parts)


def shared_reads(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None as for `block_tables`."""
    parts = []
    for header in trace.engines:
        reading = _reading(trace, header)
        if reading is None:
            return None
        rows, past = reading.rows, _past(reading)
        blocks = int(rows[R_BLOCK].max(initial=-1)) + 1
        begun, ended = np.zeros(past + 2, np.int64), np.zeros(past + 2, np.int64)
        _bounds(rows, begun, ended)
        begins, ends = np.empty(rows.shape[1], np.int32), np.empty(rows.shape[1], np.int32)
        _by_step(rows, np.cumsum(begun) - begun, np.cumsum(ended) - ended, begins, ends)
        found = np.zeros(int(_most_at_once(begun, ended)) + 1, np.int64)
        _shared(np.cumsum(begun), np.cumsum(ended), begins, ends, np.zeros((2, blocks), np.int32), found)
        readers = np.flatnonzero(found[1:]) + 1
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(header["engine_index"], len(readers), dtype=pl.Int16, eager=True),
                    "readers": readers, "blocks": found[readers],
                }
            )
        )  # fmt: skip
    return pl.concat(parts)


def _past(reading: Reading) -> int:
    ends = reading.rows[R_FIRST].astype(np.int64) + reading.rows[R_STEPS]
    return int(ends.max(initial=0))


def _most_at_once(begun: I64, ended: I64) -> int:
    return int((np.cumsum(begun) - np.cumsum(ended)).max(initial=0)) if begun.size else 0


@njit
def _per_step(rows: I32, size: int, blocks: I64, tokens: I64) -> None:
    """Adds what changes from step to step: blocks read, and tokens in them."""
    for n in range(rows.shape[1]):
        first, past = np.int64(rows[R_FIRST, n]), np.int64(rows[R_FIRST, n]) + rows[R_STEPS, n]
        each = np.int64(rows[R_TOKENS, n])
        filled = np.int64(rows[R_COMPUTED, n]) + each - np.int64(rows[R_POSITION, n]) * size
        blocks[first] += 1
        blocks[past] -= 1
        read, step = min(np.int64(size), filled), first
        tokens[step] += read
        while read < size and step + 1 < past:  # until the block is full
            filled += each
            step += 1
            tokens[step] += min(np.int64(size), filled) - read
            read = min(np.int64(size), filled)
        tokens[past] -= read


@njit
def _by_request(rows: I32, place: I64, order: I32) -> None:
    """Sorts the rows by request; `place` int64: where those of each begin."""
    for n in range(rows.shape[1]):
        request = np.intp(np.uint32(rows[R_REQUEST, n]))
        order[place[request]] = n
        place[request] += 1


@njit
def _per_block(rows: I32, order: I32, last: I32, found: I64) -> None:
    """Counts in `found` int64[2, blocks] reads and requests. `last` int32[blocks]: the request counted last, -1."""
    for i in range(order.size):
        n = np.intp(np.uint32(order[i]))
        block = np.intp(np.uint32(rows[R_BLOCK, n]))
        found[0, block] += rows[R_STEPS, n]
        if last[block] != rows[R_REQUEST, n]:
            last[block] = rows[R_REQUEST, n]
            found[1, block] += 1


@njit
def _bounds(rows: I32, begun: I64, ended: I64) -> None:
    for n in range(rows.shape[1]):
        begun[rows[R_FIRST, n]] += 1
        ended[rows[R_FIRST, n] + rows[R_STEPS, n]] += 1


@njit
def _by_step(rows: I32, begin_at: I64, end_at: I64, begins: I32, ends: I32) -> None:
    """Sorts the blocks by the step in which a request begins to read them, and by the first in which it does not."""
    for n in range(rows.shape[1]):
        first = np.int64(rows[R_FIRST, n])
        begins[begin_at[first]] = rows[R_BLOCK, n]
        begin_at[first] += 1
        past = first + rows[R_STEPS, n]
        ends[end_at[past]] = rows[R_BLOCK, n]
        end_at[past] += 1


@njit
def _shared(begun: I64, ended: I64, begins: I32, ends: I32, blocks: I32, found: I64) -> None:
    """Counts in `found`, by the number of readers, the steps that each block has so many. `begun` and `ended` are
    summed up; `blocks` int32[2, blocks]: readers now, and the step since when."""
    begin, end = 0, 0
    for step in range(begun.size):
        while end < ended[step]:
            block = np.intp(np.uint32(ends[end]))
            found[blocks[0, block]] += step - blocks[1, block]
            blocks[0, block] -= 1
            blocks[1, block] = step
            end += 1
        while begin < begun[step]:
            block = np.intp(np.uint32(begins[begin]))
            found[blocks[0, block]] += step - blocks[1, block]
            blocks[0, block] += 1
            blocks[1, block] = step
            begin += 1
