"""sglang-lfu: the least used leaf node of SGLang's tree.

The unlocked leaf node that the fewest requests covered is evicted; of several the one whose last use is longest ago.
Counts are lost with the node.

Nodes, their splits, and when a use counts: `structures.radix_nodes`. The rule is one of a tree's nodes and so
runs in `radix` semantics only.

SGLang 0.5.23, `--radix-eviction-policy lfu` (`sglang/srt/mem_cache/evict_policy.py`, `LFUStrategy`); the tree:
L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, arXiv 2312.07104.
"""

from __future__ import annotations

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures import radix_nodes as nodes


@policy(
    "sglang-lfu",
    summary="evicts the leaf node covered by the fewest requests, then the one used longest ago",
    paper="SGLang 0.5.23, LFUStrategy; Zheng et al., NeurIPS 2024, arXiv 2312.07104",
    semantics=("radix",),
)
class SglangLfu:
    """State: that of `structures.radix_nodes`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> nodes.State:
        return nodes.new_nodes(stream, capacity, nodes.LFU)

    insert = staticmethod(nodes.insert)
    hit = staticmethod(nodes.hit)
    evict = staticmethod(nodes.evict)
    pin = staticmethod(nodes.pin)
    unpin = staticmethod(nodes.unpin)
