"""cost-aware: keeps longest what is dearest to compute again.

Computing a block takes the same work in the linear layers wherever it stands, and work in attention that grows
with the tokens before it. So a block at depth d, with t = d * block_size tokens before it, costs

    cost(d) = 1 + alpha * t / even_tokens

in units of a first block, where `even_tokens` is the context at which attention takes as much work as all the
rest: about (parameters * 2) / (4 * layers * hidden size), 30,518 for a model of 8e9 parameters, 32 layers and
a hidden size of 4,096; 32,768 here. `alpha` (1) weighs saved work against recency: 0 gives `lru`.

Recency and cost are traded as in GreedyDual: when the last request that holds a block ends, the block's score
becomes `floor` + cost, and the unlocked leaf with the least score is evicted, of several the one used longest
ago. `floor` starts at 0 and rises to the score of each block evicted. So a block that costs twice as much stays
for twice as much eviction of others. Blocks are of one size, so cost by block is cost by byte.

Only leaves can be judged so: what is dearest stands behind what is cheapest, and to lose a prompt's cheap
beginning is to lose it all. Hence `radix` semantics only. Scores are integers, in 2^-20 of a first block.

R. Pan et al., "Marconi: Prefix Caching for the Era of Hybrid LLMs", MLSys 2025, arXiv 2411.19379 (evict by recency and
by floating-point work saved per byte); P. Cao, S. Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997
(GreedyDual-Size). Taken together so here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.ranked import new_ranked, put_in, take_least, take_out
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
State = tuple[I32, I32, I64, I32, I64, I64, I32, I64]

ABOVE, BELOW = range(2)  # columns of `tree`
COST, SCORE, USED = range(3)  # columns of `facts`
CLOCK, FLOOR = 2, 3  # slots of `at` behind those of `ranked`
_UNIT = 2**20


def cost_by_depth(deepest: int, block_size: int, alpha: float, even_tokens: float) -> I64:
    """int64[deepest + 1], in 2^-20 of the first block."""
    before = np.arange(deepest + 1, dtype=np.float64) * block_size
    return np.rint(_UNIT * (1 + alpha * before / even_tokens)).astype(np.int64)


@policy(
    "cost-aware",
    summary="evicts the leaf block that is cheapest to compute again, weighed with its last use",
    paper="after Marconi (Pan et al., MLSys 2025, arXiv 2411.19379) and GreedyDual (Cao, Irani, USITS 1997)",
    open_loop=True,
    semantics=("radix",),
)
class CostAware:
    """State: `refs` int32[n_refs] and `depths` int32[n_refs] of the stream; `costs` int64[deepest + 1]; `tree`
    int32[n_identities, 2], the block above and how many resident ones right below; `facts` int64[n_identities, 3],
    cost, score and last use; `entries` and `tickets`, the unlocked leaves, by rank; `at` int64[4]."""

    @staticmethod
    def setup(stream: Stream, capacity: int, alpha: float = 1.0, even_tokens: float = 32768.0) -> State:
        if not 0 <= alpha <= 1e6 or math.isnan(alpha):
            raise UsageError(f"cost-aware: alpha={alpha} must lie between 0 and 1e6")
        if not 1 <= even_tokens <= 1e12:
            raise UsageError(f"cost-aware: even_tokens={even_tokens} must lie between 1 and 1e12")
        depths = stream.depths()
        costs = cost_by_depth(int(depths.max(initial=0)), stream.block_size, alpha, even_tokens)
        tree = np.full((stream.n_identities, 2), -1, np.int32)
        tree[:, BELOW] = 0
        entries, tickets = new_ranked(stream.n_identities, capacity)
        facts = np.zeros((stream.n_identities, 3), np.int64)
        return stream.refs, depths, costs, tree, facts, entries, tickets, np.zeros(4, np.int64)

    @staticmethod
    def insert(
        key: int, now: int,
        refs: I32, depths: I32, costs: I64, tree: I32, facts: I64, entries: I64, tickets: I32, at: I64,
    ) -> None:  # fmt: skip
        facts[key, COST] = costs[depths[now]]
        tree[key, ABOVE] = -1
        if depths[now] > 0:
            tree[key, ABOVE] = refs[now - 1]
            tree[refs[now - 1], BELOW] += 1

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int,
        refs: I32, depths: I32, costs: I64, tree: I32, facts: I64, entries: I64, tickets: I32, at: I64,
    ) -> None:  # fmt: skip
        pass

    @staticmethod
    def evict(
        key: int, now: int, pins: I32,
        refs: I32, depths: I32, costs: I64, tree: I32, facts: I64, entries: I64, tickets: I32, at: I64,
    ) -> int:  # fmt: skip
        victim = take_least(entries, tickets, at)
        if victim < 0:
            return victim
        at[FLOOR] = max(at[FLOOR], facts[victim, SCORE])
        above = tree[victim, ABOVE]
        if above >= 0:
            tree[above, BELOW] -= 1
            if pins[above] == 1:  # nothing but the block that leaves
                put_in(entries, tickets, at, above, facts[above, SCORE], facts[above, USED])
        return victim

    @staticmethod
    def pin(
        key: int, refs: I32, depths: I32, costs: I64, tree: I32, facts: I64, entries: I64, tickets: I32, at: I64
    ) -> None:
        take_out(tickets, key)

    @staticmethod
    def unpin(
        key: int, refs: I32, depths: I32, costs: I64, tree: I32, facts: I64, entries: I64, tickets: I32, at: I64
    ) -> None:
        at[CLOCK] += 1
        facts[key, SCORE] = at[FLOOR] + facts[key, COST]
        facts[key, USED] = at[CLOCK]
        if tree[key, BELOW] == 0:
            put_in(entries, tickets, at, key, facts[key, SCORE], facts[key, USED])
