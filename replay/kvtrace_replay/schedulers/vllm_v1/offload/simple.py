"""The other connector: `v1/simple_kv_offload/manager.py`, SimpleCPUOffloadScheduler (0.32.0), for one group of full
attention, eager (store on fill) and lazy (store on eviction).

All that a call stores is one copy, all that it loads another. Here each request's blocks in a copy are a job, and those
that a lazy walk stores are one of nobody's. A job's list (`nodes`) has pairs: a block of the engine, and one of the
host's. Where vLLM goes through sets, of copies that end together, they come in the order in which they were begun.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import B_IDENTITY, B_NEXT, B_REFS, G_FREE, G_NOW, NO_IDENTITY
from kvtrace_replay.schedulers.vllm_v1.offload.connector import (
    leave_slot,
    move_block,
    new_job,
    write_move,
)
from kvtrace_replay.schedulers.vllm_v1.offload.host import (
    cache_host,
    give_host,
    hold,
    let_go,
    on_host,
    pin_host,
    take_host,
)
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    ALL,
    B_HAND,
    COPYING,
    G_BEGUN,
    G_BLOCKS_FREE,
    G_CALLS,
    G_COPY,
    G_CURSOR,
    G_GONE,
    G_JOBS,
    G_JOBS_FREE,
    G_LOADED_BLOCKS,
    G_LOADED_TOKENS,
    G_LOADS,
    G_LOADS_OUT,
    G_SCHEDULED,
    G_SPIN,
    G_STORED_BLOCKS,
    G_STORES,
    G_WAITS,
    INNER,
    J_BLOCKS,
    J_COPY,
    J_COUNT,
    J_FIRST,
    J_LOAD,
    J_REQUEST,
    J_ROW,
    K_LOCAL,
    K_PINS,
    K_STORED,
    L_NO_READ,
    LOADS,
    LOG_ENDED,
    M_DONE,
    M_HEARD,
    NOW,
    O_LOADED,
    O_STORED,
    P_BLOCK_SIZE,
    P_CACHING,
    P_COVER,
    P_LAZY,
    P_RUNNER,
    R_BLOCKS,
    R_COMPUTED,
    R_HOLDERS,
    R_PREEMPTIONS,
    R_SLOT,
    R_TOKENS,
    SPARE,
    STORES,
    WAITING_FOR,
)
from kvtrace_replay.schedulers.vllm_v1.offload.tier import write_time
from kvtrace_traces.compile import njit

NEW, RUNNING, AGAIN = range(3)  # how the workers are told of a scheduled request


# ---------------------------------------------------------------- lists of pairs


@njit(cache=False, **INNER)
def append_pair(s, job, last, block, host):
    """One more pair at the end of a job's list, whose last node is `last` (-1: it is empty). Returns its node."""
    node = s.g[G_BLOCKS_FREE]
    s.g[G_BLOCKS_FREE] = s.nodes[node, 3]
    s.nodes[node, 0], s.nodes[node, 2], s.nodes[node, 3] = host, block, -1
    if last < 0:
        s.job[job, J_BLOCKS] = node
    else:
        s.nodes[last, 3] = node
    s.job[job, J_COUNT] += 1
    return node


@njit(cache=False, **INNER)
def free_job(s, job):
    """Its pairs, and itself, are free for others."""
    g, node = s.g, s.job[job, J_BLOCKS]
    while node >= 0:
        following = s.nodes[node, 3]
        s.nodes[node, 3] = g[G_BLOCKS_FREE]
        g[G_BLOCKS_FREE] = node
        node = following
    k = 0
    while s.jobs[ALL, k] != job:
        k += 1
    for m in range(k, g[G_JOBS] - 1):
        s.jobs[ALL, m] = s.jobs[ALL, m + 1]
    g[G_JOBS] -= 1
    s.jobs[SPARE, g[G_JOBS_FREE]] = job
    g[G_JOBS_FREE] += 1


# ---------------------------------------------------------------- lookups and loads


@njit(cache=False, **INNER)
def host_block(s, request, nth):
    """The host's block with the identity of a request's `nth`, -1 for none."""
    return np.int64(s.host_first[s.chain[s.chain_at[request] + nth]])


@njit(cache=False, **INNER)
def drop_pins(s, request):
    """`_free_pending_cpu_hit`. The host keeps what is pinned, so the lookup finds the same blocks again."""
    first = s.req[request, K_LOCAL] // s.p[P_BLOCK_SIZE]
    for i in range(s.req[request, K_PINS]):
        give_host(s, host_block(s, request, first + i))
    s.req[request, K_PINS] = 0


