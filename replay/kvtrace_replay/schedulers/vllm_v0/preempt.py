"""Who is preempted, and how (`Scheduler._preempt` of vLLM 0.4.2)."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v0.layout import (
    BY_RECOMPUTE,
    BY_SWAP,
    FEWEST_BLOCKS,
    G_CALL,
    G_DIED,
    G_FREE_CPU,
    G_FREE_GPU,
    HYBRID,
    LAST,
    MOVED_OUT,
    MOVED_RECOMPUTE,
    P_MEND_SPACE,
    P_MODE,
    P_VICTIM,
    R_BLOCKS,
    R_TOKENS,
    R_WAY,
    RECOMPUTE,
)
from kvtrace_replay.schedulers.vllm_v0.queues import note_move
from kvtrace_traces.compile import njit


@njit(cache=False)
def place_of_victim(p, req, running, first, n):
    """Which of `running[first:n]`, those not yet scheduled in this call, is the victim. The engine takes the last."""
    if p[P_VICTIM] == LAST:
        return n - 1
    sign = -1 if p[P_VICTIM] == FEWEST_BLOCKS else 1
    best = n - 1
    for at in range(n - 2, first - 1, -1):
        if sign * req[running[at], R_BLOCKS] > sign * req[running[best], R_BLOCKS]:
            best = at
    return best


@njit(cache=False)
def preempt(p, g, req, token_cost, block_cost, moves, request):
    """Takes the GPU blocks of `request`. False where the engine dies: it is to be swapped, and the CPU pool is full."""
    blocks = req[request, R_BLOCKS]
    fits = blocks <= g[G_FREE_CPU]
    if p[P_MODE] == RECOMPUTE:
        swap = False
    elif p[P_MODE] == HYBRID:
        swap = fits and block_cost[blocks] < token_cost[req[request, R_TOKENS]]
    else:
        swap = fits
        if not fits and not p[P_MEND_SPACE]:
            g[G_DIED] = request
            return False
    g[G_FREE_GPU] += blocks
    if swap:
        g[G_FREE_CPU] -= blocks
        req[request, R_WAY] = BY_SWAP
        note_move(g, moves, g[G_CALL], MOVED_OUT, request, blocks)
    else:
        req[request, R_BLOCKS] = 0
        req[request, R_WAY] = BY_RECOMPUTE
        note_move(g, moves, g[G_CALL], MOVED_RECOMPUTE, request, blocks)
    return True
