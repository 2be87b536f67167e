"""What the blocks of a cache hold right now, kept up with each event: held, cached and idle, or free."""

from __future__ import annotations

from collections.abc import Iterable


class Blocks:
    """`idle`: blocks that are cached and that nobody holds; `evictions`: identities that were forgotten, all in all."""

    def __init__(self) -> None:
        self._holds: dict[int, int] = {}
        self._cached: set[int] = set()
        self.idle = 0
        self.evictions = 0

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return len(self._holds)

    def allocate(self, blocks: Iterable[int]) -> None:
        """Hand blocks out. One that is cached is evicted by that."""
        holds, cached = self._holds, self._cached
        for block in blocks:
            held = holds.get(block, 0)
            if block in cached:
                cached.discard(block)
                self.evictions += 1
                self.idle -= held <= 0
            holds[block] = held + 1

    def hit(self, blocks: Iterable[int]) -> None:
        """Take a reference to cached blocks."""
        for block in blocks:
            held = self._holds.get(block, 0)
            if block in self._cached:
                self.idle -= held <= 0
            else:
                self._cached.add(block)
            self._holds[block] = held + 1

    def hold(self, blocks: Iterable[int]) -> None:
        """Take a reference to blocks, whatever they hold."""
        for block in blocks:
            held = self._holds.get(block, 0)
            if block in self._cached:
                self.idle -= held <= 0
            self._holds[block] = held + 1

    def fill(self, blocks: Iterable[int]) -> None:
        """Blocks become cached."""
        for block in blocks:
            if block not in self._cached:
                self._cached.add(block)
                self.idle += self._holds.get(block, 0) <= 0

    def free(self, blocks: Iterable[int]) -> None:
        """Give references up."""
        for block in blocks:
            held = self._holds.get(block, 0) - 1
            if held > 0:
                self._holds[block] = held
            elif self._holds.pop(block, 0) > 0:
                self.idle += block in self._cached

    def evict(self, blocks: Iterable[int]) -> None:
        """Forget what these blocks hold, as the engine said."""
        for block in blocks:
            self.evictions += 1
            if block in self._cached:
                self._cached.discard(block)
                self.idle -= self._holds.get(block, 0) <= 0

    def reset(self) -> None:
        """Forget what all blocks hold."""
        self._cached.clear()
        self.idle = 0

    def forget(self) -> None:
        """Forget everything: a part of the log is missing."""
        self.reset()
        self._holds.clear()
