"""A binary min-heap of (rank, key) pairs, int64[room, 2]; its length is a number that the caller keeps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

Ranks = npt.NDArray[np.int64]

RANK, KEY = 0, 1


@njit(cache=False)
def ranks_push(heap: Ranks, size: int, rank: int, key: int) -> int:
    """Adds the pair; modifies `heap` (int64[>= size + 1, 2]); returns the new size."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent, RANK] <= rank:
            break
        heap[at, RANK], heap[at, KEY] = heap[parent, RANK], heap[parent, KEY]
        at = parent
    heap[at, RANK], heap[at, KEY] = rank, key
    return size + 1


@njit(cache=False)
def ranks_sink(heap: Ranks, size: int, rank: int, key: int) -> None:
    """Puts the pair in the place of the least one; modifies `heap`, whose size stays (`size` must be >= 1)."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1, RANK] < heap[child, RANK]:
            child += 1
        if heap[child, RANK] >= rank:
            break
        heap[at, RANK], heap[at, KEY] = heap[child, RANK], heap[child, KEY]
        at = child
    heap[at, RANK], heap[at, KEY] = rank, key


@njit(cache=False)
def ranks_pop(heap: Ranks, size: int) -> int:
    """Removes the pair with the least rank, `heap[0]`; modifies `heap`; returns the new size."""
    size -= 1
    if size > 0:
        ranks_sink(heap, size, heap[size, RANK], heap[size, KEY])
    return size
