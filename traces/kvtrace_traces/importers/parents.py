"""Tells, while a file streams by, whether its ids name content alone: then one id stands under several parents."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit

MOST_IDS = 1 << 22  # distinct; memory stays bounded, and a reader looks at all of them anyway
_FULL, _SLOW = -1, -2


class Parents:
    """Remembers the predecessor of every id. ``several``: whether some id had two; None where that could not be told,
    because there were more than MOST_IDS distinct ids and none of those seen had."""

    def __init__(self) -> None:
        self.several: bool | None = False
        self._multiplier = np.uint64(1)  # keeps neighbours together, as long as nothing collides too much
        self._room(1 << 12)

    def _room(self, slots: int) -> None:
        self._keys = np.empty(slots, np.uint64)
        self._parents = np.empty(slots, np.uint64)
        self._kinds = np.zeros(slots, np.uint8)  # 0 free, 1 first of its request, 2 has a parent
        self._used = 0

    def see(self, indptr: NDArray[np.int64], ids: NDArray[np.uint64]) -> None:
        """Look at the requests of a batch (CSR)."""
        request, place = 0, 0
        while self.several is False and request < len(indptr) - 1:
            request, place, self._used, result = _see(
                indptr, ids, request, place, self._keys, self._parents, self._kinds, self._used, self._multiplier
            )
            if result == 1:
                self.several = True
            elif result == _FULL and len(self._keys) > MOST_IDS:
                self.several = None
            elif result:
                keys, parents, kinds = self._keys, self._parents, self._kinds
                if result == _SLOW:
                    self._multiplier = np.uint64(secrets.randbits(64) | 1)
                self._room(len(keys) if result == _SLOW else 4 * len(keys))
                self._used = _move(keys, parents, kinds, self._keys, self._parents, self._kinds, self._multiplier)
        if self.several is not False:
            self._room(1)


@njit(cache=False)
def _slot(key, multiplier, mask):
    mixed = key * multiplier
    return (mixed ^ (mixed >> np.uint64(32))) & mask


@njit
def _see(indptr, ids, request, place, keys, parents, kinds, used, multiplier):
    """Go on at ``ids[indptr[request] + place]``. Returns where it stopped, slots in use, and 0 done, 1 an id has two
    parents, _FULL or _SLOW: the table must grow."""
    mask = np.uint64(len(keys) - 1)
    most = len(keys) // 2
    probes = np.int64(0)
    budget = np.int64(64) + 8 * (indptr[-1] - indptr[0])
    for r in range(request, len(indptr) - 1):
        before = np.uint64(0)
        kind = np.uint8(1)
        if place > 0:
            before, kind = ids[indptr[r] + place - 1], np.uint8(2)
        for i in range(indptr[r] + place, indptr[r + 1]):
            key = ids[i]
            slot = _slot(key, multiplier, mask)
            while kinds[slot] != 0 and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
                probes += 1
            if kinds[slot] == 0:
                if used >= most:
                    return r, i - indptr[r], used, _FULL
                keys[slot], parents[slot], kinds[slot] = key, before, kind
                used += 1
            elif kinds[slot] != kind or (kind == 2 and parents[slot] != before):
                return r, i - indptr[r], used, 1
            if probes > budget:
                return r, i - indptr[r], used, _SLOW
            before, kind = key, np.uint8(2)
        place = 0
    return len(indptr) - 1, 0, used, 0


@njit
def _move(old_keys, old_parents, old_kinds, keys, parents, kinds, multiplier):
    mask = np.uint64(len(keys) - 1)
    used = 0
    for i in range(len(old_keys)):
        if old_kinds[i] != 0:
            slot = _slot(old_keys[i], multiplier, mask)
            while kinds[slot] != 0:
                slot = (slot + np.uint64(1)) & mask
            keys[slot], parents[slot], kinds[slot] = old_keys[i], old_parents[i], old_kinds[i]
            used += 1
    return used
