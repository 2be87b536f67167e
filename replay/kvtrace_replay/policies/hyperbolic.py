"""Hyperbolic caching: the victim is the block with the fewest uses for the time it has been in the cache.

A block's score is uses / age: how often it was used since it was placed, over the references that went by since then.
Unlike a count, this falls from one moment to the next, and faster for a young block than for an old one, so a new block
is not doomed by older counts. No order of the blocks stays right for long, so a victim is found by sampling: `samples`
residents are drawn (some perhaps twice), and the one with the least score goes; of equals the one drawn first.

Age counts hits and placements, the present one among them. With prefixes, blocks that a running request holds are left
out of the draw, and each reference of a request counts as a use when the request takes its blocks. The same `seed`
gives the same run.

libCacheSim's `Hyperbolic` has the same rule with 64 samples and a seed of its own; the two are compared by the spread
of repeated runs.

A. Blankstein, S. Sen, M. J. Freedman, "Hyperbolic caching: flexible caching for web applications", USENIX ATC 2017.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.indices import as_index
from kvtrace_replay.structures.sampling import EVICTABLE, RESIDENT, Bounds, Rng, Slots, draw, new_rng
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

# Columns of `rows`.
KEY, USES, SINCE = range(3)
# Slots of `about`, after those of `structures.sampling`.
CLOCK, SAMPLES = 2, 3


@njit(cache=False)
def _swap(rows: I64, slot_of: Slots, one: int, other: int) -> None:
    for column in range(3):
        rows[one, column], rows[other, column] = rows[other, column], rows[one, column]
    slot_of[rows[one, KEY]] = one
    slot_of[rows[other, KEY]] = other


@njit(cache=False)
def _leave(rows: I64, slot_of: Slots, about: Bounds, at: int) -> None:
    """The block of row `at`, which may be evicted, is resident no more."""
    last = about[EVICTABLE] - 1
    if at != last:
        _swap(rows, slot_of, at, last)
    if about[RESIDENT] != last + 1:
        _swap(rows, slot_of, last, about[RESIDENT] - 1)
    about[EVICTABLE] = last
    about[RESIDENT] -= 1


@policy(
    "hyperbolic",
    summary="evicts, of a random sample, the block with the fewest uses for its time in the cache",
    paper="Blankstein, Sen, Freedman, USENIX ATC 2017",
)
class Hyperbolic:
    """State: `rows` int64[capacity, 3], a resident block, its uses, and the clock when it was placed, those that may be
    evicted before those that are held (in one place, for a victim is sought in many rows); `slot_of`
    int32[n_identities], the row of a block; `about` int64[4]: how many may be evicted, how many there are, the clock,
    the samples; `rng`."""

    @staticmethod
    def setup(stream: Stream, capacity: int, samples: int = 64, seed: int = 0) -> tuple[I64, Slots, Bounds, Rng]:
        if not 1 <= samples <= 100_000:
            raise UsageError(f"hyperbolic: samples={samples} must lie between 1 and 100000")
        about = np.array([0, 0, 0, samples], np.int64)
        return np.zeros((capacity, 3), np.int64), np.zeros(stream.n_identities, np.int32), about, new_rng(seed)

    @staticmethod
    def insert(key: int, now: int, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> None:
        about[CLOCK] += 1
        at = about[RESIDENT]
        rows[at, KEY] = key
        rows[at, USES] = 1
        rows[at, SINCE] = about[CLOCK]
        slot_of[key] = at
        about[RESIDENT] = at + 1
        if at != about[EVICTABLE]:
            _swap(rows, slot_of, at, about[EVICTABLE])
        about[EVICTABLE] += 1

    @staticmethod
    def hit(key: int, pinned: bool, now: int, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> None:
        about[CLOCK] += 1
        rows[as_index(slot_of[key]), USES] += 1

    @staticmethod
    def evict(key: int, now: int, pins: I32, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> int:
        clock = about[CLOCK] + 1
        n = about[EVICTABLE]
        at = draw(rng, n)
        uses, age = rows[at, USES], clock - rows[at, SINCE]
        for _ in range(1, about[SAMPLES]):
            other = as_index(draw(rng, n))
            its_age = clock - rows[other, SINCE]
            # uses / age, without dividing: both are below 2^31
            if rows[other, USES] * age < uses * its_age:
                at, uses, age = other, rows[other, USES], its_age
        victim = rows[at, KEY]
        _leave(rows, slot_of, about, at)
        return victim

    @staticmethod
    def pin(key: int, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> None:
        about[EVICTABLE] -= 1
        _swap(rows, slot_of, slot_of[key], about[EVICTABLE])

    @staticmethod
    def unpin(key: int, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> None:
        _swap(rows, slot_of, slot_of[key], about[EVICTABLE])
        about[EVICTABLE] += 1

    @staticmethod
    def remove(key: int, rows: I64, slot_of: Slots, about: Bounds, rng: Rng) -> None:
        _leave(rows, slot_of, about, slot_of[key])
