"""sglang-priority: the least important leaf node of SGLang's tree.

The unlocked leaf node of the lowest importance is evicted; of several the one whose last use is longest ago. A node's
importance is the highest of the requests whose path covered it.

SGLang evicts the lowest number first: a request's importance there is the higher, the higher its number. Traces hold
vLLM's numbers, of which the lowest is the most urgent. So importance is the number's negative here, and
`sglang-priority:as_written=1` takes the numbers as they stand. Where a trace has none this is `sglang-lru`.

Nodes, their splits, and when a use counts: `structures.radix_nodes`. The rule is one of a tree's nodes and so
runs in `radix` semantics only.

SGLang 0.5.23, `--radix-eviction-policy priority` (`sglang/srt/mem_cache/evict_policy.py`, `PriorityStrategy`); the
tree: L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, arXiv
2312.07104.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures import radix_nodes as nodes
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]


@policy(
    "sglang-priority",
    summary="evicts the leaf node of the least important requests, then by last use",
    paper="SGLang 0.5.23, PriorityStrategy; Zheng et al., NeurIPS 2024, arXiv 2312.07104",
    semantics=("radix",),
)
class SglangPriority:
    """State: that of `structures.radix_nodes`."""

    @staticmethod
    def setup(stream: Stream, capacity: int, as_written: int = 0) -> nodes.State:
        if as_written not in (0, 1):
            raise UsageError(f"sglang-priority: as_written={as_written} must be 0 or 1")
        sign = 1 if as_written else -1

        def weights() -> I32:
            made = (sign * stream.priority.astype(np.int64)).clip(-(2**31), 2**31 - 1).astype(np.int32)
            return np.repeat(made, np.diff(stream.indptr))

        made = stream.share(f"sglang-priority {sign}", weights)
        made.setflags(write=False)
        return nodes.new_nodes(stream, capacity, nodes.PRIORITY, made)

    insert = staticmethod(nodes.insert)
    hit = staticmethod(nodes.hit)
    evict = staticmethod(nodes.evict)
    pin = staticmethod(nodes.pin)
    unpin = staticmethod(nodes.unpin)
