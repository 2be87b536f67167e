"""The one declaration of what a trace holds.

Everything else follows from the tables of this file: the tracer's and the importers' encoders take the operation
codes from :data:`OPS`, the compiled decoder takes its layout from them, the Polars and DuckDB schemas and the
reference in ``docs/format.md`` are made from :data:`TABLES`.

Standard library only: this module is imported inside the serving process.
"""

from __future__ import annotations

from typing import NamedTuple

FORMAT_MAJOR = 1
FORMAT_MINOR = 3
MAX_BLOCK_TOKENS = 1 << 24  # a block's, and a granule's


class Column(NamedTuple):
    """A column of a table.

    ``dtype``: one of ``i8 i16 i32 i64 u64 f64 bool str`` or ``enum:<name of ENUMS>``; ``unit``: what one counts in;
    ``optional``: the column is there only in traces that know it.
    """

    name: str
    dtype: str
    unit: str
    doc: str
    nullable: bool = False
    optional: bool = False


class Table(NamedTuple):
    """A table of a trace, with one row per what ``doc`` says."""

    name: str
    doc: str
    columns: tuple[Column, ...]


class Op(NamedTuple):
    """An operation of the log: ``code`` in the low four bits of its first word, ``operand`` in the high 28.

    ``words`` names the 32-bit words that follow; ``*`` marks a repeated group, ``u64`` and ``f64`` take two words.
    """

    name: str
    code: int
    operand: str
    words: str
    doc: str


BLOCK_EVENT_KINDS = ("allocate", "hit", "fill", "free", "evict", "reset", "store", "load")
FINISH_REASONS = ("stop", "length", "abort", "error", "ignored", "repetition", "other")
LOSS_REASONS = ("disk", "max-bytes", "stalled", "memory", "bug", "damage", "gap")

ENUMS: dict[str, tuple[str, ...]] = {
    "block_event": BLOCK_EVENT_KINDS,
    "finish_reason": FINISH_REASONS,
    "loss_reason": LOSS_REASONS,
}

#: Why a trace may not be followed exactly. The header lists the names that hold; ``simulate`` refuses such traces.
INEXACT = {
    "hybrid-kv-groups": "the model keeps several groups of KV blocks",
    "sliding-window": "blocks outside an attention window are freed while the request runs",
    "state-space": "the cache holds recurrent state, not keys and values",
    "speculative-decoding": "draft tokens may be rejected, so computed tokens can fall",
    "kv-connector": "a connector loads and stores blocks beside the scheduler",
    "context-parallel": "a block's tokens are spread over ranks",
    "encoder-decoder": "cross-attention blocks are kept beside the decoder's",
    "pooling": "requests produce no tokens",
    "streaming-session": "a request's tokens changed after it arrived",
    "partial-block": "the engine cached, moved or pinned a part of a block",
    "unattributed-blocks": "the owner of some allocated blocks could not be told",
    "prompt-embeddings": "prompts given as embeddings have no identity of the tracer's own",
    "untested-engine": "this engine version, or scheduler class, was never checked against the tracer",
    "attached-late": "recording began while requests were under way",
    "carried-state": "it was cut out of a longer trace, and begins with a snapshot of a run under way",
    "chosen-requests": "it was cut down to some of the requests; what the others did to the cache is not in it",
}

#: Flags of LIVE.
LIVE_RUNNING = 1  # else it waits
LIVE_SCHEDULED = 2  # it is in the scheduled set
LIVE_TABLE = 4  # its blocks are known; else they are not, as where recording began late
LIVE_BEGUN = 8  # it was scheduled before
#: Flags of KNOWN.
KNOWN_GIVES = 1  # the call before gives it a token

#: Flags of a request in the log.
REQUEST_NO_READ = 1  # the request asked not to read the prefix cache
REQUEST_FINISHED = 2  # an import: arrived and finished at once, ``output_tokens`` words follow

