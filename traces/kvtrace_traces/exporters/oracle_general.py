"""libCacheSim's ``oracleGeneral``: a record of 24 bytes per reference (see ``importers.oracle_general``), size 1.

``next access`` is the number, from 1, of the record that uses the block again, -1 if none does, which is what Belady's
rule needs. ``time`` is the request's arrival in whole seconds, 0 where it is not known; times that need more than 32
bits are refused.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.exporters import exporter
from kvtrace_traces.exporters.references import references, summary, written
from kvtrace_traces.importers.oracle_general import RECORD

_ROWS = 1 << 20  # written at a time
_MOST_S = (1 << 32) - 1


@exporter("oracle-general", "libCacheSim's oracleGeneral: a record of 24 bytes per reference")
def write(trace: Any, out: Path, force: bool) -> dict[str, Any]:
    """Write the references of ``trace``; see the module. Raises :class:`KvtraceError` where there is none."""
    found = references(trace)
    if not len(found.ids):
        raise KvtraceError(f"{trace.path} has no references: oracleGeneral has nothing to say of it")
    seconds = np.maximum(found.frame["arrival_ns"].to_numpy(), 0) // 1_000_000_000
    if len(seconds) and int(seconds.max()) > _MOST_S:
        raise KvtraceError(f"{trace.path} has arrivals beyond 2^32 seconds, which oracleGeneral cannot hold")
    times = np.repeat(seconds, np.diff(found.indptr)).astype(np.uint32)
    following = _next_uses(np.unique(found.ids, return_inverse=True)[1].reshape(-1))
    with written(out, force) as file:
        for first in range(0, len(found.ids), _ROWS):
            part = slice(first, first + _ROWS)
            records = np.empty(len(times[part]), RECORD)
            records["time_s"], records["object"] = times[part], found.ids[part]
            records["size"], records["next"] = 1, following[part]
            file.write(records.tobytes())
    return summary(out, found)


def _next_uses(ids: NDArray[Any]) -> NDArray[np.int64]:
    """int64: the number, from 1, of the next reference to the same of the dense ``ids``; -1 where there is none."""
    following: NDArray[np.int64] = _backwards(ids.astype(np.int64), int(ids.max()) + 1)
    return following


@njit
def _backwards(ids, unique):  # type: ignore[no-untyped-def]
    following = np.empty(len(ids), np.int64)
    seen = np.full(unique, -1, np.int64)
    for i in range(len(ids) - 1, -1, -1):
        following[i] = seen[ids[i]]
        seen[ids[i]] = i + 1
    return following
