"""The connectors of vLLM 0.32.0 that can be simulated, with their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtrace_traces.errors import UsageError

POLICIES = ("lru", "arc")
#: The connectors' names on the command line, and when each stores.
STORES = {"offloading": ("fill",), "simple": ("fill", "eviction")}


@dataclass(frozen=True)
class Offload:
    """The tier of host memory, and the settings of `OffloadingConnector` (`kv_connector_extra_config`).

    `blocks`: room, in blocks of the engine. `policy`: who is dropped, one of POLICIES (`eviction_policy`).
    `blocks_per_chunk`: blocks that are stored as one. `store_threshold`: a chunk is stored once it was on offer so
    often; below 2 at once. `prompt_only`: whether generated blocks are left out (`offload_prompt_only`). `steps`: a
    transfer is done at the end of so many calls after the one it was begun in; 0: of that one; where requests arrive
    by time, its bytes decide instead.
    """

    blocks: int
    policy: str = "lru"
    blocks_per_chunk: int = 1
    store_threshold: int = 0
    prompt_only: bool = True
    steps: int = 0

    @property
    def chunks(self) -> int:
        """Room, in chunks."""
        return self.blocks // self.blocks_per_chunk

    def check(self) -> None:
        """Raises UsageError for what the connector does not take."""
        if self.policy not in POLICIES:
            raise UsageError(f"--offload-policy {self.policy} is none of {', '.join(POLICIES)}")
        for name, least in (("blocks", 1), ("blocks_per_chunk", 1), ("store_threshold", 0), ("steps", 0)):
            _whole(name, getattr(self, name), least)
        if self.blocks < self.blocks_per_chunk:
            raise UsageError(f"offload: {self.blocks} blocks have no room for a chunk of {self.blocks_per_chunk}")


@dataclass(frozen=True)
class SimpleOffload:
    """The tier of host memory, and the settings of `SimpleCPUOffloadConnector`.

    `blocks`: room, in blocks of the engine; one of them is the pool's null block, in which nothing is stored. `store`:
    "fill", or "eviction" (`lazy_offload`). `steps`: as of `Offload`. `runner`: which of vLLM's model runners the
    scheduler speaks to, 1 or 2 (on a GPU mostly 2): it decides whose blocks come first in a copy.
    """

    blocks: int
    store: str = "fill"
    steps: int = 0
    runner: int = 2

    policy = "lru"
    blocks_per_chunk = 1

    @property
    def chunks(self) -> int:
        """Blocks in which something can be stored."""
        return self.blocks - 1

    def check(self) -> None:
        """Raises UsageError for what the connector does not take."""
        if self.store not in STORES["simple"]:
            raise UsageError(f"--offload-store {self.store} is none of {', '.join(STORES['simple'])}")
        if self.runner not in (1, 2):
            raise UsageError(f"offload: runner {self.runner!r} is none of 1, 2")
        _whole("blocks", self.blocks, 1)
        _whole("steps", self.steps, 0)


Connector = Offload | SimpleOffload


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise UsageError(f"offload: {name} {value!r} must be a whole number from {least} to {2**31 - 1}")
