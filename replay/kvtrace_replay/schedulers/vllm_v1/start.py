"""Puts a run under way into the arrays of the compiled scheduler: `schedulers.carried.Start`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.carried import Start
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import NATIVE, Settings
from kvtrace_replay.schedulers.vllm_v1 import layout as at
from kvtrace_replay.schedulers.vllm_v1.blocks import append_free
from kvtrace_replay.schedulers.vllm_v1.choice import give_back, remember
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]


def carry_in(start: Start, recorded: Recorded, settings: Settings, state: dict[str, Any]) -> None:
    """Set `state`, that of an idle engine, to `start`, which is one of the pool of `settings`."""
    _requests(start, recorded, settings, state)
    _flight(start, state)
    g = state["g"]
    g[at.G_ARRIVED] = start.n_requests
    g[at.G_PREEMPTED], g[at.G_EMPTY] = start.preempted, start.empty
    g[at.G_EXPECTED] = int(start.scheduled.sum())
    g[at.G_LOGGED_RUNNING], g[at.G_LOGGED_WAITING] = start.running.size, start.waiting.size
    g[at.G_LIVE] = int(recorded.stop[: start.n_requests].sum())
    blk = state["blk"]
    blk[:, at.B_REFS] = np.bincount(start.table, minlength=len(blk))
    if settings.policy == NATIVE:
        _queue_up(blk, g, start.queue)
        _remember(start, state)
    else:
        _by_policy(start, state)


def _requests(start: Start, recorded: Recorded, settings: Settings, state: dict[str, Any]) -> None:
    req, st, g, order, m = state["req"], state["st"], state["g"], state["order"], start.n_requests
    waits = np.ones(m, bool)
    waits[start.running] = False
    for column, values in (
        (at.R_STATUS, np.where(waits, np.where(start.begun, at.PREEMPTED, at.WAITING), at.RUNNING)),
        (at.R_COMPUTED, start.computed),
        (at.R_TOKENS, start.tokens),
        (at.R_BLOCKS, np.diff(start.table_at)),
        (at.R_CACHED, start.filled),
        (at.R_FLIGHT, start.under_way),
        # The token under way counts as computed and not as known, which asynchronous scheduling makes up for.
        (at.R_HOLDERS, start.gives & (start.under_way > 0) & ~waits if settings.async_scheduling else 0),
        (at.R_CALL, np.where(start.scheduled, g[at.G_CALL], -1)),
        (at.R_PREEMPTIONS, start.preemptions),
        (at.R_FLAGS, np.where(start.gives, 0, at.FLAG_CHUNK)),
        (at.O_CACHED, start.cached),
    ):
        req[:m, column] = values
    for slot, request in enumerate(start.running.tolist()):
        blocks = start.blocks_of(request)
        state["table"][slot, : blocks.size] = blocks
        req[request, at.R_SLOT] = slot
        st[slot, at.ST_ORDER] = slot
    running = start.running.size
    g[at.G_SLOTS], g[at.G_ORDER], g[at.G_RUNNING] = len(st) - running, running, running
    _link(req, start.running, at.R_RUN_NEXT, at.R_RUN_PREV)
    g[at.G_WAITING] = start.waiting.size
    if settings.scheduling_policy == "priority":
        ranks = np.sort(order[start.waiting, at.Q_RANK])  # sorted, they are a heap
        order[: ranks.size, at.Q_HEAP] = ranks
        g[at.G_HEAP] = ranks.size
    else:
        _link(req, start.waiting, at.R_WAIT_NEXT, at.R_WAIT_PREV)


def _link(rows: Any, members: I32, following: int, before: int) -> None:
    """Make `members` a list through `rows`, whose last row is its end."""
    ring = np.concatenate([[len(rows) - 1], members, [len(rows) - 1]])
    rows[ring[:-1], following] = ring[1:]
    rows[ring[1:], before] = ring[:-1]


def _flight(start: Start, state: dict[str, Any]) -> None:
    """The call whose output is due; those of its requests that have ended since do not count."""
    if not start.due:
        return
    named = start.running[start.under_way[start.running] > 0]
    flights, flight_n, g = state["flights"], state["flight_n"], state["g"]
    flights[0, : named.size, 0] = named
    flights[0, : named.size, 1] = start.under_way[named]
    flights[0, : named.size, 2] = start.gives[named]
    flight_n[0, at.F_NAMED] = named.size
    flight_n[0, at.F_TOKENS] = max(int(start.under_way.sum()), 1)
    flight_n[0, at.F_END] = g[at.G_DEVICE] = start.due_ns
    g[at.G_FLIGHTS] = 1


def _queue_up(blk: Any, g: Any, queue: I32) -> None:
    _link(blk, queue, at.B_NEXT, at.B_PREV)
    g[at.G_FREE] = queue.size


def _remember(start: Start, state: dict[str, Any]) -> None:
    """What the blocks hold; several that hold one identity are a ring, in the order in which they were filled."""
    if not start.blocks.size:
        return
    blk, first = state["blk"], state["first"]
    blk[start.blocks, at.B_IDENTITY] = start.identities
    order = np.argsort(start.identities, kind="stable")
    blocks, held = start.blocks[order], start.identities[order]
    begins = np.flatnonzero(np.diff(held, prepend=-1))
    ends = np.append(begins[1:], held.size) - 1
    after, before = np.roll(blocks, -1), np.roll(blocks, 1)
    after[ends], before[begins] = blocks[begins], blocks[ends]
    alone = begins[begins == ends]
    after[alone] = before[alone] = 0
    blk[blocks, at.B_TWIN_NEXT], blk[blocks, at.B_TWIN_PREV] = after, before
    first[held[begins]] = blocks[begins]


def _by_policy(start: Start, state: dict[str, Any]) -> None:
    """What a policy of the open loop learns of the cache: blocks that nobody holds were used once, in the order of the
    free queue, then those that are held, in the order in which they were filled."""
    blk = state["blk"]
    _queue_up(blk, state["g"], np.zeros(0, np.int32))
    identity = np.full(len(blk), at.NO_IDENTITY, np.int32)
    identity[start.blocks] = start.identities
    cached = identity[start.queue] >= 0
    _hold(
        state["tag"], state["pol"], state["p"], state["g"], blk, state["first"], np.zeros(1, np.uint32),
        start.queue[cached], identity, start.blocks[blk[start.blocks, at.B_REFS] > 0], start.queue[~cached],
    )  # fmt: skip


@njit
def _hold(tag, pol, p, g, blk, first, log, idle, identity, held, plain):
    table = np.zeros(1, np.int32)
    for block in idle:
        blk[block, at.B_REFS] = 1
        remember(tag, pol, p, blk, first, g, block, identity[block], log)
        table[0] = block
        give_back(tag, pol, p, blk, first, g, table, 1, log)
    for block in held:
        remember(tag, pol, p, blk, first, g, block, identity[block], log)
        pol[0][identity[block]] += blk[block, at.B_REFS] - 1
    for block in plain:
        append_free(blk, g, block)
