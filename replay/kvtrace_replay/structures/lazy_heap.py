"""A min-heap of (score, key) for scores that only rise: a key whose score has risen keeps its place until it is on top.

So a hit writes the key's new score, somewhere of the policy's own, and does not touch the heap; who looks for the least
score compares the top with what its key scores by now and, where that is more, calls `renew_top` and looks again. Each
rise costs one renewal at most, and none where a block is hit often between two looks.

Each node has four children, which lie side by side: half the levels of a binary heap, and each costs one look into
memory.

A key can leave from the middle as well, by being told apart: scores grow with time, so that an entry made before its
key was placed the last time is known by its score. Such entries stay until they are on top or the heap is full; who has
them gives the heap twice the room.

State: `heap` int64[at least the number of keys, 2], rows of score and key; its length stands in a counter that the
caller keeps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

LazyHeap = npt.NDArray[np.int64]

SCORE, KEY = 0, 1


@njit(cache=False)
def lazy_push(heap: LazyHeap, size: int, score: int, key: int) -> int:
    """Adds `key`; modifies `heap`; returns the new size."""
    at = size
    while at > 0:
        parent = (at - 1) >> 2
        if heap[parent, SCORE] <= score:
            break
        heap[at, SCORE] = heap[parent, SCORE]
        heap[at, KEY] = heap[parent, KEY]
        at = parent
    heap[at, SCORE] = score
    heap[at, KEY] = key
    return size + 1


@njit(cache=False)
def renew_top(heap: LazyHeap, size: int, score: int, key: int) -> None:
    """Puts (`score`, `key`) in the place of the top, and then where it belongs; modifies `heap`."""
    at = 0
    while True:
        first = 4 * at + 1
        if first >= size:
            break
        child = first
        for other in range(first + 1, min(first + 4, size)):
            if heap[other, SCORE] < heap[child, SCORE]:
                child = other
        if heap[child, SCORE] >= score:
            break
        heap[at, SCORE] = heap[child, SCORE]
        heap[at, KEY] = heap[child, KEY]
        at = child
    heap[at, SCORE] = score
    heap[at, KEY] = key


@njit(cache=False)
def drop_top(heap: LazyHeap, size: int) -> int:
    """Removes the top; modifies `heap`; returns the new size (`size` must be >= 1)."""
    size -= 1
    if size > 0:
        renew_top(heap, size, heap[size, SCORE], heap[size, KEY])
    return size
