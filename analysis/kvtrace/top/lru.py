"""A prefix cache with LRU, one request after the other: `kvtrace replay --policy lru --semantics prefix` of a recorded
trace, step by step. The rules are those of `kvtrace_replay.cache.prefix_driver`."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable


class Lru:
    """A cache of `capacity` blocks. Requests hold their blocks from `admit` to `finish`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, the next victim first
        self._pins: dict[int, int] = {}
        self._held: dict[int, set[int]] = {}  # by request
        self.largest = 0  # blocks of the largest request

    def __contains__(self, block: int) -> bool:
        return block in self._pins or block in self._idle

    def __len__(self) -> int:
        return len(self._pins) + len(self._idle)

    def admit(self, request: int, prompt: array[int], most: int) -> int:
        """Look up the first `most` blocks of `prompt`, and take them all. Returns how many were found."""
        hits = 0
        while hits < most and prompt[hits] in self:
            hits += 1
        self._held[request] = set()
        self._take(request, prompt)
        return hits

    def finish(self, request: int, chain: array[int], prompt_blocks: int) -> None:
        """Take the blocks of the output, and let go of all, the last first."""
        if request not in self._held:
            return
        self.largest = max(self.largest, len(chain))
        self._take(request, chain[prompt_blocks:])
        held = self._held.pop(request)
        for block in reversed(chain):
            if block in held:
                held.discard(block)
                self._let_go(block)
        for block in held:
            self._let_go(block)

    def _let_go(self, block: int) -> None:
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]
            self._idle[block] = None

    def _take(self, request: int, blocks: array[int]) -> None:
        pins, idle, held = self._pins, self._idle, self._held[request]
        self.largest = max(self.largest, len(blocks))
        missing = []
        for block in reversed(blocks):
            if block in pins:
                pins[block] += 1
            elif block in idle:
                del idle[block]
                pins[block] = 1
            else:
                missing.append(block)
                continue
            held.add(block)
        if not missing:
            return
        # Those at the tail find no place where all else is held.
        room = max(0, self.capacity - len(pins))
        for block in missing[max(0, len(missing) - room) :]:
            if len(self) >= self.capacity:
                idle.popitem(last=False)
            pins[block] = 1
            held.add(block)

    def shrink(self, capacity: int, keep: Iterable[int]) -> None:
        """Become a cache of `capacity` blocks, with those of the idle ones that are in `keep`; nobody holds any."""
        wanted = set(keep)
        self._release()
        for block in [block for block in self._idle if block not in wanted]:
            del self._idle[block]
        self.capacity = capacity
        while len(self) > capacity:
            self._idle.popitem(last=False)

    def release(self, request: int) -> None:
        """Let go of what `request` holds, as if it had ended, without its output."""
        for block in self._held.pop(request, ()):
            self._let_go(block)

    def _release(self) -> None:
        for request in list(self._held):
            self.release(request)

    def blocks(self) -> set[int]:
        """The blocks in the cache."""
        return {*self._pins, *self._idle}
