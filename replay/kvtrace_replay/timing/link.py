"""What it costs to move KV blocks between host and device."""

from __future__ import annotations

from dataclasses import dataclass

DIRECTIONS = ("h2d", "d2h")
MEMORIES = ("pinned", "pageable")
#: `scattered`: each block's piece of each layer's tensor is a copy of its own; `gathered`: the pieces are put together
#: on the device, and move as one.
LAYOUTS = ("scattered", "gathered")
#: How an engine moves blocks. vLLM 0.4.x (`CacheEngine.swap_in`, `ops.swap_blocks`): a copy for each block, layer and
#: tensor, keys and values; vLLM's OffloadingConnector (`SingleDirectionOffloadingHandler`, 0.32.0): a copy for each
#: block and layer, whose keys and values lie together; others gather.
COPIES = {"per-block-layer-tensor": "scattered", "gathered": "gathered", "per-block-layer": "scattered"}


@dataclass(frozen=True)
class LinkCost:
    """One way over the link. `transfer_ns`: once a transfer; `copy_ns`: for each copy; `bytes_per_s`: beyond that."""

    transfer_ns: float
    copy_ns: float
    bytes_per_s: float

    def ns(self, size_bytes: float, copies: float, transfers: float = 1) -> float:
        """How long `transfers` transfers of `size_bytes` and `copies` copies in all take."""
        return transfers * self.transfer_ns + copies * self.copy_ns + size_bytes / self.bytes_per_s * 1e9


def way(direction: str, memory: str, layout: str) -> str:
    """The name of one way over the link, as profiles have it."""
    return f"{direction}-{memory}-{layout}"


#: Every way there is.
WAYS = tuple(way(d, m, t) for d in DIRECTIONS for m in MEMORIES for t in LAYOUTS)
