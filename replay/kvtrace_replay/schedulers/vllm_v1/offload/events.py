"""What becomes of the engine's blocks, in the log."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    G_BEGUN,
    G_BUDGET,
    INNER,
    LOG_EVENT,
    P_LOG,
)
from kvtrace_replay.schedulers.vllm_v1.offload.tier import write
from kvtrace_traces.compile import njit
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

ALLOCATE, HIT, FILL, FREE, EVICT = (BLOCK_EVENT_KINDS.index(k) for k in ("allocate", "hit", "fill", "free", "evict"))


@njit(cache=False, **INNER)
def emit(s, kind, request, block, identity):
    """A block event; `step` is the one of the call under way, else the last one begun. `request` -1: the connector."""
    if s.p[P_LOG]:
        step = s.g[G_BEGUN] if s.g[G_BUDGET] >= 0 else max(s.g[G_BEGUN] - 1, 0)
        write(s, LOG_EVENT, step, kind, request, block, identity, 0)
