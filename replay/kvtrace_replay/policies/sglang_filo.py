"""sglang-filo: the youngest leaf node of SGLang's tree.

The unlocked leaf node that was created last is evicted. The upper part of a split node is as young as the split.

Nodes, their splits, and when a use counts: `structures.radix_nodes`. The rule is one of a tree's nodes and so
runs in `radix` semantics only.

SGLang 0.5.23, `--radix-eviction-policy filo` (`sglang/srt/mem_cache/evict_policy.py`, `FILOStrategy`); the tree:
L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, arXiv 2312.07104.
"""

from __future__ import annotations

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures import radix_nodes as nodes


@policy(
    "sglang-filo",
    summary="evicts the leaf node of the tree created last",
    paper="SGLang 0.5.23, FILOStrategy; Zheng et al., NeurIPS 2024, arXiv 2312.07104",
    semantics=("radix",),
)
class SglangFilo:
    """State: that of `structures.radix_nodes`."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> nodes.State:
        return nodes.new_nodes(stream, capacity, nodes.FILO)

    insert = staticmethod(nodes.insert)
    hit = staticmethod(nodes.hit)
    evict = staticmethod(nodes.evict)
    pin = staticmethod(nodes.pin)
    unpin = staticmethod(nodes.unpin)
