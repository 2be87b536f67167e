"""Reuse distances: how many distinct blocks were used between two uses of a block.

One pass over the references with the stack of `curves.stack` (Mattson et al., "Evaluation techniques for storage
hierarchies", IBM Systems Journal 9(2), 1970): a block's distance is the number of blocks above it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.curves.stack import IN_LINE, NEVER, count_from, new_stack, open_line, remove
from kvtrace_replay.structures.slots import LOW, ONE, WORD, ZERO
from kvtrace_traces.compile import njit

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def reuse_distances(references: I32, n_identities: int) -> tuple[I32, I64]:
    """What lies between each reference and the one before it to the same block.

    Args:
        references: int32[n], identities of blocks in order of use, each in 0..n_identities-1.
        n_identities: one more than the largest identity that may occur.

    Returns (distance, previous): int32[n], the distinct other blocks used in between, -1 for a first use; int64[n],
    the place of the reference before, -1 for a first use.

    Raises ValueError for identities out of range.
    """
    references = np.ascontiguousarray(references, np.int32)
    if references.size and (references.min() < 0 or references.max() >= n_identities):
        raise ValueError(f"identities must lie in 0..{n_identities - 1}")
    distance, previous = np.empty(references.size, np.int32), np.empty(references.size, np.int64)
    _distances(references, distance, previous, np.full(n_identities, -1, np.int64), *new_stack(n_identities))
    return distance, previous


@njit
def _distances(
    refs: I32, distance: I32, previous: I64, place: I64, last: U32, bits: U64, lines: I16, nodes: I32, areas: I32
) -> None:  # fmt: skip
    """Fills `distance` and `previous`. `place` int64[n_identities]: where each block was used last, -1 for nowhere."""
    now = ZERO
    for i in range(refs.size):
        key = np.intp(np.uint32(refs[i]))
        if last[key] == NEVER:
            distance[i] = -1
        else:
            slot = np.uint64(last[key])
            distance[i] = count_from(slot, now, bits, lines, nodes, areas) - 1
            remove(slot >> WORD, ONE << (slot & LOW), 1, bits, lines, nodes, areas)
        previous[i] = place[key]
        place[key] = i
        last[key] = np.uint32(now)
        bits[now >> WORD] |= ONE << (now & LOW)
        now += ONE
        if now & IN_LINE == ZERO:
            now = open_line(now, last, bits, lines, nodes, areas)
