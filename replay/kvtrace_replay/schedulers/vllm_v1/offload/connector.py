"""The connector beside the scheduler: `kv_connector/v1/offloading/scheduler.py` (0.32.0).

For one group of full attention. Where vLLM goes through the set of finished requests, they come in the order in which
they finished. A job, a store or load of one request, has lists of its chunks and of the blocks that it reads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import G_NOW
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    ALL,
    B_HAND,
    G_BEGUN,
    G_BLOCKS_FREE,
    G_CALL,
    G_GONE,
    G_JOBS,
    G_JOBS_FREE,
    G_KEYS_FREE,
    G_LOADED_BLOCKS,
    G_LOADED_TOKENS,
    G_LOADS,
    G_SCHEDULED,
    G_STAMP,
    G_STORES,
    GONE,
    I_BEING,
    I_MARK,
    I_READERS,
    INNER,
    J_ASKED,
    J_BEGIN,
    J_BLOCKS,
    J_COUNT,
    J_END,
    J_FENCED,
    J_FIRST,
    J_FLUSH,
    J_KEYS,
    J_LOAD,
    J_REQUEST,
    J_ROW,
    J_TOKENS,
    K_BLOCKS,
    K_JOBS,
    K_KEYS,
    K_LOCAL,
    K_STORED,
    L_NO_READ,
    L_PROMPT,
    LOADED,
    LOADS,
    LOG_ENDED,
    LOG_MOVE,
    LOG_MOVED,
    M_BEGAN,
    M_BLOCKS,
    M_DONE,
    M_ENDED,
    M_HEARD,
    M_LOAD,
    M_PLANNED,
    M_REQUEST,
    M_STEP,
    M_TOKENS,
    N_MOVES,
    NOW,
    O_LOADED,
    O_REASON,
    P_BLOCK_SIZE,
    P_CACHING,
    P_CHUNK_BLOCKS,
    P_PROMPT_ONLY,
    R_BLOCKS,
    R_COMPUTED,
    R_SLOT,
    R_TOKENS,
    SPARE,
    STORED,
    STORES,
    STORING,
)
from kvtrace_replay.schedulers.vllm_v1.offload.tier import (
    begin_load,
    chunk_key,
    end_load,
    end_store,
    forget_request,
    note,
    prepare_store,
    write,
    write_time,
)
from kvtrace_replay.schedulers.vllm_v1.words import ABORTED
from kvtrace_traces.compile import njit

ASK_LATER = -1


@njit(cache=False, **INNER)
def keys_known(s, request):
    """Chunks of a request whose hashes are known."""
    blocks = s.req[request, R_TOKENS] // s.p[P_BLOCK_SIZE]
    known = s.chain_at[request + 1] - s.chain_at[request]
    return min(blocks, known) // s.p[P_CHUNK_BLOCKS]


@njit(cache=False, **INNER)
def matched(s, request, local):
    """`get_num_new_matched_tokens`: tokens beyond the `local` hit that the tier has, or ASK_LATER."""
    req, size = s.req, s.p[P_BLOCK_SIZE] * s.p[P_CHUNK_BLOCKS]
    req[request, K_BLOCKS] = 0
    if req[request, K_JOBS] > 0:
        return np.int64(ASK_LATER)
    keys = keys_known(s, request)
    req[request, K_KEYS], req[request, K_LOCAL] = keys, local
    if req[request, L_NO_READ]:
        return np.int64(0)
    limit = min(np.int64(req[request, R_TOKENS]), keys * size)
    if limit - local < size:
        return np.int64(0)
    start = local // size
    c, pending = start, False
    while c < keys:
        readers = s.ids[chunk_key(s, request, c), I_READERS]
        if readers == GONE:
            break
        pending |= readers == STORING
        c += 1
    if c == start:
        return np.int64(0)
    if pending:
        return np.int64(ASK_LATER)
    tokens = min(limit, c * size) - local
    if tokens < size:
        return np.int64(0)
    if s.p[P_CACHING]:
        for i in range(start, (local + tokens + size - 1) // size):
            if s.ids[chunk_key(s, request, i), I_BEING]:
                return np.int64(ASK_LATER)
    return tokens


@njit(cache=False, **INNER)
def new_job(s, request, load, tokens):
    g = s.g
    job = np.int64(s.jobs[SPARE, g[G_JOBS_FREE] - 1])
    g[G_JOBS_FREE] -= 1
    s.jobs[ALL, g[G_JOBS]] = job
    g[G_JOBS] += 1
    s.job[job, J_REQUEST], s.job[job, J_LOAD], s.job[job, J_TOKENS] = request, load, tokens
    s.job[job, J_KEYS], s.job[job, J_BLOCKS] = -1, -1
    s.job[job, J_FENCED], s.job[job, J_FLUSH], s.job[job, J_ASKED] = 0, 0, 0
    s.job[job, J_COUNT], s.job[job, J_FIRST], s.job[job, J_BEGIN], s.job[job, J_END] = 0, -1, -1, -1
    if request >= 0:
        s.req[request, K_JOBS] += 1
    return job


@njit(cache=False, **INNER)
def push_key(s, job, chunk):
    node = s.g[G_KEYS_FREE]
    s.g[G_KEYS_FREE] = s.nodes[node, 1]
    s.nodes[node, 0], s.nodes[node, 1] = chunk, s.job[job, J_KEYS]
    s.job[job, J_KEYS] = node


@njit(cache=False, **INNER)
def push_block(s, job, block):
    node = s.g[G_BLOCKS_FREE]
    s.g[G_BLOCKS_FREE] = s.nodes[node, 3]
    s.nodes[node, 2], s.nodes[node, 3] = block, s.job[job, J_BLOCKS]
    s.job[job, J_BLOCKS] = node


@njit(cache=False, **INNER)
def move_block(s, block):
    """A block of a transfer that is planned, for its row."""
    write(s, LOG_MOVED, block, 0, 0, 0, 0, 0)


@njit(cache=False, **INNER)
def plan_load(s, request, tokens):
    """`update_state_after_alloc`: the request has blocks for what is to be loaded."""
    req, size, per = s.req, s.p[P_BLOCK_SIZE], s.p[P_CHUNK_BLOCKS]
    slot = req[request, R_SLOT]
    cached = req[request, K_LOCAL] + tokens
    first = req[request, K_LOCAL] // size
    for i in range(req[request, R_BLOCKS]):
        s.blk[s.table[slot, i], B_HAND] = s.g[G_CALL]
    chunks = (cached + size * per - 1) // (size * per)
    begin_load(s, request, first // per, chunks)
    req[request, K_STORED] = chunks
    job = new_job(s, request, 1, tokens)
    for c in range(chunks - 1, first // per - 1, -1):
        push_key(s, job, c)
        if s.p[P_CACHING]:
            s.ids[chunk_key(s, request, c), I_BEING] = 1
    s.jobs[LOADS, s.g[G_LOADS]] = job
    s.g[G_LOADS] += 1
    blocks = (cached + size - 1) // size - first
    s.g[G_LOADED_TOKENS] += tokens
    s.g[G_LOADED_BLOCKS] += blocks
    req[request, O_LOADED] += blocks


@njit(cache=False, **INNER)
def write_move(s, job, count):
    """The job, of `count` blocks, is planned."""
    g, n = s.g, s.g[N_MOVES]
    load, request, tokens = s.job[job, J_LOAD], s.job[job, J_REQUEST], s.job[job, J_TOKENS]
    s.job[job, J_ROW], s.job[job, J_COUNT] = n, count
    if n < s.moves.shape[0]:
        row = s.moves[n]
        row[M_STEP], row[M_LOAD], row[M_REQUEST] = g[G_BEGUN], load, request
        row[M_BLOCKS], row[M_TOKENS], row[M_DONE] = count, tokens, -1
        row[M_PLANNED], row[M_BEGAN], row[M_ENDED], row[M_HEARD] = g[G_NOW], -1, -1, -1
    g[N_MOVES] = n + 1
    write(s, LOG_MOVE, n, request, load, tokens, s.job[job, J_FIRST], count)


@njit(cache=False, **INNER)
def wanted(s, job):
    """Whether a block that the job reads was handed out in this call."""
    node = s.job[job, J_BLOCKS]
    while node >= 0:
        if s.blk[s.nodes[node, 2], B_HAND] == s.g[G_CALL]:
            return True
        node = s.nodes[node, 3]
    return False


@njit(cache=False, **INNER)
def plan(s):
    """`build_connector_meta`: what this call stores, and which stores must be done before its step."""
    g, req = s.g, s.req
    for i in range(g[G_SCHEDULED]):
        request = s.flight[NOW, i, 0]
        req[request, K_KEYS] = keys_known(s, request)
        slot = req[request, R_SLOT]
        first = 0 if s.flight[NOW, i, 2] else req[request, K_BLOCKS]
        for k in range(first, req[request, R_BLOCKS]):
            s.blk[s.table[slot, k], B_HAND] = g[G_CALL]
        req[request, K_BLOCKS] = req[request, R_BLOCKS]
    for i in range(g[G_JOBS]):
        job = s.jobs[ALL, i]
        if s.job[job, J_FENCED] and wanted(s, job):
            s.job[job, J_FLUSH] = 1
    for i in range(g[G_LOADS]):
        job = s.jobs[LOADS, i]
        request = s.job[job, J_REQUEST]
        slot, size = req[request, R_SLOT], s.p[P_BLOCK_SIZE]
        first = req[request, K_LOCAL] // size
        last = (req[request, K_LOCAL] + s.job[job, J_TOKENS] + size - 1) // size
        for k in range(first, last):
            move_block(s, s.table[slot, k])
        s.job[job, J_FIRST] = first
        write_move(s, job, last - first)
    g[G_STORES] = 0
    for i in range(g[G_SCHEDULED]):
        request = s.flight[NOW, i, 0]
        plan_store(s, request, np.int64(req[request, R_COMPUTED] + s.flight[NOW, i, 1]), False)
    for i in range(g[G_GONE]):
        request = s.gone[i]
        tokens = np.int64(req[request, R_COMPUTED])
        if req[request, O_REASON] != ABORTED:  # the last token's keys and values are not there
            tokens = max(np.int64(req[request, L_PROMPT]), np.int64(req[request, R_TOKENS]) - 1)
        plan_store(s, request, tokens, True)
    for i in range(g[G_GONE]):
        request = np.int64(s.gone[i])
        forget_request(s, req, request)
        leave_slot(s, request)
    g[G_GONE] = 0


@njit(cache=False, **INNER)
def leave_slot(s, request):
    """One who needed the request's table needs it no more."""
    slot = s.req[request, R_SLOT]
    if slot >= 0:
        s.slots[slot, 1] -= 1
        if s.slots[slot, 1] == 0:
            let_slot(s, slot)
            s.req[request, R_SLOT] = -1


