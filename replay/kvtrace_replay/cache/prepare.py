"""What a replay needs of a workload under one semantics, made once for all policies and capacities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.paths import as_paths
from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit

_NO_PARENTS = np.zeros(0, np.int32)


@dataclass
class Prepared:
    """A stream with what its rows say about it."""

    stream: Stream
    last_tokens: npt.NDArray[np.int32]
    hit_cap: npt.NDArray[np.int32]
    block_size: int
    warmup_steps: int  # so many requests (object) or events (prefix) are replayed before counting starts
    carried: int  # the first requests are the state that a cut begins with
    requests: int  # counted ones, and what they look up
    block_lookups: int
    token_lookups: int
    longest_chain: int  # the most blocks of one request, carried ones apart; 0 in object semantics, where it holds none
    concurrent: bool  # requests overlap: recorded lifetimes
    parents: npt.NDArray[np.int32]  # of each block in the tree, as of `as_paths`; empty unless in radix semantics

    def largest_request(self) -> int:
        """The most distinct blocks that one request holds at once."""
        stream = self.stream
        indptr = stream.indptr[self.carried :]
        return int(stream.share("largest_request", lambda: _largest_request(stream.refs, indptr, stream.n_identities)))


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view: memory-mapped and ordinary workloads then share one compiled driver."""
    view = array.view()
    view.setflags(write=False)
    return view


def prepare(workload: Workload, semantics: str, warmup: float) -> Prepared:
    """`workload` under `semantics`; carried requests and then a share `warmup` are not counted."""
    by_content = semantics == "object" and workload.raw is not None
    refs = workload.raw if by_content and workload.raw is not None else workload.identities
    n_identities, parents = distinct_blocks(workload, semantics), _NO_PARENTS
    if semantics == "radix":
        refs, n_identities, parents = as_paths(_read_only(refs), _read_only(workload.indptr), n_identities)
    n = workload.n_requests
    if semantics == "object":
        events = np.zeros(0, np.int64)
    elif workload.schedule is not None:
        events = workload.schedule
    else:
        events = np.empty(2 * n, np.int64)
        events[0::2] = np.arange(1, n + 1)
        events[1::2] = -events[0::2]
    known: dict[str, Any] = {
        name: _read_only(array)
        for name in ("arrival_ns", "priority", "request_class")
        if (array := getattr(workload, name)) is not None
    }
    stream = Stream(
        refs=_read_only(refs),
        indptr=_read_only(workload.indptr),
        prompt_blocks=_read_only(workload.prompt_blocks),
        events=_read_only(events),
        n_identities=n_identities,
        semantics=semantics,
        block_size=workload.block_size,
        timed=workload.arrival_ns is not None,
        **known,
    )
    whole = semantics == "object"
    skipped = workload.skipped(warmup)
    if whole:
        counted, steps = np.arange(skipped, n), skipped
    else:
        admissions = np.flatnonzero(events > 0)
        counted = events[admissions[skipped:]] - 1
        steps = int(admissions[skipped]) if 0 < skipped < n else events.size if skipped else 0
    lookups = np.diff(workload.indptr) if whole else workload.prompt_blocks
    return Prepared(
        stream=stream,
        last_tokens=_read_only(workload.last_tokens),
        hit_cap=_read_only(workload.hit_cap),
        block_size=workload.block_size,
        warmup_steps=steps,
        carried=workload.carried,
        requests=counted.size,
        block_lookups=int(lookups[counted].sum(dtype=np.int64)),
        token_lookups=int(
            workload.token_counts()[counted].sum() if whole else workload.prompt_tokens[counted].sum(dtype=np.int64)
        ),
        longest_chain=0 if whole else int(np.diff(workload.indptr[workload.carried :]).max(initial=0)),
        concurrent=workload.schedule is not None,
        parents=_read_only(parents),
    )


@njit
def _largest_request(refs: npt.NDArray[np.int32], indptr: npt.NDArray[np.int64], n_identities: int) -> int:
    """The most distinct blocks that a single request refers to."""
    last = np.full(n_identities, -1, np.int64)
    largest = 0
    for r in range(indptr.size - 1):
        distinct = 0
        for p in range(indptr[r], indptr[r + 1]):
            if last[refs[p]] != r:
                last[refs[p]] = r
                distinct += 1
        largest = max(largest, distinct)
    return largest


def too_small(run: Prepared, capacity: int | float) -> str | None:
    """Why no run at `capacity` can be made; None where one can."""
    if capacity >= run.longest_chain or capacity >= run.largest_request():
        return None
    return (
        f"a capacity of {capacity} blocks cannot hold the largest single request, which needs "
        f"{run.largest_request()} blocks"
    )
