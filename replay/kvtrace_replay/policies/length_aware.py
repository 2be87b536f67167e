"""length-aware: like LFU, but of equally used blocks those that stand late in long prompts go first.

For each resident block the policy counts the requests that used it since it was placed, and keeps its depth: its
position in the request that used it last. The victim is the block with the fewest uses; of several the deepest;
of several of these the one whose last use is longest ago. So what few requests share beyond a common beginning
leaves before that beginning, and one long prompt loses its end before a short one loses anything.

With prefixes the last use is when the last request that holds the block ends, and held blocks are no victims. A
block is used at least as often as those behind it, and stands before them, so a chain is eaten from its end
by itself: the rule chooses leaves only, and `radix` semantics change nothing. In `object` semantics each
reference is a use.

R. Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025 (arXiv 2407.00079): LengthAwareCache,
given there in one sentence. How ties fall is ours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.ranked import new_ranked, put_in, take_least, take_out
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
State = tuple[I32, I32, I64, I32, I64]

USES, DEPTH = range(2)  # columns of `facts`
CLOCK, NEVER_PINNED = 2, 3  # slots of `at` behind those of `ranked`


@policy(
    "length-aware",
    summary="evicts the least used block, of several the one farthest into its prompt (Mooncake)",
    paper="Qin et al., Mooncake, FAST 2025, arXiv 2407.00079",
    open_loop=True,
    semantics=("object", "prefix", "radix"),
)
class LengthAware:
    """State: `depths` int32[n_refs]; `facts` int32[n_identities, 2], uses and depth; `entries` and `tickets`, the
    blocks that may be evicted, by rank; `at` int64[4]."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> State:
        entries, tickets = new_ranked(stream.n_identities, capacity)
        at = np.zeros(4, np.int64)
        at[NEVER_PINNED] = stream.semantics == "object"
        return stream.depths(), np.zeros((stream.n_identities, 2), np.int32), entries, tickets, at

    @staticmethod
    def insert(key: int, now: int, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
        facts[key, USES] = 1
        facts[key, DEPTH] = depths[now]
        if at[NEVER_PINNED]:
            _offer(key, facts, entries, tickets, at)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
        facts[key, USES] += 1
        facts[key, DEPTH] = depths[now]
        if at[NEVER_PINNED]:
            _offer(key, facts, entries, tickets, at)

    @staticmethod
    def evict(key: int, now: int, pins: I32, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> int:
        return take_least(entries, tickets, at)

    @staticmethod
    def pin(key: int, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
        take_out(tickets, key)

    @staticmethod
    def unpin(key: int, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
        _offer(key, facts, entries, tickets, at)

    @staticmethod
    def remove(key: int, depths: I32, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
        take_out(tickets, key)


@njit(cache=False)
def _offer(key: int, facts: I32, entries: I64, tickets: I32, at: I64) -> None:
    at[CLOCK] += 1
    # Deeper before less deep, then older before younger; 2^40 uses are more than a replay has.
    minor = at[CLOCK] - (np.int64(facts[key, DEPTH]) << 40)
    put_in(entries, tickets, at, key, facts[key, USES], minor)
