"""LRU: least recently used.

All resident blocks stand in one list, ordered by their last use. A block that is used moves to the new
end of the list, a block that is placed enters there, and the victim is the block at the old end.

With prefixes, a request's blocks leave the list while the request holds them and come back, at the new
end, when it lets go of them, the tail of its chain first. So the head of a chain is always younger than
its tail and a chain is eaten from its end. This is vLLM's free queue (`vllm/v1/core/block_pool.py`,
0.32.0: `touch`, `free_blocks`).

The rule is folklore; its name and analysis: R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger, "Evaluation
techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvtrace_replay.policies.registry import policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.structures.lists import Links, new_lists, oldest, push_new, unlink


@policy(
    "lru",
    summary="evicts the block whose last use is longest ago (vLLM's rule)",
    paper="Mattson et al., IBM Systems Journal 9(2), 1970",
    by_last_use=True,
    semantics=("object", "prefix", "radix"),
)
class Lru:
    """State: `links`, one list of the blocks that may be evicted."""

    @staticmethod
    def setup(stream: Stream, capacity: int) -> tuple[Links]:
        return (new_lists(stream.n_identities, 1),)

    @staticmethod
    def insert(key: int, now: int, links: Links) -> None:
        push_new(links, links.shape[0] - 1, key)

    @staticmethod
    def hit(key: int, pinned: bool, now: int, links: Links) -> None:
        if not pinned:
            unlink(links, key)
            push_new(links, links.shape[0] - 1, key)

    @staticmethod
    def evict(key: int, now: int, pins: npt.NDArray[np.int32], links: Links) -> int:
        victim = oldest(links, links.shape[0] - 1)
        unlink(links, victim)
        return victim

    @staticmethod
    def pin(key: int, links: Links) -> None:
        unlink(links, key)

    @staticmethod
    def unpin(key: int, links: Links) -> None:
        push_new(links, links.shape[0] - 1, key)

    @staticmethod
    def remove(key: int, links: Links) -> None:
        unlink(links, key)
