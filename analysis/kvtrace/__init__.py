"""kvtrace: see what an LLM server's KV cache did, and replay it at settings that were never run.

    import kvtrace
    trace = kvtrace.open("run.kvt")
    trace.sql("SELECT kind, count(*) FROM block_events GROUP BY kind")
    kvtrace.replay(trace, policy=["lru", "fifo"], capacity=["50%", "inf"])
    kvtrace.simulate(trace, num_blocks=[200, 400])

Names are imported on first use, so that `import kvtrace` costs a millisecond and pulls in no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtrace.api import Trace, open
    from kvtrace.curves import curve
    from kvtrace.metrics import stats
    from kvtrace.replays import replay
    from kvtrace.reports.compose import report
    from kvtrace.simulations import simulate
    from kvtrace_traces.errors import KvtraceError, UsageError

    __version__: str

__all__ = [
    "KvtraceError",
    "Trace",
    "UsageError",
    "__version__",
    "curve",
    "open",
    "replay",
    "report",
    "simulate",
    "stats",
]

_HOMES = {
    "KvtraceError": "kvtrace_traces.errors",
    "UsageError": "kvtrace_traces.errors",
    "Trace": "kvtrace.api",
    "open": "kvtrace.api",
    "curve": "kvtrace.curves",
    "replay": "kvtrace.replays",
    "report": "kvtrace.reports.compose",
    "simulate": "kvtrace.simulations",
    "stats": "kvtrace.metrics",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("kvtrace")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'kvtrace' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