_ENGINE = Column("engine_index", "i16", "index", "the engine (scheduler) the row comes from")
_STEP = Column("step", "i32", "step", "0-based number of the scheduler step; between steps, the last one begun")
_REQUEST = Column("request", "i32", "request", "0-based number of the request, in order of arrival at its engine")

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        Table(
            "requests",
            "one row per request, in order of arrival",
            (
                _ENGINE,
                _REQUEST,
                Column("request_id", "str", "", "the engine's own name of the request"),
                Column("arrival_ns", "i64", "ns", "when the scheduler got it, since the trace's clock"),
                Column("arrival_s", "f64", "s", "the front end's arrival time (Unix time); ties of priority use it"),
                Column("arrival_step", "i32", "step", "the first step that could see it"),
                Column("prompt_tokens", "i32", "tokens", "length of the prompt"),
                Column("output_tokens", "i32", "tokens", "tokens generated until it finished", True),
                Column("max_tokens", "i32", "tokens", "most tokens it may generate"),
                Column("priority", "i32", "", "scheduling priority, lower first"),
                Column("tenant", "u64", "", "keyed hash of LoRA adapter and cache salt, 0 for neither"),
                Column("no_cache_read", "bool", "", "it asked not to read the prefix cache"),
                Column("cached_tokens", "i32", "tokens", "prefix-cache hit at its first admission", True),
                Column("preemptions", "i32", "times", "how often it was preempted"),
                Column("first_step", "i32", "step", "first step it was scheduled in", True),
                Column("last_step", "i32", "step", "last step it was scheduled in", True),
                Column("finish_step", "i32", "step", "the last step begun when it finished", True),
                Column(
                    "finish_empty_calls", "i32", "calls", "calls without tokens after the last step, at its end", True
                ),
                Column("finish_ns", "i64", "ns", "when its last output arrived, or it was aborted", True),
                Column("finish_reason", "enum:finish_reason", "", "why it ended", True),
                Column("chain_granules", "i32", "granules", "identities recorded for it, prompt and output"),
                Column("type", "str", "", "kind of work; only in imports that know it, as the next two", True, True),
                Column("turn", "i32", "turns", "its place in its conversation, as the file counts", True, True),
                Column("parent", "i32", "request", "the request before it in its conversation", True, True),
            ),
        ),
        Table(
            "steps",
            "one row per scheduler call that scheduled at least one token",
            (
                _ENGINE,
                _STEP,
                Column("start_ns", "i64", "ns", "when the scheduler began"),
                Column("end_ns", "i64", "ns", "when the step's output arrived", True),
                Column("requests", "i32", "requests", "requests scheduled"),
                Column("tokens", "i32", "tokens", "tokens scheduled"),
                Column("running", "i32", "requests", "requests in the running queue after scheduling"),
                Column("waiting", "i32", "requests", "requests in the waiting queue after scheduling"),
                Column("free_blocks", "i32", "blocks", "the engine's count of free blocks after scheduling"),
                Column("preempted", "i32", "requests", "requests preempted since the step before"),
                Column("empty_calls", "i32", "calls", "scheduler calls without tokens just before this step"),
            ),
        ),
        Table(
            "step_spans",
            "one row per stretch of consecutive steps in which a request was scheduled the same number of tokens",
            (
                _ENGINE,
                _REQUEST,
                Column("first_step", "i32", "step", "first step of the stretch"),
                Column("steps", "i32", "steps", "its length"),
                Column("tokens", "i32", "tokens", "tokens scheduled in each of them"),
                Column("computed_before", "i32", "tokens", "tokens computed before the first of them"),
            ),
        ),
        Table(
            "step_requests",
            "one row per step and request scheduled in it",
            (
                _ENGINE,
                _STEP,
                _REQUEST,
                Column("tokens", "i32", "tokens", "tokens scheduled for it"),
                Column("computed_before", "i32", "tokens", "tokens computed before the step"),
            ),
        ),
        Table(
            "lookups",
            "one row per prefix-cache lookup of an admitted request",
            (
                _ENGINE,
                _STEP,
                _REQUEST,
                Column("tokens_asked", "i32", "tokens", "length of the sequence looked up"),
                Column("tokens_hit", "i32", "tokens", "tokens found"),
                Column("after_preemption", "bool", "", "whether the request had been preempted before"),
            ),
        ),
        Table(
            "preemptions",
            "one row per preemption",
            (
                _ENGINE,
                _STEP,
                Column("time_ns", "i64", "ns", "when the scheduler call began"),
                _REQUEST,
                Column("blocks_lost", "i32", "blocks", "blocks it held"),
                Column("tokens_lost", "i32", "tokens", "tokens it had computed"),
            ),
        ),
        Table(
            "block_events",
            "one row per block and change of its state or of a reference to it, in the order they happened",
            (
                _ENGINE,
                _STEP,
                Column("time_ns", "i64", "ns", "begin of the scheduler call or arrival of the output it belongs to"),
                Column("request", "i32", "request", "the request that caused it", True),
                Column("kind", "enum:block_event", "", "what happened"),
                Column(
                    "block",
                    "i32",
                    "block",
                    "the block's number in the engine; null for reset, which concerns all",
                    True,
                ),
                Column("identity", "i32", "identity", "what the block holds (fill, hit) or held (free, evict)", True),
                Column("group", "i16", "index", "KV cache group", True),
            ),
        ),
        Table(
            "offloads",
            "one row per transfer of blocks to a slower tier or back, in the order they were begun",
            (
                _ENGINE,
                _STEP,
                Column("time_ns", "i64", "ns", "begin of the scheduler call that planned it"),
                Column("request", "i32", "request", "the request whose blocks they are", True),
                Column("kind", "enum:block_event", "", "`store` to the slower tier, `load` from it"),
                Column("tier", "i16", "index", "the slower tier: 1 is the host's memory, or the only one there is"),
                Column("blocks", "i32", "blocks", "blocks copied"),
                Column("bytes", "i64", "bytes", "keys and values copied, as the worker counts if it says so"),
                Column("tokens", "i32", "tokens", "of a load: tokens that the request need not compute", True),
                Column("done_step", "i32", "step", "the last step begun when the scheduler heard of its end", True),
                Column("done_ns", "i64", "ns", "when the scheduler heard of its end", True),
                Column("copy_ns", "i64", "ns", "time it took, where the worker says it of this transfer alone", True),
            ),
        ),
        Table(
            "losses",
            "one row per stretch of the log that is missing",
            (
                _ENGINE,
                Column("reason", "enum:loss_reason", "", "why"),
                Column("time_ns", "i64", "ns", "when, as far as known", True),
                Column("commits", "i64", "commits", "commits of the log that are missing", True),
                Column("events", "i64", "events", "block events that are missing", True),
                Column("detail", "str", "", "what is known of it"),
            ),
        ),
    )
}

