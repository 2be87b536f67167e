"""sglang-slru: leaf nodes of SGLang's tree in two segments.

Nodes covered by fewer than `threshold` requests (2) are evicted before all others; within each of the two segments
the unlocked leaf node whose last use is longest ago is first.

Nodes, their splits, and when a use counts: `structures.radix_nodes`. The rule is one of a tree's nodes and so
runs in `radix` semantics only.

SGLang 0.5.23, `--radix-eviction-policy slru` (`sglang/srt/mem_cache/evict_policy.py`, `SLRUStrategy`); the tree:
L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, arXiv 2312.07104.
"""

from __future__ import annotations

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures import radix_nodes as nodes
from kvtrace_traces.errors import UsageError


@policy(
    "sglang-slru",
    summary="evicts leaf nodes covered by few requests first, each segment by last use",
    paper="SGLang 0.5.23, SLRUStrategy; Zheng et al., NeurIPS 2024, arXiv 2312.07104",
    semantics=("radix",),
)
class SglangSlru:
    """State: that of `structures.radix_nodes`."""

    @staticmethod
    def setup(stream: Stream, capacity: int, threshold: int = 2) -> nodes.State:
        if threshold < 1:
            raise UsageError(f"sglang-slru: threshold={threshold} must be 1 or more")
        return nodes.new_nodes(stream, capacity, nodes.SLRU, threshold=threshold)

    insert = staticmethod(nodes.insert)
    hit = staticmethod(nodes.hit)
    evict = staticmethod(nodes.evict)
    pin = staticmethod(nodes.pin)
    unpin = staticmethod(nodes.unpin)
