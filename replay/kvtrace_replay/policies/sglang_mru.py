"""sglang-mru: the most recently used leaf node of SGLang's tree.

The unlocked leaf node whose last use is the latest is evicted.

Nodes, their splits, and when a use counts: `structures.radix_nodes`. The rule is one of a tree's nodes and so
runs in `radix` semantics only.

SGLang 0.5.23, `--radix-eviction-policy mru` (`sglang/srt/mem_cache/evict_policy.py`, `MRUStrategy`); the tree:
L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, arXiv 2312.07104.
"""

from __future__ import annotations

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures import radix_nodes as nodes


@policy(
    "sglang-mru",
    summary="evicts the leaf node of the tree used last",
    paper="SGLang 0.5.23, MRUStrategy; Zheng et al., NeurIPS 2024, arXiv 2312.07104",
    semantics=("radix",),
)
class SglangMru:
    """State: that of `structures.radix_nodes`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> nodes.State:
        return nodes.new_nodes(stream, capacity, nodes.MRU)

    insert = staticmethod(nodes.insert)
    hit = staticmethod(nodes.hit)
    evict = staticmethod(nodes.evict)
    pin = staticmethod(nodes.pin)
    unpin = staticmethod(nodes.unpin)
