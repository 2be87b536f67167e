"""Cuts a smaller trace out of a log, which reads, verifies and replays from its own first step."""

from __future__ import annotations

from kvtrace_traces.cut.cut import Cut, cut_requests, cut_steps, cut_times

__all__ = ["Cut", "cut_requests", "cut_steps", "cut_times"]
