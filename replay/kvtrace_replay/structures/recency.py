"""Blocks in the order of their last use, without a list: time slots, and a bit for each.

Every use of a block takes the next slot. A block's stamp is the slot of its last use; of all slots, `bits` has those
set that are some block's stamp. The block used longest ago has the first set bit from TAIL on, and to evict it is to
move TAIL beyond that bit: a block is resident if its stamp is not below TAIL. So a use touches the block's own stamp,
which can be asked for early, and two bits of a set that is small; an eviction touches bits that lie side by side, and
no block. A list costs three places in memory for each use, its neighbours', none of them known ahead.

When the slots run out, the resident blocks are numbered anew, in their order.

State, made by `new_recency`:
    stamps  uint32[n_identities], NEVER for a block never used or forgotten, TAKEN while a driver holds it
    bits    uint64[slots / 64], also set: slots below TAIL, which are not looked at
    at      int64[2]: TAIL; NOW, the next slot
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.machine import trailing_zeros
from kvtrace_replay.structures.slots import LOW, ONE, WORD, ZERO, number_anew
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

NEVER, TAKEN = np.uint32(0), np.uint32(2**32 - 1)
TAIL, NOW = 0, 1
_MOST_SLOTS = 2**32 - 64  # so that TAKEN is no slot
_SLOTS_PER_BLOCK = 32  # numbering anew costs a few steps a block, and four bytes of bits a block are no burden


def new_recency(n_identities: int, n_refs: int, longest: int) -> tuple[U32, U64, I64]:
    """(stamps, bits, at) before any of `n_refs` uses; `longest` of them at most between two questions whether
    slots are `too_few`. Raises KvtraceError where that is more than there can be."""
    if n_identities + longest >= _MOST_SLOTS:
        most = _MOST_SLOTS - n_identities - 1
        raise KvtraceError(f"a request of {longest:,} blocks is too long: {most:,} can be replayed")
    wanted = max(_SLOTS_PER_BLOCK * n_identities, n_identities + longest)
    slots = min(wanted, n_refs, _MOST_SLOTS - 1) + 1  # slot 0 is NEVER
    return np.zeros(n_identities, np.uint32), np.zeros(-(-slots // 64), np.uint64), np.ones(2, np.int64)


@njit(cache=False, forceinline=True)
def live(stamp: Any, tail: np.uint64) -> Any:
    """Whether a block of this stamp is resident."""
    return np.uint64(stamp) >= tail


@njit(cache=False, forceinline=True)
def clear(slot: Any, bits: U64) -> None:
    """The block of this slot has it no longer. NEVER may be cleared."""
    bits[np.uint64(slot) >> WORD] &= ~(ONE << (np.uint64(slot) & LOW))


@njit(cache=False, forceinline=True)
def use(key: Any, now: np.uint64, stamps: U32, bits: U64) -> np.uint64:
    """`key`, whose earlier slot was cleared, is used now. Returns the next slot."""
    stamps[key] = np.uint32(now)
    bits[now >> WORD] |= ONE << (now & LOW)
    return now + ONE


@njit(cache=False, forceinline=True)
def drop_oldest(tail: np.uint64, bits: U64) -> np.uint64:
    """Evicts the block used longest ago; there is one. Returns the new TAIL."""
    word = tail >> WORD
    rest = bits[word] >> (tail & LOW)
    if rest != ZERO:
        return tail + trailing_zeros(rest) + ONE
    word += ONE
    while bits[word] == ZERO:
        word += ONE
    return (word << WORD) + trailing_zeros(bits[word]) + ONE


@njit(cache=False, forceinline=True)
def too_few(needed: Any, now: np.uint64, bits: U64) -> Any:
    """Whether fewer than `needed` slots are left, so that it is time to `make_slots`."""
    return np.int64(now) + needed > 64 * bits.size


@njit(cache=False, forceinline=True)
def make_slots(tail: np.uint64, stamps: U32, bits: U64) -> np.uint64:
    """Numbers the resident blocks anew; no block may be TAKEN. TAIL is 1 then; returns the new NOW."""
    return np.uint64(number_anew(stamps, bits, tail, NEVER, ONE))
