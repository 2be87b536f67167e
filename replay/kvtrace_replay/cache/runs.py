"""Runs of the open-loop cache: one (policy, capacity, semantics) after the other, or side by side, as
result rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core.errors import NumbaError

from kvtrace_replay.cache import object_driver as by_object
from kvtrace_replay.cache import prefix_driver as by_prefix
from kvtrace_replay.cache import radix_driver as by_radix
from kvtrace_replay.cache import recency_driver as by_recency
from kvtrace_replay.cache.prepare import Prepared, prepare, too_small
from kvtrace_replay.cache.totals import (
    BAD_VICTIM,
    BLOCK_HITS,
    BYPASSED,
    EVICTIONS,
    EXPIRED,
    IMPOSSIBLE,
    N_TOTALS,
    PIN_OVERFLOWS,
    PINNED,
    RESIDENT,
    TOKEN_HITS,
    ratio_of,
)
from kvtrace_replay.capacity import parse_capacity
from kvtrace_replay.cores import cores
from kvtrace_replay.policies.refusal import reason
from kvtrace_replay.policies.registry import MAX_STATE, SEMANTICS, Policy, find_policy
from kvtrace_replay.structures.recency import new_recency
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import warm
from kvtrace_traces.errors import KvtraceError, UsageError

# Below this, starting threads and keeping several states in memory gains nothing.
_PARALLEL_FROM_REFS = 1_000_000
UNUSED = np.zeros(0, np.int32)
_NEVER_SEEN = np.zeros(0, np.uint8)

Row = dict[str, Any]
# Told of each cell that was run: its row, hit blocks int64[n], and uint8[n], not 0 for the requests of which a block
# found no place; of all n requests but the carried ones.
PerCell = Callable[[Row, npt.NDArray[np.int64], npt.NDArray[np.uint8]], None]


def replay(
    workload: Workload,
    policy: str | Sequence[str] = "lru",
    capacity: int | float | str | Sequence[int | float | str] = math.inf,
    semantics: str | Sequence[str] = "prefix",
    *,
    warmup: float = 0.0,
    threads: int | None = None,
    per_cell: PerCell | None = None,
) -> list[Row]:
    """Replays `workload` with every policy, semantics and capacity given.

    Args:
        workload: the requests of one engine.
        policy: name or names, see `kvtrace_replay.policies`.
        capacity: usable blocks, `math.inf`, or any form of `parse_capacity`; one or several.
        semantics: "object", "prefix" or "radix", or several.
        warmup: this share of the requests, from the first admitted on, fills the cache and is not counted. What a cut
            carries in (`Workload.carried`) fills it before, and is not among the requests.
        per_cell: called after each cell, in order, with its figures by request, warm-up included.
        threads: runs at a time; default: one per core for large workloads, else one.

    Returns one dict per run, by policy, then semantics, then capacity, with the keys `policy capacity_blocks
    block_size semantics requests block_lookups block_hits block_hit_ratio token_lookups token_hits
    token_hit_ratio evictions seconds pin_overflow_requests expired_blocks bypassed_blocks warmup why`.
    `capacity_blocks` None is infinite. `seconds` is the driver alone, warm-up included, without preparing
    the policy's state. A ratio of no lookups is None.
    Where the capacity cannot hold the largest single request, the results are None and `why` says so.
    `pin_overflow_requests` counts requests of which a block found no place because all others were
    pinned.

    `expired_blocks` were dropped for their age (`ttl`), `bypassed_blocks` not admitted (`second-touch`, ...).

    Raises UsageError for an unknown policy or semantics or a bad capacity, KvtraceError for an invalid
    workload or a policy that does not compile.
    """
    if not 0 <= warmup < 1:
        raise UsageError(f"warm-up {warmup} must be a share of the requests, 0 or more and below 1")
    entries = [find_policy(name) for name in _listed(policy, "policy")]
    kinds = [_check_semantics(name) for name in _listed(semantics, "semantics")]
    wanted = _listed(capacity, "capacity")
    workload.validate()
    sizes = {kind: [parse_capacity(size, workload, kind) for size in wanted] for kind in kinds}
    for entry in entries:
        for kind in kinds:
            entry.within(kind)
    runs = {kind: prepare(workload, kind, warmup) for kind in kinds}
    cells = [(entry, runs[kind], size, warmup) for entry in entries for kind in kinds for size in sizes[kind]]
    if threads is None:
        large = workload.n_refs * len(cells) > _PARALLEL_FROM_REFS
        threads = cores() if large else 1
    if threads < 2 or len(cells) < 2:
        return [_told(*_row(*cell), per_cell) for cell in cells]
    with ThreadPoolExecutor(min(threads, len(cells))) as pool:
        return [_told(*done, per_cell) for done in pool.map(lambda cell: _row(*cell), cells)]


def _told(row: Row, by_request: tuple[Any, Any] | None, per_cell: PerCell | None) -> Row:
    if per_cell is not None and by_request is not None:
        per_cell(row, *by_request)
    return row


def replay_requests(
    workload: Workload,
    policy: str = "lru",
    capacity: int | float | str = math.inf,
    semantics: str = "prefix",
) -> npt.NDArray[np.int64]:
    """Hit blocks of each request but the carried ones, int64[n], to compare with what the engine itself reported.

    Arguments as in `replay`, one of each. Raises KvtraceError where the capacity cannot hold the largest
    request, and whatever `replay` raises.
    """
    entry, kind = find_policy(policy), _check_semantics(semantics)
    workload.validate()
    size = parse_capacity(capacity, workload, kind)
    run = prepare(workload, kind, 0.0)
    why = too_small(run, size)
    if why is not None:
        raise KvtraceError(why)
    return _drive(entry, run, size)[0][run.carried :]


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    many = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not many:
        raise UsageError(f"no {what} given: name at least one")
    return many


def _check_semantics(name: str) -> str:
    if name in SEMANTICS:
        return name
    raise UsageError(f"no semantics is called {name!r}; semantics are {', '.join(SEMANTICS)}")


def _drive(
    entry: Policy, run: Prepared, capacity: int | float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64], float]:
    """One run: (hits of each request int64[n_requests], whether it overflowed uint8[n_requests], totals, seconds in the
    driver)."""
    stream = run.stream
    entry = entry.within(stream.semantics)
    # More room than there are blocks changes nothing; state sized by the capacity then stays small.
    blocks = int(min(capacity, max(1, stream.n_identities)))
    # What a cut carries in may need more than the cache has.
    in_imports = stream.semantics == "prefix" and not run.concurrent and not run.carried
    if entry.by_last_use and entry.uses == 1 and (in_imports or stream.semantics == "object"):
        return _drive_by_recency(run, blocks)
    state = entry.state(stream, blocks)
    padded = (*state, *(UNUSED,) * (MAX_STATE - len(state)))
    n_requests = stream.prompt_blocks.size
    request_hits = np.zeros(n_requests, np.int64)
    overflowed = np.zeros(n_requests, np.uint8)
    totals = np.zeros(N_TOTALS, np.int64)
    seen = np.zeros(stream.n_identities, np.uint8) if entry.uses > 1 else _NEVER_SEEN
    driver: Any
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    if stream.semantics == "object":
        driver, steps = by_object.object_driver, n_requests
        pins: npt.NDArray[Any] = np.full(stream.n_identities, by_object.ABSENT, np.int8)
        before = (entry.tag, stream.refs, stream.indptr, run.last_tokens, run.block_size)
        after = (blocks, entry.uses, seen, pins, request_hits, totals)
    else:
        driver, steps = by_prefix.prefix_driver, stream.events.size
        pins = np.full(stream.n_identities, by_prefix.ABSENT, np.int32)
        held = np.zeros(stream.refs.size, np.uint8)
        before = (
            entry.tag, stream.refs, stream.indptr, run.last_tokens, run.block_size, stream.prompt_blocks, run.hit_cap,
            stream.events,
        )  # fmt: skip
        in_order = (entry.in_order and in_imports,) if stream.semantics == "prefix" else ()
        after = (blocks, entry.uses, *in_order, seen, pins, held, overflowed, request_hits, totals)
    if stream.semantics == "radix":
        driver = by_radix.radix_driver
        after = (*after, np.zeros((stream.n_identities, 2), np.int32), run.parents)
    try:
        warm(driver, (*before, 0, steps, *after, *padded))
    except NumbaError as error:
        raise KvtraceError(f"policy {entry.name!r} does not compile: {reason(error)}") from error
    seconds = _timed(lambda first, last: driver(*before, first, last, *after, *padded), run.warmup_steps, steps, totals)
    if totals[BAD_VICTIM]:
        raise KvtraceError(f"policy {entry.name!r} is wrong: its evict returned a block that may not be evicted")
    return request_hits, overflowed, totals, seconds


def _drive_by_recency(
    run: Prepared, blocks: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64], float]:
    """As `_drive`, for LRU: in `object` semantics, and in `prefix` semantics over an import."""
    stream = run.stream
    n = stream.prompt_blocks.size
    hits = np.zeros(n, np.int64)
    totals = np.zeros(N_TOTALS, np.int64)
    order = new_recency(stream.n_identities, stream.refs.size, max(1, run.longest_chain))
    before: tuple[Any, ...] = (stream.refs, stream.indptr, run.last_tokens, run.block_size)
    driver: Any
    if stream.semantics == "object":
        driver, warmup = by_recency.object_recency_driver, run.warmup_steps
    else:
        driver, before = by_recency.prefix_recency_driver, (*before, stream.prompt_blocks, run.hit_cap)
        warmup = run.warmup_steps // 2  # of two events a request, the first is its admission
    warm(driver, (*before, 0, n, blocks, *order, hits, totals))
    seconds = _timed(lambda first, last: driver(*before, first, last, blocks, *order, hits, totals), warmup, n, totals)
    return hits, np.zeros(n, np.uint8), totals, seconds


def _timed(drive: Callable[[int, int], None], warmup: int, steps: int, totals: npt.NDArray[np.int64]) -> float:
    """Drives the first `warmup` steps, forgets what they add to `totals`, then drives the rest; seconds of both."""
    begin = time.perf_counter()
    if warmup:
        drive(0, warmup)
        kept = totals[[RESIDENT, PINNED, BAD_VICTIM]]
        totals[:] = 0
        totals[[RESIDENT, PINNED, BAD_VICTIM]] = kept
    if not totals[BAD_VICTIM]:
        drive(warmup, steps)
    return time.perf_counter() - begin


def _row(entry: Policy, run: Prepared, capacity: int | float, warmup: float) -> tuple[Row, tuple[Any, Any] | None]:
    row: Row = {
        "policy": entry.called,
        "capacity_blocks": None if math.isinf(capacity) else int(capacity),
        "block_size": run.block_size,
        "semantics": run.stream.semantics,
        "requests": run.requests,
        "block_lookups": run.block_lookups,
        "block_hits": None,
        "block_hit_ratio": None,
        "token_lookups": run.token_lookups,
        "token_hits": None,
        "token_hit_ratio": None,
        "evictions": None,
        "seconds": None,
        "pin_overflow_requests": None,
        "expired_blocks": None,
        "bypassed_blocks": None,
        "warmup": warmup,
        "why": too_small(run, capacity),
    }
    if row["why"] is not None:
        return row, None
    hits, overflowed, totals, seconds = _drive(entry, run, capacity)
    row["block_hits"] = int(totals[BLOCK_HITS])
    row["token_hits"] = int(totals[TOKEN_HITS])
    row["evictions"] = int(totals[EVICTIONS])
    row["seconds"] = seconds
    row["pin_overflow_requests"] = int(totals[PIN_OVERFLOWS])
    row["expired_blocks"] = int(totals[EXPIRED])
    row["bypassed_blocks"] = int(totals[BYPASSED])
    for kind in ("block", "token"):
        row[f"{kind}_hit_ratio"] = ratio_of(row[f"{kind}_hits"], row[f"{kind}_lookups"])
    if row["token_hits"] > row["token_lookups"]:
        row["why"] = IMPOSSIBLE
    return row, (hits[run.carried :], overflowed[run.carried :])
