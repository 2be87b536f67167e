"""How often requests took each block, counted over squares of blocks and steps in one compiled pass."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace.views.event_arrays import pieces
from kvtrace_traces.compile import njit
from kvtrace_traces.rows import ALLOCATED, E_BLOCK, E_STEP, HITS

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def taken(trace: Any, header: dict[str, Any], tall: int, wide: int, blocks: int, steps: int) -> I64:
    """int64[rows, columns]: `allocate` and `hit` events of an engine in squares of `tall` blocks by `wide` steps, of so
    many `blocks` and `steps` in all; what lies beyond counts in the last row or column."""
    found = np.zeros((max(1, ceil(blocks / tall)), max(1, ceil(steps / wide))), np.int64)
    for piece in pieces(trace, header):
        _count(piece.narrow, piece.kinds, tall, wide, found)
    return found


@njit
def _count(events: I32, kinds: npt.NDArray[np.uint8], tall: int, wide: int, found: I64) -> None:
    rows, columns = found.shape
    for n in range(kinds.size):
        if kinds[n] == ALLOCATED or kinds[n] == HITS:
            row = min(np.uint32(max(events[E_BLOCK, n], 0)) // np.uint32(tall), rows - 1)
            column = min(np.uint32(max(events[E_STEP, n], 0)) // np.uint32(wide), columns - 1)
            found[np.intp(row), np.intp(column)] += 1
