"""Curves from a sample of the blocks, for any policy: a cache of C blocks is stood for by one of RATE * C.

*Object* semantics: SHARDS. Blocks are chosen by a hash of their id, with all their references; hits are corrected by
the difference between the references expected and those got, which are mostly to the hottest blocks (Waldspurger,
Park, Garthwaite and Ahmad, "Efficient MRC construction with SHARDS", FAST 2015, `SHARDS_adj`).

*Prefix* semantics: a request is chosen as a whole, since a prefix with holes never hits, and all requests that share
blocks behind the trunk (`units.py`) are chosen together. The trunk, where there is one, is taken to stay in the
cache once it is there: its hits are counted, not sampled; a cache of C blocks is stood for by trunk + RATE * (C -
trunk), and what the sample finds behind the trunk is scaled up.

*Error*: half of the 95 % confidence interval, from seven balanced half-samples, each with a scaled cache of its own
(McCarthy, "Pseudo-replication: half samples", Review of the ISI 37, 1969): the mean square of their distances from
the whole sample's ratio is its variance, and Student's factor for seven degrees of freedom makes the interval. It
covers which blocks were drawn, and partly what scaling distorts (half-samples distort more). It cannot cover what
no sample shows, such as a rare giant conversation. Samples of fewer than FEWEST_GROUPS independent groups state none.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.curves.lru import lookups
from kvtrace_replay.curves.points import SCHEMA, Capacities, Exact, smallest_capacity, spread
from kvtrace_replay.curves.units import TrunkUse, block_units, chain_units, mixed, trunk_use
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.errors import UsageError

SAMPLED = "sample"
SAMPLE_POINTS = 24
FEWEST_GROUPS = 8.0
_PARTS = 8  # of a sample, of which every half-sample takes four
_STUDENT_95 = 2.365  # two-sided, seven degrees of freedom
_KINDS = ("block", "token")

SAMPLE_SCHEMA: dict[str, Any] = {
    **{name: kind for name, kind in SCHEMA.items() if name not in ("block_hits", "token_hits", "why")},
    "sample_rate": pl.Float64,
    "sampled_requests": pl.Int64,
    "sampled_block_lookups": pl.Int64,
    **{f"{kind}_hit_ratio_error": pl.Float64 for kind in _KINDS},
    "why": pl.String,
}
Ratios = dict[str, float]


def parse_rate(text: str | float) -> float:
    """A sampling rate, `0.01` or `1%`. Raises UsageError unless 0 < rate < 1."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(?:e(-?\d+))?\s*(%?)", str(text).strip().lower())
    rate = float(f"{match[1]}e{match[2] or 0}") / (100 if match[3] else 1) if match else math.nan
    if not 0 < rate < 1:
        raise UsageError(f"the sampling rate {text!r} must lie between 0 and 1, as 0.01 or 1%")
    return rate


class _Part:
    """A sample or half-sample of `rate`, and how its hits are scaled up."""

    def __init__(
        self, exact: Exact, rate: float, whole: dict[str, float], trunk: TrunkUse, own_trunk: TrunkUse
    ) -> None:
        """`whole`: lookups of the whole workload, `block` and `token`; `trunk`, its use of the trunk."""
        self.exact, self.rate, self.whole, self.trunk, self.own_trunk = exact, rate, whole, trunk, own_trunk

    def ratios(self, row: dict[str, Any]) -> Ratios | None:
        """The whole workload's hit ratios, from a row of this part's; None where they cannot be told."""
        if row["block_hits"] is None:
            return None
        found: Ratios = {}
        for i, kind in enumerate(_KINDS):
            whole, own, hits = self.whole[kind], row[f"{kind}_lookups"], row[f"{kind}_hits"]
            if not whole or not own:
                return None
            if self.exact.semantics == "object":
                expected = whole * self.rate
                ratio = (hits + expected - own) / expected
            else:
                kept = self.trunk[2 + i]
                behind, own_behind = whole - self.trunk[i], own - self.own_trunk[i]
                if behind and not own_behind:
                    return None
                ratio = (kept + (hits - self.own_trunk[2 + i]) * (behind / own_behind if behind else 0)) / whole
            found[kind] = min(max(ratio, 0.0), 1.0)
        return found


