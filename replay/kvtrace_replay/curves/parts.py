"""The LRU curve in `object` semantics, of parts of the references side by side.

Each part has a stack of its own, which begins empty. All that it cannot know is the depth of a block at its first use
in the part: it lies as deep as the earlier parts' stacks say, and below all that the part used before. So, once all
have been gone through, the first uses of each part, one a block at most, are looked up in the stack of the part before,
in their order, each block taken out as it is found; what is not there, in the stack of the part before that (Niu et
al., "PARDA: A Fast Parallel Reuse Distance Analysis Algorithm", IPDPS 2012). Exact, whatever the parts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cores import cores
from kvtrace_replay.curves.lru_kernels import earlier_kernel, new_counts, object_kernel
from kvtrace_replay.curves.stack import NEVER, new_stack
from kvtrace_traces.compile import warm

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# A part costs a stack, and every block a lookup more: below these it does not pay.
_LEAST_REFS, _LEAST_REFS_PER_BLOCK = 10_000_000, 10


def parts_for(n_refs: int, n_identities: int) -> int:
    """How many parts to make: one for each core, if each has enough to do."""
    return max(1, min(cores(), n_refs // _LEAST_REFS, n_refs // max(1, _LEAST_REFS_PER_BLOCK * n_identities)))


class ObjectCurve:
    """The work on one workload. Making it compiles what is needed; `run` does it, once."""

    def __init__(
        self, refs: I32, indptr: I64, last_tokens: I32, block_size: int, first_counted: int, n_identities: int,
        partial: bool, parts: int,
    ) -> None:  # fmt: skip
        """`refs`, `indptr`, `last_tokens`: of the workload. `first_counted`: the first request that counts. `partial`:
        whether there are blocks that are not full."""
        # A part has whole requests, so there may be fewer of them.
        inner = np.searchsorted(indptr, np.linspace(0, indptr[-1], parts + 1)[1:-1])
        self._bounds = np.unique([0, *inner, indptr.size - 1]).tolist() if indptr.size > 1 else [0, 0]
        parts = len(self._bounds) - 1
        self._workload = (refs, indptr, last_tokens, block_size)
        self._first_counted = first_counted
        self._counts = [new_counts(n_identities, refs.size, partial) for _ in range(parts)]
        listed = n_identities if parts > 1 else 0
        self._firsts = [np.empty(listed if part else 0, np.int32) for part in range(parts)]
        self._lacking = [np.empty(listed if part and partial else 0, np.int32) for part in range(parts)]
        self._stacks = [new_stack(n_identities) for _ in range(parts)]
        warm(object_kernel, self._arguments(0))
        if parts > 1:
            none = np.empty(0, np.int32)
            warm(earlier_kernel, (none, none, none, 0, 0, 0, *self._counts[0], *self._stacks[0]))

    def _arguments(self, part: int) -> tuple[Any, ...]:
        return (
            *self._workload, self._bounds[part], self._bounds[part + 1], self._first_counted,
            self._firsts[part], self._lacking[part], *self._counts[part], *self._stacks[part],
        )  # fmt: skip

    def run(self) -> tuple[npt.NDArray[Any], I64]:
        """(hits, short), as of `lru_kernels`."""
        parts = range(len(self._stacks))
        with ThreadPoolExecutor(len(parts)) as pool:
            done = list(pool.map(lambda part: object_kernel(*self._arguments(part)), parts))
        hits, short = self._counts[0]
        blocks = [int((stack[0] != NEVER).sum()) for stack in self._stacks]
        for part in parts[1:]:
            found, uncounted, _ = done[part]
            keys, lacking = self._firsts[part][:found], self._lacking[part][:found]
            above = np.arange(found, dtype=np.int32)
            for earlier in range(part - 1, -1, -1):
                left, uncounted_left = earlier_kernel(
                    keys, above, lacking, uncounted, blocks[earlier], done[earlier][2], hits, short,
                    *self._stacks[earlier],
                )  # fmt: skip
                blocks[earlier] -= keys.size - left
                keys, above, lacking, uncounted = keys[:left], above[:left], lacking[:left], uncounted_left
            hits += self._counts[part][0]
            short += self._counts[part][1]
        self._stacks.clear()
        return hits, short
