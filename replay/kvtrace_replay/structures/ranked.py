"""The least-ranked of a changing set of ids: a binary heap that forgets lazily.

Taking an id out costs nothing but a mark: its entry stays in the heap until it comes to the top or the heap
is full, when all such entries are thrown out at once. So blocks can be pinned and let go of, request after
request, for the price of one push each.

State: `entries` int64[2 * most + 64, 3], rows of (major rank, minor rank, ticket << 32 | id), ordered by the
ranks, least first; `tickets` int32[n_ids], the ticket of an id's live entry, OUT where it has none; in an int64
array `at` of the caller's, SIZE entries and NEXT ticket. Equal ranks of two ids must not happen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

SIZE, NEXT = 0, 1  # slots of `at`
MAJOR, MINOR, WHO = 0, 1, 2
OUT = -1


def new_ranked(n_ids: int, most: int) -> tuple[I64, I32]:
    """The empty set over ids 0..n_ids-1, for at most `most` of them at a time: (entries, tickets)."""
    return np.empty((2 * most + 64, 3), np.int64), np.full(n_ids, OUT, np.int32)


@njit(cache=False)
def _before(entries: I64, i: int, major: int, minor: int) -> bool:
    """Entry `i` ranks below (major, minor)."""
    return entries[i, MAJOR] < major or (entries[i, MAJOR] == major and entries[i, MINOR] < minor)


@njit(cache=False)
def _copy(entries: I64, target: int, source: int) -> None:
    entries[target, MAJOR] = entries[source, MAJOR]
    entries[target, MINOR] = entries[source, MINOR]
    entries[target, WHO] = entries[source, WHO]


@njit(cache=False)
def _settle(entries: I64, size: int, at: int, major: int, minor: int, who: int) -> None:
    """Puts an entry into the hole `at`, or below it."""
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(entries, child + 1, entries[child, MAJOR], entries[child, MINOR]):
            child += 1
        if not _before(entries, child, major, minor):
            break
        _copy(entries, at, child)
        at = child
    entries[at, MAJOR] = major
    entries[at, MINOR] = minor
    entries[at, WHO] = who


@njit(cache=False)
def is_in(tickets: I32, key: int) -> bool:
    """`key` is in the set."""
    return tickets[key] != OUT


@njit(cache=False)
def _tidy(entries: I64, tickets: I32, at: I64) -> None:
    """Throws out the dead entries, makes a heap of the rest."""
    size = 0
    for i in range(at[SIZE]):
        if tickets[entries[i, WHO] & 0xFFFFFFFF] == entries[i, WHO] >> 32:
            _copy(entries, size, i)
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _settle(entries, size, i, entries[i, MAJOR], entries[i, MINOR], entries[i, WHO])
    at[SIZE] = size


@njit(cache=False)
def put_in(entries: I64, tickets: I32, at: I64, key: int, major: int, minor: int) -> None:
    """Adds `key` at this rank, or gives it this rank; modifies all three arrays."""
    if at[SIZE] == entries.shape[0]:
        tickets[key] = OUT
        _tidy(entries, tickets, at)
    ticket = at[NEXT]
    at[NEXT] = (ticket + 1) & 0x7FFFFFFF
    tickets[key] = ticket
    hole = at[SIZE]
    at[SIZE] = hole + 1
    while hole > 0:
        parent = (hole - 1) >> 1
        if _before(entries, parent, major, minor):
            break
        _copy(entries, hole, parent)
        hole = parent
    entries[hole, MAJOR] = major
    entries[hole, MINOR] = minor
    entries[hole, WHO] = (ticket << 32) | key


@njit(cache=False)
def take_out(tickets: I32, key: int) -> None:
    """Removes `key` (which may be absent)."""
    tickets[key] = OUT


@njit(cache=False)
def take_least(entries: I64, tickets: I32, at: I64) -> int:
    """Removes and returns the id of the least rank; -1 when the set is empty."""
    while at[SIZE] > 0:
        who = entries[0, WHO]
        size = at[SIZE] - 1
        at[SIZE] = size
        if size > 0:
            _settle(entries, size, 0, entries[size, MAJOR], entries[size, MINOR], entries[size, WHO])
        key = who & 0xFFFFFFFF
        if tickets[key] == who >> 32:
            tickets[key] = OUT
            return key
    return -1
