"""Replays a cache at settings that were never run: open loop, one compiled driver per semantics and policy.

    from kvtrace_replay import from_trace, replay
    rows = replay(from_trace(trace), policy=["lru", "fifo"], capacity=[1000, "50%"], semantics="prefix")

Names are loaded on first use, so that importing this package does not load Numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrace_replay.cache.runs import replay, replay_requests
    from kvtrace_replay.capacity import parse_capacity
    from kvtrace_replay.policies.registry import SEMANTICS, find_policy, load_policy_file
    from kvtrace_replay.schedulers.sweep import simulate
    from kvtrace_replay.workload.model import Workload
    from kvtrace_replay.workload.recorded import from_trace, requests_of
    from kvtrace_replay.workload.store import of_trace

_HOMES = {
    "SEMANTICS": "kvtrace_replay.policies.registry",
    "Workload": "kvtrace_replay.workload.model",
    "find_policy": "kvtrace_replay.policies.registry",
    "from_trace": "kvtrace_replay.workload.recorded",
    "of_trace": "kvtrace_replay.workload.store",
    "load_policy_file": "kvtrace_replay.policies.registry",
    "parse_capacity": "kvtrace_replay.capacity",
    "replay": "kvtrace_replay.cache.runs",
    "replay_requests": "kvtrace_replay.cache.runs",
    "requests_of": "kvtrace_replay.workload.recorded",
    "simulate": "kvtrace_replay.schedulers.sweep",
}

__all__ = [
    "SEMANTICS",
    "Workload",
    "find_policy",
    "from_trace",
    "load_policy_file",
    "of_trace",
    "parse_capacity",
    "replay",
    "replay_requests",
    "requests_of",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
