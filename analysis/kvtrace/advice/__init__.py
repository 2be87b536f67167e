"""Advice: what replays of a trace say about its deployment, with the figures behind it."""

from __future__ import annotations

from kvtrace.advice.collect import advise
from kvtrace.advice.declare import Figure, Finding, adviser

__all__ = ["Figure", "Finding", "advise", "adviser"]