@njit(cache=False, **INNER)
def find_on_host(s, request, local):
    """`get_num_new_matched_tokens`: tokens beyond the `local` hit that the host has. They are pinned."""
    req, size = s.req, s.p[P_BLOCK_SIZE]
    drop_pins(s, request)
    req[request, K_LOCAL] = local
    if req[request, L_NO_READ] or not s.p[P_CACHING]:
        return np.int64(0)
    first = local // size
    most = min((req[request, R_TOKENS] - 1) // size, s.chain_at[request + 1] - s.chain_at[request])
    n = np.int64(0)
    while first + n < most and host_block(s, request, first + n) >= 0:
        n += 1
    for i in range(n):
        pin_host(s, host_block(s, request, first + i))
    req[request, K_PINS] = n
    return n * size


@njit(cache=False, **INNER)
def load_from_host(s, request, tokens):
    """`update_state_after_alloc`: what was pinned stays so until the load has ended, and the engine's blocks too."""
    g, req = s.g, s.req
    n, first, slot = req[request, K_PINS], req[request, K_LOCAL] // s.p[P_BLOCK_SIZE], req[request, R_SLOT]
    job = new_job(s, request, 1, tokens)
    last = np.int64(-1)
    for i in range(n):
        last = append_pair(s, job, last, s.table[slot, first + i], host_block(s, request, first + i))
        hold(s, s.table[slot, first + i])
    s.job[job, J_FIRST] = first
    req[request, K_PINS] = 0
    s.jobs[LOADS, g[G_LOADS]] = job
    g[G_LOADS] += 1
    g[G_LOADS_OUT] += 1
    g[G_LOADED_TOKENS] += tokens
    g[G_LOADED_BLOCKS] += n
    req[request, O_LOADED] += n


# ---------------------------------------------------------------- stores


@njit(cache=False, **INNER)
def take_and_hold(s, job):
    """The blocks of a store are chosen: the host's are handed out, then the engine's held."""
    node = s.job[job, J_BLOCKS]
    while node >= 0:
        s.nodes[node, 0] = take_host(s)
        node = s.nodes[node, 3]
    node = s.job[job, J_BLOCKS]
    while node >= 0:
        block = s.nodes[node, 2]
        s.blk[block, B_HAND] = COPYING
        hold(s, block)
        node = s.nodes[node, 3]
    s.g[G_STORED_BLOCKS] += s.job[job, J_COUNT]
    if s.job[job, J_REQUEST] >= 0:
        s.req[s.job[job, J_REQUEST], O_STORED] += s.job[job, J_COUNT]


@njit(cache=False, **INNER)
def walk(s):
    """`_prepare_lazy_store_specs`: a job of what stands next in the free queue and the host has not, -1 for none."""
    g, end = s.g, s.blk.shape[0] - 1
    if g[G_CURSOR] > 0 and s.blk[g[G_CURSOR], B_REFS] > 0:
        g[G_CURSOR] = 0
    room, covered, count = s.host_g[G_FREE], 0, 0
    job, last = np.int64(-1), np.int64(-1)
    block = np.int64(s.blk[g[G_CURSOR] if g[G_CURSOR] > 0 else end, B_NEXT])
    while block != end and covered < s.p[P_COVER] and count < room:
        g[G_CURSOR] = block
        covered += 1
        identity = s.blk[block, B_IDENTITY]
        if identity != NO_IDENTITY and not on_host(s, block, identity):
            if job < 0:
                job = new_job(s, np.int64(-1), 0, 0)
            last = append_pair(s, job, last, block, 0)
            count += 1
        block = np.int64(s.blk[block, B_NEXT])
    if job >= 0:
        take_and_hold(s, job)
    return job


@njit(cache=False, **INNER)
def select(s, request, blocks):
    """`_select_eager_blocks_to_store`, of the first `blocks` of its table: a job, -1 for none."""
    req, room, count = s.req, s.host_g[G_FREE], 0
    job, last = np.int64(-1), np.int64(-1)
    if room == 0:
        return job
    slot = req[request, R_SLOT]
    computed = (req[request, R_COMPUTED] - req[request, R_HOLDERS]) // s.p[P_BLOCK_SIZE]
    for i in range(req[request, K_STORED], min(blocks, computed)):
        block = np.int64(s.table[slot, i])
        identity = s.blk[block, B_IDENTITY]
        chosen = identity != NO_IDENTITY and s.blk[block, B_HAND] != COPYING and not on_host(s, block, identity)
        if chosen and count >= room:
            break
        if chosen:
            if job < 0:
                job = new_job(s, request, 0, 0)
            last = append_pair(s, job, last, block, 0)
            count += 1
        req[request, K_STORED] = i + 1
    if job >= 0:
        take_and_hold(s, job)
    return job


@njit(cache=False, **INNER)
def plan_store_of(s, job):
    if job >= 0:
        s.jobs[STORES, s.g[G_STORES]] = job
        s.g[G_STORES] += 1


@njit(cache=False, **INNER)
def told_as(s, i):
    """In which of the three lists that go to the workers the i-th scheduled request is."""
    if not s.flight[NOW, i, 2]:
        return RUNNING
    return AGAIN if s.req[s.flight[NOW, i, 0], R_PREEMPTIONS] > 0 else NEW


@njit(cache=False, **INNER)
def plan_filled(s):
    """`_prepare_eager_store_specs`. Workers are told of new requests first, then of those that run, then of those that
    begin again; vLLM's second model runner is told of these as of new ones."""
    for turn in range(3):
        kind = turn
        if s.p[P_RUNNER] == 2 and turn > 0:
            kind = AGAIN if turn == 1 else RUNNING
        for i in range(s.g[G_SCHEDULED]):
            if told_as(s, i) == kind:
                request = np.int64(s.flight[NOW, i, 0])
                plan_store_of(s, select(s, request, np.int64(s.req[request, R_BLOCKS])))


@njit(cache=False, **INNER)
def plan_row(s, job):
    node = s.job[job, J_BLOCKS]
    while node >= 0:
        move_block(s, s.nodes[node, 2])
        node = s.nodes[node, 3]
    write_move(s, job, s.job[job, J_COUNT])
    s.job[job, J_COPY] = s.g[G_COPY]


@njit(cache=False, **INNER)
def plan_simple(s):
    """`build_connector_meta`."""
    g = s.g
    g[G_CALLS] += 1
    g[G_SPIN] = 0 if g[G_SCHEDULED] + g[G_LOADS_OUT] > 0 else g[G_SPIN] + 1
    g[G_STORES] = 0
    for i in range(g[G_LOADS]):
        plan_row(s, np.int64(s.jobs[LOADS, i]))
    g[G_COPY] += 1
    if s.p[P_CACHING]:
        if s.p[P_LAZY]:
            plan_store_of(s, walk(s))
        else:
            plan_filled(s)
    for i in range(g[G_WAITS]):
        plan_store_of(s, np.int64(s.jobs[WAITING_FOR, i]))
    g[G_WAITS] = 0
    for i in range(g[G_STORES]):
        plan_row(s, np.int64(s.jobs[STORES, i]))
    g[G_COPY] += 1
    for i in range(g[G_GONE]):
        leave_slot(s, np.int64(s.gone[i]))
    g[G_GONE] = 0


@njit(cache=False, **INNER)
def end_request(s, request):
    """`request_finished_all_groups`, before the blocks of the request go: what is left of it is stored with the next
    call, and what its last lookup pinned is given up."""
    req = s.req
    if s.p[P_CACHING] and not s.p[P_LAZY]:
        covered = (req[request, R_COMPUTED] + s.p[P_BLOCK_SIZE] - 1) // s.p[P_BLOCK_SIZE]
        job = select(s, request, min(covered, np.int64(req[request, R_BLOCKS])))
        if job >= 0:
            s.jobs[WAITING_FOR, s.g[G_WAITS]] = job
            s.g[G_WAITS] += 1
    drop_pins(s, request)


# ---------------------------------------------------------------- ends of copies


@njit(cache=False, **INNER)
def tell_end(s, job):
    row = s.job[job, J_ROW]
    if row < s.moves.shape[0]:
        s.moves[row, M_DONE] = max(s.g[G_BEGUN] - 1, 0)
        s.moves[row, M_HEARD] = s.g[G_NOW]
    write_time(s, LOG_ENDED, row, s.g[G_NOW])


@njit(cache=False, **INNER)
def end_copy(s, jobs, start, stop, what):
    """One of the three things that are done to all blocks of a copy, before the next of them is."""
    for i in range(start, stop):
        node = s.job[jobs[i], J_BLOCKS]
        while node >= 0:
            host, block = np.int64(s.nodes[node, 0]), np.int64(s.nodes[node, 2])
            if what == 0:
                s.blk[block, B_HAND] = 0
                cache_host(s, host, block)
            elif what == 1:
                give_host(s, host)
            else:
                let_go(s, block)
            node = s.nodes[node, 3]


@njit(cache=False, **INNER)
def hear_simple(s, ended, n, loaded):
    """`update_connector_output`: loads first, each request's alone, then stores, a copy at a time. Writes to `loaded`
    the requests whose blocks are there now, and returns how many."""
    many = 0
    for i in range(n):
        job = np.int64(ended[i])
        tell_end(s, job)
        if s.job[job, J_LOAD]:
            end_copy(s, ended, i, i + 1, 1)
            end_copy(s, ended, i, i + 1, 2)
            loaded[many] = s.job[job, J_REQUEST]
            many += 1
    s.g[G_LOADS_OUT] -= many
    i = 0
    while i < n:
        stop = i + 1
        if not s.job[ended[i], J_LOAD]:
            while stop < n and s.job[ended[stop], J_COPY] == s.job[ended[i], J_COPY]:
                stop += 1
            for what in range(3):
                end_copy(s, ended, i, stop, what)
        i = stop
    for i in range(n):
        free_job(s, np.int64(ended[i]))
    return many
