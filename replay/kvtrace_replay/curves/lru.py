"""The LRU hit-ratio curve of a workload at all capacities, from one pass (Mattson et al., 1970).

*Object* semantics: a reference hits in every cache that holds as many blocks as were used since the block's last
use, itself included. Exact at all capacities.

*Prefix* semantics, imports: a block hits where all blocks of its prefix do. A request that is over has put its blocks
on top of the LRU stack, the head uppermost; so a cache of c blocks holds the top c of the stack, and the curve is
exact at all capacities that can hold the largest single request. Smaller ones are not replayed at all.

*Prefix* semantics, recorded: blocks of running requests are pinned. The curve is exact at all capacities that hold
what was ever pinned at a time (`exact_from`). In smaller ones blocks are bypassed for want of room, other blocks at
each capacity; there `kvtrace_replay.replay` is the way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.curves.lru_kernels import import_kernel, new_counts, recorded_kernel
from kvtrace_replay.curves.parts import ObjectCurve, parts_for
from kvtrace_replay.curves.stack import new_stack
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit, warm
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True, eq=False)
class LruCurve:
    """Hits of an LRU cache at every capacity.

    Attributes:
        semantics: "object" or "prefix".
        block_size: tokens in a full block.
        requests, block_lookups, token_lookups: what is counted, as in the rows of `kvtrace_replay.replay`.
        hits: int64[n_identities + 1]; at c, the blocks hit with a capacity of c.
        short_tokens: int64[n_identities + 1], the tokens that the hit blocks lack to being full; empty where all
            are.
        largest_request: the smallest capacity that is replayed: distinct blocks of the largest request; 1 in
            object semantics.
        exact_from: the smallest capacity at which `hits` is what `replay` finds.
        seconds: the pass alone.
    """

    semantics: str
    block_size: int
    requests: int
    block_lookups: int
    token_lookups: int
    hits: I64
    short_tokens: I64
    largest_request: int
    exact_from: int
    seconds: float

    @property
    def distinct_blocks(self) -> int:
        return int(self.hits.size - 1)

    def block_hits(self, capacity: int | float) -> int:
        """Blocks hit in a cache of `capacity` >= `exact_from` blocks (or `math.inf`)."""
        return int(self.hits[int(min(capacity, self.distinct_blocks))])

    def token_hits(self, capacity: int | float) -> int:
        """Tokens hit in a cache of `capacity` >= `exact_from` blocks (or `math.inf`)."""
        lacking = self.short_tokens[int(min(capacity, self.distinct_blocks))] if self.short_tokens.size else 0
        return self.block_hits(capacity) * self.block_size - int(lacking)

    def breakpoints(self) -> I64:
        """The capacities, from `exact_from` on, at which the curve takes another value than one block below, and
        `exact_from` itself."""
        first = min(self.exact_from, self.distinct_blocks)
        later = np.flatnonzero(self.hits[first + 1 :] != self.hits[first:-1]) + first + 1
        return np.concatenate([[self.exact_from], later]).astype(np.int64)


def lru_curve(workload: Workload, semantics: str = "prefix", warmup: float = 0.0) -> LruCurve:
    """The curve of `workload`; `warmup`, a share of the requests, fills the cache and is not counted.

    Memory beside the workload: about 17 bytes per distinct block, 25 where last blocks are not full; 13 and 25 more for
    each further core that a large workload in object semantics is spread over.
    Raises KvtraceError for an invalid workload, UsageError for other semantics than "object" and "prefix" and for a
    warm-up that is no share.
    """
    if semantics not in ("object", "prefix"):
        raise UsageError(f"there is no one-pass curve in {semantics} semantics: it needs a replay for each capacity")
    if not 0 <= warmup < 1:
        raise UsageError(f"warm-up {warmup} must be a share of the requests, 0 or more and below 1")
    workload.validate()
    n = distinct_blocks(workload, semantics)
    skipped = workload.skipped(warmup)
    args: tuple[Any, ...]
    partial = bool((workload.last_tokens < workload.block_size).any())
    chains = (read_only(references(workload, semantics)), read_only(workload.indptr))
    prompts = (read_only(workload.prompt_blocks), read_only(workload.hit_cap))
    tokens = (read_only(workload.last_tokens), workload.block_size)
    largest, exact_from = 1, 1
    if semantics == "object":
        curve = ObjectCurve(*chains, *tokens, skipped, n, partial, parts_for(workload.n_refs, n))
        begin = time.perf_counter()
        counts, short = curve.run()
    elif workload.schedule is None:
        counts, short = new_counts(n, workload.n_refs, partial)
        args = (*chains, *prompts, *tokens, skipped, counts, short, *new_stack(n))
        warm(import_kernel, args)
        begin = time.perf_counter()
        import_kernel(*args)
    else:
        counts, short = new_counts(n, workload.n_refs, partial)
        pins = np.zeros(n, np.int32)
        events = read_only(workload.schedule)
        first_counted = _admission(events, skipped)
        args = (*chains, *prompts, *tokens, events, first_counted, pins, counts, short, *new_stack(n))
        warm(recorded_kernel, args)
        begin = time.perf_counter()
        exact_from = int(recorded_kernel(*args))
    seconds = time.perf_counter() - begin
    if semantics == "prefix":
        largest = max(1, largest_request(chains[0], chains[1][workload.carried :], n))
        exact_from = max(exact_from, largest)
    hits = counts.astype(np.int64)
    np.cumsum(hits, out=hits)  # with a dtype, it would copy its input once more
    np.cumsum(short, out=short)
    requests, block_lookups, token_lookups = lookups(workload, semantics, skipped)
    return LruCurve(
        semantics=semantics,
        block_size=workload.block_size,
        requests=requests,
        block_lookups=block_lookups,
        token_lookups=token_lookups,
        hits=hits,
        short_tokens=short,
        largest_request=largest,
        exact_from=exact_from,
        seconds=seconds,
    )


def references(workload: Workload, semantics: str) -> I32:
    """int32[n_refs]: the block ids that `semantics` goes by."""
    return workload.raw if semantics == "object" and workload.raw is not None else workload.identities


def lookups(workload: Workload, semantics: str, skipped: int) -> tuple[int, int, int]:
    """(requests, blocks, tokens) looked up after the first `skipped` requests in order of admission."""
    n = workload.n_requests
    if semantics == "object":
        blocks = int(workload.indptr[n] - workload.indptr[skipped])
        return n - skipped, blocks, int(workload.token_counts()[skipped:].sum())
    if workload.schedule is None:
        counted: slice | I64 = slice(skipped, n)
    else:
        counted = workload.schedule[workload.schedule > 0][skipped:] - 1
    return (
        n - skipped,
        int(workload.prompt_blocks[counted].sum(dtype=np.int64)),
        int(workload.prompt_tokens[counted].sum(dtype=np.int64)),
    )


def _admission(events: I64, skipped: int) -> int:
    """The place in `events` of admission number `skipped`, their end where there is none."""
    admissions = np.flatnonzero(events > 0)
    return int(admissions[skipped]) if skipped < admissions.size else events.size if skipped else 0


def read_only(array: npt.NDArray[Kind]) -> npt.NDArray[Kind]:
    """A read-only view: memory-mapped and ordinary arrays then share one compiled kernel."""
    view: npt.NDArray[Kind] = array.view(np.ndarray)
    view.setflags(write=False)
    return view


@njit
def largest_request(refs: I32, indptr: I64, n_identities: int) -> int:
    """The most distinct blocks that a single request refers to."""
    longest = np.int64(0)
    for r in range(indptr.size - 1):
        longest = max(longest, indptr[r + 1] - indptr[r])
    used_by = np.full(n_identities, -1, np.int64)
    largest = 0
    for r in range(indptr.size - 1):
        if indptr[r + 1] - indptr[r] <= largest:
            continue
        distinct = 0
        for p in range(indptr[r], indptr[r + 1]):
            key = np.intp(np.uint32(refs[p]))
            if used_by[key] != r:
                used_by[key] = r
                distinct += 1
        largest = max(largest, distinct)
        if largest == longest:
            break
    return largest
