"""OPT: Belady's rule. The victim is the block whose next use lies farthest in the future.

In `object` semantics every reference is a use, a missing block is always placed, and the rule gives the
fewest misses of all policies that always place.

With prefixes a block's next use is the next admission of a request that looks it up; of blocks with the
same next use the one deeper in the chain goes first. Blocks that no later request looks up go before all
others, the deeper first, then the one used longer ago. Since a hit needs the whole prefix before it, and
running requests hold their blocks, this is a strong reference there, not a bound and not called an
optimum.

Next uses are distinct positions in the trace, so the blocks that may be evicted are a set of bits, whose
highest is the
victim: no heap is needed.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal
5(2), 1966.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.bitset import Starts, Words, clear_bit, highest_bit, new_bitset, set_bit
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@policy(
    "opt",
    summary="evicts the block used next farthest ahead (Belady); with prefixes a reference, not a bound",
    paper="Belady, IBM Systems Journal 5(2), 1966",
    needs_future=True,
    semantics=("object", "prefix", "radix"),
)
class Opt:
    """State: `after` int32[n_refs], the priority that each reference gives its block: the position of its
    next use in replay order, or n_refs + a rank where there is none; `owner` int32, the block that has a
    priority; `priority` int32[n_identities], of resident blocks; `words` and `starts`, the priorities of
    blocks that may be evicted, as a bit set."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[I32, I32, I32, Words, Starts]:
        if stream.refs.size >= 2**30:
            raise KvtraceError("opt holds at most 2^30 references in memory: cut the trace first")
        after, owner = stream.share("opt", lambda: _future(stream))
        words, starts = new_bitset(owner.size)
        return after, owner, np.zeros(stream.n_identities, np.int32), words, starts

    @staticmethod
    def insert(key: int, now: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts) -> None:
        priority[key] = after[now]
        set_bit(words, starts, after[now])

    @staticmethod
    def hit(
        key: int, pinned: bool, now: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts
    ) -> None:
        if not pinned:
            clear_bit(words, starts, priority[key])
            set_bit(words, starts, after[now])
        priority[key] = after[now]

    @staticmethod
    def evict(
        key: int, now: int, pins: I32, after: I32, owner: I32, priority: I32, words: Words, starts: Starts
    ) -> int:
        farthest = highest_bit(words, starts)
        clear_bit(words, starts, farthest)
        return owner[farthest]

    @staticmethod
    def pin(key: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts) -> None:
        clear_bit(words, starts, priority[key])

    @staticmethod
    def unpin(key: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts) -> None:
        set_bit(words, starts, priority[key])

    @staticmethod
    def remove(key: int, after: I32, owner: I32, priority: I32, words: Words, starts: Starts) -> None:
        clear_bit(words, starts, priority[key])


def _future(stream: Stream) -> tuple[I32, I32]:
    if stream.semantics == "object":
        after = _next_references(stream.refs, stream.n_identities)
        owner = np.concatenate([stream.refs, stream.refs[::-1]])
    else:
        after, owner = _next_lookups(
            stream.refs, stream.indptr, stream.prompt_blocks, stream.events, stream.n_identities
        )
    for array in (after, owner):
        array.setflags(write=False)  # shared between runs
    return after, owner


@njit
def _next_references(refs: I32, n_identities: int) -> I32:
    """int32[n]: the position of the next reference to the same block; where there is none 2n - 1 - i, so
    that of two such blocks the one used longer ago ranks higher."""
    n = refs.size
    upcoming = np.full(n_identities, -1, np.int32)
    after = np.empty(n, np.int32)
    for i in range(n - 1, -1, -1):
        key = refs[i]
        after[i] = upcoming[key] if upcoming[key] >= 0 else 2 * n - 1 - i
        upcoming[key] = i
    return after


@njit
def _next_lookups(refs: I32, indptr: I64, prompt_blocks: I32, events: I64, n_identities: int) -> tuple[I32, I32]:
    """(after int32[n], owner int32[n + blocks never looked up again]), walking the events backwards."""
    n = refs.size
    upcoming = np.full(n_identities, -1, np.int32)
    after = np.full(n, -1, np.int32)
    owner = np.zeros(2 * n, np.int32)
    deepest = 0
    for r in range(prompt_blocks.size):
        deepest = max(deepest, indptr[r + 1] - indptr[r])
    rank = np.zeros(deepest + 1, np.int64)
    at = n
    for e in range(events.size - 1, -1, -1):
        r = abs(events[e]) - 1
        middle = indptr[r] + prompt_blocks[r]
        start, stop = (indptr[r], middle) if events[e] > 0 else (middle, indptr[r + 1])
        for p in range(start, stop):
            after[p] = upcoming[refs[p]]
            if after[p] < 0:
                rank[p - indptr[r] + 1] += 1
        at -= stop - start
        if events[e] > 0:
            for p in range(stop - 1, start - 1, -1):
                upcoming[refs[p]] = at + p - start
                owner[at + p - start] = refs[p]
    for depth in range(deepest):
        rank[depth + 1] += rank[depth]
    for e in range(events.size - 1, -1, -1):
        r = abs(events[e]) - 1
        middle = indptr[r] + prompt_blocks[r]
        start, stop = (indptr[r], middle) if events[e] > 0 else (middle, indptr[r + 1])
        for p in range(stop - 1, start - 1, -1):
            if after[p] < 0:
                depth = p - indptr[r]
                after[p] = n + rank[depth]
                owner[n + rank[depth]] = refs[p]
                rank[depth] += 1
    return after, owner[: n + rank[deepest]]