OPS: dict[str, Op] = {
    o.name: o
    for o in (
        Op(
            "KEY",
            1,
            "n scheduled",
            "time u64, step, requests, events u64, running, waiting, outputs due, m, "
            "*n (request, tokens, computed), *m (request, blocks, filled, chain)",
            "starts a frame: all that later operations are relative to",
        ),
        Op("OUTPUT", 2, "ns since the last time", "", "the output of the oldest step without one arrived"),
        Op("CHAIN", 3, "request", "n, *n identity u64", "the request's chain grows by n identities"),
        Op(
            "LOOKUP",
            4,
            "request",
            "tokens asked, tokens hit + 1 or 0",
            "prefix-cache lookup; what follows is this request's until the next LOOKUP or SCHED. 0: no lookup was made",
        ),
        Op("HIT", 5, "n", "*n block", "the looked-up request takes a reference to n cached blocks"),
        Op("ALLOC", 6, "block", "", "one block is handed out: to the request looked up, or to SCHED's next owner"),
        Op("ALLOCN", 7, "n", "*n block", "n blocks are handed out to one owner, as ALLOC"),
        Op("FILL1", 8, "request", "identity u64", "its chain grows by one, and its next block becomes cached"),
        Op("FILL", 9, "request", "n", "its next n blocks become cached, with the identities of its chain"),
        Op("FREE", 10, "request", "n", "it gives up its n blocks, last first"),
        Op("PREEMPT", 11, "request", "tokens computed, n", "it is preempted and gives up its n blocks, last first"),
        Op("FINISH", 12, "request", "reason, output tokens", "it ended; index into FINISH_REASONS"),
        Op("BEGIN", 13, "ns since the last time", "", "a scheduler call begins"),
        Op(
            "SCHED",
            14,
            "flags + 16 * n + 65536 * k",
            "(n, k), free blocks, (running, waiting), *n (request, tokens, computed), (*k owner)",
            "the scheduler call ends. The scheduled set is the last one without finished and preempted requests, "
            "each with one token, changed by the n entries",
        ),
        Op("EXT", 15, "code + 256 * words", "see EXT_OPS", "one of the rarer operations"),
    )
}

