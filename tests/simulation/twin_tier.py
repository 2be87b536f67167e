"""The manager of vLLM's CPU tier, written from its source (0.32.0, `vllm/v1/kv_offload/cpu`) to be read.

Keys are identities of chunks. A chunk is `stored` (not readable yet), idle, or read by so many loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

STORING = -1


@dataclass
class Access:
    """What one request did: keys it offered or loaded, those it inserted, those it found ready, those it missed."""

    seen: list[int] = field(default_factory=list)
    inserted: set[int] = field(default_factory=set)
    reused: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)


class Lru:
    """Evicts what was used longest ago. A use: inserted, or touched by a request when that ends, tail first."""

    def __init__(self, capacity: int, on: Callable[[str], bool]) -> None:
        self.used: dict[int, int] = {}  # key -> when
        self.clock, self.on = 0, on

    def insert(self, key: int) -> None:
        self.clock += 1
        self.used[key] = self.clock

    def miss(self, keys: list[int]) -> None:
        pass

    def finished(self, keys: list[int], inserted: set[int], reused: set[int]) -> None:
        for key in reversed(keys) if self.on("tail-first") else keys:
            if key in self.used and self.on("touched-at-the-end"):
                self.insert(key)

    def victims(self, count: int, idle: set[int]) -> list[int] | None:
        order = sorted(idle, key=self.used.__getitem__)
        return order[:count] if len(order) >= count else None

    def drop(self, keys: list[int]) -> None:
        for key in keys:
            del self.used[key]


class Arc:
    """Two lists, oldest first: of chunks used once and of chunks used again; ghosts of both steer the first's size."""

    def __init__(self, capacity: int, on: Callable[[str], bool]) -> None:
        self.capacity, self.on = capacity, on
        self.once: list[int] = []
        self.again: list[int] = []
        self.ghosts_once: list[int] = []
        self.ghosts_again: list[int] = []
        self.target = 0.0

    def insert(self, key: int) -> None:
        self.once.append(key)
        for ghosts in (self.ghosts_once, self.ghosts_again):
            if key in ghosts:
                ghosts.remove(key)

    def miss(self, keys: list[int]) -> None:
        for key in reversed(keys):
            b1, b2 = self.ghosts_once, self.ghosts_again
            if key in b1:
                if self.on("ghost-once-grows"):
                    self.target = min(self.target + max(1, len(b2) / len(b1)), self.capacity)
                self._to_end(b1, key)
            elif key in b2:
                if self.on("ghost-again-shrinks"):
                    self.target = max(self.target - max(1, len(b1) / len(b2)), 0)
                self._to_end(b2, key)

    @staticmethod
    def _to_end(keys: list[int], key: int) -> None:
        keys.remove(key)
        keys.append(key)

    def finished(self, keys: list[int], inserted: set[int], reused: set[int]) -> None:
        for key in reversed(keys) if self.on("tail-first") else keys:
            if key in inserted:
                for held in (self.once, self.again):
                    if key in held:
                        self._to_end(held, key)
            elif key in reused and key in self.once and self.on("reuse-promotes"):
                self.once.remove(key)
                self.again.append(key)
            elif key in reused and key in self.again:
                self._to_end(self.again, key)

    def victims(self, count: int, idle: set[int]) -> list[int] | None:
        once = [key for key in self.once if key in idle]
        again = [key for key in self.again if key in idle]
        size, chosen = len(self.once), []
        for _ in range(count):
            # From the first list while that has its share or more; else, and where that has none left, the other.
            if once and (size >= int(self.target) or not again):
                chosen.append(once.pop(0))
                size -= 1
            elif again:
                chosen.append(again.pop(0))
            else:
                return None
        return chosen

    def drop(self, keys: list[int]) -> None:
        for key in keys:
            held, ghosts = (self.once, self.ghosts_once) if key in self.once else (self.again, self.ghosts_again)
            held.remove(key)
            ghosts.append(key)
        for ghosts in (self.ghosts_once, self.ghosts_again):
            del ghosts[: max(0, len(ghosts) - self.capacity)]


class Tier:
    """`capacity` chunks. `readers`: key -> loads that read it, or STORING. `log`: what was done, for comparisons."""

    def __init__(self, capacity: int, policy: str, threshold: int, on: Callable[[str], bool]) -> None:
        self.capacity, self.threshold, self.on = capacity, threshold, on
        self.policy: Lru | Arc = {"lru": Lru, "arc": Arc}[policy](capacity, on)
        self.readers: dict[int, int] = {}
        self.offered: dict[int, int] = {}
        self.access: dict[int, Access] = {}
        self.log: list[tuple[str, list[int]]] = []

    def lookup(self, key: int) -> str:
        """`miss`, `pending` (being stored), or `hit`."""
        readers = self.readers.get(key)
        return "miss" if readers is None else "pending" if readers == STORING else "hit"

    def prepare_load(self, request: int, keys: list[int]) -> None:
        """The chunks are read from now on, and stay."""
        for key in keys:
            self.readers[key] += 1
        self._seen(request, keys, keys)
        self.log.append(("load", sorted(keys)))

    def complete_load(self, keys: Iterable[int]) -> None:
        """A load of them has ended."""
        for key in keys:
            self.readers[key] -= 1
        self.log.append(("loaded", sorted(keys)))

    def prepare_store(self, request: int, keys: list[int]) -> list[int] | None:
        """Make room for those of `keys` that are to be stored, and return them; None if there is no room for all."""
        for key in keys:
            self.offered[key] = self.offered.get(key, 0) + 1
        new = [key for key in keys if key not in self.readers]
        if self.threshold >= 2 and self.on("store-threshold"):
            new = [key for key in new if self.offered[key] >= self.threshold]
        ready = [key for key in keys if self.readers.get(key, STORING) != STORING]
        access = self.access.setdefault(request, Access())
        missed = [key for key in new if key not in access.missed]
        self.policy.miss(missed)
        access.missed.update(missed)
        self._seen(request, [key for key in keys if key in new or key in ready], ready)
        if not new:
            return []
        short = len(new) - (self.capacity - len(self.readers))
        if short > 0:
            offered = set(keys) if self.on("offered-stay") else set()
            idle = {key for key, readers in self.readers.items() if readers == 0 and key not in offered}
            victims = self.policy.victims(short, idle)
            if victims is None:
                self.log.append(("refuse", sorted(keys)))
                return None
            self.policy.drop(victims)
            for key in victims:
                del self.readers[key]
            self.log.append(("evict", victims))
        for key in new:
            self.policy.insert(key)
            self.readers[key] = STORING
        access.inserted.update(new)
        self.log.append(("store", new))
        return new

    def complete_store(self, keys: Iterable[int]) -> None:
        """They can be read from now on."""
        for key in keys:
            self.readers[key] = 0
        self.log.append(("stored", sorted(keys)))

    def finished(self, request: int, order: Callable[[int], int]) -> None:
        """The request has ended: what it used counts as used now; `order`: the place of a key in its prefix."""
        access = self.access.pop(request, None)
        if access is not None:
            only_inserted = access.inserted - access.reused
            self.policy.finished(sorted(access.seen, key=order), only_inserted, access.reused)

    def _seen(self, request: int, keys: list[int], reused: list[int]) -> None:
        access = self.access.setdefault(request, Access())
        access.seen += [key for key in keys if key not in access.seen]
        access.reused.update(key for key in reused if key not in access.inserted)
