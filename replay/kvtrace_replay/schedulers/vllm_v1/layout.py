"""Where the compiled scheduler keeps what: the columns of its arrays.

All state lives in a few arrays, so that a run can stop at any scheduler call, hand its log to Python and go on.
"""

from __future__ import annotations

# Requests: `req`, int32[n + 1, 32]. Row n is no request: its links are the ends of the queues. First their state, then
# their limits (tokens of the prompt, tokens it ends at, the most it may have, whether it may not read the cache, why it
# ends as an index into schema.FINISH_REASONS, granules of its chain in the log), then what is to be told of them.
(
    R_STATUS, R_COMPUTED, R_TOKENS, R_BLOCKS, R_CACHED, R_FLIGHT, R_STALE, R_HOLDERS,
    R_SLOT, R_RUN_NEXT, R_RUN_PREV, R_WAIT_NEXT, R_WAIT_PREV, R_CALL, R_PREEMPTIONS, R_FLAGS,
) = range(16)  # fmt: skip
L_PROMPT, L_STOP, L_MOST, L_NO_READ, L_REASON, L_GRANULES = range(16, 22)
O_FIRST, O_LAST, O_FINISH, O_CACHED, O_REASON, O_HIT = range(22, 28)
R_FIELDS = 32

# The order by priority: `order`, int32[n + 1, 5]: a heap of ranks, the rank of each request, its rank as a victim, the
# request of each rank, and a list of those set aside.
Q_HEAP, Q_RANK, Q_VICTIM, Q_REQUEST, Q_SKIPPED = range(5)
#: R_STATUS
NEW, WAITING, PREEMPTED, FINISHED, RUNNING = range(5)
FLAG_STEADY = 2  # it only decodes, and its row stands still: see `steady`
FLAG_CHUNK = 1  # the last call scheduled a part of its prefill (`Request.is_prefill_chunk`)


# Blocks: `blk`, int32[num_blocks + 1, 6], column after column in memory (see `lanes`). The last row is no block: its
# links are the ends of the free queue.
B_REFS, B_IDENTITY, B_NEXT, B_PREV, B_TWIN_NEXT, B_TWIN_PREV = range(6)
B_FIELDS = 6
NO_IDENTITY = -1
GUESSED = -2  # cached, and equal to no other: tokens that the trace does not know

# Running requests, by the slot of their block table: `st`, int64[slots, 16]. All but the order is of steady ones alone:
# the steady calls and outputs before, its blocks and those cached, its chain and its length, the steady output that is
# its last, whether the call before that leaves it out, its phase, and the links of the lists of phases and ends. The
# last column is a stack of free slots.
(
    ST_ORDER, ST_REQUEST, ST_CALLS, ST_OUTPUTS, ST_BLOCKS, ST_CACHED, ST_CHAIN, ST_KNOWN, ST_END, ST_SKIPS, ST_PHASE,
    ST_PHASE_NEXT, ST_PHASE_PREV, ST_END_NEXT, ST_END_PREV, ST_FREE,
) = range(16)  # fmt: skip
ST_FIELDS = 16

# Settings: `p`, int64.
(
    P_BLOCK_SIZE, P_MAX_SEQS, P_MAX_TOKENS, P_MAX_BATCHED, P_CACHING, P_CHUNKED, P_LONG, P_LONG_ADAPTIVE, P_PRIORITY,
    P_ASYNC, P_DEPTH, P_WATERMARK, P_GATE, P_UNCACHED_FIRST, P_MAX_LEN, P_LONE_LONG, P_LOG, P_ROWS, P_STRIDE,
    P_FAST, P_VICTIM, P_SKIPS_FINISHING, P_PASSES_LONG, P_TIMED, P_BY_TIME,
    P_VICTIM_BY,
) = range(26)  # fmt: skip
P_FIELDS = 32

# The run: `g`, int64.
(
    G_STEP, G_CALL, G_FREE, G_RUNNING, G_WAITING, G_ARRIVED, G_FINISHED_IDS, G_FLIGHTS, G_EMPTY, G_PREEMPTIONS,
    G_EVICTIONS, G_HIT_TOKENS, G_LOOKUP_TOKENS, G_GUESSED, G_LOG, G_EXPECTED, G_EVENTS, G_SLOTS, G_STEP_ROWS,
    G_PREEMPTED, G_OWNERS, G_STUCK, G_HEAP, G_SCHEDULED, G_TOKENS, G_LOGGED_RUNNING, G_LOGGED_WAITING, G_ALLOCATED,
    G_HIT_AFTER, G_LOOKUP_AFTER, G_FINISHED, G_IDLE, G_OUTPUT, G_FILLED, G_ORDER, G_STEADY, G_STEADY_CALLS, G_OUTPUTS,
    G_LATE, G_STEP_BEFORE, G_STEADY_SCHEDULED, G_ABORTED, G_POLICY_CLOCK, G_BAD_VICTIM,
    G_QUIET, G_LIVE, G_NOW, G_DEVICE, G_TOLD_LAST, G_GAPS, G_CONTEXT,
) = range(51)  # fmt: skip
G_FIELDS = 56

# What stops a run: DONE, the log or the rows of steps are full (go on after taking them), or nothing can go on.
DONE, FULL, STUCK = range(3)

# What reaches the engine from outside, once so many steps have begun: arrivals, `come`, int64[n, 3]: (due, request,
# whether late: not before the outputs of all steps begun, if nothing else is left to do), and aborts, `gone`,
# int64[m, 4]: (due, whether late: not before the output that the last step begun waits for, request, calls without
# tokens that come before, while that is the last step), sorted by when they are due, aborts then by those calls.
X_DUE, X_REQUEST, X_LATE = range(3)
A_DUE, A_LATE, A_REQUEST, A_CALLS = range(4)

# Rows of steps: `rows`, int32[capacity, 9].
(S_REQUESTS, S_TOKENS, S_RUNNING, S_WAITING, S_FREE, S_PREEMPTED, S_EMPTY, S_PREFILL, S_EVICTIONS) = range(9)
S_FIELDS = 9

# The clock: `costs`, float64[8], `timing.costs.StepCosts.array`; `times`, int64[n, 4], of each request, in ns, -1 where
# not yet; `gaps`, int64[capacity, 2], (ns between two tokens of a request, how many such pairs); `step_ns`,
# int64[capacity, 2], begin and end of each step, beside `rows`. Where nothing is timed they are of one row. They are
# plain arguments: in a tuple they made the loop three to six times slower.
T_ARRIVED, T_BEGUN, T_FIRST, T_LAST = range(4)
# Calls under way: `flights`, int32[., ., 3]: (request, tokens, sampled) of those not steady, and `flight_n`,
# int64[., 3]: how many these are, all tokens, and when the output arrives (ns).
F_NAMED, F_TOKENS, F_END = range(3)

#: P_VICTIM_BY is a place in these: who is preempted. The engine's own rule, or, of all that run, the one that arrived
#: last or first, with the fewest or the most blocks, of the lowest priority (as the engine's, by priority), or with the
#: fewest tokens computed, whose prefill is the shortest. Of several: the last to arrive.
VICTIMS = ("vllm", "last", "first", "fewest-blocks", "most-blocks", "lowest-priority", "cheapest")
BY_ENGINE, BY_LAST, BY_FIRST, BY_FEWEST, BY_MOST, BY_PRIORITY, BY_CHEAPEST = range(7)
