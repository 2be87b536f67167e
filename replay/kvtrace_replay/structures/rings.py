"""FIFO queues of block identities in plain arrays: `rings`, and `ghosts`, whose members can be taken out.

`rings` is int32[n_rings, room]. The first slots of an int64 array that the caller keeps, two for each ring, hold the
place of its oldest entry and its length. Entries lie side by side, so that walking a queue reads memory in order,
which a linked list does not.

Where members may be taken out of the middle, `slots` int32[n_identities] tells where each lies, GONE fills the gap
(never at the old end), and a ring that is full of gaps is closed up; for that it has twice the room. Elsewhere `slots`
is not kept (`structures.kept`), and costs nothing.

Ghosts are identities remembered after their eviction, at most `limit` of them, the oldest forgotten first. `ghosts` is
int32[3 + 2 limit]: three counters, then the entries from oldest to newest, with GONE in the place of those that were
taken out; when the end is reached the rest moves to the front, which costs a few operations an entry. The place of
each is kept in the first column of `places`, [n_identities, any]: the links of a list do, for a ghost is in none. Who
is a ghost the caller marks in an array of its own, small enough to stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.structures.kept import is_kept, new_kept
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Places = npt.NDArray[Any]

GONE = -1
OLDEST, END, COUNT = 0, 1, 2  # the counters at the start of `ghosts`
FIRST = 3


def new_rings(n_rings: int, capacity: int, n_identities: int, removes: bool) -> tuple[I32, I32]:
    """Empty (rings, slots) for `capacity` members each; `removes`: `ring_remove` will be called."""
    return (
        np.zeros((n_rings, capacity * 2 if removes else capacity), np.int32),
        new_kept(n_identities, np.int32, removes),
    )


@njit(cache=False)
def ring_push(rings: I32, counters: I64, slots: I32, ring: int, key: int) -> None:
    """Puts `key` at the new end; there must be room. Modifies the arrays."""
    if is_kept(slots) and counters[2 * ring + 1] == rings.shape[1]:
        _close_ring(rings, counters, slots, ring)
    at = counters[2 * ring] + counters[2 * ring + 1]
    if at >= rings.shape[1]:
        at -= rings.shape[1]
    rings[ring, np.uintp(at)] = key
    counters[2 * ring + 1] += 1
    if is_kept(slots):
        slots[key] = ring * rings.shape[1] + at


@njit(cache=False)
def _close_ring(rings: I32, counters: I64, slots: I32, ring: int) -> None:
    room = rings.shape[1]
    head = counters[2 * ring]
    kept = 0
    for i in range(counters[2 * ring + 1]):
        key = rings[ring, (head + i) % room]
        if key != GONE:
            at = (head + kept) % room
            rings[ring, at] = key
            slots[key] = ring * room + at
            kept += 1
    counters[2 * ring + 1] = kept


@njit(cache=False)
def ring_trim(rings: I32, counters: I64, ring: int) -> None:
    """Takes gaps from the old end. Modifies `counters`."""
    at, length = counters[2 * ring], counters[2 * ring + 1]
    while length > 0 and rings[ring, np.uintp(at)] == GONE:
        at = at + 1 if at + 1 < rings.shape[1] else 0
        length -= 1
    counters[2 * ring], counters[2 * ring + 1] = at, length


@njit(cache=False)
def ring_pop(rings: I32, counters: I64, slots: I32, ring: int) -> int:
    """Takes out and returns the oldest; there must be one. Modifies `counters`."""
    at = counters[2 * ring]
    counters[2 * ring] = at + 1 if at + 1 < rings.shape[1] else 0
    counters[2 * ring + 1] -= 1
    key = rings[ring, np.uintp(at)]
    if is_kept(slots):
        ring_trim(rings, counters, ring)
    return key


@njit(cache=False)
def ring_remove(rings: I32, counters: I64, slots: I32, key: int) -> int:
    """Takes `key` out of the ring that it is in; returns that ring. Modifies `rings` and `counters`."""
    ring, at = slots[key] // rings.shape[1], slots[key] % rings.shape[1]
    rings[ring, at] = GONE
    ring_trim(rings, counters, ring)
    return ring


@njit(cache=False)
def ring_length(counters: I64, ring: int) -> int:
    """0 for a ring without members; else their number, gaps included."""
    return counters[2 * ring + 1]


def new_ghosts(n_identities: int, limit: int) -> I32:
    """No ghosts; room for `limit`, though for no more than there are identities."""
    ghosts = np.zeros(FIRST + 2 * min(limit, n_identities), np.int32)
    ghosts[OLDEST] = ghosts[END] = FIRST
    return ghosts


@njit(cache=False)
def forget_oldest(ghosts: I32) -> int:
    """Takes out and returns the oldest ghost; there must be one. Modifies `ghosts`."""
    at = np.uintp(ghosts[OLDEST])
    while ghosts[at] == GONE:
        at += np.uintp(1)
    ghosts[OLDEST] = at + np.uintp(1)
    ghosts[COUNT] -= 1
    return ghosts[at]


@njit(cache=False)
def forget(ghosts: I32, places: Places, key: int) -> None:
    """Takes the ghost `key` out. Modifies `ghosts`."""
    ghosts[np.uintp(places[key, 0])] = GONE
    ghosts[COUNT] -= 1


@njit(cache=False)
def _close_gaps(ghosts: I32, places: Places) -> None:
    to = FIRST
    for at in range(ghosts[OLDEST], ghosts[END]):
        kept = ghosts[np.uintp(at)]
        if kept != GONE:
            ghosts[np.uintp(to)] = kept
            places[np.uintp(kept), 0] = to
            to += 1
    ghosts[OLDEST], ghosts[END] = FIRST, to


@njit(cache=False)
def remember(ghosts: I32, places: Places, key: int) -> int:
    """Makes `key` the newest ghost. Returns the ghost that had to be forgotten for it, `key` itself where there is no
    room at all, or -1. Modifies both arrays."""
    limit = (ghosts.size - FIRST) // 2
    if limit == 0:
        return key
    forgotten = -1
    if ghosts[COUNT] == limit:
        forgotten = forget_oldest(ghosts)
    if ghosts[END] == ghosts.size:
        _close_gaps(ghosts, places)
    at = ghosts[END]
    ghosts[np.uintp(at)] = key
    places[key, 0] = at
    ghosts[END] = at + 1
    ghosts[COUNT] += 1
    return forgotten
