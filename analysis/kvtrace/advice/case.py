"""`Case`: an engine of a trace, the questions that findings ask of it, and the commands that ask the same."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace import metrics
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Figure, Finding, worked
from kvtrace.api import Trace
from kvtrace.simulations import Simulated, request_frame, simulate_trace
from kvtrace.sql import Database
from kvtrace_replay import Workload, of_trace
from kvtrace_replay.schedulers.sweep import WHY
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError

Found = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One row of `kvtrace simulate` or `replay`: as printed, with tokens found per request, and where it stands."""

    row: dict[str, Any]
    cached: Found  # prompt tokens found at the first admission, by request
    command: str
    where: dict[str, Any]

    def figure(self, name: str, column: str, unit: str) -> Figure:
        """A cell of the row."""
        return Figure(name, self.row[column], unit, self.command, column, self.where)


class Case:
    """An engine of a trace. `header` is its header, `capacity` its usable blocks (None: not known), `profile` what
    steps and copies cost (None: nobody said)."""

    def __init__(
        self, trace: Trace, header: dict[str, Any], database: Database, profile: Profile | None = None
    ) -> None:
        self.trace = trace
        self.header = header
        self.index = int(header["engine_index"])
        self.several = len(trace.engines) > 1
        self.capacity = metrics.capacity_blocks(header)
        self.block_size = int(header["block_size"])
        self.block_bytes: int | None = header.get("bytes_per_block")
        self.profile = profile
        self._database = database
        self._simulated: dict[str, Simulated] = {}

    # ------------------------------------------------------------------------------------------------ what is known

    @cached_property
    def workload(self) -> Workload:
        """Its requests as the open loop takes them."""
        return of_trace(self.trace.reader, engine_index=self.index)

    @cached_property
    def requests(self) -> int:
        """Requests that looked something up, or would in the open loop."""
        mine = pl.col("engine_index") == self.index
        if self.header.get("source") == "import":
            return self.trace.requests.filter(mine).height
        return self.trace.lookups.filter(mine & ~pl.col("after_preemption")).height

    @cached_property
    def open_because(self) -> str | None:
        """Why the closed loop is not used; None: it repeats the recorded run exactly."""
        if self.header.get("source") == "import":
            return "an import has no scheduler steps to run again"
        if self.trace.lossy:
            return "the trace is lossy"
        try:
            (own,) = self.simulated({})
        except KvtraceError as error:
            return str(error)
        recorded = int(self.trace.lookups.filter(pl.col("engine_index") == self.index)["tokens_hit"].sum())
        if own.row["why"]:
            return f"the run cannot be repeated exactly ({own.row['why']})"
        if own.row["hit_tokens"] != recorded:
            return f"the simulated run finds {own.row['hit_tokens']:,} tokens, the recorded one {recorded:,}"
        return None

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts: what hits are shares of."""
        mine = self.trace.requests.filter(pl.col("engine_index") == self.index)
        return int(mine["prompt_tokens"].cast(pl.Int64).sum())

    @property
    def loop(self) -> str:
        """The loop that figures come from, in words."""
        return "closed loop" if self.open_because is None else f"open loop, since {self.open_because}"

    @cached_property
    def token_cost(self) -> Figure | None:
        """What a token of prefill costs, by least squares over the steps; None where the trace does not tell."""
        if self.header.get("clock") == "logical":
            return None
        query = (
            "SELECT engine_index, regr_slope(duration_ns, prefill_tokens) AS ns_per_prefill_token FROM step_phases "
            f"WHERE engine_index = {self.index} GROUP BY engine_index"
        )
        figures = self.ask(query, {"ns_per_prefill_token": "ns"})
        slope = figures[0].value if figures else None
        return figures[0] if slope is not None and np.isfinite(slope) and slope > 0 else None

    def size(self, blocks: int | float) -> str:
        """An amount of blocks in bytes, where they are known."""
        from kvtrace.people import size

        return f"{blocks:,.0f} blocks" + (f" ({size(blocks * self.block_bytes)})" if self.block_bytes else "")

    # ------------------------------------------------------------------------------------------------- what is asked

    def command(self, name: str, *words: str) -> str:
        """A command line over this trace that prints JSON."""
        return shlex.join(["kvtrace", name, str(self.trace.path), *words, "--json"])

    def ask(self, query: str, units: dict[str, str]) -> list[Figure]:
        """The first row that a query answers with, one figure for each column named in `units`; none if it is empty."""
        rows = self._database.query(query).to_dicts()
        if not rows:
            return []
        command = self.command("sql", " ".join(query.split()))
        return [Figure(name, rows[0][name], unit, command, name) for name, unit in units.items()]

    def columns(self, query: str) -> pl.DataFrame:
        """All that a query answers with."""
        return self._database.query(query)

    def simulated(self, settings: dict[str, list[Any]]) -> list[Outcome]:
        """The closed loop at a grid of settings; cells that cannot be run are left out."""
        words = [word for name, values in settings.items() for word in (_option(name), ",".join(map(str, values)))]
        command = self.command("simulate", *words)
        if command not in self._simulated:
            self._simulated[command] = simulate_trace(self.trace, dict(settings))
        found = self._simulated[command]
        outcomes = []
        for (index, cell), row in zip(found.cells, found.frame().iter_rows(named=True), strict=True):
            if index != self.index or cell.run is None:
                continue
            where = {name: row[name] for name in settings}
            if self.several:
                where["engine_index"] = index
            cached = request_frame(cell, cell.run)["cached_tokens"].fill_null(0).to_numpy().astype(np.int64)
            outcomes.append(Outcome(row, cached, command, where))
        return outcomes

    def replayed(
        self, policies: Sequence[str], capacities: Sequence[int | str], sizes: Sequence[int] = ()
    ) -> list[Outcome]:
        """The open loop at a grid; cells that cannot be run are left out."""
        from kvtrace.replays import replay

        words = ["--policy", ",".join(policies), "--capacity", ",".join(map(str, capacities))]
        if sizes:
            words += ["--block-size", ",".join(map(str, sizes))]
        command = self.command("replay", *words)
        each: list[pl.DataFrame] = []
        rows = replay(
            self.trace, list(policies), list(capacities), list(sizes) if sizes else None, per_request=each
        ).iter_rows(named=True)
        names = ("policy", "capacity_blocks", "block_size", *(["engine_index"] if self.several else []))
        tokens = {
            (frame["engine_index"][0], *(frame[name][0] for name in names[:3])): frame["token_hits"].to_numpy()
            for frame in each
            if frame.height
        }
        outcomes = []
        for row in rows:
            if row.get("engine_index", self.index) != self.index or row["why"]:
                continue
            key = (self.index, row["policy"], row["capacity_blocks"], row["block_size"])
            if key in tokens:
                outcomes.append(Outcome(row, tokens[key], command, {name: row[name] for name in names}))
        return outcomes

    # ----------------------------------------------------------------------------------------------- what is answered

    def saving(self, kind: str, text: str, more: Outcome, now: Outcome, *others: Figure) -> Finding:
        """A finding: the prompt tokens that `more` finds and `now` does not, with how sure that is.

        In `text`, {gain} stands for that in words.
        """
        from kvtrace.people import percent, seconds

        difference = (more.cached - now.cached).astype(np.float64)
        figures = [*self.hits("more", more), *self.hits("now", now)]
        formula = _HITS.format("more") + " - " + _HITS.format("now")
        if "hit_tokens" not in now.row:
            formula = "more_hits - now_hits"
        value = worked(formula, figures)
        low, high = interval(difference)
        sure = SAID.format(stretches(difference.size))
        asked = max(1, self.prompt_tokens)
        gain = "as many prompt tokens in the cache"
        if value:
            gain = (
                f"{abs(value):,.0f} {'more' if value > 0 else 'fewer'} prompt tokens in the cache "
                f"({percent(value / asked, 1)} of all; 95 %: {percent(low / asked, 1)} to {percent(high / asked, 1)})"
            )
        saved = None
        if (cost := self.token_cost) is not None and cost.value is not None and value > 0:
            saved = value * cost.value / 1e9
            figures.append(cost)
            gain += f", about {seconds(saved)} of prefill"
        if low <= 0 <= high and value:
            gain += "; from these requests that cannot be told from nothing"
        return Finding(
            kind, text.format(gain=gain), (*figures, *others), formula, value, "tokens", low, high,
            f"{self.exactness(more)}; {sure}", max(0.0, value) if low > 0 else 0.0, saved,
        )  # fmt: skip

    def hits(self, name: str, outcome: Outcome) -> list[Figure]:
        """What the tokens found at first admissions are made of, in the columns that the row has."""
        if "hit_tokens" in outcome.row:
            return [
                outcome.figure(f"{name}_hits", "hit_tokens", "tokens"),
                outcome.figure(f"{name}_hits_after_preemption", "hit_tokens_after_preemption", "tokens"),
            ]
        return [outcome.figure(f"{name}_hits", "token_hits", "tokens")]

    def exactness(self, outcome: Outcome) -> str:
        """How a row's figures are bound to what would have happened."""
        if "exact" not in outcome.row:
            return self.loop
        why = outcome.row["why"]
        if not why:
            return "closed loop, exact given equal tokens"
        return "closed loop, not bound to be exact: " + "; ".join(WHY[name] for name in why.split(", "))


_HITS = "({0}_hits - {0}_hits_after_preemption)"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
