"""At which capacities a curve is told, and the exact values there: from one pass where the rule allows it, else
from one replay for each capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.cache.runs import replay
from kvtrace_replay.cache.totals import IMPOSSIBLE
from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.curves.lru import LruCurve, largest_request, lru_curve, read_only
from kvtrace_replay.policies.lru import Lru
from kvtrace_replay.policies.registry import Policy, find_policy
from kvtrace_replay.workload.model import Workload

Capacities = Sequence[int | float] | npt.NDArray[np.int64]

ONE_PASS, BY_REPLAY = "one-pass", "replay"
# A replay for each point is dear, a point of a one-pass curve is free.
ONE_PASS_POINTS, REPLAY_POINTS = 40, 24

SCHEMA: dict[str, Any] = {
    "policy": pl.String,
    "capacity_blocks": pl.Int64,
    "block_size": pl.Int64,
    "semantics": pl.String,
    "requests": pl.Int64,
    "block_lookups": pl.Int64,
    "block_hits": pl.Int64,
    "block_hit_ratio": pl.Float64,
    "token_lookups": pl.Int64,
    "token_hits": pl.Int64,
    "token_hit_ratio": pl.Float64,
    "warmup": pl.Float64,
    "method": pl.String,
    "why": pl.String,
}


class Exact:
    """The exact curve of one workload, policy and semantics.

    The pass over the workload is made once, when the first point is asked for that can be told from it.
    """

    def __init__(self, workload: Workload, policy: str, semantics: str, warmup: float = 0.0) -> None:
        """Raises UsageError for an unknown policy, or one without a meaning in `semantics`."""
        entry = find_policy(policy)
        self.within = entry.within(semantics)
        self.workload, self.policy, self.semantics, self.warmup = workload, policy, semantics, warmup
        self.called = entry.called
        self.one_pass = is_plain_lru(entry) and semantics in ("object", "prefix")
        self._curve: LruCurve | None = None

    @property
    def curve(self) -> LruCurve:
        """The one-pass curve; only where `one_pass`."""
        if self._curve is None:
            self._curve = lru_curve(self.workload, self.semantics, self.warmup)
        return self._curve

    def smallest(self) -> int:
        """The smallest capacity that can be replayed: what the largest request needs, 1 in object semantics."""
        return smallest_capacity(self.workload, self.semantics)

    def default_points(self) -> list[int]:
        """Log-spaced capacities from the smallest to all distinct blocks."""
        many = ONE_PASS_POINTS if self.one_pass else REPLAY_POINTS
        return spread(self.smallest(), distinct_blocks(self.workload, self.semantics), many)

    def all_points(self) -> Capacities:
        """Every capacity at which the curve takes another value; log-spaced ones where a replay is needed."""
        if not self.one_pass:
            return self.default_points()
        turns = self.curve.breakpoints()
        return np.concatenate([[point for point in self.default_points() if point < turns[0]], turns]).astype(np.int64)

    def at(self, capacities: Capacities, threads: int | None = None) -> pl.DataFrame:
        """A row for each capacity, in their order; columns as in SCHEMA."""
        if not self.one_pass:
            return self._replayed(list(capacities), threads)
        sizes = np.asarray(capacities, np.float64)
        below = sizes < self.curve.exact_from
        if not below.any():
            return self._from_pass(sizes)
        small = [size for size, is_below in zip(capacities, below, strict=True) if is_below]
        rows = pl.concat([self._replayed(small, threads), self._from_pass(sizes[~below])])
        return rows[np.argsort(np.argsort(~below, kind="stable")).tolist()]

    def _replayed(self, capacities: list[int | float], threads: int | None) -> pl.DataFrame:
        rows = replay(self.workload, self.policy, capacities, self.semantics, warmup=self.warmup, threads=threads)
        known = [{name: row.get(name) for name in SCHEMA} | {"method": BY_REPLAY} for row in rows]
        return pl.DataFrame(known, schema=SCHEMA)

    def _from_pass(self, sizes: npt.NDArray[np.float64]) -> pl.DataFrame:
        curve = self.curve
        at = np.minimum(sizes, curve.distinct_blocks).astype(np.int64)
        hits = curve.hits[at]
        tokens = hits * curve.block_size
        if curve.short_tokens.size:
            tokens = tokens - curve.short_tokens[at]
        finite = np.where(np.isinf(sizes), -1, sizes).astype(np.int64)
        return pl.DataFrame(
            {
                "policy": pl.Series([self.called]).new_from_index(0, sizes.size),
                "capacity_blocks": pl.Series(finite).replace(-1, None),
                "block_size": curve.block_size,
                "semantics": self.semantics,
                "requests": curve.requests,
                "block_lookups": curve.block_lookups,
                "block_hits": hits,
                "block_hit_ratio": _ratio(hits, curve.block_lookups),
                "token_lookups": curve.token_lookups,
                "token_hits": tokens,
                "token_hit_ratio": _ratio(tokens, curve.token_lookups),
                "warmup": self.warmup,
                "method": ONE_PASS,
                "why": pl.select(pl.when(pl.Series(tokens > curve.token_lookups)).then(pl.lit(IMPOSSIBLE))).to_series(),
            },
            schema=SCHEMA,
        )


def _ratio(hits: npt.NDArray[np.int64], lookups: int) -> pl.Series:
    return pl.Series(np.where(hits > lookups, np.nan, hits / lookups if lookups else np.nan)).fill_nan(None)


def is_plain_lru(policy: Policy) -> bool:
    """Whether it is this project's own LRU, which places every block."""
    return policy.setup is Lru.setup and policy.uses == 1


def smallest_capacity(workload: Workload, semantics: str) -> int:
    """Distinct blocks of the largest request, which every prefix cache must hold; 1 in object semantics."""
    if semantics == "object":
        return 1
    chains = read_only(workload.identities), read_only(workload.indptr)[workload.carried :]
    return max(1, int(largest_request(*chains, workload.n_identities)))


def spread(first: int, last: int, many: int) -> list[int]:
    """About `many` whole numbers from `first` to `last`, both included, equally spaced in their logarithm."""
    if last <= first:
        return [max(1, first)]
    return np.unique(np.geomspace(first, last, many).round().astype(np.int64)).tolist()
