"""Eviction policies, one file each. A file registers itself with `@policy`; nothing else knows about it."""

from __future__ import annotations

from kvtrace_replay.policies.registry import Policy, find_policy, load_policy_file, policies, policy
from kvtrace_replay.policies.stream import Stream

__all__ = ["Policy", "Stream", "find_policy", "load_policy_file", "policies", "policy"]
