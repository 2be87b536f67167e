"""The queues of the scheduler, and blocks taken and given back.

Running and swapped requests stand in arrays, in the order in which the engine's stable sort by arrival time would put
them. Waiting requests need no sorted structure: those preempted by recomputation go to the head of the queue and
arrivals to its end, so the queue is a stack before a list that is known from the start.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v0.layout import (
    G_COME,
    G_FREE_CPU,
    G_FREE_GPU,
    G_MOVES,
    G_RUNNING,
    G_STACKED,
    G_SWAPPED,
    G_TAKEN,
    M_AMOUNT,
    M_CALL,
    M_KIND,
    M_REQUEST,
    R_BLOCKS,
    R_RANK,
    R_STATUS,
    RUNNING,
    SWAPPED,
    WAITING,
)
from kvtrace_traces.compile import njit


@njit(cache=False)
def insert_by_arrival(req, queue, n, request):
    """Puts `request` into the first `n` of `queue` behind all that did not arrive later (`Policy.sort_by_priority`)."""
    rank = req[request, R_RANK]
    at = n
    while at > 0 and req[queue[at - 1], R_RANK] > rank:
        queue[at] = queue[at - 1]
        at -= 1
    queue[at] = request


@njit(cache=False)
def add_running(g, req, running, request):
    insert_by_arrival(req, running, g[G_RUNNING], request)
    g[G_RUNNING] += 1
    req[request, R_STATUS] = RUNNING


@njit(cache=False)
def add_swapped(g, req, swapped, request):
    insert_by_arrival(req, swapped, g[G_SWAPPED], request)
    g[G_SWAPPED] += 1
    req[request, R_STATUS] = SWAPPED


@njit(cache=False)
def take_out(queue, n, at):
    """Removes place `at` of the first `n` of `queue`, keeping the order."""
    for i in range(at, n - 1):
        queue[i] = queue[i + 1]


@njit(cache=False)
def find(queue, n, request):
    at = 0
    while at < n and queue[at] != request:
        at += 1
    return at


@njit(cache=False)
def head_of_waiting(g, req, stack, come):
    """The first that waits, -1 for none. Passes over those that were aborted while they waited."""
    while g[G_STACKED] > 0:
        request = stack[g[G_STACKED] - 1]
        if req[request, R_STATUS] == WAITING:
            return request
        g[G_STACKED] -= 1
    while g[G_TAKEN] < g[G_COME]:
        request = come[g[G_TAKEN]]
        if req[request, R_STATUS] == WAITING:
            return request
        g[G_TAKEN] += 1
    return -1


@njit(cache=False)
def pop_waiting(g):
    """Removes what `head_of_waiting` has just returned."""
    if g[G_STACKED] > 0:
        g[G_STACKED] -= 1
    else:
        g[G_TAKEN] += 1


@njit(cache=False)
def note_move(g, moves, call, kind, request, amount):
    at = g[G_MOVES]
    moves[at, M_CALL] = call
    moves[at, M_KIND] = kind
    moves[at, M_REQUEST] = request
    moves[at, M_AMOUNT] = amount
    g[G_MOVES] = at + 1


@njit(cache=False)
def give_back(g, req, request):
    """Frees the blocks of `request`, wherever they are."""
    if req[request, R_STATUS] == SWAPPED:
        g[G_FREE_CPU] += req[request, R_BLOCKS]
    else:
        g[G_FREE_GPU] += req[request, R_BLOCKS]
    req[request, R_BLOCKS] = 0
