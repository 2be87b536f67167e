"""The prefixes that most requests begin with, counted in bounded memory.

Of each chain the blocks at places 1, 2, 3, 4, 6, 8, 12, 16, 24 ... are counted, so a prefix is found at least two
thirds as long as it is. Where there are too many, the least counted are dropped, and whoever comes back begins with the
highest count that was ever dropped (as in Space-Saving: Metwally, Agrawal and El Abbadi, ICDT 2005), so that what is
hot stays. `error` says by how much a count may be too high.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

MOST = 1 << 14
_SAME = 0.9  # a longer prefix of nearly as many requests speaks for a shorter one


class Head(NamedTuple):
    """A prefix: the identity of its last block, its length, the requests that began with it, how many of these found
    all of it in the cache, and by how much `requests` may be too high."""

    identity: int
    blocks: int
    requests: int
    found: int
    error: int


def places(blocks: int) -> list[int]:
    """The places, from 1, of the blocks that are counted of a chain of so many."""
    chosen, step = [], 1
    while step <= blocks:
        chosen += [step] + ([step * 3 // 2] if step > 1 and step * 3 // 2 <= blocks else [])
        step *= 2
    return chosen


class Prefixes:
    """Counts of prefixes, `most` at a time at the end of each call."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._counts: dict[int, list[int]] = {}  # identity: requests, found, blocks, identity one place up, error
        self._dropped = 0
        self.requests = 0

    def add(self, marks: array[int], blocks: int, hit_blocks: int) -> None:
        """Count a request. `marks`: the identities at the `places` of its prompt of so many `blocks`."""
        self.requests += 1
        before = -1
        for place, identity in zip(places(blocks), marks, strict=False):
            entry = self._counts.get(identity)
            if entry is None:
                entry = self._counts[identity] = [self._dropped, 0, place, before, self._dropped]
            entry[0] += 1
            entry[1] += hit_blocks >= place
            before = identity
        if len(self._counts) > 2 * self._most:
            order = sorted(self._counts.items(), key=lambda item: -item[1][0])
            self._dropped = max(self._dropped, order[self._most][1][0])
            self._counts = dict(order[: self._most])

    def hottest(self, many: int) -> list[Head]:
        """The prefixes of two requests and more that stand for most blocks, each block counted once for each request
        after the first; of nested ones with about the same requests only the longest."""
        spoken_for = {
            entry[3]
            for entry in self._counts.values()
            if entry[3] in self._counts and entry[0] >= _SAME * self._counts[entry[3]][0]
        }
        heads = [
            Head(identity, blocks, requests, found, error)
            for identity, (requests, found, blocks, _, error) in self._counts.items()
            if requests - error > 1 and identity not in spoken_for
        ]
        heads.sort(key=lambda head: (-(head.requests - head.error - 1) * head.blocks, head.identity))
        return heads[:many]
