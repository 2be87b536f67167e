"""Slots of the int64 array in which the drivers return their sums and keep their counts."""

from __future__ import annotations

BLOCK_HITS, TOKEN_HITS, EVICTIONS, EXPIRED, BYPASSED, PIN_OVERFLOWS, RESIDENT, PINNED, BAD_VICTIM = range(9)
N_TOTALS = 9
