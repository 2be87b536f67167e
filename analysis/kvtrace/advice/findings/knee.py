"""The knee of the LRU curve: the capacity behind which more returns less.

The knee is the point that lies highest above the line between the ends of the curve (Satopää et al., "Finding a
'Kneedle' in a Haystack", ICDCS Workshops 2011, without smoothing, as an exact curve of LRU never falls).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Figure, Finding, adviser

LEAST_POINTS = 5


def knee_of(points: pl.DataFrame) -> int:
    """The capacity at the knee of a curve, whose points are in order of capacity."""
    capacities, hits = (points[name].to_numpy().astype(np.float64) for name in ("capacity_blocks", "token_hits"))
    x = (capacities - capacities[0]) / (capacities[-1] - capacities[0])
    y = (hits - hits[0]) / max(hits[-1] - hits[0], 1)
    return int(capacities[np.argmax(y - x)])


def curve_of(case: Case) -> pl.DataFrame:
    """The points of the LRU curve that could be told, in order of capacity."""
    from kvtrace.curves import curve

    rows = curve(case.trace)
    if "engine_index" in rows.columns:
        rows = rows.filter(pl.col("engine_index") == case.index)
    return rows.filter(pl.col("capacity_blocks").is_not_null() & pl.col("token_hits").is_not_null()).sort(
        "capacity_blocks"
    )


@adviser("knee")
def knee(case: Case) -> Iterator[Finding]:
    """Where the curve bends, and how the engine's own capacity lies to that."""
    points = curve_of(case)
    if points.height < LEAST_POINTS or points["token_hits"].n_unique() < LEAST_POINTS:
        return
    capacity = knee_of(points)
    wanted: list[int | str] = [capacity, "inf"] if case.capacity is None else [capacity, case.capacity, "inf"]
    found = {row.row["capacity_blocks"]: row for row in case.replayed(["lru"], wanted)}
    if capacity not in found or None not in found:
        return
    ends, top = found[capacity], found[None]
    figures: list[Figure] = [
        ends.figure("knee_blocks", "capacity_blocks", "blocks"),
        ends.figure("knee_ratio", "token_hit_ratio", "ratio"),
        top.figure("endless_ratio", "token_hit_ratio", "ratio"),
    ]
    low, high = interval(ends.cached, np.full(ends.cached.size, case.prompt_tokens / max(1, ends.cached.size)))
    text = (
        f"The LRU curve bends at {case.size(capacity)}: there {ends.row['token_hit_ratio']:.1%} of tokens hit "
        f"(95 %: {low:.1%} to {high:.1%}), in an endless cache {top.row['token_hit_ratio']:.1%}."
    )
    if case.capacity is not None and case.capacity in found:
        own = found[case.capacity]
        figures.append(own.figure("own_ratio", "token_hit_ratio", "ratio"))
        side = "behind it, where memory returns less" if case.capacity > capacity else "before it"
        if case.capacity == capacity:
            side = "at it"
        text += f" The engine's {case.size(case.capacity)} lie {side}: {own.row['token_hit_ratio']:.1%}."
    sure = SAID.format(stretches(ends.cached.size))
    yield Finding(
        "knee", text, tuple(figures), "knee_ratio", ends.row["token_hit_ratio"], "ratio", low, high,
        f"open loop, lru; {sure}",
    )  # fmt: skip
