"""`object` semantics: a classic cache simulator. Every block id in file order is one reference; a missing
block is always placed; nothing is pinned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import evict, hit, insert
from kvtrace_replay.cache.totals import BAD_VICTIM, BLOCK_HITS, EVICTIONS, TOKEN_HITS
from kvtrace_traces.compile import njit

ABSENT = -1


@njit
def object_driver(
    tag: Any,
    refs: npt.NDArray[np.int32],
    indptr: npt.NDArray[np.int64],
    block_tokens: npt.NDArray[np.int32],
    capacity: int,
    pins: npt.NDArray[np.int8],
    request_hits: npt.NDArray[np.int64],
    totals: npt.NDArray[np.int64],
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Replays `refs` (int32[n]) into a cache of `capacity` blocks.

    Modified in place: `pins` int8[n_identities], all ABSENT at first, 0 for a resident block; `request_hits`
    int64[n_requests], hit blocks of each request; `totals`; the policy's state.
    """
    block_hits = 0
    token_hits = 0
    evictions = 0
    resident = 0
    for r in range(indptr.size - 1):
        hits_before = block_hits
        for i in range(indptr[r], indptr[r + 1]):
            # Through uint32: an index known to be positive needs no branch for negative ones.
            key = np.intp(np.uint32(refs[i]))
            if pins[key] != ABSENT:
                block_hits += 1
                token_hits += block_tokens[i]
                hit(tag, key, False, i, s0, s1, s2, s3, s4, s5, s6, s7)
            else:
                if resident == capacity:
                    victim = evict(tag, key, i, pins, s0, s1, s2, s3, s4, s5, s6, s7)
                    if victim < 0 or victim >= pins.size or pins[victim] == ABSENT:
                        totals[BAD_VICTIM] = 1  # a defect of the policy; memory must stay whole
                        return
                    pins[victim] = ABSENT
                    evictions += 1
                else:
                    resident += 1
                pins[key] = 0
                insert(tag, key, i, s0, s1, s2, s3, s4, s5, s6, s7)
        request_hits[r] = block_hits - hits_before
    totals[BLOCK_HITS] = block_hits
    totals[TOKEN_HITS] = token_hits
    totals[EVICTIONS] = evictions
