"""Runs the compiled scheduler: lays out its arrays, takes its log away as it fills, and hands back what happened."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core.errors import NumbaError

from kvtrace_replay.policies.refusal import reason
from kvtrace_replay.policies.registry import MAX_STATE, find_policy
from kvtrace_replay.policies.stream import Stream
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import NATIVE, Settings
from kvtrace_replay.schedulers.vllm_v1 import layout as at
from kvtrace_replay.schedulers.vllm_v1 import loop
from kvtrace_replay.schedulers.vllm_v1.choice import ABSENT, Native
from kvtrace_replay.schedulers.vllm_v1.start import carry_in
from kvtrace_replay.timing.costs import WORK, StepCosts
from kvtrace_traces.compile import warm
from kvtrace_traces.errors import KvtraceError, UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]
STEP_ROWS = 1 << 16
LOG_WORDS = 1 << 20
GAPS = 1 << 16
run_compiled: Any = loop.run
run_by_policy: Any = loop.run_by_policy


@dataclass(frozen=True, eq=False)
class Clock:
    """The times of a run, in ns since its clock began.

    Attributes:
        duration_ns: when the last output arrived.
        times: int64[n, 4], of each request: when it arrived, when its first step began, when its first token was there
            and when its last; -1 where that never was.
        gaps: int64[m, 2], (ns between two tokens of one request, how many such pairs): a distribution.
        steps: int64[steps, 2], when each began and when its output arrived, where rows of steps are kept; else empty.
    """

    duration_ns: int
    times: I64
    gaps: I64
    steps: I64


@dataclass(eq=False)
class Run:
    """What a simulated run did.

    Attributes:
        settings: at which.
        steps: scheduler calls with tokens. preemptions, evictions, allocations, fills: counts.
        hit_tokens, lookup_tokens: of all admissions; hit_tokens_after, lookup_tokens_after: of those after a
            preemption.
        finished: requests that ended. guessed: blocks cached whose tokens the trace does not know.
        requests: int32[n, 6]; columns O_* of `layout` less O_FIRST. preempted: int32[n], how often each was.
        tokens: int32[n], prompt and output at the end.
        rows: int32[steps, 9], columns `layout.S_*`, where asked for; else empty.
        clock: when all this happened, where calls have costs; else None.
        seconds: what the kernel took.
    """

    settings: Settings
    steps: int
    preemptions: int
    evictions: int
    allocations: int
    fills: int
    hit_tokens: int
    lookup_tokens: int
    hit_tokens_after: int
    lookup_tokens_after: int
    finished: int
    guessed: int
    events: int
    requests: I32
    preempted: I32
    tokens: I32
    rows: I32
    clock: Clock | None
    seconds: float


def compile_for(recorded: Recorded, settings: Settings) -> None:
    """Compile the kernel, or load it, so that runs side by side do not each do so.

    Raises KvtraceError for a policy that does not compile.
    """
    state = _state(replace(recorded, start=None), settings, "all")
    words = np.zeros(1, np.uint32)
    try:
        warm(_kernel(settings), (*state.values(), words, words, np.zeros(1, np.int64), 0))
    except NumbaError as error:
        if settings.policy == NATIVE:
            raise
        raise KvtraceError(f"policy {settings.policy!r} does not compile: {reason(error)}") from error


def _kernel(settings: Settings) -> Any:
    return run_compiled if settings.policy == NATIVE else run_by_policy


def simulate_run(recorded: Recorded, settings: Settings, **options: Any) -> Run:
    """Run `recorded` at `settings`; `options` are those of `run_in_pieces`."""
    pieces = run_in_pieces(recorded, settings, **options)
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            run: Run = stop.value
            return run


def run_in_pieces(
    recorded: Recorded,
    settings: Settings,
    *,
    arrivals: str = "step",
    costs: StepCosts | None = None,
    step_rows: bool = False,
    arrival_words: tuple[U32, I64] | None = None,
    fast: bool = True,
) -> Generator[U32, None, Run]:
    """Run `recorded` at `settings`; yields the words of the log as they come, and returns the run.

    Args:
        arrivals: a name of `recorded.ARRIVALS`; "time" needs `costs`.
        costs: what a call takes; without, nothing is timed.
        step_rows: keep a row per step.
        arrival_words: the words of each request's arrival and where they begin (`schedulers.log`); without, no log.
        fast: let requests that only decode pass many steps at once; False goes through each of them, for tests.

    Raises UsageError where some request can never be served at these settings, and where a run under way that the
    trace begins with cannot be taken up at them (`carried.Start.at`).
    """
    if arrivals == "time" and costs is None:
        raise UsageError("--arrivals time needs to know what a step costs: name a profile with --timing")
    if recorded.start is not None:
        recorded = replace(recorded, start=recorded.start.at(settings))
    _check_sizes(recorded, settings)
    state = _state(recorded, settings, arrivals, costs, step_rows, arrival_words is not None, fast)
    words, word_at = arrival_words or (np.zeros(1, np.uint32), np.zeros(recorded.n_requests + 1, np.int64))
    room = _room(recorded, settings, state["gone"])
    longest = int(np.diff(word_at).max(initial=0))
    log = np.zeros(max(LOG_WORDS, 4 * room + longest) if arrival_words else 1, np.uint32)
    g = state["g"]
    rows: list[I32] = []
    gaps: list[I64] = []
    steps: list[I64] = []
    seconds, status, kernel = 0.0, at.FULL, _kernel(settings)
    while status == at.FULL:
        begin = time.perf_counter()
        status = kernel(*state.values(), log, words, word_at, room)
        seconds += time.perf_counter() - begin
        if step_rows:
            rows.append(state["rows"][: g[at.G_STEP_ROWS]].copy())
            steps.append(state["step_ns"][: g[at.G_STEP_ROWS]].copy())
            g[at.G_STEP_ROWS] = 0
        if costs is not None:
            gaps.append(state["gaps"][: g[at.G_GAPS]].copy())
            g[at.G_GAPS] = 0
        yield log[: g[at.G_LOG]]
        g[at.G_LOG] = 0
    if g[at.G_BAD_VICTIM]:
        raise KvtraceError(f"policy {settings.policy!r} is wrong: its evict returned a block that may not be evicted")
    if status == at.STUCK:
        raise UsageError(_why_stuck(recorded, settings, int(g[at.G_STUCK])))
    clock = None
    if costs is not None:
        clock = Clock(
            duration_ns=int(g[at.G_NOW]),
            times=_since_begin(recorded, state["times"]),
            gaps=np.concatenate(gaps),
            steps=np.concatenate(steps) if steps else np.zeros((0, 2), np.int64),
        )
    return Run(
        settings=settings,
        steps=int(g[at.G_STEP]),
        preemptions=int(g[at.G_PREEMPTIONS]),
        evictions=int(g[at.G_EVICTIONS]),
        allocations=int(g[at.G_ALLOCATED]),
        fills=int(g[at.G_FILLED]),
        hit_tokens=int(g[at.G_HIT_TOKENS]),
        lookup_tokens=int(g[at.G_LOOKUP_TOKENS]),
        hit_tokens_after=int(g[at.G_HIT_AFTER]),
        lookup_tokens_after=int(g[at.G_LOOKUP_AFTER]),
        finished=int(g[at.G_FINISHED]),
        guessed=int(g[at.G_GUESSED]),
        events=int(g[at.G_EVENTS]),
        requests=_outcomes(recorded, state["req"]),
        preempted=state["req"][:-1, at.R_PREEMPTIONS].copy(),
        tokens=state["req"][:-1, at.R_TOKENS].copy(),
        rows=np.concatenate(rows) if rows else np.zeros((0, at.S_FIELDS), np.int32),
        clock=clock,
        seconds=seconds,
    )


def _outcomes(recorded: Recorded, req: I32) -> I32:
    """What became of each request; the first step of those that had begun before the trace did is not in it."""
    out = req[:-1, at.O_FIRST : at.O_HIT + 1].copy()
    if recorded.start is not None:
        out[: recorded.start.n_requests][recorded.start.begun, 0] = -1
    return out


def _since_begin(recorded: Recorded, times: I64) -> I64:
    """`Clock.times`: of requests that were under way at the begin only the last is told."""
    if recorded.start is not None:
        times[: recorded.start.n_requests, : at.T_LAST] = -1
    return times


def _state(
    recorded: Recorded,
    settings: Settings,
    arrivals: str,
    costs: StepCosts | None = None,
    step_rows: bool = False,
    logged: bool = False,
    fast: bool = True,
) -> dict[str, Any]:
    """The arrays of a run, in the order of the kernel's arguments."""
    n, blocks = recorded.n_requests, settings.num_blocks
    slots = _slots(recorded, settings)
    chain, chain_at = recorded.blocks(settings.block_size)
    identities = int(recorded.hashes.size)
    longest = int(recorded.stop.max(initial=1)) + 2 * settings.depth
    most_outputs = int((recorded.stop - recorded.prompt).max(initial=1)) + 2 * settings.depth
    req = np.zeros((n + 1, at.R_FIELDS), np.int32)
    req[:, at.R_SLOT] = -1
    req[n, [at.R_RUN_NEXT, at.R_RUN_PREV, at.R_WAIT_NEXT, at.R_WAIT_PREV]] = n
    for column, values in (
        (at.L_PROMPT, recorded.prompt),
        (at.L_STOP, recorded.stop),
        (at.L_MOST, recorded.most),
        (at.L_NO_READ, recorded.no_read),
        (at.L_REASON, recorded.reason),
        (at.L_GRANULES, np.diff(recorded.chain_at)),
    ):
        req[:n, column] = values
    req[:, [at.O_FIRST, at.O_LAST, at.O_FINISH, at.O_CACHED, at.O_REASON]] = -1
    order = np.zeros((n + 1, 5), np.int32)
    if settings.scheduling_policy == "priority" or settings.victim == "lowest-priority":
        order[:n, at.Q_RANK], order[:n, at.Q_VICTIM] = recorded.ranks()
        order[order[:n, at.Q_RANK], at.Q_REQUEST] = np.arange(n, dtype=np.int32)
    st = np.zeros((slots, at.ST_FIELDS), np.int64)
    st[:, at.ST_FREE] = np.arange(slots)[::-1]
    blk = np.zeros((blocks + 1, at.B_FIELDS), np.int32, order="F")
    blk[:, at.B_IDENTITY] = at.NO_IDENTITY
    # The free queue: 1, 2, ... in order; block 0 is the null block.
    number = np.arange(blocks + 1, dtype=np.int32)
    blk[1:blocks, at.B_NEXT], blk[blocks, at.B_NEXT] = number[2:], 1
    blk[2:, at.B_PREV], blk[1, at.B_PREV] = number[1:-1], blocks
    g = np.zeros(at.G_FIELDS, np.int64)
    g[at.G_FREE], g[at.G_SLOTS] = blocks - 1, slots
    tag, pol = _policy(recorded, settings, chain, chain_at)
    state = {
        "tag": tag,
        "pol": pol,
        "p": _parameters(recorded, settings, step_rows, logged, fast, costs is not None, arrivals == "time"),
        "g": g,
        "req": req,
        "blk": blk,
        "first": np.full(identities + 1, -1, np.int32),  # one more, that nothing holds
        "table": np.zeros((slots, longest // settings.block_size + 2), np.int32),
        "order": order,
        "chain": chain,
        "chain_at": chain_at,
        "sch": np.zeros((slots + 1, 3), np.int32),
        "owners": np.zeros(2 * blocks + slots if logged else 1, np.int32),
        "come": recorded.arrivals(arrivals),
        "gone": recorded.aborts(arrivals),
        "flights": np.zeros((settings.depth + 2, slots + 1, 3), np.int32),  # one more, to copy to
        "flight_n": np.zeros((settings.depth + 1, 3), np.int64),
        "st": st,
        "phases": _empty_lists(settings.block_size),
        "ends": _empty_lists(1 << most_outputs.bit_length()),
        "costs": np.zeros(len(WORK) + 1) if costs is None else costs.array(),
        "times": np.full((n if costs else 1, 4), -1, np.int64),
        "gaps": np.zeros((GAPS + 2 * slots if costs else 1, 2), np.int64),
        "step_ns": np.zeros((STEP_ROWS if step_rows else 1, 2), np.int64),
        "rows": np.zeros((STEP_ROWS if step_rows else 1, at.S_FIELDS), np.int32),
    }
    if recorded.start is not None:
        carry_in(recorded.start, recorded, settings, state)
    return state


def _slots(recorded: Recorded, settings: Settings) -> int:
    """Most requests that run at once."""
    running = 0 if recorded.start is None else recorded.start.running.size
    return max(min(settings.max_num_seqs, recorded.n_requests), running)


def _policy(recorded: Recorded, settings: Settings, chain: I32, chain_at: I64) -> tuple[Any, tuple[Any, ...]]:
    """The tag of who is evicted, and its state: pins and eight arrays. Empty for the engine's own rule."""
    if settings.policy == NATIVE:
        return Native(0), ()
    policy = find_policy(settings.policy)
    identities = int(recorded.hashes.size) + 1
    stream = Stream(
        refs=chain,
        indptr=chain_at,
        prompt_blocks=np.minimum(recorded.prompt // settings.block_size, np.diff(chain_at)).astype(np.int32),
        events=np.zeros(0, np.int64),
        n_identities=identities,
        semantics="prefix",
        block_size=settings.block_size,
        priority=np.ascontiguousarray(recorded.priority, np.int32),
    )
    state = policy.state(stream, settings.num_blocks - 1)
    unused = (np.zeros(0, np.int32),) * (MAX_STATE - len(state))
    return policy.tag, (np.full(identities, ABSENT, np.int32), *state, *unused)


def _empty_lists(n: int) -> I64:
    """int64[n, 3]: head, tail and length of each list."""
    lists = np.full((n, 3), -1, np.int64)
    lists[:, 2] = 0
    return lists


def _parameters(
    recorded: Recorded, settings: Settings, step_rows: bool, logged: bool, fast: bool, timed: bool, by_time: bool
) -> I64:
    rules = settings.rules
    p = np.zeros(at.P_FIELDS, np.int64)
    active = settings.max_num_active_seqs
    for place, value in (
        (at.P_BLOCK_SIZE, settings.block_size),
        (at.P_MAX_SEQS, min(settings.max_num_seqs, active or settings.max_num_seqs)),
        (at.P_MAX_TOKENS, settings.max_num_scheduled_tokens or settings.max_num_batched_tokens),
        (at.P_MAX_BATCHED, settings.max_num_batched_tokens),
        (at.P_CACHING, settings.prefix_caching),
        (at.P_CHUNKED, settings.chunked_prefill),
        (at.P_LONG, settings.long_prefill_token_threshold),
        (at.P_LONG_ADAPTIVE, settings.long_prefill_token_threshold_adaptive),
        (at.P_PRIORITY, settings.scheduling_policy == "priority"),
        (at.P_ASYNC, settings.async_scheduling),
        (at.P_DEPTH, settings.depth),
        (at.P_WATERMARK, settings.watermark_blocks if rules.watermark else 0),
        (at.P_GATE, settings.reserve_full_isl and rules.whole_sequence_gate),
        (
            at.P_UNCACHED_FIRST,
            rules.uncached_first if settings.prefix_caching else rules.uncached_first_without_caching,
        ),
        (at.P_MAX_LEN, settings.max_model_len),
        (at.P_LONE_LONG, not rules.threshold_spares_lone_request),
        (at.P_LOG, logged),
        (at.P_ROWS, step_rows),
        (at.P_STRIDE, recorded.stride(settings.block_size)),
        (at.P_FAST, fast),
        (at.P_VICTIM, rules.priority_victim),
        (at.P_SKIPS_FINISHING, rules.async_skips_finishing),
        (at.P_PASSES_LONG, not rules.unchunked_prompt_blocks),
        (at.P_TIMED, timed),
        (at.P_VICTIM_BY, at.VICTIMS.index(settings.victim)),
        (at.P_BY_TIME, by_time),
    ):
        p[place] = int(value)
    return p


def _room(recorded: Recorded, settings: Settings, aborted: I64) -> int:
    """Words that a call, its output and the aborts between them can log at most."""
    early = aborted[aborted[:, at.A_LATE] == 0, at.A_DUE]
    # Those after a step, and those after the step before that waited for calls which were not made.
    aborts = 2 * int(np.unique(early, return_counts=True)[1].max(initial=0))
    slots = _slots(recorded, settings)
    per_block = 8 + 4 * recorded.stride(settings.block_size)
    return 2 * per_block * settings.num_blocks + 64 * slots + 8 * aborts + 256


def _need(recorded: Recorded, settings: Settings, request: int) -> int:
    # The last token is sampled and never computed.
    return -(-max(int(recorded.stop[request]) - 1, int(recorded.prompt[request])) // settings.block_size)


def _check_sizes(recorded: Recorded, settings: Settings) -> None:
    longest = int(np.argmax(np.maximum(recorded.stop - 1, recorded.prompt)))
    need = _need(recorded, settings, longest)
    if need > settings.num_blocks - 1:
        raise UsageError(
            f"{settings.num_blocks} blocks of {settings.block_size} tokens can never serve request {longest}, which "
            f"needs {need}: at this block size --num-blocks must be at least {need + 1} (the null block included)"
        )


def _why_stuck(recorded: Recorded, settings: Settings, request: int) -> str:
    return (
        f"request {request} ({int(recorded.prompt[request])} prompt tokens) can never be served at "
        f"--num-blocks {settings.num_blocks} --block-size {settings.block_size} --max-num-batched-tokens "
        f"{settings.max_num_batched_tokens} --watermark {settings.watermark:g}"
        f"{'' if settings.chunked_prefill else ' --no-chunked-prefill'}: more blocks or a larger budget serve it"
    )
