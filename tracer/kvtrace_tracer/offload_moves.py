"""What the hooks on every connector share: the operations MOVE and MOVED, and who a block belongs to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtrace_traces.schema import MOVE_LOAD, MOVE_STORE, NO_REQUEST, NOT_TOLD

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

HOST = 1
"""The tier that a connector copies to; what its manager does below that is not told to the scheduler."""


class Moves:
    """Writes transfers into the log of ``hooks``."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.log = hooks.log
        self.block_bytes = int(hooks.block_bytes or 0)

    def number(self, rid: str) -> int:
        """The number of the request with the id ``rid``; NO_REQUEST once its blocks are free."""
        entry = self.hooks.state.entries.get(rid)
        return NO_REQUEST if entry is None else entry.number

    def begin(self, owner: int, load: bool, blocks: Sequence[int], tokens: int = 0, first: int = NO_REQUEST) -> int:
        """Log that a transfer of the engine's ``blocks`` begins; return its number. ``tokens``, ``first``: see MOVE in
        the schema."""
        hooks = self.hooks
        number = hooks.state.transfers
        hooks.state.transfers = number + 1
        size = len(blocks) * self.block_bytes
        hooks.log.ext(
            "MOVE", number, owner,
            (MOVE_LOAD if load else MOVE_STORE) | HOST << 8, tokens, first, size & 0xFFFFFFFF, size >> 32, *blocks,
        )  # fmt: skip
        hooks.log.events += len(blocks)
        return number

    def now(self) -> int:
        """The trace's clock."""
        return time.monotonic_ns() - self.hooks.clock_ns

    def end(self, number: int, now: int, size: int = NOT_TOLD, took: int = NOT_TOLD) -> None:
        """Log that the scheduler heard at ``now`` of a transfer's end: bytes copied, and ns taken."""
        self.hooks.log.ext("MOVED", number, *(word for n in (now, size, took) for word in (n & 0xFFFFFFFF, n >> 32)))
