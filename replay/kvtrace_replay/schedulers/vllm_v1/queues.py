"""The running list and the waiting queue: lists through the rows of `req`, or a heap where priorities rule.

The last row of `req` is the end of both lists. The heap holds ranks: positions of requests in the order of (priority,
arrival time, id), in which no two are equal. It is a column of `order`, whose others tell ranks and requests.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_HEAP,
    G_RUNNING,
    G_WAITING,
    P_PRIORITY,
    Q_HEAP,
    Q_RANK,
    R_RUN_NEXT,
    R_RUN_PREV,
    R_WAIT_NEXT,
    R_WAIT_PREV,
)
from kvtrace_traces.compile import njit


@njit(cache=False)
def append_running(req, g, request):
    end = req.shape[0] - 1
    last = req[end, R_RUN_PREV]
    req[request, R_RUN_PREV] = last
    req[request, R_RUN_NEXT] = end
    req[last, R_RUN_NEXT] = request
    req[end, R_RUN_PREV] = request
    g[G_RUNNING] += 1


@njit(cache=False)
def remove_running(req, g, request):
    before, after = req[request, R_RUN_PREV], req[request, R_RUN_NEXT]
    req[before, R_RUN_NEXT] = after
    req[after, R_RUN_PREV] = before
    g[G_RUNNING] -= 1


@njit(cache=False)
def link_waiting(req, before, request):
    after = req[before, R_WAIT_NEXT]
    req[request, R_WAIT_PREV] = before
    req[request, R_WAIT_NEXT] = after
    req[before, R_WAIT_NEXT] = request
    req[after, R_WAIT_PREV] = request


@njit(cache=False)
def unlink_waiting(req, request):
    before, after = req[request, R_WAIT_PREV], req[request, R_WAIT_NEXT]
    req[before, R_WAIT_NEXT] = after
    req[after, R_WAIT_PREV] = before


@njit(cache=False)
def rise(order, at):
    rank = order[at, Q_HEAP]
    while at > 0:
        parent = (at - 1) >> 1
        if order[parent, Q_HEAP] <= rank:
            break
        order[at, Q_HEAP] = order[parent, Q_HEAP]
        at = parent
    order[at, Q_HEAP] = rank


@njit(cache=False)
def push_heap(order, g, rank):
    """As `heapq.heappush`."""
    order[g[G_HEAP], Q_HEAP] = rank
    rise(order, g[G_HEAP])
    g[G_HEAP] += 1


@njit(cache=False)
def sink(order, n, at, rank):
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and order[child + 1, Q_HEAP] < order[child, Q_HEAP]:
            child += 1
        if order[child, Q_HEAP] >= rank:
            break
        order[at, Q_HEAP] = order[child, Q_HEAP]
        at = child
    order[at, Q_HEAP] = rank


@njit(cache=False)
def pop_heap(order, g):
    top = order[0, Q_HEAP]
    n = g[G_HEAP] - 1
    g[G_HEAP] = n
    if n > 0:
        sink(order, n, 0, order[n, Q_HEAP])
    return top


@njit(cache=False)
def enqueue(p, g, req, order, request, at_front):
    """`request` waits: at the head for a preempted one, else at the end; by rank where priorities rule."""
    if p[P_PRIORITY]:
        push_heap(order, g, order[request, Q_RANK])
    else:
        end = req.shape[0] - 1
        link_waiting(req, end if at_front else req[end, R_WAIT_PREV], request)
    g[G_WAITING] += 1


@njit(cache=False)
def withdraw(p, g, req, order, request):
    """`request` waits no more, wherever in the queue it is."""
    if p[P_PRIORITY]:
        n = g[G_HEAP]
        for i in range(n):
            if order[i, Q_HEAP] == order[request, Q_RANK]:
                n -= 1
                g[G_HEAP] = n
                if i < n:
                    moved = order[n, Q_HEAP]
                    sink(order, n, i, moved)
                    rise(order, i)
                break
    else:
        unlink_waiting(req, request)
    g[G_WAITING] -= 1
