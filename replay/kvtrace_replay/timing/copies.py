"""Measures the link between host and device: copies of many sizes and numbers, pinned and pageable, with torch.

A pool on each side holds twice the pieces that move, and those that move lie apart and in no order, as the blocks of a
victim do. *Scattered*: a copy for each piece. *Gathered*: pieces are put together on the device and cross the link as
one, or the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvtrace_replay.timing.fit import relative_nnls
from kvtrace_replay.timing.link import DIRECTIONS, LAYOUTS, LinkCost, way
from kvtrace_replay.timing.profile import Measured

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
COUNTS = (1, 8, 64, 512)
MOST = 256 * MIB
QUICK_SIZES, QUICK_COUNTS, QUICK_MOST = (4 * KIB, 64 * KIB, 512 * KIB), (1, 8, 64), 16 * MIB

Timer = Callable[[Callable[[], None]], tuple[float, float, float]]


def points(quick: bool) -> list[tuple[int, int]]:
    """(bytes of a piece, pieces) to measure."""
    sizes, counts, most = (QUICK_SIZES, QUICK_COUNTS, QUICK_MOST) if quick else (SIZES, COUNTS, MOST)
    return [(size, count) for size in sizes for count in counts if size * count <= most]


def measure_ways(torch: Any, device: str, memories: tuple[str, ...], quick: bool, timed: Timer) -> Iterator[Measured]:
    """The time of every point, by each way over the link; `timed` runs an action and gives median and quartiles, ns."""
    for memory in memories:
        for size, count in points(quick):
            pair = Pools(torch, device, memory == "pinned", size, count)
            for direction in DIRECTIONS:
                for layout in LAYOUTS:
                    action = pair.scattered if layout == "scattered" else pair.gathered
                    middle, low, high = timed(lambda go=action, to=direction: go(to))  # type: ignore[misc]
                    yield Measured(way(direction, memory, layout), size * count, count, middle, low, high)


class Pools:
    """A pool of pieces of `size` bytes on each side, of which `count` move, and what moves them."""

    def __init__(self, torch: Any, device: str, pinned: bool, size: int, count: int) -> None:
        self.torch = torch
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(count))[:count]
        wide = {"dtype": torch.int64}  # gathering byte by byte is what no engine does
        self.host = torch.ones((2 * count, size // 8), **wide, pin_memory=pinned)
        self.device = torch.zeros((2 * count, size // 8), **wide, device=device)
        self.places = order.tolist()
        self.index = order.to(device)
        self.staging = torch.zeros((count, size // 8), **wide, device=device)
        self.together = torch.ones((count, size // 8), **wide, pin_memory=pinned)

    def scattered(self, direction: str) -> None:
        """A copy for each piece."""
        to, of = (self.device, self.host) if direction == "h2d" else (self.host, self.device)
        for place in self.places:
            to[place].copy_(of[place], non_blocking=True)

    def gathered(self, direction: str) -> None:
        """One copy, and the device puts the pieces together, or in their places."""
        if direction == "h2d":
            self.staging.copy_(self.together, non_blocking=True)
            self.device.index_copy_(0, self.index, self.staging)
        else:
            self.torch.index_select(self.device, 0, self.index, out=self.staging)
            self.together.copy_(self.staging, non_blocking=True)


def link_from(measured: list[Measured]) -> dict[str, LinkCost]:
    """The cost of each way: a transfer, each copy and each byte, fitted to relative errors. A gathered transfer is one
    copy, so it has no cost of copies."""
    found = {}
    for name in dict.fromkeys(point.what for point in measured):
        mine = [point for point in measured if point.what == name]
        took = np.array([point.median_ns for point in mine])
        count = np.array([float(point.context) for point in mine])
        size = np.array([float(point.size) for point in mine])
        columns = [np.ones(len(mine)), size] if name.endswith("gathered") else [np.ones(len(mine)), size, count]
        transfer_ns, byte_ns, *copy_ns = relative_nnls(np.column_stack(columns), took)
        # Should latency explain everything, the fastest point bounds the bandwidth from below.
        rate = 1e9 / byte_ns if byte_ns > 0 else float((size / took).max()) * 1e9
        found[name] = LinkCost(float(transfer_ns), float(copy_ns[0]) if copy_ns else 0.0, rate)
    return found
