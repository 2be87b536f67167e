"""The running list and the waiting queue: lists through the rows of `req`, or a heap where priorities rule.

The last row of `req` is the end of both lists. The heap holds ranks: positions of requests in the order of (priority,
arrival time, id), in which no two are equal.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_HEAP,
    G_RUNNING,
    G_WAITING,
    P_PRIORITY,
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
def push_heap(heap, g, rank):
    """As `heapq.heappush`."""
    at = g[G_HEAP]
    g[G_HEAP] = at + 1
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= rank:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = rank


@njit(cache=False)
def sink(heap, n, at, rank):
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= rank:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = rank


@njit(cache=False)
def pop_heap(heap, g):
    top = heap[0]
    n = g[G_HEAP] - 1
    g[G_HEAP] = n
    if n > 0:
        sink(heap, n, 0, heap[n])
    return top


@njit(cache=False)
def enqueue(p, g, req, heap, rank, request, at_front):
    """`request` waits: at the head for a preempted one, else at the end; by rank where priorities rule."""
    if p[P_PRIORITY]:
        push_heap(heap, g, rank[request])
    else:
        end = req.shape[0] - 1
        link_waiting(req, end if at_front else req[end, R_WAIT_PREV], request)
    g[G_WAITING] += 1


@njit(cache=False)
def withdraw(p, g, req, heap, rank, request):
    """`request` waits no more, wherever in the queue it is."""
    if p[P_PRIORITY]:
        n = g[G_HEAP]
        for i in range(n):
            if heap[i] == rank[request]:
                n -= 1
                g[G_HEAP] = n
                if i < n:
                    moved = heap[n]
                    sink(heap, n, i, moved)
                    rise(heap, i)
                break
    else:
        unlink_waiting(req, request)
    g[G_WAITING] -= 1


@njit(cache=False)
def rise(heap, at):
    rank = heap[at]
    while at > 0:
        parent = (at - 1) >> 1
        if heap[parent] <= rank:
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = rank
