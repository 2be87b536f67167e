"""A binary min-heap of int64 in a plain array; its length stands in a counter that the caller keeps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

Heap = npt.NDArray[np.int64]


@njit(cache=False)
def heap_push(heap: Heap, size: int, value: int) -> int:
    """Adds `value`; modifies `heap` (int64[>= size + 1]); returns the new size."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= value:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = value
    return size + 1


@njit(cache=False)
def heap_pop(heap: Heap, size: int) -> int:
    """Removes the least value, `heap[0]`; modifies `heap`; returns the new size (`size` must be >= 1)."""
    size -= 1
    value = heap[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = value
    return size
