"""A run with a tier as the operations of a `.kvt` file (`docs/format.md`), as the tracer would write them.

The rows of its log, which tell all that happened in order, become 32-bit words. What the words of the engine's own
scheduler write (`vllm_v1.words`) is written by them, on arrays of their layout.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from kvtrace_replay.schedulers.vllm_v1.layout import (
    G_CALL,
    G_EVENTS,
    G_FREE,
    G_LOG,
    G_NOW,
    G_OUTPUT,
    G_RUNNING,
    G_SCHEDULED,
    G_WAITING,
    P_TIMED,
    R_CALL,
    R_COMPUTED,
)
from kvtrace_replay.schedulers.vllm_v1.offload.events import ALLOCATE, FILL, FREE, HIT
from kvtrace_replay.schedulers.vllm_v1.offload.layout import (
    LOG_ASKED,
    LOG_CALL,
    LOG_CAME,
    LOG_EMPTY,
    LOG_ENDED,
    LOG_EVENT,
    LOG_FINISH,
    LOG_MOVE,
    LOG_OUTPUT,
    LOG_PREEMPTION,
    LOG_ROW,
    LOG_STEP,
    LOW_SIZE,
    M_BEGAN,
    M_ENDED,
)
from kvtrace_replay.schedulers.vllm_v1.words import (
    leave_set,
    log_alloc,
    log_begin,
    log_fill,
    log_finish,
    log_guess,
    log_lookup,
    log_output,
    log_preempt,
    log_sched,
    put,
)
from kvtrace_traces.compile import njit
from kvtrace_traces.schema import EXT_OPS, MOVE_LOAD, MOVE_STORE, NO_REQUEST, NOT_TOLD, OPS

OP_HIT, OP_ALLOCN, OP_FREE, OP_CHAIN = (OPS[name].code for name in ("HIT", "ALLOCN", "FREE", "CHAIN"))
EXT, MOVE, MOVED, HITX, FREEX = OPS["EXT"].code, *(EXT_OPS[name].code for name in ("MOVE", "MOVED", "HITX", "FREEX"))
HOST = 1 << 8  # the tier, above the kind
UNKNOWN = NOT_TOLD & 0xFFFFFFFF
#: Words that a row takes at most, beside a request's own; a guessed identity takes four for each granule of a block.
ROW_WORDS = 16
# Of each request, `known`, int64[n + 1, 3]: its number in the trace, how many granules of its chain are told, and how
# many of its blocks are cached. Of the run, the last row: who has come, and whose blocks are handed out, -1 for nobody.
NUMBER, GRANULES, FILLED = range(3)
COME, CONTEXT = range(2)


@njit(cache=False)
def put_time(log, g, time):
    put(log, g, time & 0xFFFFFFFF)
    put(log, g, time >> 32)


@njit(cache=False)
def same(rows, i, request, kind):
    """How many rows from `i` on are events of `kind` of one request."""
    n = i
    while n < rows.shape[0] and rows[n, 0] == LOG_EVENT and rows[n, 2] == kind and rows[n, 3] == request:
        n += 1
    return n - i


@njit(cache=False)
def comes(p, g, req, known, request, time, log, words, word_at):
    """REQ and CHAIN of a request, under the number that it has by coming now."""
    run = known.shape[0] - 1
    number = known[run, COME]
    known[request, NUMBER] = number
    known[run, COME] += 1
    start, stop, at = word_at[request], word_at[request + 1], g[G_LOG]
    log[at : at + stop - start] = words[start:stop]
    came = time if p[P_TIMED] else g[G_OUTPUT]
    log[at + 1] = np.uint32(came & 0xFFFFFFFF)
    log[at + 2] = np.uint32(came >> 32)
    chain = at + (np.int64(words[start]) >> 12) + 1  # behind REQ, whose operand says how long it is
    if chain < at + stop - start:
        log[chain] = np.uint32(number << 4 | OP_CHAIN)
    g[G_LOG] = at + stop - start
    req[number, R_CALL] = -1


@njit(cache=False)
def blocks(log, g, known, rows, i, request, kind, n):
    """HIT or ALLOCN of `n` blocks."""
    put(log, g, n << 4 | (OP_HIT if kind == HIT else OP_ALLOCN))
    for k in range(n):
        put(log, g, rows[i + k, 4])
    g[G_EVENTS] += n
    if kind == HIT:
        known[request, FILLED] += n


@njit(cache=False)
def nobodys(log, g, rows, i, kind, n):
    """HITX or FREEX of `n` blocks that a copy holds, or lets go."""
    put(log, g, EXT | ((HITX if kind == HIT else FREEX) | (2 + n) << 8) << 4)
    put(log, g, NO_REQUEST)
    put(log, g, 0)
    for k in range(n):
        put(log, g, rows[i + k, 4])
    g[G_EVENTS] += n


@njit(cache=False)
def fills(log, g, known, request, n, stride):
    """FILL of `n` blocks; identities that the trace does not know are made up."""
    number = known[request, NUMBER]
    known[request, FILLED] += n
    for nth in range(known[request, GRANULES], known[request, FILLED] * stride):
        log_guess(log, g, number, nth)
        known[request, GRANULES] = nth + 1
    log_fill(log, g, number, n)


@njit(cache=False)
def begins(log, g, known, rows, i, block_bytes):
    """MOVE: row `i`, and its blocks before it."""
    row, request, load, tokens, first = rows[i, 1], rows[i, 2], rows[i, 3], rows[i, 4], rows[i, 5]
    n = np.int64(rows[i, 6])
    put(log, g, EXT | (MOVE | (7 + n) << 8) << 4)
    put(log, g, row)
    put(log, g, known[request, NUMBER] if request >= 0 else NO_REQUEST)
    put(log, g, (MOVE_LOAD if load else MOVE_STORE) | HOST)
    put(log, g, tokens)
    put(log, g, first if first >= 0 else NO_REQUEST)
    put_time(log, g, n * block_bytes)
    for k in range(i - n, i):
        put(log, g, rows[k, 1])
    g[G_EVENTS] += n


@njit(cache=False)
def ends(p, log, g, moves, row, time):
    """MOVED: the scheduler hears of a transfer's end."""
    put(log, g, EXT | (MOVED | 7 << 8) << 4)
    put(log, g, row)
    put_time(log, g, max(time, g[G_OUTPUT]) if p[P_TIMED] else g[G_OUTPUT])
    put(log, g, UNKNOWN)
    put(log, g, UNKNOWN)
    if p[P_TIMED]:
        put_time(log, g, moves[row, M_ENDED] - moves[row, M_BEGAN])
    else:
        put(log, g, UNKNOWN)
        put(log, g, UNKNOWN)