@njit(cache=False, **INNER)
def let_slot(s, slot):
    from_end = s.slots.shape[0]
    n = s.slots[from_end - 1, 0]
    s.slots[n, 0] = slot
    s.slots[from_end - 1, 0] = n + 1


@njit(cache=False, **INNER)
def take_slot(s):
    from_end = s.slots.shape[0]
    n = s.slots[from_end - 1, 0] - 1
    s.slots[from_end - 1, 0] = n
    slot = s.slots[n, 0]
    s.slots[slot, 1] = 1
    return slot


@njit(cache=False, **INNER)
def plan_store(s, request, tokens, gone):
    """`_build_store_jobs` for one request, of which so many tokens will be computed."""
    req, per = s.req, s.p[P_CHUNK_BLOCKS]
    tokens = min(tokens, np.int64(req[request, R_TOKENS]))
    if s.p[P_PROMPT_ONLY]:
        tokens = min(tokens, np.int64(req[request, L_PROMPT]))
    chunks = min(tokens // (s.p[P_BLOCK_SIZE] * per), req[request, K_BLOCKS] // per, np.int64(req[request, K_KEYS]))
    start = np.int64(req[request, K_STORED])
    if chunks <= start:
        return
    new = prepare_store(s, req, request, start, chunks)
    if new < 0:
        return  # it is on offer again with the next call
    req[request, K_STORED] = chunks
    if new == 0:
        return
    job = new_job(s, request, 0, 0)
    slot = req[request, R_SLOT]
    count, first, last = 0, -1, -1
    for c in range(chunks - 1, start - 1, -1):
        key = chunk_key(s, request, c)
        if s.ids[key, I_MARK] == -s.g[G_STAMP]:
            push_key(s, job, c)
            count += per
            first, last = c, max(last, c)
            for k in range(per - 1, -1, -1):
                push_block(s, job, s.table[slot, c * per + k])
    node = s.job[job, J_BLOCKS]
    while node >= 0:
        move_block(s, s.nodes[node, 2])
        node = s.nodes[node, 3]
    if (last + 1 - first) * per == count:  # they follow one another in the request's table
        s.job[job, J_FIRST] = first * per
    write_move(s, job, count)
    s.jobs[STORES, s.g[G_STORES]] = job
    s.g[G_STORES] += 1
    if gone:
        s.job[job, J_FENCED] = 1
        if wanted(s, job):
            s.job[job, J_FLUSH] = 1


@njit(cache=False, **INNER)
def fence(s, request):
    """The request has finished: its blocks may be handed out while stores still read them."""
    s.req[request, K_KEYS] = keys_known(s, request)
    if s.req[request, K_JOBS] > 0:
        for i in range(s.g[G_JOBS]):
            job = s.jobs[ALL, i]
            if s.job[job, J_REQUEST] == request and not s.job[job, J_LOAD]:
                s.job[job, J_FENCED] = 1


@njit(cache=False, **INNER)
def flush(s, request):
    """The request is preempted: its stores are to be done before its blocks are written again."""
    if s.req[request, K_JOBS] > 0:
        for i in range(s.g[G_JOBS]):
            if s.job[s.jobs[ALL, i], J_REQUEST] == request:
                s.job[s.jobs[ALL, i], J_FLUSH] = 1


@njit(cache=False, **INNER)
def hear(s, ended, n, loaded):
    """`update_connector_output`: jobs have ended. Writes to `loaded` the requests whose blocks are there now, and
    returns how many."""
    g, req, many = s.g, s.req, 0
    for i in range(n):
        job = np.int64(ended[i])
        request, load = s.job[job, J_REQUEST], s.job[job, J_LOAD]
        if s.job[job, J_ROW] < s.moves.shape[0]:
            s.moves[s.job[job, J_ROW], M_DONE] = max(g[G_BEGUN] - 1, 0)
            s.moves[s.job[job, J_ROW], M_HEARD] = g[G_NOW]
        write_time(s, LOG_ENDED, s.job[job, J_ROW], g[G_NOW])
        node, count = s.job[job, J_KEYS], 0
        while node >= 0:
            node, count = s.nodes[node, 1], count + 1
        note(s, LOADED if load else STORED, count)
        node = s.job[job, J_KEYS]
        while node >= 0:
            chunk, following = np.int64(s.nodes[node, 0]), s.nodes[node, 1]
            note(s, -1, chunk_key(s, request, chunk))
            if load:
                end_load(s, request, chunk)
                s.ids[chunk_key(s, request, chunk), I_BEING] = 0
            else:
                end_store(s, request, chunk)
            s.nodes[node, 1] = g[G_KEYS_FREE]
            g[G_KEYS_FREE] = node
            node = following
        node = s.job[job, J_BLOCKS]
        while node >= 0:
            following = s.nodes[node, 3]
            s.nodes[node, 3] = g[G_BLOCKS_FREE]
            g[G_BLOCKS_FREE] = node
            node = following
        req[request, K_JOBS] -= 1
        if load:
            loaded[many] = request
            many += 1
        k = 0
        while s.jobs[ALL, k] != job:
            k += 1
        for m in range(k, g[G_JOBS] - 1):
            s.jobs[ALL, m] = s.jobs[ALL, m + 1]
        g[G_JOBS] -= 1
        s.jobs[SPARE, g[G_JOBS_FREE]] = job
        g[G_JOBS_FREE] += 1
    return many
