"""Slow, obvious twins of the compiled cache: dictionaries, brute-force search, one rule a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from kvtrace_replay.workload import Workload

FOREVER = 10**9


def make_workload(
    chains: Sequence[Sequence[int]],
    *,
    prompt_blocks: Sequence[int] | None = None,
    hit_cap: Sequence[int] | None = None,
    schedule: Sequence[int] | None = None,
    raw: Sequence[int] | None = None,
    last_tokens: Sequence[int] | None = None,
    block_size: int = 16,
    bytes_per_block: int | None = None,
) -> Workload:
    """A workload from lists; what is not given is an import's default."""
    lengths = [len(chain) for chain in chains]
    ids = np.array([block for chain in chains for block in chain], np.int32)
    prompts = np.array(lengths if prompt_blocks is None else prompt_blocks, np.int32)
    return Workload(
        identities=ids,
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_blocks=prompts,
        hit_cap=prompts.copy() if hit_cap is None else np.array(hit_cap, np.int32),
        prompt_tokens=prompts.astype(np.int64) * block_size,
        last_tokens=np.full(len(chains), block_size, np.int32)
        if last_tokens is None
        else np.array(last_tokens, np.int32),
        schedule=None if schedule is None else np.array(schedule, np.int64),
        raw=None if raw is None else np.array(raw, np.int32),
        block_size=block_size,
        n_identities=int(ids.max()) + 1 if ids.size else 0,
        source="import" if schedule is None else "recorded",
        bytes_per_block=bytes_per_block,
    )


@dataclass
class Outcome:
    hits: list[int] = field(default_factory=list)  # of each request
    token_hits: int = 0
    evictions: int = 0
    overflows: set[int] = field(default_factory=set)


def tokens_of(workload: Workload, r: int, position: int) -> int:
    """Tokens in the entry at `position`, which is one of request `r`."""
    return int(workload.last_tokens[r]) if position == workload.indptr[r + 1] - 1 else workload.block_size


def twin(workload: Workload, policy: str, capacity: float, semantics: str) -> Outcome:
    return (_object if semantics == "object" else _prefix)(workload, policy, capacity)


def _object(workload: Workload, policy: str, capacity: float) -> Outcome:
    refs = (workload.identities if workload.raw is None else workload.raw).tolist()
    outcome = Outcome()
    placed: dict[int, int] = {}  # resident block -> when it was placed
    used: dict[int, int] = {}

    def next_use(block: int, now: int) -> int:
        return next((i for i in range(now + 1, len(refs)) if refs[i] == block), FOREVER)

    for r in range(workload.n_requests):
        outcome.hits.append(0)
        for now in range(workload.indptr[r], workload.indptr[r + 1]):
            block = refs[now]
            if block in placed:
                outcome.hits[r] += 1
                outcome.token_hits += tokens_of(workload, r, now)
            else:
                if len(placed) == capacity:
                    if policy == "lru":
                        victim = min(placed, key=lambda b: used[b])
                    elif policy == "fifo":
                        victim = min(placed, key=lambda b: placed[b])
                    else:
                        victim = max(placed, key=lambda b: (next_use(b, now), -used[b]))
                    del placed[victim]
                    outcome.evictions += 1
                placed[block] = now
            used[block] = now
    return outcome


class _PrefixTwin:
    def __init__(self, workload: Workload, policy: str, capacity: float) -> None:
        bounds = workload.indptr.tolist()
        self.chains = [workload.identities[a:b].tolist() for a, b in pairwise(bounds)]
        self.prompts = [c[:n] for c, n in zip(self.chains, workload.prompt_blocks.tolist(), strict=True)]
        self.outputs = [c[n:] for c, n in zip(self.chains, workload.prompt_blocks.tolist(), strict=True)]
        self.policy = policy
        self.capacity = capacity
        self.holds_nothing = policy == "fifo" and workload.schedule is None
        self.events = (
            [e for r in range(1, workload.n_requests + 1) for e in (r, -r)]
            if workload.schedule is None
            else workload.schedule.tolist()
        )
        self.clock = 0
        self.event = 0
        self.resident: set[int] = set()
        self.holders: dict[int, set[int]] = {}
        self.stamp: dict[int, int] = {}  # what LRU and FIFO order by
        self.last: dict[int, tuple[int, int]] = {}  # for OPT: -event of the last use, depth then
        self.bypassed: set[tuple[int, int]] = set()  # (request, place in its chain)
        self.outcome = Outcome(hits=[0] * workload.n_requests)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def pinned(self) -> set[int]:
        return {block for block, holders in self.holders.items() if holders}

    def rank(self, block: int) -> Any:
        """The block with the highest rank is evicted."""
        if self.policy in ("lru", "fifo"):
            return -self.stamp[block]
        for later in range(self.event + 1, len(self.events)):
            r = self.events[later] - 1
            if r >= 0 and block in self.prompts[r]:
                return (later, self.prompts[r].index(block))
        minus_event, depth = self.last[block]
        return (FOREVER, depth, minus_event)

    def place_in_order(self, blocks: list[int]) -> None:
        """An import's blocks where nothing is held."""
        for block in blocks:
            if block not in self.resident:
                if len(self.resident) == self.capacity:
                    self.resident.remove(max(self.resident, key=self.rank))
                    self.outcome.evictions += 1
                self.resident.add(block)
                self.stamp[block] = self.tick()

    def take(self, r: int, blocks: list[int], depth: int) -> None:
        if self.holds_nothing:
            return self.place_in_order(blocks)
        for i, block in enumerate(reversed(blocks)):
            self.last[block] = (-self.event, depth + len(blocks) - 1 - i)
        found = {block for block in blocks if block in self.resident}
        for block in found:
            self.holders[block].add(r)
        room = self.capacity - len(self.pinned())
        chosen: list[int] = []
        for place, block in enumerate(blocks, depth):
            if block not in found and block not in chosen:
                if len(chosen) < room:
                    chosen.append(block)
                else:
                    self.bypassed.add((r, place))
                    self.outcome.overflows.add(r)
        for block in reversed(blocks):
            if block in chosen and block not in self.resident:
                if len(self.resident) == self.capacity:
                    victim = max(self.resident - self.pinned(), key=self.rank)
                    self.resident.remove(victim)
                    self.outcome.evictions += 1
                self.resident.add(block)
                self.holders[block] = {r}
                self.stamp[block] = self.tick()

    def run(self, workload: Workload) -> Outcome:
        for event, entry in enumerate(self.events):
            self.event = event
            r = abs(entry) - 1
            if entry > 0:
                cap = int(workload.hit_cap[r])
                hits = 0
                while hits < min(cap, len(self.prompts[r])) and self.prompts[r][hits] in self.resident:
                    hits += 1
                self.outcome.hits[r] = hits
                start = int(workload.indptr[r])
                self.outcome.token_hits += sum(tokens_of(workload, r, p) for p in range(start, start + hits))
                self.take(r, self.prompts[r], 0)
            else:
                self.take(r, self.outputs[r], len(self.prompts[r]))
                for place, block in reversed(list(enumerate(self.chains[r]))):
                    if self.holds_nothing or (r, place) in self.bypassed:
                        continue
                    self.holders[block].discard(r)
                    if not self.holders[block] and self.policy == "lru":
                        self.stamp[block] = self.tick()  # of two references the one nearer the head counts
        return self.outcome


def _prefix(workload: Workload, policy: str, capacity: float) -> Outcome:
    return _PrefixTwin(workload, policy, capacity).run(workload)
