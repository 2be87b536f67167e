"""The hit ratio that caches of other capacities would have had, kept up with a running trace in bounded memory.

Each capacity is an LRU prefix cache that is asked what the engine is asked: an open loop, as in `kvtrace replay`. As
long as at most MOST_BLOCKS blocks are followed, all requests are, and the figures are those of a replay. When there are
more, the rate is halved, again and again: requests are chosen by a hash of the first block of their chains, so that
all that share blocks are drawn together, and caches of C blocks are stood for by ones of RATE * C (Waldspurger, Park,
Garthwaite and Ahmad, "Efficient MRC construction with SHARDS", FAST 2015; the sample of fixed size is theirs too).
Blocks that most requests go through (a system prompt) are put aside as the *trunk*, and what counts is then the first
block behind it; the trunk is taken to stay in the cache, and its hits are counted, not sampled. This is the rule of
`kvtrace_replay.curves.sample`, decided anew when the rate is halved, from what was followed up to then.

What was found at each rate is scaled up by the lookups behind the trunk, all of them over the followed ones.
"""

from __future__ import annotations

from array import array
from collections import Counter

from kvtrace.top.lru import Lru

MOST_BLOCKS = 40_000
_ENOUGH_GROUPS, _LEAST_SHARED, _LARGEST_TRUNK = 50.0, 0.02, 0.1  # as in kvtrace_replay.curves.units
_WHOLE = 1 << 64


