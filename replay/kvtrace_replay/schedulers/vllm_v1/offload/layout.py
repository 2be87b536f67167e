"""Where the compiled scheduler with a connector keeps what.

Unlike the scheduler without one (`vllm_v1.layout`), its arrays go as one tuple: a load or store costs far more than the
count that taking an array out of the tuple costs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Requests: `req`, int32[n + 3, R_FIELDS]; the last three rows are the ends of the queues. First what the pool
# and the scheduler need, then limits, then what the connector knows, then what is to be told.
(
    R_STATUS, R_COMPUTED, R_TOKENS, R_BLOCKS, R_CACHED, R_FLIGHT, R_HOLDERS, R_SLOT, R_NEXT, R_PREV, R_PREEMPTIONS,
    R_CHUNK, R_PREFILLING, R_LAST_STEP, R_QUEUE,
) = range(15)  # fmt: skip
L_PROMPT, L_STOP, L_MOST, L_NO_READ, L_REASON, L_RANK, L_VICTIM, L_ABORTED = range(15, 23)
K_BLOCKS, K_KEYS, K_STORED, K_LOCAL, K_CACHED, K_JOBS, K_LOADED, K_PINS = range(23, 31)
O_FIRST, O_LAST, O_FINISH, O_CACHED, O_REASON, O_STORED, O_LOADED = range(31, 38)
R_FIELDS = 38

#: R_STATUS
ABSENT, WAITING, RUNNING, LOADING, FINISHED, LEAVING = range(6)
#: R_QUEUE: which list a request stands in, whose end is row n + this.
WAITS, HOLDS, RUNS, NOWHERE = range(4)

# Settings: `p`, int64.
(
    P_BLOCK_SIZE, P_MAX_SEQS, P_BUDGET, P_MAX_BATCHED, P_CACHING, P_CHUNKED, P_LONG, P_ADAPTIVE, P_PRIORITY, P_ASYNC,
    P_WATERMARK, P_GATE, P_UNCACHED_FIRST, P_MAX_LEN, P_SKIPS_FINISHING, P_CHUNK_BLOCKS, P_CHUNKS, P_ARC, P_THRESHOLD,
    P_PROMPT_ONLY, P_POLLS, P_PATIENCE, P_LOG, P_TIMED, P_BY_TIME, P_SIMPLE, P_LAZY, P_COVER, P_RUNNER, P_IDLE,
    P_EMPTY,
) = range(31)  # fmt: skip
P_FIELDS = 32

# The run: `g`, int64. The first 64 are those of `vllm_v1.layout`, of which the pool and the clock use some. G_LINK_OUT,
# G_LINK_IN: when each direction of the link is free; G_OUT: when the last of the outputs under way arrives; G_LAST:
# when the last one with tokens did; G_QUIET: whether the last call changed nothing; G_EVICTED: evictions up to the last
# step; G_CURSOR: the last block that a lazy walk came to, 0 for none; G_CALLS: calls, G_ALIVE: how many there had been
# when there was last a request, G_SPIN: those since the last step without a load under way; G_COPY: copies so far;
# G_LOADS_OUT: loads under way; G_FLIGHT: of each call under
# way, its requests, the transfers that end with it, and when its output arrives.
(
    G_BEGUN, G_BUDGET, G_SCHEDULED, G_PREEMPTED, G_CALL_PREEMPTED, G_EMPTY, G_EMPTY_ROW, G_CALL, G_ARRIVED, G_ABORTS,
    G_SLOTS, G_GONE, G_LEFT, G_JOBS, G_JOBS_FREE, G_KEYS_FREE, G_BLOCKS_FREE, G_LOADS, G_STORES, G_WAITS, G_UNDER_WAY,
    G_FLIGHTS, G_CALLED, G_DONE, G_DEFERRED, G_DEFER_HEAD, G_IDLE, G_STAMP, G_ROOM, G_READY, G_PREEMPTIONS,
    G_HIT_TOKENS, G_LOOKUP_TOKENS, G_LOADED_TOKENS, G_STORED_BLOCKS, G_LOADED_BLOCKS, G_TIER_EVICTIONS, G_REFUSED,
    G_RUNNING,
    G_WAITING, G_HOLDING, G_GUESSED, G_LOADING,
    G_LOG, N_MOVES, G_LINK_OUT, G_LINK_IN, G_OUT, G_LAST, G_QUIET, G_EVICTED, G_CURSOR, G_CALLS, G_ALIVE, G_SPIN,
    G_COPY, G_LOADS_OUT, G_FLIGHT,
) = range(64, 122)  # fmt: skip
F_NAMED, F_ENDED, F_END = range(3)
F_FIELDS = 3
G_FIELDS = 128

# Jobs: `job`, int64[., J_FIELDS]: keys and blocks are heads of lists through `nodes`; J_REQUEST may be -1, nobody;
# J_COPY: with which other jobs its bytes are one copy (`simple`).
(
    J_REQUEST, J_LOAD, J_KEYS, J_BLOCKS, J_ROW, J_FENCED, J_FLUSH, J_ASKED, J_TOKENS, J_COUNT, J_FIRST, J_BEGIN, J_END,
    J_COPY,
) = range(14)  # fmt: skip
J_FIELDS = 14

# `real`, float64: ARC's target; what calls cost (`timing.costs.StepCosts.array`); what transfers cost, out and in
# (`timing.costs.TransferCosts.array`).
F_TARGET, F_CALL, F_PREFILL, F_PAIR, F_ROW, F_CONTEXT = range(6)
F_OUT, F_IN = 9, 11  # of each direction: once, and for a block
REALS = 13

# Which list a chunk is in: `where`, by identity. LRU uses T1 alone. `lists`, int64[5, 3]: head, tail, length.
NONE, T1, T2, B1, B2 = range(5)
HEAD, TAIL, COUNT = range(3)
GONE, STORING = -2, -1  # `readers` of a chunk that is not there, or not readable yet
# Bits of `flags`: what a request did with a chunk of its chain.
SEEN, INSERTED, REUSED, MISSED = 1, 2, 4, 8

#: What the tier did: codes of LOG_TIER, with how many chunks; these follow one by one, with code -1.
TIER_OPS = ("evict", "store", "stored", "load", "loaded", "refuse")
EVICT, STORE, STORED, LOAD, LOADED, REFUSE = range(6)
#: What became of a block of the host's pool: it was handed out, taken from the free queue, put to its end, cached.
HOST_OPS = ("take", "pin", "give", "cache")
TAKE, PIN, GIVE, CACHE = range(4)
# Transfers: `moves`, int64[., M_FIELDS]: as OffloadRun tells them; then, in ns, when its call was made, the copy begun
# and ended, and the scheduler heard of it.
M_STEP, M_LOAD, M_REQUEST, M_BLOCKS, M_TOKENS, M_DONE, M_PLANNED, M_BEGAN, M_ENDED, M_HEARD = range(10)
M_FIELDS = 10
# The log, `log`, int32[., 7]: what, and up to six values: (step, kind, request, block, identity); (step, request,
# tokens, computed before) of each in a step; (requests, free blocks, running, waiting, preempted, empty calls) of a
# step; (step, request, tokens asked, tokens hit, after preemption); (step, request, blocks, tokens); a block of the
# next row of `moves`; (code, value) of the tier. The others are for a trace of the run (`words`): a call begins (0,
# time); an output arrives (0, time); a request comes (request, time); one that waits gets blocks
# (request, tokens asked, tokens hit + 1 or 0); it ends (request, reason, output tokens); a transfer begins (its row,
# request, whether a load, tokens, place of its first block in the request's table or -1, blocks); it ends (its row,
# time); a call without tokens ends (free blocks, running, waiting); a block of the host (one of HOST_OPS, block,
# identity or -1).
(
    LOG_EVENT, LOG_ROW, LOG_STEP, LOG_LOOKUP, LOG_PREEMPTION, LOG_MOVED, LOG_TIER,
    LOG_CALL, LOG_OUTPUT, LOG_CAME, LOG_ASKED, LOG_FINISH, LOG_MOVE, LOG_ENDED, LOG_EMPTY, LOG_HOST,
) = range(16)  # fmt: skip
LOG_FIELDS = 7
LOW_SIZE = 31
LOW_BITS = (1 << LOW_SIZE) - 1  # of a time: the first of its two values; the other has the rest

# Steps: `rows`, int64[., S_FIELDS]: the columns `S_*` of `vllm_v1.layout`, then begin and end in ns, blocks in the
# tier, and requests that wait for a load.
S_BEGIN, S_END, S_TIER, S_LOADING = range(9, 13)
S_FIELDS = 13

# Chunks, by identity: `ids`, int64[., 7]: links of the list that it is in, loads that read it, how often it was on
# offer, the last offer that it was part of (negative if that stored it), its list, whether it is being loaded.
I_NEXT, I_PREVIOUS, I_READERS, I_OFFERED, I_MARK, I_WHERE, I_BEING = range(7)
I_FIELDS = 7
# A further column of `blk`: the call that handed the block out last; with `simple` COPYING while it is stored, or
# where its identity is guessed the host's block that holds the same, as the other one's B_HAND says.
B_HAND = 6
COPYING = -1

# Rows of `jobs`: all, free ones, loads and stores of this call, those that the worker has, stores that it has not
# begun, requests that load since this call; then those that end with the first call under way, with the second, and
# scratch.
ALL, SPARE, LOADS, STORES, WORKING, WAITING_FOR, LOADING_NOW, ENDED = range(8)
JOB_LISTS = 10
NOW = 2  # row of `flight`: the present call, (request, tokens, whether admitted)

DONE, STUCK, LIVELOCK = range(3)


#: Options of functions that only compiled ones call: they have no entry from Python, and do not count references to the
#: arrays, which the run keeps. Compiling either would take far longer than compiling what they do.
INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}


class State(NamedTuple):
    """All arrays of a run; few, for each costs where a function takes them."""

    p: Any
    g: Any
    req: Any
    blk: Any  # int32[num_blocks + 1, 7]
    first: Any
    table: Any
    slots: Any  # int32[slots + 1, 2]: free ones, and what still needs each; last row: how many are free
    chain: Any
    chain_at: Any
    flags: Any  # uint8, as chain
    ids: Any
    lists: Any
    real: Any  # float64[REALS]
    job: Any
    nodes: Any  # int32[., 4]: chunk of a request's chain, next; block, next; with `simple` the first is the host's
    jobs: Any  # int32[JOB_LISTS, .]
    flight: Any  # int32[3, ., 3]: requests of the calls under way, (request, tokens, whether sampled); see NOW
    defer: Any  # int64[., 4]: blocks that will be free: (after so many steps, slot, blocks, request)
    gone: Any  # int32: finished since the last call
    come: Any
    aborts: Any
    log: Any
    moves: Any
    times: Any  # int64[n, 4], `vllm_v1.layout.T_*`
    gaps: Any  # int64[., 2]: ns between two tokens of a request, how many such pairs
    rows: Any
    host: Any  # the host's pool (`simple`): as blk, first and g
    host_first: Any
    host_g: Any
