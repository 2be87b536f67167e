"""Replays of a cache in several tiers, as result rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core.errors import NumbaError

from kvtrace_replay.cache.prepare import Prepared, prepare, too_small
from kvtrace_replay.cache.runs import UNUSED
from kvtrace_replay.cache.totals import IMPOSSIBLE, ratio_of
from kvtrace_replay.capacity import parse_capacity
from kvtrace_replay.policies.refusal import reason
from kvtrace_replay.policies.registry import MAX_STATE, Policy, find_policy
from kvtrace_replay.tiers import words
from kvtrace_replay.tiers.driver import tiers_driver
from kvtrace_replay.tiers.spec import SEMANTICS, Tier, check_tiers, gives_up, parse_bandwidth, parse_tier, uses_of
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import warm
from kvtrace_traces.errors import KvtraceError, UsageError

Row = dict[str, Any]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Level:
    """A tier with its texts read."""

    tier: Tier
    entry: Policy
    capacity: int | float
    uses: int
    bandwidth: float | None


@dataclass(frozen=True)
class _Found:
    totals: I64  # int64[MAX_TIERS, N_SUMS], see `words`
    request_hits: I64  # int64[n_requests], over all tiers
    mask: npt.NDArray[np.uint8]  # uint8[n_identities], the tiers that hold a block at the end
    seconds: float


def replay_tiers(
    workload: Workload,
    tiers: Sequence[Tier | str],
    semantics: str = "prefix",
    *,
    warmup: float = 0.0,
    bytes_per_token: float | None = None,
    prefill_tokens_per_s: float | None = None,
) -> list[Row]:
    """Replays `workload` through `tiers`, by the rules of docs/tiers.md.

    Args:
        workload: the requests of one engine.
        tiers: 1 to 4, the top first, each a `Tier` or a text for `parse_tier`.
        semantics: "object" or "prefix".
        warmup: this share of the requests, from the first admitted on, fills the tiers and is not counted.
        bytes_per_token: bytes of keys and values in a token, in place of what the workload says.
        prefill_tokens_per_s: how many tokens a second are recomputed; None where unknown.

    Returns one dict per tier, the top first, and one called "total", with the keys `tier level policy capacity_blocks
    mode write promote uses semantics block_size requests block_lookups block_hits block_hit_ratio token_lookups
    token_hits token_hit_ratio blocks_up blocks_down bytes_up bytes_down evictions expired_blocks bypassed_blocks
    invalidated_blocks pin_overflow_requests recompute_seconds load_seconds seconds_saved seconds warmup why`.
    Each tier's ratios are shares of all lookups, so that they add up to the total's. `capacity_blocks` None is
    infinite. `blocks_up` were read out of the tier for hits, `blocks_down` written into it from above. Bytes are
    None where the bytes of a block are not known, `recompute_seconds` (of the tokens hit), `load_seconds` (of the
    bytes up) and `seconds_saved`, their difference, where a speed is not. `seconds` is the driver alone. Where the
    top tier cannot hold the largest single request, the results are None and `why` says so.

    Raises UsageError for tiers, a policy, capacity, speed or semantics that cannot be, KvtraceError for an invalid
    workload or a policy that does not compile.
    """
    if not 0 <= warmup < 1:
        raise UsageError(f"warm-up {warmup} must be a share of the requests, 0 or more and below 1")
    if semantics not in SEMANTICS:
        raise UsageError(f"tiers have no {semantics!r} semantics: take {' or '.join(SEMANTICS)}")
    for what, value in (("bytes per token", bytes_per_token), ("prefill tokens per second", prefill_tokens_per_s)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{value} {what} must be a number above 0")
    workload.validate()
    if bytes_per_token is not None:
        workload = replace(workload, bytes_per_block=max(1, round(bytes_per_token * workload.block_size)))
    levels = _levels(workload, [parse_tier(t) if isinstance(t, str) else t for t in tiers], semantics)
    run = prepare(workload, semantics, warmup)
    why = too_small(run, levels[0].capacity)
    found = None if why else _drive(levels, run)
    rows = [
        _tier_row(k, level, found, workload.bytes_per_block, prefill_tokens_per_s) for k, level in enumerate(levels)
    ]
    rows.append(_total_row(rows, found))
    common = {
        "semantics": semantics,
        "block_size": workload.block_size,
        "requests": run.requests,
        "block_lookups": run.block_lookups,
        "token_lookups": run.token_lookups,
        "warmup": warmup,
        "why": why,
    }
    return [_finished({**row, **common}) for row in rows]


def _levels(workload: Workload, tiers: list[Tier], semantics: str) -> list[_Level]:
    check_tiers(tiers)
    levels = [
        _Level(
            tier=tier,
            entry=find_policy(tier.policy).within(semantics),
            capacity=parse_capacity(tier.capacity, workload, semantics),
            uses=uses_of(tier),
            bandwidth=None if tier.bandwidth is None else parse_bandwidth(tier.bandwidth),
        )
        for tier in tiers
    ]
    for k, level in enumerate(levels):
        above = max(levels[:k], key=lambda other: other.capacity, default=level)
        if level.tier.mode == "inclusive" and level.capacity < above.capacity:
            raise UsageError(
                f"tier {level.tier.name!r} is inclusive and has {level.capacity} blocks, fewer than the "
                f"{above.capacity} of {above.tier.name!r} above it: give it as many"
            )
    return levels


def _drive(levels: list[_Level], run: Prepared) -> _Found:
    stream = run.stream
    n, n_refs, n_requests = stream.n_identities, stream.refs.size, stream.prompt_blocks.size
    # More room than there are blocks changes nothing; state sized by the capacity then stays small.
    sizes = [int(min(level.capacity, max(1, n))) for level in levels]
    rules = np.zeros((words.MAX_TIERS, words.N_RULES), np.int64)
    slots: list[Any] = []
    for k, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        rules[k, words.CAPACITY] = size
        rules[k, words.USES] = level.uses
        rules[k, words.THROUGH] = not level.tier.demotes
        rules[k, words.EXCLUSIVE] = level.tier.mode == "exclusive"
        rules[k, words.INCLUSIVE] = level.tier.mode == "inclusive"
        rules[k, words.PROMOTE] = level.tier.promote
        # An inclusive tier must keep what the top tier has of a request, so it holds that whatever its policy.
        in_order = level.entry.in_order and stream.semantics == "prefix" and not run.concurrent
        rules[k, words.IN_ORDER] = in_order and level.tier.mode != "inclusive"
        state = level.entry.state(replace(stream, removes=gives_up([level.tier for level in levels], k)), size)
        padding = (UNUSED,) * (MAX_STATE - len(state))
        slots.append((level.entry.tag, np.full(n, words.ABSENT, np.int32), *state, *padding))
    # Of the same types as the last tier's, so that unused slots compile nothing of their own.
    slots += [slots[-1]] * (words.MAX_TIERS - len(slots))
    longest = int(np.diff(stream.indptr).max()) if n_requests else 0
    inclusive = bool(rules[:, words.INCLUSIVE].any())
    totals = np.zeros((words.MAX_TIERS, words.N_SUMS), np.int64)
    counts = np.zeros(words.N_COUNTS, np.int64)
    mask = np.zeros(n, np.uint8)
    counting = bool((rules[:, words.USES] > 1).any())
    request_hits = np.zeros(n_requests, np.int64)
    some = words.MAX_TIERS * (longest + (n if inclusive else 0)) + 1
    by_block = stream.semantics == "object"
    before = (
        len(levels), stream.refs, stream.indptr, run.last_tokens, run.block_size, stream.prompt_blocks, run.hit_cap,
        stream.events, by_block, counting,
    )  # fmt: skip
    after = (
        rules, totals, counts, mask,
        np.full(n, 0 if counting else 255, np.uint8),
        np.full(n, -1, np.int64),
        np.zeros(n_refs, np.uint8),
        np.zeros(n_requests, np.uint8),
        request_hits,
        np.zeros(words.MAX_TIERS * longest + 1, np.int32),
        np.zeros(some, np.int32),
        np.zeros(some, np.uint8),
        *(part for slot in slots for part in slot),
    )  # fmt: skip
    _compile(levels, (*before, 0, 0, *after))
    steps = n_requests if by_block else stream.events.size
    begin = time.perf_counter()
    if run.warmup_steps:
        tiers_driver(*before, 0, run.warmup_steps, *after)
        totals[:, : words.RESIDENT] = 0
    if not counts[words.BAD_TIER]:
        tiers_driver(*before, run.warmup_steps, steps, *after)
    seconds = time.perf_counter() - begin
    if counts[words.BAD_TIER]:
        name = levels[counts[words.BAD_TIER] - 1].entry.name
        raise KvtraceError(f"policy {name!r} is wrong: it gave up a block that may not be evicted")
    return _Found(totals, request_hits, mask, seconds)


def _compile(levels: list[_Level], args: tuple[Any, ...]) -> None:
    try:
        warm(tiers_driver, args)
    except NumbaError as error:
        names = ", ".join(sorted({repr(level.entry.name) for level in levels}))
        raise KvtraceError(f"one of the policies {names} does not compile: {reason(error)}") from error


def _tier_row(
    k: int, level: _Level, found: _Found | None, bytes_per_block: int | None, prefill_tokens_per_s: float | None
) -> Row:
    tier = level.tier
    row: Row = {
        "tier": tier.name,
        "level": k,
        "policy": level.entry.called,
        "capacity_blocks": int(level.capacity) if level.capacity < float("inf") else None,
        "mode": tier.mode if k else None,
        "write": ("demote" if tier.demotes else "through") if k else None,
        "promote": tier.promote if k else None,
        "uses": level.uses,
        **dict.fromkeys(_SUMS),
        **dict.fromkeys(_SECONDS),
        "seconds": None,
    }
    if found is None:
        return row
    sums = found.totals[k]
    row.update({name: int(sums[slot]) for name, slot in _SLOTS.items()})
    if k:
        row["pin_overflow_requests"] = None
    if bytes_per_block is not None:
        row["bytes_up"] = row["blocks_up"] * bytes_per_block
        row["bytes_down"] = row["blocks_down"] * bytes_per_block
    if prefill_tokens_per_s is not None:
        row["recompute_seconds"] = row["token_hits"] / prefill_tokens_per_s
    if row["blocks_up"] == 0:
        row["load_seconds"] = 0.0
    elif level.bandwidth is not None and row["bytes_up"] is not None:
        row["load_seconds"] = row["bytes_up"] / level.bandwidth
    if row["recompute_seconds"] is not None and row["load_seconds"] is not None:
        row["seconds_saved"] = row["recompute_seconds"] - row["load_seconds"]
    return row


_SLOTS = {
    "block_hits": words.BLOCK_HITS,
    "token_hits": words.TOKEN_HITS,
    "blocks_up": words.UP,
    "blocks_down": words.DOWN,
    "evictions": words.EVICTIONS,
    "expired_blocks": words.EXPIRED,
    "bypassed_blocks": words.BYPASSED,
    "invalidated_blocks": words.INVALIDATED,
    "pin_overflow_requests": words.PIN_OVERFLOWS,
}
_SUMS = (*_SLOTS, "bytes_up", "bytes_down")
_SECONDS = ("recompute_seconds", "load_seconds", "seconds_saved")
_COLUMNS = (
    "tier", "level", "policy", "capacity_blocks", "mode", "write", "promote", "uses", "semantics", "block_size",
    "requests", "block_lookups", "block_hits", "block_hit_ratio", "token_lookups", "token_hits", "token_hit_ratio",
    "blocks_up", "blocks_down", "bytes_up", "bytes_down", "evictions", "expired_blocks", "bypassed_blocks",
    "invalidated_blocks", "pin_overflow_requests", "recompute_seconds", "load_seconds", "seconds_saved", "seconds",
    "warmup", "why",
)  # fmt: skip


def _total_row(rows: list[Row], found: _Found | None) -> Row:
    """The sums of the tiers; None where one of them is not known (or infinite)."""
    total: Row = dict.fromkeys((*rows[0], "seconds"))
    total["tier"] = "total"
    for name in ("capacity_blocks", *_SUMS, *_SECONDS):
        parts = [row[name] for row in rows[: 1 if name == "pin_overflow_requests" else None]]
        total[name] = None if None in parts else sum(parts)
    total["seconds"] = None if found is None else found.seconds
    return total


def _finished(row: Row) -> Row:
    for kind in ("block", "token"):
        row[f"{kind}_hit_ratio"] = ratio_of(row[f"{kind}_hits"], row[f"{kind}_lookups"])
    if row["token_hits"] is not None and row["token_hits"] > row["token_lookups"]:
        row["why"] = IMPOSSIBLE
    return {name: row[name] for name in _COLUMNS}