class RunningCurve:
    """Hits of caches of `capacities` blocks, from one request after the other.

    `rate`: share of the chains that are followed; `trunk`: identities that most requests begin with.
    """

    def __init__(self, capacities: list[int], block_size: int, most_blocks: int = MOST_BLOCKS) -> None:
        self.capacities = capacities
        self.rate = 1.0
        self.trunk: set[int] = set()
        self.followed = 0  # requests
        self._block_size = block_size
        self._most = most_blocks
        self._caches = [Lru(capacity) for capacity in capacities]
        self._running: dict[int, tuple[array[int], int]] = {}
        self._before: dict[int, int] = {}  # each block's predecessor in its chain, 0 for none
        self._through: Counter[int] = Counter()  # requests that went through each block
        self._tokens = 0
        self._hits = [0.0] * len(capacities)  # of the rates before, scaled up
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._behind = self._behind_followed = self._trunk_hits = 0
        self._epoch_hits = [0] * len(self._caches)

    def follows(self, chain: array[int]) -> bool:
        """Whether a request with this chain is followed."""
        return self.rate == 1 or _mixed(self._unit(chain)) < self.rate * _WHOLE

    def admit(self, request: int, chain: array[int], prompt_blocks: int, hit_cap: int, prompt_tokens: int) -> bool:
        """A request is admitted: `chain` begins with its `prompt_blocks`, `hit_cap` of which a lookup may find. Returns
        whether it is followed; what it says of its output at its end is wanted only then. The chain of one that is not
        may be cut behind the block that tells so."""
        prompt = chain[:prompt_blocks]
        most = min(hit_cap, prompt_blocks)
        kept = self.in_trunk(prompt)
        self._tokens += prompt_tokens
        self._trunk_hits += min(kept, most)
        self._behind += prompt_blocks - kept
        if not self.follows(prompt):
            return False
        self.followed += 1
        self._behind_followed += len(prompt) - kept
        self._running[request] = chain, prompt_blocks
        self._note(prompt)
        for i, cache in enumerate(self._caches):
            self._epoch_hits[i] += max(0, cache.admit(request, prompt, most) - kept)
        if len(self._before) > self._most:
            self._prune()
        return True

    def finish(self, request: int, chain: array[int]) -> None:
        """A request ends; `chain`: its prompt and the full blocks of its output that were computed."""
        known = self._running.pop(request, None)
        if known is None:
            return
        self._note(chain, known[1])
        for cache in self._caches:
            cache.finish(request, chain, known[1])

    def give_up(self) -> None:
        """A part of the log is missing: whoever ran may have ended there."""
        for request in list(self._running):
            for cache in self._caches:
                cache.release(request)
        self._running.clear()

    def running(self) -> dict[int, tuple[array[int], int]]:
        """The chains of the requests that are followed and run, and how many of their blocks are prompt."""
        return self._running

    def token_hit_ratios(self) -> list[float | None]:
        """The share of prompt tokens found, for each capacity; None where there is nothing to say it from, or a cache
        (scaled to the rate) could not hold the largest request."""
        if not self._tokens or (self._behind and not self._behind_followed):
            return [None] * len(self._caches)
        scale = self._behind / self._behind_followed if self._behind else 0.0
        found: list[float | None] = []
        for cache, before, hits in zip(self._caches, self._hits, self._epoch_hits, strict=True):
            blocks = before + self._trunk_hits + hits * scale
            too_small = cache.largest > cache.capacity
            found.append(None if too_small else min(1.0, blocks * self._block_size / self._tokens))
        return found

    # ---------------------------------------------------------------- what is followed

    def _unit(self, chain: array[int]) -> int:
        """What is drawn as a whole: the first block behind the trunk, or the last one of it."""
        unit = 0
        for block in chain:
            unit = block
            if block not in self.trunk:
                break
        return unit

    def in_trunk(self, prompt: array[int]) -> int:
        """How many of its first blocks belong to the trunk."""
        kept = 0
        if self.trunk:
            while kept < len(prompt) and prompt[kept] in self.trunk:
                kept += 1
        return kept

    def _note(self, chain: array[int], first: int = 0) -> None:
        before = chain[first - 1] if first else 0
        for block in chain[first:]:
            self._before.setdefault(block, before)
            self._through[block] += 1
            before = block

    def _prune(self) -> None:
        """Forget blocks that no cache holds any more; where that is not enough, halve the rate."""
        while True:
            held: set[int] = set().union(*(cache.blocks() for cache in self._caches))
            for chain, _ in self._running.values():
                held.update(chain)
            if len(held) <= self._most * 3 // 4 or self.rate < 1e-6:
                break
            self._halve()
            if not self._running and not any(map(len, self._caches)):
                break
        self._before = {block: before for block, before in self._before.items() if block in held}
        self._through = Counter({block: n for block, n in self._through.items() if block in held})

    def _halve(self) -> None:
        scale = self._behind / self._behind_followed if self._behind_followed else 0.0
        for i, hits in enumerate(self._epoch_hits):
            self._hits[i] += self._trunk_hits + hits * scale
        self._begin_epoch()
        self.rate /= 2
        self._grow_trunk()
        # A block goes with the first one behind the trunk on its chain.
        chosen: dict[int, bool] = {}
        for block in self._before:
            path = []
            at = block
            while at and at not in chosen and at not in self.trunk:
                path.append(at)
                at = self._before.get(at, 0)
            if path:
                kept = chosen[at] if at in chosen else _mixed(path[-1]) < self.rate * _WHOLE
                chosen.update(dict.fromkeys(path, kept))
        keep = {block for block, kept in chosen.items() if kept} | self.trunk
        running = {r: known for r, known in self._running.items() if self.follows(known[0][: known[1]])}
        self._running = {}
        for cache, capacity in zip(self._caches, self.capacities, strict=True):
            trunk = min(len(self.trunk), capacity)
            cache.shrink(trunk + round((capacity - trunk) * self.rate), keep)
            for request, (chain, prompt_blocks) in running.items():
                cache.admit(request, chain[:prompt_blocks], 0)
        self._running = running

    def _grow_trunk(self) -> None:
        """The blocks that most requests go through, as few as leave enough independent groups behind them."""
        heads = sum(n for block, n in self._through.items() if not self._before[block])
        most = heads
        while most // 2 >= max(_LEAST_SHARED * heads, 1) and self._groups(most) * self.rate < _ENOUGH_GROUPS:
            grown = {block for block, n in self._through.items() if n > most // 2}
            if len(grown) > _LARGEST_TRUNK * len(self._through):
                break
            most //= 2
        self.trunk |= {block for block, n in self._through.items() if n > most}

    def _groups(self, most: int) -> float:
        """How many equal groups would vary as much as those behind the blocks that more than `most` go through."""
        weights: Counter[int] = Counter()
        unit: dict[int, int] = {}
        for block, before in self._before.items():  # in order of first use: a block stands behind its predecessor
            own = unit[block] = unit.get(before, block) if self._through[block] <= most else block
            if self._through[before] > most or not before:
                own = unit[block] = block
            if self._through[block] <= most:
                weights[own] += self._through[block]
        squares = sum(n * n for n in weights.values())
        return sum(weights.values()) ** 2 / squares if squares else 0.0


def _mixed(number: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), on numbers that are keyed hashes already."""
    bits = (number + 0x9E37_79B9_7F4A_7C15) % _WHOLE
    bits = (bits ^ bits >> 30) * 0xBF58_476D_1CE4_E5B9 % _WHOLE
    bits = (bits ^ bits >> 27) * 0x94D0_49BB_1331_11EB % _WHOLE
    return bits ^ bits >> 31