@njit(cache=False)
def call_ends(log, g, req, sch, owners, st, free, running, waiting):
    """SCHED; the scheduled set is that of this call from here on."""
    g[G_FREE], g[G_RUNNING], g[G_WAITING] = free, running, waiting
    log_sched(log, g, req, sch, owners, st, 0)
    g[G_CALL] += 1
    for i in range(g[G_SCHEDULED]):
        req[sch[i, 0], R_CALL] = g[G_CALL]
    g[G_SCHEDULED] = 0


@njit
def encode(rows, moves, p, g, req, sch, owners, st, known, words, word_at, stride, block_bytes, log):
    """Append the words of `rows`, whole calls, to `log` at `g[G_LOG]`.

    rows: int32[., 7], as `layout` has them; moves: int64[., M_FIELDS]. p, g, req, sch, owners, st: as `vllm_v1.words`
    takes them. known: see above. words, word_at: of each request's arrival (`schedulers.log`). stride: granules in a
    block. block_bytes: 0 where not known.
    """
    run, i = known.shape[0] - 1, 0
    while i < rows.shape[0]:
        what, request = rows[i, 0], np.int64(rows[i, 1])
        time = np.int64(rows[i, 2]) | np.int64(rows[i, 3]) << LOW_SIZE
        many = 1
        if what == LOG_CAME:
            comes(p, g, req, known, request, time, log, words, word_at)
        elif what == LOG_CALL:
            g[G_NOW] = time
            known[run, CONTEXT] = -1
            log_begin(p, log, g)
        elif what == LOG_OUTPUT:
            g[G_NOW] = time
            log_output(p, log, g)
        elif what == LOG_ASKED:
            known[run, CONTEXT], known[request, FILLED] = request, 0
            log_lookup(log, g, known[request, NUMBER], rows[i, 2], rows[i, 3] - 1)
        elif what == LOG_PREEMPTION:
            request = np.int64(rows[i, 2])
            number, known[request, FILLED] = known[request, NUMBER], 0
            leave_set(req, g, number)
            log_preempt(log, g, number, rows[i, 4], rows[i, 3])
            many += same(rows, i + 1, request, FREE)
        elif what == LOG_FINISH:
            leave_set(req, g, known[request, NUMBER])
            log_finish(log, g, known[request, NUMBER], rows[i, 2], rows[i, 3], 0)
        elif what == LOG_EVENT:
            kind, request = np.int64(rows[i, 2]), np.int64(rows[i, 3])
            if request < 0:
                many = same(rows, i, request, kind)
                nobodys(log, g, rows, i, kind, many)
            elif kind == ALLOCATE and request != known[run, CONTEXT]:
                log_alloc(log, g, owners, known[request, NUMBER], np.int64(rows[i, 4]))
            elif kind in (ALLOCATE, HIT):
                many = same(rows, i, request, kind)
                blocks(log, g, known, rows, i, request, kind, many)
            elif kind == FILL:
                many = same(rows, i, request, kind)
                fills(log, g, known, request, many, stride)
            elif kind == FREE:
                many = same(rows, i, request, kind)
                known[request, FILLED] = 0
                put(log, g, known[request, NUMBER] << 4 | OP_FREE)
                put(log, g, many)
                g[G_EVENTS] += many
        elif what == LOG_MOVE:
            begins(log, g, known, rows, i, block_bytes)
        elif what == LOG_ENDED:
            ends(p, log, g, moves, request, time)
        elif what == LOG_ROW:
            n, number = g[G_SCHEDULED], known[rows[i, 2], NUMBER]
            sch[n, 0], sch[n, 1] = number, rows[i, 3]
            req[number, R_COMPUTED] = rows[i, 4]
            g[G_SCHEDULED] = n + 1
        elif what == LOG_STEP:
            call_ends(log, g, req, sch, owners, st, rows[i, 2], rows[i, 3], rows[i, 4])
        elif what == LOG_EMPTY:
            call_ends(log, g, req, sch, owners, st, rows[i, 1], rows[i, 2], rows[i, 3])
        i += many
