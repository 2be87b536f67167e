"""What became of the same requests in two traces: who gained or lost hits, was preempted, slowed down, and why."""

from __future__ import annotations

from kvtrace.diff.compare import Difference, diff
from kvtrace.diff.match import METHODS

__all__ = ["METHODS", "Difference", "diff"]
