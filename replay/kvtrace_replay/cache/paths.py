"""Prefix paths: the identities of `radix` semantics, and each identity's parent in the tree.

An identity of a tree stands for one whole path from the root. Chained identities, as recorded traces and all
importers make them, are that already; a workload made by hand may hold one id under two parents, or twice in
a request, and then gets new identities here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

ROOT = -1  # the parent of the first block of a chain
_UNKNOWN = -2


def as_paths(refs: I32, indptr: I64, n_identities: int) -> tuple[I32, int, I32]:
    """(refs int32[n_refs], n_identities, parents int32[n_identities]) in which each id has one parent, ROOT for the
    first of a chain. `refs` itself where it is so already; else ids are given anew, in order of first use."""
    parents = np.full(n_identities, _UNKNOWN, np.int32)
    if _fill_parents(refs, indptr, parents):
        return refs, n_identities, parents
    renamed = _renamed(refs, indptr)
    n_identities = int(renamed.max()) + 1
    parents = np.full(n_identities, _UNKNOWN, np.int32)
    _fill_parents(renamed, indptr, parents)
    return renamed, n_identities, parents


@njit
def _fill_parents(refs: I32, indptr: I64, parents: I32) -> bool:
    """Fills `parents`, int32[n_identities], all _UNKNOWN at first; False as soon as an id has two."""
    for r in range(indptr.size - 1):
        parent = ROOT
        for p in range(indptr[r], indptr[r + 1]):
            key = refs[p]
            if parents[key] == _UNKNOWN:
                parents[key] = parent
            elif parents[key] != parent:
                return False
            parent = key
    return True


def _renamed(refs: I32, indptr: I64) -> I32:
    names: dict[tuple[int, int], int] = {}
    renamed = np.empty_like(refs)
    bounds, ids = indptr.tolist(), refs.tolist()
    for r in range(len(bounds) - 1):
        path = ROOT
        for p in range(bounds[r], bounds[r + 1]):
            path = names.setdefault((path, ids[p]), len(names))
            renamed[p] = path
    return renamed
