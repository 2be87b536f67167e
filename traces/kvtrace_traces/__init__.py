"""What a kvtrace trace is: the event schema, the ``.kvt`` log and the readers of both.

Importing this package costs the standard library alone: the tracer does so inside a serving process.
Everything that needs numpy, numba or polars is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtrace_traces.errors import KvtraceError, UsageError

if TYPE_CHECKING:
    from kvtrace_traces.trace import Chains, Trace, open_trace

__all__ = ["Chains", "KvtraceError", "Trace", "UsageError", "open_trace"]

_LAZY = {"Chains": "trace", "Trace": "trace", "open_trace": "trace"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"kvtrace_traces.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
