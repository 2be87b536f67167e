"""The comparison of two traces, request by request."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace.diff.match import METHODS, match
from kvtrace.diff.why import SCHEMA, whys
from kvtrace_traces.errors import KvtraceError, UsageError

if TYPE_CHECKING:
    from kvtrace.api import Trace

#: What is told of each request in both traces: `NAME_a`, `NAME_b`.
SIDES = (
    "prompt_tokens", "output_tokens", "finish_reason", "cached_tokens", "cached_after_preemption", "preemptions",
    "queue_steps", "steps", "queue_s", "ttft_s", "e2e_s",
)  # fmt: skip
#: What makes two requests differ. Times do not: no two recordings agree in them.
COMPARED = (
    "prompt_tokens",
    "output_tokens",
    "finish_reason",
    "cached_tokens",
    "cached_after_preemption",
    "preemptions",
)


@dataclass(frozen=True)
class Difference:
    """Two traces compared.

    Attributes:
        requests: one row per matched request: engine_index, request_a, request_b, request_id, matched_by, `different`
            (a column of COMPARED differs), the columns SIDES with `_a` and `_b`, hit_change (cached tokens of B less
            those of A), and of the trace in which less was found the first block that was not: `worse` (a or b),
            missed_blocks (found in the other only), evicted_blocks of them, position, reason (a key of `why.REASONS`),
            evicted_by, evicted_step, evicted_ns, filled_by, filled_step.
        blocks: one row per such block: engine_index, request_a, worse, and the columns of `why.SCHEMA`.
        only_a, only_b: requests without a counterpart: engine_index, request.
    """

    requests: pl.DataFrame
    blocks: pl.DataFrame
    only_a: pl.DataFrame
    only_b: pl.DataFrame

    @property
    def equal(self) -> bool:
        """Whether every request has a counterpart that agrees with it in all of COMPARED."""
        return not (self.only_a.height or self.only_b.height or self.requests["different"].any())


def diff(
    a: Trace | str | os.PathLike[str], b: Trace | str | os.PathLike[str], match_by: str | None = None
) -> Difference:
    """Compare the requests of trace `b` with those of trace `a`; engines are compared by their index.

    `match_by`: one of `match.METHODS`, to match by that alone. Raises KvtraceError for traces without lookups
    (imports) or requests in common, UsageError for traces with different engines.
    """
    import kvtrace

    opened_a, opened_b = (kvtrace.open(t) if isinstance(t, str | os.PathLike) else t for t in (a, b))
    if match_by is not None and match_by not in METHODS:
        raise UsageError(f"--match {match_by} is none of {', '.join(METHODS)}")
    indices = [[int(header["engine_index"]) for header in trace.engines] for trace in (opened_a, opened_b)]
    if indices[0] != indices[1] and any(len(found) > 1 for found in indices):
        raise UsageError(f"the engines differ: {opened_a.path} has {indices[0]}, {opened_b.path} has {indices[1]}")
    for trace in (opened_a, opened_b):
        if trace.header.get("source") == "import":
            raise KvtraceError(f"{trace.path} was imported: no engine served it, so there is nothing to compare")
    parts = [_engine(opened_a, opened_b, i, j, match_by) for i, j in zip(*indices, strict=True)]
    return Difference(*(pl.concat([part[n] for part in parts]) for n in range(4)))


def _engine(a: Trace, b: Trace, index_a: int, index_b: int, match_by: str | None) -> tuple[pl.DataFrame, ...]:
    pairs = match(a, b, index_a, index_b, match_by)
    sides = {"a": _side(a, index_a), "b": _side(b, index_b)}
    rows = pairs
    for name, side in sides.items():
        renamed = side.rename({column: f"{column}_{name}" for column in side.columns})
        rows = rows.join(renamed, on=f"request_{name}", how="left", maintain_order="left")
    rows = rows.with_columns(
        hit_change=pl.col("cached_tokens_b") - pl.col("cached_tokens_a"),
        different=pl.any_horizontal(pl.col(f"{name}_a").ne_missing(pl.col(f"{name}_b")) for name in COMPARED),
    ).with_columns(
        worse=pl.when(pl.col("hit_change") < 0).then(pl.lit("b")).when(pl.col("hit_change") > 0).then(pl.lit("a"))
    )
    blocks = pl.concat([_missed(a, index_a, rows, "a"), _missed(b, index_b, rows, "b")])
    first = blocks.group_by("request_a", maintain_order=True).agg(
        pl.len().alias("missed_blocks"), (pl.col("reason") == "evicted").sum().alias("evicted_blocks"),
        *(pl.col(name).first() for name in list(SCHEMA)[1:]),
    )  # fmt: skip
    rows = rows.join(first, on="request_a", how="left", maintain_order="left")
    sided = [f"{name}_{side}" for name in SIDES for side in ("a", "b")]
    names = [
        "request_a", "request_b", "request_id", "matched_by", "different", *sided, "hit_change", "worse",
        "missed_blocks", "evicted_blocks", *list(SCHEMA)[1:],
    ]  # fmt: skip
    rows = rows.with_columns(request_id=pl.col("request_id_a")).select(names)
    only = [
        side.filter(~pl.col("request").is_in(pairs[f"request_{name}"].implode())).select("request")
        for name, side in sides.items()
    ]
    engine = pl.lit(index_a, pl.Int16).alias("engine_index")
    return tuple(frame.select(engine, pl.all()) for frame in (rows, blocks, *only))


def _side(trace: Trace, index: int) -> pl.DataFrame:
    """What one trace tells of its requests: request, request_id and the columns SIDES."""
    mine = pl.col("engine_index") == index
    requests = trace.requests.filter(mine)
    later = trace.lookups.filter(mine & pl.col("after_preemption")).group_by("request").agg(
        cached_after_preemption=pl.col("tokens_hit").cast(pl.Int64).sum()
    )  # fmt: skip
    times = trace.sql(
        f"SELECT request, queue_ns / 1e9 AS queue_s, ttft_ns / 1e9 AS ttft_s, e2e_ns / 1e9 AS e2e_s FROM latencies "
        f"WHERE engine_index = {index}"
    ).cast({"request": pl.Int32})
    if _header(trace, index).get("clock") == "logical":  # it counts steps, and its times are none
        times = times.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ("queue_s", "ttft_s", "e2e_s"))
    known = requests.join(later, on="request", how="left").join(times, on="request", how="left").sort("request")
    return known.select(
        "request", "request_id", "prompt_tokens", "output_tokens", pl.col("finish_reason").cast(pl.String),
        "cached_tokens", pl.col("cached_after_preemption").fill_null(0), "preemptions",
        (pl.col("first_step") - pl.col("arrival_step")).alias("queue_steps"),
        (pl.col("finish_step") - pl.col("arrival_step") + 1).alias("steps"), "queue_s", "ttft_s", "e2e_s",
    )  # fmt: skip


def _header(trace: Trace, index: int) -> dict[str, Any]:
    return next(header for header in trace.engines if header["engine_index"] == index)


def _missed(trace: Trace, index: int, rows: pl.DataFrame, side: str) -> pl.DataFrame:
    """The blocks that first lookups of this trace did not find, and those of the other trace did."""
    size = int(_header(trace, index)["block_size"])
    other = "b" if side == "a" else "a"
    asked = rows.filter(pl.col("worse") == side).select(
        "request_a", "worse", request=pl.col(f"request_{side}"),
        position=pl.int_ranges(pl.col(f"cached_tokens_{side}") // size, -(-pl.col(f"cached_tokens_{other}") // size)),
    ).explode("position")  # fmt: skip
    asked = asked.with_columns(pl.col("position").cast(pl.Int32)).filter(pl.col("position").is_not_null())
    found = whys(trace, index, asked.select("request", "position"))
    return asked.join(found, on=["request", "position"], how="left", maintain_order="left").select(
        "request_a", "worse", *SCHEMA
    )
