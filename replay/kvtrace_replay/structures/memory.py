"""Arrays that begin where a line of the processor's cache does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_LINE_BYTES = 64


def aligned_zeros(n: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`np.zeros(n, dtype)` whose first byte is the first of a cache line.

    NumPy's own large arrays begin 16 bytes behind one, so what is 64 bytes long lies in two, of which a prefetch brings
    one: the LRU curve of a large workload was a third slower for it.
    """
    size = n * np.dtype(dtype).itemsize
    raw = np.zeros(size + CACHE_LINE_BYTES, np.uint8)
    first = -raw.ctypes.data % CACHE_LINE_BYTES
    return raw[first : first + size].view(dtype)
