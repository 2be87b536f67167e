"""What the twin with a connector is asked, what it keeps, and what it tells; see `twin_offload`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .twin_words import Run

#: Rules that `simulate(..., broken=name)` can break.
RULES = (
    "tail-first", "touched-at-the-end", "ghost-once-grows", "ghost-again-shrinks", "reuse-promotes", "store-threshold",
    "offered-stay", "pending-waits", "being-loaded-waits", "under-way-waits", "loads-reserve", "loads-first",
    "deferred-store", "flush-preempted", "flush-reused", "prompt-only", "finished-stores", "full-hit-recomputes",
    "refused-again", "whole-chunks", "loaded-not-stored", "frees-wait", "victims-wait",
)  # fmt: skip


@dataclass(frozen=True)
class Offload:
    """The connector's settings: room for `chunks` chunks of `blocks_per_chunk` blocks; `polls` of the worker."""

    chunks: int
    policy: str = "lru"
    blocks_per_chunk: int = 1
    store_threshold: int = 0
    prompt_only: bool = True
    polls: int = 0


@dataclass
class OffloadRun(Run):
    """`Run`, and: transfers (step, kind, request, blocks, tokens, last step begun at its end or None), as they begin;
    tier: what its manager did, in order."""

    transfers: list[tuple[int, str, int | None, list[int], int, int | None]] = field(default_factory=list)
    tier: list[tuple[str, list[int]]] = field(default_factory=list)


@dataclass
class Side:
    """What the connector knows of a request."""

    blocks: list[int] = field(default_factory=list)  # as it was last told
    keys: int = 0  # chunks whose hash is known
    stored: int = 0  # chunks that need not be looked at any more
    local: int = 0  # tokens of its last hit in the engine's own cache
    cached: int = 0  # as the engine reports it
    jobs: set[int] = field(default_factory=set)
    loaded: bool = False
    ended: bool = False


@dataclass
class Job:
    """A transfer; `row`: its place in `OffloadRun.transfers`."""

    request: int
    load: bool
    keys: list[int]
    blocks: list[int]
    row: int
