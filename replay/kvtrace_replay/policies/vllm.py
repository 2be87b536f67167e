"""vLLM's free queue: the block that has been free the longest is handed out, and loses what it held.

A block without users stands in the free queue. A request that hits it takes it off; a request that ends gives its
blocks back at the end of the queue, the tail of its chain first; a new block is taken from the front
(`BlockPool.touch`, `free_blocks`, `get_new_blocks` and `SingleTypeKVCacheManager.free`, 0.32.0). In the open loop,
this is `lru`, and the same functions run: in `prefix` semantics the moments at which `lru` counts a use are those at
which the engine frees a block, and in `object` semantics each reference takes a block and gives it back at once.

What the engine does besides, and where it shows:

- Blocks that hold nothing anyone can ask for (a last block that is not full, a second copy of a block) go to the front
  of its queue when they are freed, and are handed out before anything is evicted. The open loop has no such blocks: of
  a recorded trace it replays the full blocks alone, each content once. In the engine they take up room while their
  requests run, so it evicts a little more; with `uses` copies of a prefix in flight, more than a little.
- In an import, a last block that is not full has an identity here, can be hit and stays in the order of uses. The
  engine would not cache it.
- The engine caches blocks as it computes them, preempts, and looks up again what it preempted. The open loop takes the
  prompt's blocks at admission and the output's at the end.

`kvtrace simulate --policy vllm` (its default) has all of this: there the name means the engine's own pool, not this
file."""

from __future__ import annotations

from kvtrace_replay.policies.lru import Lru
from kvtrace_replay.policies.registry import policy


@policy(
    "vllm",
    summary="vLLM's free queue, which in the open loop is lru; in `simulate`, the engine's own pool",
    paper="vLLM 0.32.0, vllm/v1/core/block_pool.py",
    by_last_use=True,
)
class Vllm:
    """State: that of `lru`."""

    setup = Lru.setup
    insert = Lru.insert
    hit = Lru.hit
    evict = Lru.evict
    pin = Lru.pin
    unpin = Lru.unpin
    remove = Lru.remove
