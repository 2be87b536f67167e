"""Protected heads: LRU that evicts the first blocks of chains last.

System prompts and instructions stand at the beginning of requests. Here the first `heads` blocks of every chain are
evicted only when nothing else can go; within each of the two groups the block used longest ago goes first.
"""

from __future__ import annotations

import numpy as np

from kvtrace_replay.policies import policy
from kvtrace_replay.structures.lists import new_lists, oldest, push_new, unlink
from kvtrace_traces.errors import UsageError


@policy("protected-heads", summary="lru that evicts the first blocks of chains last", paper="none: an example")
class ProtectedHeads:
    """State: `links`, two lists, the heads and then the others; `is_head` int64[n_identities], 1 or 0."""

    # Python: called once for each run. Its keyword arguments are the policy's parameters.
    def setup(stream, capacity, heads=8):
        if heads < 0:
            raise UsageError(f"protected-heads: heads={heads} must be 0 or more")
        is_head = np.zeros(stream.n_identities, np.int64)
        is_head[stream.refs[stream.depths() < heads]] = 1
        return new_lists(stream.n_identities, 2), is_head

    # Compiled from here on. The rows behind the blocks' own name the lists: the last the others, that before the heads.
    def insert(key, now, links, is_head):
        push_new(links, links.shape[0] - 1 - is_head[key], key)

    def hit(key, pinned, now, links, is_head):
        if not pinned:  # a block that a request holds is in no list
            unlink(links, key)
            push_new(links, links.shape[0] - 1 - is_head[key], key)

    def evict(key, now, pins, links, is_head):
        others = links.shape[0] - 1
        victim = oldest(links, others)
        if victim == others:  # that list is empty
            victim = oldest(links, others - 1)
        unlink(links, victim)
        return victim

    def pin(key, links, is_head):
        unlink(links, key)

    def unpin(key, links, is_head):
        push_new(links, links.shape[0] - 1 - is_head[key], key)
