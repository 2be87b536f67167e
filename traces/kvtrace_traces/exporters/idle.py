"""How many blocks were cached and held by nobody, after each step was scheduled; and prefill tokens of each step.

The rule is that of the view ``occupancy``: what was logged up to a step's begin had happened by then; a block is idle
while it is cached and nobody holds it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.rows import ALLOCATED, EVICTED, FILLED, FREED, HITS, RESET


@njit
def idle_blocks(times, kinds, blocks, identities, starts, num_blocks):
    """int64[steps]: idle blocks at each of ``starts`` (int64, ascending), from the block events of one engine in log
    order: ``times`` int64, ``kinds`` uint8, ``blocks`` and ``identities`` int32 (-1 for none)."""
    holds = np.zeros(num_blocks, np.int32)
    cached = np.zeros(num_blocks, np.bool_)
    found = np.zeros(len(starts), np.int64)
    idle = 0
    at = 0
    for i in range(len(times)):
        while at < len(starts) and starts[at] < times[i]:
            found[at] = idle
            at += 1
        kind, block = kinds[i], blocks[i]
        if kind == RESET:
            cached[:] = False
            idle = 0
            continue
        if block < 0 or block >= num_blocks:
            continue
        idle -= cached[block] and holds[block] <= 0
        if kind == ALLOCATED:
            holds[block] += 1
            cached[block] = False
        elif kind == HITS:
            holds[block] += 1
            cached[block] = identities[i] >= 0
        elif kind == FILLED:
            if identities[i] >= 0:
                cached[block] = True
        elif kind == FREED:
            holds[block] -= 1
            cached[block] = identities[i] >= 0
        elif kind == EVICTED:
            cached[block] = False
        idle += cached[block] and holds[block] <= 0
    while at < len(starts):
        found[at] = idle
        at += 1
    return found


@njit
def prefill_tokens(first_at, steps, tokens, computed, prompts, many):
    """int64[many]: scheduled tokens that lie in prompts, by place of the step. Spans: ``first_at``, place of the first
    step; ``steps``, ``tokens`` a step, ``computed`` before, ``prompts`` tokens of the request's prompt; all int64."""
    found = np.zeros(many, np.int64)
    for i in range(len(first_at)):
        left = prompts[i] - computed[i]
        for k in range(steps[i]):
            if left <= 0 or tokens[i] <= 0 or first_at[i] + k >= many:
                break
            found[first_at[i] + k] += min(tokens[i], left)
            left -= tokens[i]
    return found
