"""Doubly linked lists over block identities, in one array.

`links` is uint32[n_identities + n_lists, 2], C-contiguous: row `key` holds its two neighbours (`TOWARDS_NEW`,
`TOWARDS_OLD`), both in one cache line. Row `n_identities + i` is the ring's fixed node of list i, so that no
operation has a special case for an empty list. A key is in at most one list. Unsigned, because a signed index
costs a branch for Python's negative indices (measured: 171 -> 203 million references a second for LRU).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_traces.compile import njit

Links = npt.NDArray[np.uint32]

TOWARDS_NEW = 0
TOWARDS_OLD = 1


def new_lists(n_identities: int, n_lists: int) -> Links:
    """`n_lists` empty lists, uint32[n_identities + n_lists, 2]; list i is named by `n_identities + i`."""
    links = np.empty((n_identities + n_lists, 2), np.uint32)
    links[n_identities:] = np.arange(n_identities, n_identities + n_lists, dtype=np.uint32)[:, None]
    return links


@njit(cache=False)
def push_new(links: Links, head: int, key: int) -> None:
    """Puts `key`, which is in no list, at the new end of list `head`. Modifies `links`."""
    newest = links[head, TOWARDS_OLD]
    links[key, TOWARDS_NEW] = head
    links[key, TOWARDS_OLD] = newest
    links[head, TOWARDS_OLD] = key
    links[newest, TOWARDS_NEW] = key


@njit(cache=False)
def unlink(links: Links, key: int) -> None:
    """Takes `key` out of the list it is in. Modifies `links`."""
    newer = links[key, TOWARDS_NEW]
    older = links[key, TOWARDS_OLD]
    links[newer, TOWARDS_OLD] = older
    links[older, TOWARDS_NEW] = newer


@njit(cache=False)
def oldest(links: Links, head: int) -> int:
    """The key at the old end of list `head`; `head` itself when the list is empty."""
    return links[head, TOWARDS_NEW]
