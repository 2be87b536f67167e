"""What a section asks: one engine of one trace, its tables by SQL, its metrics, and the curves of its replays.

Nothing is computed here: tables and views are those of `kvtrace sql`, metrics those of `kvtrace stats`, curves those of
`kvtrace curve`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace import metrics
from kvtrace.curves import curve
from kvtrace.metrics.declare import MISSING, Group
from kvtrace.sql import Database, distinct_names
from kvtrace_traces.errors import KvtraceError

if TYPE_CHECKING:
    from kvtrace.api import Trace

POLICIES = ("lru", "fifo", "sieve", "s3fifo", "opt")
MOST_POINTS, LEAST_POINTS = 12, 2  # of a curve, beside those around the run's own cache
MOST_BYTES = 1 << 29  # of views that are kept, beside those that a query names
REPLAYED_USES = 800_000_000  # of blocks, in all replays of a curve together: about ten seconds
# Views that several sections ask for, and that cost more than to keep them.
_KEPT = ("block_lifetimes", "occupancy", "preemptions", "step_phases", "misses", "prefixes", "latencies")
_UNITS = ((600.0, 1.0, "s"), (36_000.0, 60.0, "min"), (float("inf"), 3600.0, "h"))


class Untold(KvtraceError):
    """What a section cannot show for this trace, and why: the page says it in its place."""


@dataclass(frozen=True)
class Axis:
    """The axis of what happens over time: begins of steps, or their numbers where the run has no clock.

    `column`: of `steps`; `first` and `past`: its least value, and one more than its greatest; `each`: of it in a shown
    `unit`; `name`: of a table's column.
    """

    column: str
    first: int
    past: int
    each: float
    unit: str
    name: str
    title: str

    def slice(self, count: int) -> str:
        """SQL: which of so many equal slices a row falls into, from 0."""
        return f"(({self.column} - {self.first}) * {count}::HUGEINT // {self.past - self.first})::INTEGER"

    def begin(self, column: str, count: int) -> pl.Expr:
        """Where a slice begins, in shown units."""
        return (pl.col(column) * ((self.past - self.first) / count / self.each)).alias(self.name)

    def shown(self, column: str) -> pl.Expr:
        """A value of `column`, in shown units."""
        return ((pl.col(column) - self.first) / self.each).alias(self.name)

    @property
    def extent(self) -> float:
        """All of it, in shown units."""
        return (self.past - self.first) / self.each

    @property
    def cells(self) -> dict[str, Callable[[Any], str]]:
        """How tables show the axis' column."""
        return {self.name: (lambda value: f"{value:,.4g}") if self.is_time else (lambda value: f"{value:,.0f}")}

    @property
    def is_time(self) -> bool:
        """Whether there is a clock."""
        return self.column != "step"


