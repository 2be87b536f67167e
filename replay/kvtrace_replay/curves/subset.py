"""Smaller workloads that stand for a larger one: a part of its requests, or the references to a part of its blocks."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.curves.lru import read_only, references
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# All other arrays of a workload have an entry a request.
_NOT_PER_REQUEST = ("identities", "indptr", "schedule", "raw")


def some_requests(workload: Workload, chosen: Bools) -> tuple[Workload, I32]:
    """The requests where `chosen` (bool[n_requests]) holds, whole, in their order, and int32[n_identities] the ids
    that their blocks had in `workload`. Content ids are left out."""
    numbers = np.flatnonzero(chosen)
    lengths = np.diff(workload.indptr)[numbers]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    refs, originals = _gather(
        read_only(workload.identities), read_only(workload.indptr), numbers, indptr, workload.n_identities
    )
    schedule = workload.schedule
    if schedule is not None:
        kept = schedule[chosen[np.abs(schedule) - 1]]
        renumbered = np.cumsum(chosen, dtype=np.int64)
        schedule = np.sign(kept) * renumbered[np.abs(kept) - 1]
    own: dict[str, Any] = {
        field.name: np.ascontiguousarray(array[numbers])
        for field in fields(workload)
        if field.name not in _NOT_PER_REQUEST and isinstance(array := getattr(workload, field.name), np.ndarray)
    }
    part = replace(
        workload, identities=refs, indptr=indptr, n_identities=originals.size, schedule=schedule, raw=None, **own
    )
    return part, originals


def some_blocks(workload: Workload, chosen: Bools) -> Workload:
    """All requests, of their references those to blocks where `chosen` (bool[n]) holds, as `object` semantics
    see them."""
    refs, indptr, last_kept, n_identities = _filter(
        read_only(references(workload, "object")), read_only(workload.indptr), chosen
    )
    lengths = np.diff(indptr).astype(np.int32)
    return replace(
        workload,
        identities=refs,
        indptr=indptr,
        prompt_blocks=lengths,
        hit_cap=lengths,
        last_tokens=np.where(last_kept, workload.last_tokens, np.int32(workload.block_size)).astype(np.int32),
        schedule=None,
        raw=None,
        n_identities=n_identities,
    )


@njit
def _gather(refs: I32, indptr: I64, numbers: I64, new_indptr: I64, n_identities: int) -> tuple[I32, I32]:
    """The chains of the requests `numbers`, their ids renumbered in order of first use, and the ids they had."""
    renumbered = np.full(n_identities, -1, np.int32)
    gathered = np.empty(new_indptr[-1], np.int32)
    originals = np.empty(min(n_identities, gathered.size), np.int32)
    known = 0
    for i in range(numbers.size):
        at = new_indptr[i]
        for p in range(indptr[numbers[i]], indptr[numbers[i] + 1]):
            key = np.intp(np.uint32(refs[p]))
            if renumbered[key] < 0:
                renumbered[key] = known
                originals[known] = key
                known += 1
            gathered[at] = renumbered[key]
            at += 1
    return gathered, originals[:known].copy()


@njit
def _filter(refs: I32, indptr: I64, chosen: Bools) -> tuple[I32, I64, Bools, int]:
    """(references to chosen blocks, renumbered; new indptr; whether each request keeps its last entry; blocks)."""
    total = 0
    for p in range(refs.size):
        total += chosen[np.intp(np.uint32(refs[p]))]
    renumbered = np.full(chosen.size, -1, np.int32)
    kept = np.empty(total, np.int32)
    new_indptr = np.zeros(indptr.size, np.int64)
    last_kept = np.zeros(indptr.size - 1, np.bool_)
    at, known = 0, 0
    for r in range(indptr.size - 1):
        for p in range(indptr[r], indptr[r + 1]):
            key = np.intp(np.uint32(refs[p]))
            last_kept[r] = chosen[key]
            if chosen[key]:
                if renumbered[key] < 0:
                    renumbered[key] = known
                    known += 1
                kept[at] = renumbered[key]
                at += 1
        new_indptr[r + 1] = at
    return kept, new_indptr, last_kept, known
