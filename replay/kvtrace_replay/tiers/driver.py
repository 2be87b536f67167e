"""Several tiers, block by block or request by request: what `levels` does, in order, for each tier in turn.

A range of references (a prompt, an output, or a single block in `object` semantics) is served in these steps:

1. it is looked up, block by block along the chain: a block is a hit of the first tier that has it, and in `prefix`
   semantics the first block that none has ends the run of hits;
2. the top tier uses and pins those it has, chooses those it will place, and places them; what it evicts for that
   is on offer to the tiers below;
3. from the top down, each tier below uses those it has (an exclusive one gives up what the top tier has now);
   stores copies of what the top tier has (write-through), or what was evicted above and lies nowhere above any
   more (demote); and lets go of the range, the tail first, which is the moment that defines recency. What it
   evicts is on offer further down;
4. what an inclusive tier dropped is dropped above it.

In the top tier a request's blocks stay pinned until it finishes, and so do their copies in inclusive tiers. Over an
import, a tier whose policy's order no use changes pins nothing, as in the plain cache (see `in_order`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtrace_replay.tiers.levels import (
    I32,
    I64,
    U8,
    age,
    invalidate,
    release,
    serve_below,
    serve_top,
    start,
)
from kvtrace_replay.tiers.mask import first_tier
from kvtrace_replay.tiers.words import BAD_TIER, BLOCK_HITS, INCLUSIVE, LOST, PIN_OVERFLOWS, TOKEN_HITS
from kvtrace_traces.compile import njit


@njit
def tiers_driver(
    n_tiers: int,
    refs: I32,
    indptr: I64,
    last_tokens: I32,
    block_size: int,
    prompt_blocks: I32,
    hit_cap: I32,
    events: I64,
    by_block: bool,
    counting: bool,
    first: int,
    last: int,
    rules: I64,
    totals: I64,
    counts: I64,
    mask: U8,
    used: U8,
    last_use: I64,
    held: U8,
    overflowed: U8,
    request_hits: I64,
    victims: I32,
    lost: I32,
    lost_from: U8,
    tag0: Any, pins0: I32, a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, a5: Any, a6: Any, a7: Any,
    tag1: Any, pins1: I32, b0: Any, b1: Any, b2: Any, b3: Any, b4: Any, b5: Any, b6: Any, b7: Any,
    tag2: Any, pins2: I32, c0: Any, c1: Any, c2: Any, c3: Any, c4: Any, c5: Any, c6: Any, c7: Any,
    tag3: Any, pins3: I32, d0: Any, d1: Any, d2: Any, d3: Any, d4: Any, d5: Any, d6: Any, d7: Any,
) -> None:  # fmt: skip
    """Replays the requests `first` to `last` - 1 (`by_block`: `object` semantics), or `events[first:last]` (`prefix`,
    as `prefix_driver` has them), through `n_tiers` tiers, going on from where the call before left them.

    Modified in place: `totals`, to which is added, `request_hits` int64[n_requests], and all arrays from `counts` on
    that `levels` describes, which a caller only makes: `mask`, `used`, `held` and `overflowed` as zeros, `last_use`
    as -1, `victims` with room for MAX_TIERS times the longest request, `lost` and `lost_from` for as much and, with
    an inclusive tier, MAX_TIERS times all blocks, the tiers' pins full of ABSENT. `counting` tells whether `used` is
    kept. The slots of tiers from `n_tiers` on hold anything of the same types. Stops with counts[BAD_TIER] set
    to 1 + the tier whose policy returned a block that may not be evicted.
    """
    # Numba compiles a function once more for each number that is written out in a call of it.
    k0: Any = np.int64(0)
    k1: Any = np.int64(1)
    k2: Any = np.int64(2)
    k3: Any = np.int64(3)
    pinning = not by_block
    for e in range(first, last):
        admission = True
        r = e
        if pinning:
            admission = events[e] > 0
            r = abs(events[e]) - 1
        stop = indptr[r + 1]
        lo = indptr[r]
        end = stop
        limit = stop
        if pinning and admission:
            end = lo + prompt_blocks[r]
            limit = min(end, lo + hit_cap[r])
        elif pinning:
            lo += prompt_blocks[r]
        if admission:
            start(
                tag0, k0, r, lo, rules, totals, counts, mask, lost, lost_from, pins0, a0, a1, a2, a3, a4, a5, a6, a7
            )  # fmt: skip
            if n_tiers > 1:
                start(
                    tag1, k1, r, lo, rules, totals, counts, mask, lost, lost_from, pins1, b0, b1, b2, b3, b4, b5, b6, b7
                )  # fmt: skip
            if n_tiers > 2:
                start(
                    tag2, k2, r, lo, rules, totals, counts, mask, lost, lost_from, pins2, c0, c1, c2, c3, c4, c5, c6, c7
                )  # fmt: skip
            if n_tiers > 3:
                start(
                    tag3, k3, r, lo, rules, totals, counts, mask, lost, lost_from, pins3, d0, d1, d2, d3, d4, d5, d6, d7
                )  # fmt: skip
        while True:
            # In `object` semantics policies are asked at each reference, as `object_driver` asks them.
            if by_block and indptr[r] < lo < end:
                age(
                    tag0, k0, lo, rules, totals, counts, mask, lost, lost_from, pins0, a0, a1, a2, a3, a4, a5, a6, a7
                )  # fmt: skip
                if n_tiers > 1:
                    age(
                        tag1, k1, lo, rules, totals, counts, mask, lost, lost_from, pins1,
                        b0, b1, b2, b3, b4, b5, b6, b7,
                    )  # fmt: skip
                if n_tiers > 2:
                    age(
                        tag2, k2, lo, rules, totals, counts, mask, lost, lost_from, pins2,
                        c0, c1, c2, c3, c4, c5, c6, c7,
                    )  # fmt: skip
                if n_tiers > 3:
                    age(
                        tag3, k3, lo, rules, totals, counts, mask, lost, lost_from, pins3,
                        d0, d1, d2, d3, d4, d5, d6, d7,
                    )  # fmt: skip
            if counts[LOST]:
                invalidate(
                    tag0, k0, totals, counts, lost, lost_from, pins0, a0, a1, a2, a3, a4, a5, a6, a7
                )  # fmt: skip
                if n_tiers > 2:
                    invalidate(
                        tag1, k1, totals, counts, lost, lost_from, pins1, b0, b1, b2, b3, b4, b5, b6, b7
                    )  # fmt: skip
                if n_tiers > 3:
                    invalidate(
                        tag2, k2, totals, counts, lost, lost_from, pins2, c0, c1, c2, c3, c4, c5, c6, c7
                    )  # fmt: skip
                counts[LOST] = 0
            if counts[BAD_TIER]:
                return
            if lo >= end:
                break
            hi = lo + 1 if by_block else end
            run_end = lo
            if admission:
                looked_up = min(hi, limit)
                while run_end < looked_up:
                    tiers = mask[refs[run_end]]
                    if tiers == 0:
                        break
                    found = first_tier(tiers)
                    run_end += 1
                    totals[found, BLOCK_HITS] += 1
                    totals[found, TOKEN_HITS] += last_tokens[r] if run_end == stop else block_size
                request_hits[r] += run_end - lo
            if serve_top(
                tag0, refs, lo, run_end, hi, pinning, counting, rules, totals, counts, mask, used, last_use, held,
                victims, lost, lost_from, pins0, a0, a1, a2, a3, a4, a5, a6, a7,
            ) and overflowed[r] == 0:  # fmt: skip
                overflowed[r] = 1
                totals[0, PIN_OVERFLOWS] += 1
            if n_tiers > 1:
                serve_below(
                    tag1, k1, refs, lo, hi, pinning, rules, totals, counts, mask, pins0, used, last_use, held, victims,
                    lost, lost_from, pins1, b0, b1, b2, b3, b4, b5, b6, b7,
                )  # fmt: skip
            if n_tiers > 2:
                serve_below(
                    tag2, k2, refs, lo, hi, pinning, rules, totals, counts, mask, pins0, used, last_use, held, victims,
                    lost, lost_from, pins2, c0, c1, c2, c3, c4, c5, c6, c7,
                )  # fmt: skip
            if n_tiers > 3:
                serve_below(
                    tag3, k3, refs, lo, hi, pinning, rules, totals, counts, mask, pins0, used, last_use, held, victims,
                    lost, lost_from, pins3, d0, d1, d2, d3, d4, d5, d6, d7,
                )  # fmt: skip
            lo = hi
        if not admission:
            release(
                tag0, k0, refs, indptr[r], stop, totals, held, pins0, a0, a1, a2, a3, a4, a5, a6, a7
            )  # fmt: skip
            if n_tiers > 1 and rules[1, INCLUSIVE]:
                release(
                    tag1, k1, refs, indptr[r], stop, totals, held, pins1, b0, b1, b2, b3, b4, b5, b6, b7
                )  # fmt: skip
            if n_tiers > 2 and rules[2, INCLUSIVE]:
                release(
                    tag2, k2, refs, indptr[r], stop, totals, held, pins2, c0, c1, c2, c3, c4, c5, c6, c7
                )  # fmt: skip
            if n_tiers > 3 and rules[3, INCLUSIVE]:
                release(
                    tag3, k3, refs, indptr[r], stop, totals, held, pins3, d0, d1, d2, d3, d4, d5, d6, d7
                )  # fmt: skip