class Source:
    """A trace with its database, its curves and its metrics, asked for once."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.trace = trace
        self.name = name
        self.database = Database([trace.reader], keep=_KEPT, most_bytes=MOST_BYTES)

        self._known: dict[str, set[int]] = {}
        self._figures: dict[str, pl.DataFrame] = {}

    def known(self, need: str) -> set[int]:
        """The engines that have what metrics may need: a key of `kvtrace.metrics.declare.MISSING`."""
        if need not in self._known:
            self._known[need] = set(self.database.query(MISSING[need][0])["engine_index"])
        return self._known[need]

    def figures(self, group: Group) -> pl.DataFrame:
        """What the query of a group of metrics answers with, asked once."""
        if group.name not in self._figures:
            self._figures[group.name] = self.database.query(group.sql)
        return self._figures[group.name]

    @cached_property
    def uses(self) -> pl.DataFrame:
        """By engine_index: block_uses, those of blocks by requests, and distinct_blocks among them."""
        return self.database.query(
            "SELECT engine_index, sum(requests * blocks)::BIGINT AS block_uses, sum(blocks)::BIGINT AS distinct_blocks "
            "FROM prefixes GROUP BY engine_index"
        )

    @cached_property
    def curve(self) -> pl.DataFrame:
        """Rows of `kvtrace.curve` for all engines, at the same sizes; those of LRU at some more."""
        capacities = {metrics.capacity_blocks(header) for header in self.trace.engines} - {None}
        uses, distinct = (int(self.uses[name].to_numpy().max(initial=0)) for name in ("block_uses", "distinct_blocks"))
        sizes = curve_sizes([size for size in capacities if size], distinct, uses)
        # LRU takes one pass for all sizes, so it has as many as there are of a small trace.
        more = sorted({*sizes, *curve_sizes([size for size in capacities if size], distinct, 1)})
        others = [policy for policy in POLICIES if policy != "lru"]
        return pl.concat([curve(self.trace, "lru", more), curve(self.trace, others, sizes)])


class Run:
    """One engine of a trace, as sections see it.

    `name` tells it from the other runs of the page; `header` is its own; `capacity` its usable blocks, None where the
    trace knows no cache.
    """

    def __init__(self, source: Source, header: dict[str, Any], name: str) -> None:
        self.source = source
        self.trace = source.trace
        self.header = header
        self.engine = int(header["engine_index"])
        self.name = name
        self.capacity = metrics.capacity_blocks(header)
        self.block_size = int(header["block_size"])
        self.imported = header.get("source") == "import"

    def sql(self, query: str) -> pl.DataFrame:
        """The result of a query over the trace's tables and views; `{engine}` stands for this run's engine_index."""
        return self.source.database.query(query.replace("{engine}", str(self.engine)))

    def rows(self, group: Group) -> pl.DataFrame:
        """The figures of a group of metrics, a row for each part of it (one where it has none).

        Raises Untold where the trace does not hold what they need.
        """
        for need in group.needs:
            self.require(need)
        return self.source.figures(group).filter(pl.col("engine_index") == self.engine)

    def require(self, need: str) -> None:
        """Raises Untold, with the reason, where the run does not have what metrics may need."""
        if need == "turns":
            if "turn" not in self.trace.requests.columns:
                raise Untold("the trace does not tell turns: only some imports do")
        elif not self.has(need):
            reason = MISSING[need][1]  # which ends in what imports cannot tell
            raise Untold(reason if self.imported else reason.partition(": ")[0])

    def figures(self, group: Group) -> dict[str, Any]:
        """The figures of a group by the names of its metrics; None for each where they are not known."""
        try:
            found = self.rows(group)
        except Untold:
            found = pl.DataFrame()
        row = found.row(0, named=True) if found.height else {}
        return {metric.name: row.get(metric.name) for metric in group.metrics}

    def has(self, need: str) -> bool:
        """Whether the run has what metrics may need: a key of `kvtrace.metrics.declare.MISSING`."""
        return self.engine in self.source.known(need)

    @cached_property
    def timed(self) -> bool:
        """Whether times are times: a simulated run without a clock counts its steps alone."""
        return self.header.get("clock") != "logical"

    @cached_property
    def axis(self) -> Axis:
        """The axis of the steps. Raises Untold where there are none."""
        self.require("steps")
        column = "start_ns" if self.timed else "step"
        first, last = self.sql(
            f"SELECT min({column}) AS first, max({column}) AS last FROM steps WHERE engine_index = {{engine}}"
        ).row(0)
        if not self.timed:
            return Axis("step", first, last + 1, 1.0, "steps", "step", "scheduler step")
        return clock(column, first, last + 1, "since the first step")

    @cached_property
    def requests(self) -> int:
        """Requests of the trace at this engine."""
        return int(self.sql("SELECT count(*) FROM requests WHERE engine_index = {engine}").item())

    @cached_property
    def steps(self) -> int:
        """Steps that scheduled a token."""
        return int(self.sql("SELECT count(*) FROM steps WHERE engine_index = {engine}").item())

    @property
    def curve(self) -> pl.DataFrame:
        """Rows of `kvtrace.curve` for POLICIES, at sizes around the run's own cache and up to all distinct blocks.

        Raises Untold where no request has a block.
        """
        self.require("chains")
        rows = self.source.curve
        return rows.filter(pl.col("engine_index") == self.engine) if "engine_index" in rows.columns else rows


def curve_sizes(capacities: Sequence[int], distinct: int, uses: int) -> list[int]:
    """Capacities equally spaced in their logarithm up to all distinct blocks, and half, all and twice the own ones; the
    fewer, the more uses of blocks have to be replayed for each."""
    most = max(distinct, 1, *capacities)
    least = max(1, min(most // 64, min(capacities, default=most) // 8))
    points = min(MOST_POINTS, max(LEAST_POINTS, REPLAYED_USES // (len(POLICIES) * max(uses, 1)) - 3))
    spaced = {round(least * (most / least) ** (i / points)) for i in range(points + 1)}
    return sorted(spaced | {max(1, size * times // 2) for size in capacities for times in (1, 2, 4)})


def clock(column: str, first: int, past: int, since: str) -> Axis:
    """An axis of times in nanoseconds, in the unit that reads best."""
    seconds = (past - first) / 1e9
    _, each, unit = next(row for row in _UNITS if seconds <= row[0])
    return Axis(column, first, past, each * 1e9, unit, f"time_{unit}", f"time {since}, {unit}")


def runs_of(traces: Sequence[Trace]) -> list[Run]:
    """The runs of a page: every engine of every trace, each with a name of its own."""
    sources = [
        Source(trace, name) for trace, name in zip(traces, distinct_names([t.path for t in traces]), strict=True)
    ]
    return [
        Run(source, header, source.name + (f" · engine {header['engine_index']}" if len(engines) > 1 else ""))
        for source in sources
        for engines in [source.trace.engines]
        for header in engines
    ]
