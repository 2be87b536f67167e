"""`object` semantics: a classic cache simulator. Every block id in file order is one reference; a missing
block is always placed; nothing is pinned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.cache.hooks import admit, begin, evict, expire, hit, insert, soon
from kvtrace_replay.cache.totals import BAD_VICTIM, BLOCK_HITS, BYPASSED, EVICTIONS, EXPIRED, RESIDENT, TOKEN_HITS
from kvtrace_traces.compile import njit

ABSENT = -1
# How many references before its turn a block is announced to the policy (`soon`): time enough for memory to answer.
FAR, NEAR = 32, 16


@njit
def object_driver(
    tag: Any,
    refs: npt.NDArray[np.int32],
    indptr: npt.NDArray[np.int64],
    last_tokens: npt.NDArray[np.int32],
    block_size: int,
    first: int,
    last: int,
    capacity: int,
    uses: int,
    seen: npt.NDArray[np.uint8],
    pins: npt.NDArray[np.int8],
    request_hits: npt.NDArray[np.int64],
    totals: npt.NDArray[np.int64],
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> None:  # fmt: skip
    """Replays the requests `first` to `last` - 1 into a cache of `capacity` blocks, which goes on from where the
    call before left it.

    Modified in place: `pins` int8[n_identities], all ABSENT at first, 0 for a resident block; `seen`
    uint8[n_identities], how often a missing block was asked for, or empty with `uses` 1; `request_hits`
    int64[n_requests], hit blocks of each request; `totals`, to which is added; the policy's state.
    """
    block_hits = 0
    short_tokens = 0
    evictions = 0
    resident = totals[RESIDENT]
    for r in range(first, last):
        hits_before = block_hits
        last_hit = 0
        begin(tag, r, indptr[r], s0, s1, s2, s3, s4, s5, s6, s7)
        for i in range(indptr[r], indptr[r + 1]):
            dropped = expire(tag, i, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            while dropped >= 0:
                if dropped >= pins.size or pins[dropped] == ABSENT:
                    totals[BAD_VICTIM] = 1
                    return
                pins[dropped] = ABSENT
                resident -= 1
                totals[EXPIRED] += 1
                dropped = expire(tag, i, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            if i + FAR < refs.size:
                far, near = np.intp(np.uint32(refs[i + FAR])), np.intp(np.uint32(refs[i + NEAR]))
                soon(tag, far, False, pins, s0, s1, s2, s3, s4, s5, s6, s7)
                soon(tag, near, True, pins, s0, s1, s2, s3, s4, s5, s6, s7)
            # Through uint32: an index known to be positive needs no branch for negative ones.
            key = np.intp(np.uint32(refs[i]))
            if pins[key] != ABSENT:
                block_hits += 1
                last_hit = 1
                hit(tag, key, False, i, s0, s1, s2, s3, s4, s5, s6, s7)
                continue
            last_hit = 0
            if uses > 1 and seen[key] < uses - 1:
                seen[key] += 1
                totals[BYPASSED] += 1
                continue
            if not admit(tag, key, i, pins, s0, s1, s2, s3, s4, s5, s6, s7):
                totals[BYPASSED] += 1
                continue
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
        short_tokens += last_hit * (block_size - last_tokens[r])  # no branch: it would be as hard to guess as a hit
    totals[BLOCK_HITS] += block_hits
    totals[TOKEN_HITS] += block_hits * block_size - short_tokens
    totals[EVICTIONS] += evictions
    totals[RESIDENT] = resident
