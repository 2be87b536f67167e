"""Slots of the int64 array in which the drivers return their sums and keep their counts."""

from __future__ import annotations

BLOCK_HITS, TOKEN_HITS, EVICTIONS, EXPIRED, BYPASSED, PIN_OVERFLOWS, RESIDENT, PINNED, BAD_VICTIM = range(9)
N_TOTALS = 9
IMPOSSIBLE = (
    "more tokens were hit than looked up, so there is no ratio of tokens: requests name more blocks than their prompts "
    "have tokens for (`kvtrace import --block-size` says how many a block has)"
)


def ratio_of(hits: int | None, lookups: int) -> float | None:
    """``hits / lookups``; None where there is none, or the hits are more (see ``IMPOSSIBLE``)."""
    return hits / lookups if hits is not None and 0 < lookups >= hits else None
