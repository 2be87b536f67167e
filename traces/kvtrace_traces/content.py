"""Imports whose ids name content alone: telling them from prefix ids, and chaining them.

A prefix id stands for a block and all before it, so that it always has the same predecessor. Where one id stands under
several, ids name content; the identity of a prefix is then a hash over the ids up to there.
"""

from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit


@njit
def many_parents(indptr, identities, unique):  # type: ignore[no-untyped-def]
    """Whether some identity follows different ones in places (CSR: ``indptr`` int64, ``identities`` int32)."""
    parent = np.full(unique, -2, np.int32)  # -1: first of its request
    for request in range(len(indptr) - 1):
        before = np.int32(-1)
        for i in range(indptr[request], indptr[request + 1]):
            identity = identities[i]
            if parent[identity] == -2:
                parent[identity] = before
            elif parent[identity] != before:
                return True
            before = identity
    return False


@njit
def chain(indptr, identities, hashes, chained):  # type: ignore[no-untyped-def]
    """Write to ``chained`` (uint64) for each place a hash of the ids from its request's start up to there.

    The mixing is that of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied to the hash so far and the next id.
    """
    for request in range(len(indptr) - 1):
        state = np.uint64(0x9E3779B97F4A7C15)
        for i in range(indptr[request], indptr[request + 1]):
            state = (state ^ hashes[identities[i]]) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
            chained[i] = state
