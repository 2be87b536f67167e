"""Slots of the arrays through which the drivers of several tiers are told their rules and return their sums."""

from __future__ import annotations

MAX_TIERS = 4

# Columns of `rules`, int64[MAX_TIERS, N_RULES].
CAPACITY, USES, THROUGH, EXCLUSIVE, INCLUSIVE, PROMOTE, IN_ORDER = range(7)
N_RULES = 7

# Columns of `totals`, int64[MAX_TIERS, N_SUMS]. UP: blocks read out of this tier for a request; DOWN: blocks written
# into it from above; INVALIDATED: dropped because an inclusive tier below evicted them. The last two are counts that
# are kept, not sums.
BLOCK_HITS, TOKEN_HITS, UP, DOWN, EVICTIONS, EXPIRED, BYPASSED, INVALIDATED, PIN_OVERFLOWS, RESIDENT, PINNED = range(11)
N_SUMS = 11

# Slots of `counts`, int64[N_COUNTS]: blocks in `victims`, blocks in `lost`, 1 + the tier whose policy is wrong.
VICTIMS, LOST, BAD_TIER = range(3)
N_COUNTS = 3

# Values of a tier's `pins` below 0: not resident; not resident but about to be placed.
ABSENT, CHOSEN = -1, -2

# Bits of `held`, uint8 by reference: HELD << k, tier k holds the block for this reference; PLACING << k, it is about
# to be placed there for it.
HELD, PLACING = 1, 16
