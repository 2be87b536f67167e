"""The block pool of the twin: references, identities, the free queue and what is cached, as vLLM keeps them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

Emit = Callable[[str, int, int, "int | None"], None]  # kind, request, block, identity


class Pool:
    """`num_blocks` blocks, of which block 0 is the null block and never handed out.

    `free`: the free queue, its front first. `cached`: identity -> the blocks that hold it, first cached first.
    `on(rule)` says whether a rule holds (mutation tests break one); `emit` takes down each event.
    """

    def __init__(self, num_blocks: int, uncached_first: bool, on: Callable[[str], bool], emit: Emit) -> None:
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.references = [0] * num_blocks
        self.identity: list[int | None] = [None] * num_blocks
        self.cached: dict[int, list[int]] = {}
        self.uncached_first = uncached_first
        self.on, self.emit = on, emit

    def find(self, identity: int) -> int | None:
        """Return the block that a lookup of `identity` gets."""
        blocks = self.cached.get(identity)
        if not blocks:
            return None
        return blocks[0] if self.on("first-duplicate") else blocks[-1]

    def take(self, request: int, count: int) -> list[int]:
        """Hand out `count` free blocks; what they held is forgotten."""
        taken = []
        for _ in range(count):
            block, _none = self.free.popitem(last=not self.on("allocate-front"))
            identity = self.identity[block]
            if identity is not None:
                self.emit("evict", request, block, identity)
                self.identity[block] = None
                self.cached[identity].remove(block)
            self.references[block] = 1
            self.emit("allocate", request, block, None)
            taken.append(block)
        return taken

    def touch(self, request: int, blocks: Sequence[int]) -> None:
        """Let `request` use cached blocks, which leave the free queue."""
        for block in blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1
            self.emit("hit", request, block, self.identity[block])

    def fill(self, request: int, block: int, identity: int) -> None:
        """A block of `request` is full: others can find it."""
        self.identity[block] = identity
        self.cached.setdefault(identity, []).append(block)
        self.emit("fill", request, block, identity)

    def give_up(self, request: int, table: Sequence[int]) -> None:
        """Drop the references of a request to all its blocks, last first; the unused ones become free."""
        first, last = [], []
        for block in reversed(table) if self.on("free-tail-first") else table:
            self.references[block] -= 1
            self.emit("free", request, block, self.identity[block])
            if self.references[block] > 0:
                continue
            to_front = self.uncached_first and self.identity[block] is None and self.on("uncached-front")
            (first if to_front else last).append(block)
        if not self.on("front-keeps-order"):
            first.reverse()
        for block in reversed(first):
            self.free[block] = None
            self.free.move_to_end(block, last=False)
        for block in last:
            self.free[block] = None
            if not self.on("cached-back"):
                self.free.move_to_end(block, last=False)