class Sampled:
    """The sampled curve of one workload, policy and semantics."""

    def __init__(
        self, workload: Workload, policy: str, semantics: str, rate: float, warmup: float = 0.0, seed: int = 0
    ) -> None:
        """Draws the samples. Raises UsageError where nothing was drawn, and whatever `Exact` raises."""
        workload.validate()
        if workload.carried:
            raise UsageError(
                "this cut begins with a filled cache, of which a sample would need its part: leave out --sample"
            )
        self.workload, self.semantics, self.rate, self.warmup = workload, semantics, rate, warmup
        self.units = block_units(workload, seed) if semantics == "object" else chain_units(workload, rate, seed)
        self.counted = lookups(workload, semantics, int(warmup * workload.n_requests))
        trunk = trunk_use(workload, self.units.trunk, warmup) if self.units.trunk_blocks else TrunkUse(0, 0, 0, 0)
        whole = dict(zip(_KINDS, map(float, self.counted[1:]), strict=True))
        drawn = self.units.hashes < np.uint64(min(int(rate * 2**64), 2**64 - 1))
        eighth = mixed(self.units.hashes) & np.uint64(_PARTS - 1)
        self.parts = []
        for row in range(_PARTS):  # of a Hadamard matrix: the first takes all, the others half each
            taken = np.array([(row & column).bit_count() % 2 == 0 for column in range(_PARTS)])
            part = self.units.choose(drawn & taken[eighth], warmup)
            exact = Exact(part.workload, policy, semantics, warmup)
            self.parts.append(_Part(exact, rate / 2 if row else rate, whole, trunk, part.trunk))
        if self.parts[0].exact.workload.n_refs == 0:
            raise UsageError(f"a sample of {rate:.3g} holds no block of this trace: take a higher rate")

    @property
    def groups(self) -> float:
        """Independent groups in the sample."""
        return self.units.groups * self.rate

    def default_points(self) -> list[int]:
        """Log-spaced capacities of which the half-samples' caches can hold the largest request."""
        need = max(smallest_capacity(part.exact.workload, self.semantics) for part in self.parts)
        every = distinct_blocks(self.workload, self.semantics)
        placed = bisect_left(range(need, every), True, key=lambda size: all(self._can_be(p, size) for p in self.parts))
        need += placed
        trunk = self.units.trunk_blocks
        first = trunk + math.ceil(max(need - trunk, 1) / (self.rate / 2))
        return spread(first, every, SAMPLE_POINTS)

    def at(self, capacities: Capacities, threads: int | None = None) -> pl.DataFrame:
        """A row for each capacity, in their order; columns as in SAMPLE_SCHEMA."""
        estimates = [self._estimate(part, capacities, threads) for part in self.parts]
        own = self.parts[0].exact.workload
        requests, block_lookups, token_lookups = self.counted
        rows = []
        for capacity, ratios, *halves in zip(capacities, *estimates, strict=True):
            errors, why = self._errors(ratios, halves) if ratios else ({}, self._why_not(capacity))
            ratios = ratios or {}
            rows.append(
                {
                    "policy": self.parts[0].exact.called,
                    "capacity_blocks": None if math.isinf(capacity) else int(capacity),
                    "block_size": self.workload.block_size,
                    "semantics": self.semantics,
                    "requests": requests,
                    "block_lookups": block_lookups,
                    "token_lookups": token_lookups,
                    **{f"{kind}_hit_ratio": ratios.get(kind) for kind in _KINDS},
                    **{f"{kind}_hit_ratio_error": errors.get(kind) for kind in _KINDS},
                    "warmup": self.warmup,
                    "method": SAMPLED,
                    "sample_rate": self.rate,
                    "sampled_requests": own.n_requests,
                    "sampled_block_lookups": lookups(own, self.semantics, int(self.warmup * own.n_requests))[1],
                    "why": why,
                }
            )
        return pl.DataFrame(rows, schema=SAMPLE_SCHEMA)

    def _estimate(self, part: _Part, capacities: Capacities, threads: int | None) -> list[Ratios | None]:
        sizes = [self._scaled(capacity, part.rate) for capacity in capacities]
        possible = sorted({size for size in sizes if self._can_be(part, size)})
        if not possible or part.exact.workload.n_refs == 0:
            return [None] * len(sizes)
        rows = part.exact.at(possible, threads).iter_rows(named=True)
        found = {size: part.ratios(row) for size, row in zip(possible, rows, strict=True)}
        return [found.get(size) for size in sizes]

    def _can_be(self, part: _Part, size: int | float) -> bool:
        """Whether a sample's cache of `size` blocks stands for a larger one; see `Policy.places`."""
        if self.semantics != "object" or math.isinf(size):
            return size >= 1
        fits = size >= distinct_blocks(part.exact.workload, "object")
        return size >= 1 and (fits or part.exact.within.places_at(int(size)))

    def _scaled(self, capacity: int | float, rate: float) -> int | float:
        """Blocks of the sample's cache, 0 where the capacity does not even hold the trunk."""
        trunk = self.units.trunk_blocks
        if math.isinf(capacity):
            return capacity
        return 0 if capacity <= trunk else trunk + round((capacity - trunk) * rate)

    def _errors(self, ratios: Ratios, halves: list[Ratios | None]) -> tuple[Ratios, str | None]:
        """(half of the confidence intervals, None), or ({}, why there are none)."""
        if self.groups < FEWEST_GROUPS:
            few = f"the sample holds about {self.groups:.1f} independent groups of requests"
            return {}, f"no error is stated: {few}, at least {FEWEST_GROUPS:.0f} are needed; take a higher rate"
        known = [half for half in halves if half is not None]
        if len(known) < len(halves):
            return {}, "no error is stated: half of the sample cannot be replayed at this capacity; take a higher rate"
        squares = {kind: sum((half[kind] - ratios[kind]) ** 2 for half in known) for kind in _KINDS}
        return {kind: _STUDENT_95 * math.sqrt(total / len(known)) for kind, total in squares.items()}, None

    def _why_not(self, capacity: int | float) -> str:
        if capacity <= self.units.trunk_blocks:
            return f"a capacity of {capacity} blocks cannot hold the {self.units.trunk_blocks} that most requests share"
        need = smallest_capacity(self.parts[0].exact.workload, self.semantics)
        size = self._scaled(capacity, self.rate)
        few = f"a capacity of {capacity} blocks is one of {size} in the sample"
        if need <= size:
            return f"{few}, too few for {self.parts[0].exact.called} to place any: take a higher rate"
        return f"{few}, in which a single request needs {need}: take a higher rate"
