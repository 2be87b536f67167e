"""Figures that are read off a recorded run itself: nothing here is replayed."""

from __future__ import annotations

from kvtrace.metrics.collect import GROUPS, stats
from kvtrace.metrics.recorded import capacity_blocks, occupancy, own_hits

__all__ = ["GROUPS", "capacity_blocks", "occupancy", "own_hits", "stats"]
