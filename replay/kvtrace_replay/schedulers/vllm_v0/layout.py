"""Where the compiled scheduler keeps what: the columns of its arrays, and the names of what comes out."""

from __future__ import annotations

# What each call needs of a request: `req`, int32[n, 8]. R_TOKENS are those known, prompt and output; R_STOP how many it
# ends at; R_ASKED how many were asked for, R_RANK its place by arrival
# time, equal for equal times.
R_TOKENS, R_BLOCKS, R_STOP, R_RANK, R_STATUS, R_ASKED, R_WAY = range(7)
R_FIELDS = 8
#: R_STATUS
NEW, WAITING, RUNNING, SWAPPED, ENDED = range(5)
#: R_WAY: how it was preempted last.
NEVER, BY_RECOMPUTE, BY_SWAP = range(3)

# What is told of a request: `told`, int64[n, 12], the names below.
REQUEST_COLUMNS = (
    "first_step", "last_step", "recomputes", "swaps", "blocks_swapped_out", "blocks_swapped_in", "recomputed_tokens",
    "arrival_ns", "begun_ns", "first_token_ns", "last_token_ns", "end",
)  # fmt: skip
(
    O_FIRST, O_LAST, O_RECOMPUTES, O_SWAPS, O_OUT, O_BACK, O_AGAIN, O_ARRIVED_NS, O_BEGUN_NS, O_FIRST_NS, O_LAST_NS,
    O_END,
) = range(12)  # fmt: skip

#: How a request ended, and what the engine tells its user. O_END is a place in it.
ENDS = {
    "unfinished": None,
    "finished": "length",
    "model-length": "length",
    "aborted": "abort",
    "prompt-too-long": "length",
    "never-fits": "length",
    "dropped-recomputed": "length",
    "dropped-swapped": "length",
}
UNFINISHED, FINISHED, MODEL_LENGTH, ABORTED, PROMPT_TOO_LONG, NEVER_FITS, DROPPED_RECOMPUTED, DROPPED_SWAPPED = range(8)

# Calls: `rows`, int64[calls, 19], the names below. Free blocks and the lengths of the queues are those of the call,
# before requests that end in it give their blocks back. The last names of work are what a model of time needs.
STEP_COLUMNS = (
    "kind", "requests", "recomputed", "swapped_out", "swapped_in", "ignored", "free_gpu_blocks", "free_cpu_blocks",
    "running", "waiting", "swapped", "start_ns", "end_ns",
    "prefill_tokens", "prefill_pairs", "decode_rows", "decode_context", "blocks_swapped_in", "blocks_swapped_out",
)  # fmt: skip
(
    S_KIND, S_REQUESTS, S_RECOMPUTED, S_OUT, S_BACK, S_IGNORED, S_FREE_GPU, S_FREE_CPU, S_RUNNING, S_WAITING, S_SWAPPED,
    S_START, S_END, S_PREFILL, S_PAIRS, S_ROWS, S_CONTEXT, S_BLOCKS_IN, S_BLOCKS_OUT,
) = range(19)  # fmt: skip
S_FIELDS = len(STEP_COLUMNS)
#: The part of a row that costs time, in the order of `timing.costs.WORK`.
WORK = slice(S_PREFILL, S_FIELDS)
KINDS = ("idle", "prefill", "decode")
IDLE, PREFILL, DECODE = range(3)

# What happens to requests in a call: `moves`, int32[moves, 4]: (call, kind, request, blocks or known tokens).
M_CALL, M_KIND, M_REQUEST, M_AMOUNT = range(4)
MOVES = ("recomputed", "swapped_out", "swapped_in", "ignored")
MOVED_RECOMPUTE, MOVED_OUT, MOVED_BACK, MOVED_IGNORED = range(4)

# The settings: `p`, int64.
(
    P_BLOCK_SIZE, P_TOTAL, P_WATERMARK, P_MAX_SEQS, P_MAX_TOKENS, P_MAX_LEN, P_MODE, P_VICTIM, P_MEND_SPACE,
    P_MEND_LIVELOCK, P_MEND_LEAK, P_MEND_RETURN, P_MEND_SPARE, P_TIMED, P_ROWS, P_DETAIL, P_BY_TIME,
) = range(17)  # fmt: skip
P_FIELDS = 17
#: P_MODE and P_VICTIM are places in these.
PREEMPTIONS = ("recompute", "swap", "hybrid")
RECOMPUTE, SWAP, HYBRID = range(3)
VICTIMS = ("last", "most-blocks", "fewest-blocks")
LAST, MOST_BLOCKS, FEWEST_BLOCKS = range(3)

# The run: `g`, int64. G_NOW: ns; G_TICK: calls, and those that an idle engine did not make. G_STACKED: preempted
# requests that wait; G_COME, G_TAKEN: how many have arrived, and of these how many have been taken from the queue;
# G_NEEDLESS: victims that fell for a block that nobody needed. From G_SUMS on, the sums of the columns of work over
# all calls.
(
    G_CALL, G_NOW, G_FREE_GPU, G_FREE_CPU, G_RUNNING, G_SWAPPED, G_WAITING, G_STACKED, G_COME, G_TAKEN, G_GONE,
    G_MOVES, G_MOVES_BEFORE, G_ROWS, G_SCHEDULED, G_NEEDLESS, G_LEAKED, G_IDLE_CALLS, G_PREFILL_CALLS, G_DIED, G_TICK,
    G_GAPS,
) = range(22)  # fmt: skip
G_SUMS = 22
G_FIELDS = G_SUMS + S_FIELDS - S_PREFILL

#: What `run` returns: nothing is left; nothing can ever change; the engine died; buffers are full.
DONE, LIVELOCK, DIED, FULL = range(4)