SCHED_COUNTS = 1  # running and waiting changed: two words
SCHED_WIDE = 2  # owners are 32-bit request numbers; else one base word and 16-bit offsets
SCHED_FULL = 4  # the entries are the whole scheduled set
SCHED_BIG = 8  # n or k exceeds 12 bits: both stand in the first two words, and n = k = 0 in the operand

EXT_OPS: dict[str, Op] = {
    o.name: o
    for o in (
        Op("TIME", 1, "", "time u64", "sets the time"),
        Op(
            "REQ",
            2,
            "",
            "time u64, arrival f64, prompt tokens, max tokens, priority, flags, tenant u64, "
            "output tokens, id bytes, *id",
            "a request arrives; it gets the next number",
        ),
        Op("OWN", 3, "", "*owner", "owners of the allocations so far in this call, for what follows at once"),
        Op("RESET", 4, "", "", "every block's identity is forgotten"),
        Op("EVICT", 5, "", "*block", "the identities of these blocks are forgotten"),
        Op("SKIP", 6, "", "n", "the n oldest steps without output will get none"),
        Op("INEXACT", 7, "", "reason", "from here on the trace is inexact; index into INEXACT"),
        Op("ALLOCX", 8, "", "request, group, *block", "blocks handed out; request and group 2^32-1 if unknown"),
        Op("HITX", 9, "", "request, group, *block", "references taken to cached blocks"),
        Op("FILLX", 10, "", "request, group, *(block, identity u64)", "blocks become cached"),
        Op("FREEX", 11, "", "request, group, *block", "references given up, in this order"),
        Op("LOST", 15, "", "request, tokens computed, n", "as PREEMPT, where the blocks given up are named by FREEX"),
        Op("IDS", 12, "", "*id u64", "an import: each id is a finished request of one block"),
        Op("STORE", 13, "", "request, tier, bytes u64, done ns u64, *block", "blocks are copied to a slower tier"),
        Op("LOAD", 14, "", "request, tier, bytes u64, done ns u64, *block", "blocks are copied back"),
        Op("TYPE", 16, "", "number, type bytes, *type", "an import: names a type of requests, for ABOUT"),
        Op(
            "ABOUT",
            17,
            "",
            "request, type, turn, parent",
            "an import: what is known of a request's conversation, 2^32-1 for what is not",
        ),
        Op(
            "WHEN",
            18,
            "",
            "request, *(n, time u64)",
            "an import: from this one on, n requests arrived at time, and so on",
        ),
        Op(
            "MOVE",
            19,
            "",
            "number, request, kind + 256 * tier, tokens, first, bytes u64, *block",
            "a transfer begins: its number, greater than those before; kind 0: store, 1: load; tokens that a load "
            "spares its request; first: place of the first block in the request's table if they are its blocks in "
            "order, else 2^32-1",
        ),
        Op(
            "MOVED",
            20,
            "",
            "number, time u64, bytes u64, ns u64",
            "the scheduler heard that a transfer has ended; bytes copied and time taken, 2^64-1 for what is not told",
        ),
        Op(
            "START",
            21,
            "",
            "preempted, empty calls",
            "a cut: what follows before the first BEGIN is the state of a run under way. So many requests were "
            "preempted and so many calls made no step since the last one; the free queue is empty until QUEUE",
        ),
        Op(
            "LIVE",
            22,
            "",
            "request, flags, tokens computed, cached tokens + 1 or 0, preemptions, filled, *block",
            "a cut: a request that was under way, its first filled blocks cached. Running ones first, in the order of "
            "their queue; then those that wait",
        ),
        Op(
            "KEPT",
            23,
            "",
            "*(block, identity u64, parent u64)",
            "a cut: cached blocks, in the order in which they were filled; parent is the identity of the block "
            "before, 0 for none",
        ),
        Op("QUEUE", 24, "", "*block", "a cut: the free queue goes on with these blocks"),
        Op(
            "KNOWN",
            25,
            "",
            "*(request, tokens, tokens under way, flags, tokens lost)",
            "a cut: of requests under way, how many tokens of prompt and output are known, how many were scheduled in "
            "the call whose output is due, and the most that a preemption has cost. Flag 1: the call before gives it a "
            "token",
        ),
    )
}

MOVE_STORE, MOVE_LOAD = 0, 1
"""Kinds of MOVE, in the low byte of its third word."""

NOT_TOLD = 0xFFFFFFFFFFFFFFFF
"""What MOVED has for a figure that the engine does not tell."""

NO_REQUEST = 0xFFFFFFFF
