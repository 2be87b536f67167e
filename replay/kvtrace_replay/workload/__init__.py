"""What a replay reads: the stream of requests as plain arrays (`Workload`), and how a trace becomes one."""

from __future__ import annotations

from kvtrace_replay.workload.model import Workload
from kvtrace_replay.workload.recorded import from_trace
from kvtrace_replay.workload.store import of_trace

__all__ = ["Workload", "from_trace", "of_trace"]
