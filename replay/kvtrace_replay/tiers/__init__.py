"""A cache in several tiers, such as GPU memory, host memory and disk: what each finds and what moves between
them. docs/tiers.md has the rules."""

from __future__ import annotations

from kvtrace_replay.tiers.runs import replay_tiers
from kvtrace_replay.tiers.spec import Tier, parse_bandwidth, parse_tier

__all__ = ["Tier", "parse_bandwidth", "parse_tier", "replay_tiers"]
