"""Hit-ratio curves and working sets of whole traces: every engine and block size that was asked for, as one frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import polars as pl

from kvtrace.api import Trace, open_as_it_is
from kvtrace.replays import several
from kvtrace_replay import Workload, of_trace, parse_capacity
from kvtrace_replay.curves.points import Capacities, Exact
from kvtrace_replay.curves.sample import Sampled, parse_rate
from kvtrace_replay.curves.working_set import working_sets
from kvtrace_traces.errors import UsageError

Capacity = int | float | str
POINTS = ("default", "all")


def curve(
    trace: str | os.PathLike[str] | Trace,
    policy: str | Sequence[str] = "lru",
    capacity: Capacity | Sequence[Capacity] | None = None,
    block_size: int | Sequence[int | None] | None = None,
    semantics: str | Sequence[str] = "prefix",
    warmup: float = 0.0,
    sample: float | str | None = None,
    points: str = "default",
    seed: int = 0,
) -> pl.DataFrame:
    """Hit ratios over the capacity: exact, from one pass for LRU and from a replay a point for other policies; or, with
    `sample`, estimated from that share of the blocks, with an error.

    `trace`, `policy`, `capacity`, `block_size`, `semantics` and `warmup` are those of `kvtrace.replay`.
    Without `capacity`, `points` chooses them: "default" are some that are equally spaced in their logarithm, "all"
    is every capacity at which the curve takes another value (LRU in one pass only; other curves have their default
    points). `seed` draws another sample.

    Columns: policy, capacity_blocks (null is `inf`), block_size, semantics, requests, block_lookups, block_hits,
    block_hit_ratio, token_lookups, token_hits, token_hit_ratio, warmup, method (`one-pass`, `replay` or `sample`),
    why; a sampled curve has no hits, but sample_rate, sampled_requests, sampled_block_lookups, block_hit_ratio_error
    and token_hit_ratio_error, half of the 95 % confidence interval. A trace of several engines has engine_index in
    front. A point that cannot be told has nulls, and says why.

    Raises UsageError for values that cannot be, KvtraceError for a trace without chains.
    """
    if points not in POINTS:
        raise UsageError(f"points {points!r} are not known; choose {' or '.join(POINTS)}")
    rate = None if sample is None else parse_rate(sample)

    def rows(workload: Workload) -> pl.DataFrame:
        frames = []
        for name in several(policy):
            for kind in several(semantics):
                if rate is None:
                    exact = Exact(workload, name, kind, warmup)
                    own = exact.all_points if points == "all" else exact.default_points
                    frames.append(exact.at(_wanted(capacity, workload, kind, own)))
                else:
                    sampled = Sampled(workload, name, kind, rate, warmup, seed)
                    frames.append(sampled.at(_wanted(capacity, workload, kind, sampled.default_points)))
        return pl.concat(frames)

    return _of_every_engine(trace, block_size, rows)


def working_set(
    trace: str | os.PathLike[str] | Trace,
    window: str | int,
    block_size: int | Sequence[int | None] | None = None,
    semantics: str | Sequence[str] = "prefix",
) -> pl.DataFrame:
    """The distinct blocks used in each window of time (`60s`, `5min`) or of requests (`1000`), one after the other.

    Columns: block_size, semantics, window, window_start_s, window_s, first_request, requests, block_lookups,
    distinct_blocks, distinct_tokens, distinct_bytes, as `kvtrace_replay.curves.working_set` says; a trace of several
    engines has engine_index in front. Raises UsageError for a window that cannot be.
    """

    def rows(workload: Workload) -> pl.DataFrame:
        return pl.concat(
            working_sets(workload, window, kind).select(
                pl.lit(workload.block_size).alias("block_size"), pl.lit(kind).alias("semantics"), pl.all()
            )
            for kind in several(semantics)
        )

    return _of_every_engine(trace, block_size, rows)


def _wanted(
    capacity: Capacity | Sequence[Capacity] | None,
    workload: Workload,
    semantics: str,
    otherwise: Callable[[], Capacities],
) -> Capacities:
    if capacity is None:
        return otherwise()
    return [parse_capacity(size, workload, semantics) for size in several(capacity)]


def _of_every_engine(
    trace: str | os.PathLike[str] | Trace,
    block_size: int | Sequence[int | None] | None,
    rows: Callable[[Workload], pl.DataFrame],
) -> pl.DataFrame:
    opened = trace if isinstance(trace, Trace) else open_as_it_is(trace)[0]
    frames = []
    for header in opened.engines:
        for size in several(block_size):
            frame = rows(of_trace(opened.reader, block_size=size, engine_index=header["engine_index"]))
            if len(opened.engines) > 1:
                index = pl.lit(header["engine_index"], dtype=pl.Int16).alias("engine_index")
                frame = frame.select(index, pl.all())
            frames.append(frame)
    return pl.concat(frames)
