"""`carried_state`: what a cut trace begins with, as requests to be replayed before its own.

A cut carries in a snapshot of the run: which requests run and wait, which blocks are cached, and the free queue, whose
front is evicted first. It becomes *carried requests*, which fill the cache and are never counted:

1. Cached blocks that no running request holds, in the order of the free queue, the oldest first. One request a block,
   finished as soon as it is admitted. The chain of each is the path of its cached ancestors down to it, so that trees
   and depths are as they were. The free queue has a request's blocks the tail first, so that a block's ancestors are
   touched again, in their order, by what follows. A block that follows right behind its child is in the child's
   path, and has no request of its own.
2. Requests that had begun. Those that run hold their prompts, and what is cached of their outputs, from the beginning,
   as if they were admitted then; preempted ones hold nothing. All take the rest of their blocks when they end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
ROOT = -1


class Carried(NamedTuple):
    """`begun`: int64[m], numbers of the requests that had begun; `cached`: int64[m], tokens in blocks that each has in
    the cache, -1 for one that holds nothing; `chains`: int64[], identities of the trace, and `lengths`: int64[n], of
    the chains of what nobody holds, the oldest first."""

    begun: I64
    cached: I64
    chains: I64
    lengths: I64


NOTHING = Carried(*(np.zeros(0, np.int64) for _ in range(4)))


def carried_state(trace: Any, header: dict[str, Any], engine_index: int, size: int) -> Carried:
    """The state that an engine of `trace` begins with, in blocks of `size` tokens; NOTHING where it begins idle.

    A block of several of the engine's own is carried where all of them are cached, and is as old as its last one.
    Raises UsageError where `size` is no multiple of the engine's own block size: what part of a cached block holds is
    not known.
    """
    snapshot = trace.snapshot(engine_index) if "carried-state" in header.get("inexact", ()) else None
    if snapshot is None:
        return NOTHING
    own_size = int(header["block_size"])
    if snapshot.blocks.size and size % own_size:
        raise UsageError(
            f"this cut begins with a cache of {own_size}-token blocks, which cannot be told in blocks of {size}: take "
            f"--block-size {own_size}, {2 * own_size}, {3 * own_size}, ..."
        )
    live = [request for request in snapshot.live if request.begun]
    holding = [request for request in live if request.running or request.table]
    held = {block for request in holding for block in (request.table or ())[: request.filled]}
    holds = {
        block: i for block, i in zip(snapshot.blocks.tolist(), snapshot.identities.tolist(), strict=True) if i >= 0
    }
    queue = snapshot.queue.tolist()
    queued = {*queue, *held}
    # Cached blocks that are neither free nor in a known table are in use: they are younger than all free ones.
    order = [holds[block] for block in queue if block in holds]
    order += [identity for block, identity in holds.items() if block not in queued]
    of_live = {holds[block] for block in held if block in holds}
    # Of several copies the one that goes last counts.
    idle = [identity for identity in reversed(dict.fromkeys(reversed(order))) if identity not in of_live]
    pairs = zip(snapshot.identities.tolist(), snapshot.parents.tolist(), strict=True)
    parents = {identity: parent for identity, parent in pairs if identity >= 0}
    chains, lengths = _paths(idle, parents, size // own_size)
    return Carried(
        begun=np.array([request.request for request in live], np.int64),
        cached=np.array([request.filled * own_size if request in holding else -1 for request in live], np.int64),
        chains=np.array(chains, np.int64),
        lengths=np.array(lengths, np.int64),
    )


def _paths(idle: list[int], parents: dict[int, int], stride: int) -> tuple[list[int], list[int]]:
    """(chains one after the other, their lengths): of each of `idle` in order that no chain before ends with.
    `parents` are of all cached identities, each with that of the block before it, ROOT for none."""
    chains: list[int] = []
    lengths: list[int] = []
    below: list[int] = []  # the path down to the block before, which may be a child of the next
    for identity in idle:
        if len(below) > 1 and below[-2] == identity:
            below.pop()
            continue
        path, at = [identity], parents[identity]
        while at in parents and len(path) < len(parents):
            path.append(at)
            at = parents[at]
        path.reverse()
        if stride > 1:
            if at != ROOT or len(path) % stride:  # where a larger block begins is known from the root alone
                continue
            path = path[stride - 1 :: stride]
        chains += path
        lengths.append(len(path))
        below = path
    return chains, lengths
