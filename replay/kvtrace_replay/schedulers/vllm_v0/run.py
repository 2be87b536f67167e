"""`simulate_v0`: runs the compiled scheduler, takes its records away as they fill, and hands back what happened."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.vllm_v0 import layout as at
from kvtrace_replay.schedulers.vllm_v0 import loop
from kvtrace_replay.schedulers.vllm_v0.requests import RequestsV0, Served, requests_of
from kvtrace_replay.schedulers.vllm_v0.settings import DEFECTS, SettingsV0
from kvtrace_replay.timing.costs import WORK, StepCosts
from kvtrace_traces.compile import warm
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
ROWS = 1 << 16
MOVES = 1 << 16
SCHEDULED = 1 << 20
GAPS = 1 << 16
#: How a run ends: all served; the names of defects.
OUTCOMES = {at.DONE: "done", at.LIVELOCK: "livelock", at.DIED: "swap-space"}
TIMES = ("arrival_ns", "begun_ns", "first_token_ns", "last_token_ns")
run_compiled: Any = loop.run


@dataclass(eq=False)
class RunV0:
    """What a simulated run of vLLM 0.4.2 did.

    A *call* is one of `LLMEngine.step` that changes something; a *step* is one that schedules requests. Calls are
    counted from 0, and `first_step` and the like are such numbers.

    Attributes:
        settings: at which.
        ended: "done", or "livelock" or "swap-space": the engine stood still, or died, with requests unfinished.
            `culprit`: the request that waits for ever, or that could not be swapped; else -1.
        calls, steps, prefill_steps, decode_steps, idle_calls: counts; a step is either all prefill or all decode, and
            an idle call only preempts or drops requests.
        recomputes, swaps: preemptions of either kind. blocks_swapped_out, blocks_swapped_in: copied.
        prefill_tokens: computed by prefills, of which `recomputed_tokens` for a second time; `decode_tokens`.
        output_tokens: sampled. finished: requests that had all they asked for, or reached the model's length.
        dropped: requests that were not. leaked_blocks: CPU blocks lost at the end.
        defects: how often each of DEFECTS that is not mended was met: runs ended, blocks leaked, requests dropped
            (no-return: those whose tokens would have fit), victims.
        duration_ns: of the clock at the end, where calls have costs; else None.
        prompt, tokens: int64[n], tokens of each prompt, and with the output at the end.
        told: int64[n, 12], REQUEST_COLUMNS of `layout`.
        gaps: int64[m, 2], (ns between two tokens of one request, how many such pairs), where calls have costs.
        rows: int64[calls, 19], STEP_COLUMNS. moves: int32[m, 4], (call, place in MOVES, request, blocks; or known
            tokens, of ignored ones). scheduled: int32[k, 2], (request, tokens), in the order of the calls, as many of
            each as its row's `requests`. Empty where not asked for.
        seconds: what the kernel took.
    """

    settings: SettingsV0
    ended: str
    culprit: int
    calls: int
    steps: int
    prefill_steps: int
    decode_steps: int
    idle_calls: int
    recomputes: int
    swaps: int
    blocks_swapped_out: int
    blocks_swapped_in: int
    prefill_tokens: int
    recomputed_tokens: int
    decode_tokens: int
    output_tokens: int
    finished: int
    dropped: int
    leaked_blocks: int
    defects: dict[str, int]
    duration_ns: int | None
    prompt: I64
    tokens: I64
    told: I64
    gaps: I64
    rows: I64
    moves: I32
    scheduled: I32
    seconds: float

    def request_columns(self) -> dict[str, Any]:
        """Columns with an entry per request: REQUEST_COLUMNS, `tokens`, and `end` and `finish_reason` as text. -1 where
        something never happened; times only where calls have costs."""
        names = list(at.ENDS)
        columns: dict[str, Any] = {name: self.told[:, n] for n, name in enumerate(at.REQUEST_COLUMNS[:-1])}
        if self.duration_ns is None:
            for name in TIMES:
                del columns[name]
        columns["tokens"] = self.tokens
        columns["end"] = [names[code] for code in self.told[:, at.O_END]]
        columns["finish_reason"] = [at.ENDS[name] for name in columns["end"]]
        return columns

    def step_columns(self) -> dict[str, Any]:
        """Columns with an entry per call: STEP_COLUMNS, `kind` as text; times only where calls have costs."""
        columns: dict[str, Any] = {name: self.rows[:, n] for n, name in enumerate(at.STEP_COLUMNS)}
        columns["kind"] = [at.KINDS[code] for code in self.rows[:, at.S_KIND]]
        if self.duration_ns is None:
            del columns["start_ns"], columns["end_ns"]
        return columns

    @property
    def times(self) -> I64:
        """int64[n, 4], ns: when each request arrived, began, had its first token and its last; -1 for never."""
        return self.told[:, [at.O_ARRIVED_NS, at.O_BEGUN_NS, at.O_FIRST_NS, at.O_LAST_NS]]

    @property
    def work(self) -> I64:
        """int64[calls, 6]: what costs time, in the order of `timing.costs.WORK` without `call`."""
        return self.rows[:, at.WORK]


def compile_v0() -> None:
    """Compile the kernel, or load it, so that runs side by side do not each do so."""
    nobody = RequestsV0(np.ones(1, np.int64), np.ones(1, np.int64))
    state = _state(nobody.checked(), SettingsV0(1), None, False, False, False)
    warm(run_compiled, tuple(state.values()))


def simulate_v0(
    requests: Recorded | RequestsV0,
    settings: SettingsV0,
    *,
    arrivals: str = "all",
    costs: StepCosts | None = None,
    by_time: bool = False,
    step_rows: bool = False,
    detail: bool = False,
) -> RunV0:
    """Serve `requests` by vLLM 0.4.2's rules (`vllm/core/scheduler.py`, `vllm/core/block_manager_v1.py`).

    Args:
        requests: those of a trace, or lengths.
        settings: of the engine.
        arrivals: for those of a trace: "all", "step", or "time", which needs `costs`.
        costs: what a call takes; without, nothing is timed.
        by_time: arrivals and aborts of RequestsV0 are in ns, not in calls; needs `costs`.
        step_rows: keep a row per call, and the moves of requests.
        detail: with these, keep which requests each call scheduled.

    What cannot go on is not an error but the run's `ended`, and what the engine drops has an `end` that says so.
    Raises UsageError for settings that 0.4.2 does not start with, and for requests that it does not take.
    """
    settings.check()
    if isinstance(requests, Recorded):
        requests, by_time = requests_of(requests, arrivals), arrivals == "time"
    if by_time and costs is None:
        raise UsageError("--arrivals time needs to know what a step costs: name a profile with --timing")
    served = requests.checked()
    state = _state(served, settings, costs, by_time, step_rows or detail, detail)
    g = state["g"]
    gaps: list[I64] = []
    rows: list[I64] = []
    moves: list[I32] = []
    scheduled: list[I32] = []
    seconds, status = 0.0, at.FULL
    while status == at.FULL:
        begin = time.perf_counter()
        status = run_compiled(*state.values())
        seconds += time.perf_counter() - begin
        if step_rows or detail:
            # A call in which the engine dies has no row, and its moves do not count.
            n_moves = g[at.G_MOVES_BEFORE] if status == at.DIED else g[at.G_MOVES]
            rows.append(state["rows"][: g[at.G_ROWS]].copy())
            moves.append(state["moves"][:n_moves].copy())
            scheduled.append(state["log"][: g[at.G_SCHEDULED]].copy())
            g[[at.G_ROWS, at.G_MOVES, at.G_SCHEDULED]] = 0
        if costs is not None:
            gaps.append(state["gaps"][: g[at.G_GAPS]].copy())
            g[at.G_GAPS] = 0
    run = _told(served, settings, state, OUTCOMES[status], costs is not None, seconds)
    if gaps:
        run.gaps = np.concatenate(gaps)
    if rows:
        run.rows, run.moves, run.scheduled = np.concatenate(rows), np.concatenate(moves), np.concatenate(scheduled)
    return run


def _told(
    served: Served, settings: SettingsV0, state: dict[str, Any], ended: str, timed: bool, seconds: float
) -> RunV0:
    g, told = state["g"], state["told"]
    sums = dict(zip(at.STEP_COLUMNS[at.WORK], g[at.G_SUMS :].tolist(), strict=True))
    tokens = state["req"][:, at.R_TOKENS].astype(np.int64)
    ends = told[:, at.O_END]
    returning = np.isin(ends, (at.DROPPED_RECOMPUTED, at.DROPPED_SWAPPED))
    size = settings.block_size
    met = {
        "swap-space": int(ended == "swap-space"),
        "livelock": int(ended == "livelock"),
        "leak": int(g[at.G_LEAKED]),
        "no-return": int((returning & (tokens <= settings.num_gpu_blocks * size)).sum()),
        "spare-block": int(g[at.G_NEEDLESS]),
    }
    assert list(met) == list(DEFECTS)
    culprit = {"swap-space": int(g[at.G_DIED]), "livelock": int(state["swapped"][0])}.get(ended, -1)
    calls, idle, prefill = int(g[at.G_CALL]), int(g[at.G_IDLE_CALLS]), int(g[at.G_PREFILL_CALLS])
    return RunV0(
        settings=settings,
        ended=ended,
        culprit=culprit,
        calls=calls,
        steps=calls - idle,
        prefill_steps=prefill,
        decode_steps=calls - idle - prefill,
        idle_calls=idle,
        recomputes=int(told[:, at.O_RECOMPUTES].sum()),
        swaps=int(told[:, at.O_SWAPS].sum()),
        blocks_swapped_out=sums["blocks_swapped_out"],
        blocks_swapped_in=sums["blocks_swapped_in"],
        prefill_tokens=sums["prefill_tokens"],
        recomputed_tokens=int(told[:, at.O_AGAIN].sum()),
        decode_tokens=sums["decode_rows"],
        output_tokens=int((tokens - served.prompt).sum()),
        finished=int(np.isin(ends, (at.FINISHED, at.MODEL_LENGTH)).sum()),
        dropped=int((returning | np.isin(ends, (at.PROMPT_TOO_LONG, at.NEVER_FITS))).sum()),
        leaked_blocks=int(g[at.G_LEAKED]),
        defects={name: count for name, count in met.items() if count},
        duration_ns=int(g[at.G_NOW]) if timed else None,
        prompt=served.prompt,
        tokens=tokens,
        told=told,
        gaps=np.zeros((0, 2), np.int64),
        rows=np.zeros((0, at.S_FIELDS), np.int64),
        moves=np.zeros((0, 4), np.int32),
        scheduled=np.zeros((0, 2), np.int32),
        seconds=seconds,
    )


def _state(
    served: Served, settings: SettingsV0, costs: StepCosts | None, by_time: bool, step_rows: bool, detail: bool
) -> dict[str, Any]:
    """The arrays of a run, in the order of the kernel's arguments."""
    n = served.prompt.size
    slots = max(min(settings.max_num_seqs, n), 1)
    asked = served.prompt + served.output
    req = np.zeros((n, at.R_FIELDS), np.int32)
    req[:, at.R_TOKENS] = served.prompt
    req[:, at.R_ASKED] = asked
    # It ends with more tokens than the model's length (`StopChecker.maybe_stop_sequence`), one too many.
    req[:, at.R_STOP] = np.minimum(asked, settings.max_model_len + 1)
    req[:, at.R_RANK] = np.unique(served.arrival_time, return_inverse=True)[1]
    told = np.zeros((n, len(at.REQUEST_COLUMNS)), np.int64)
    told[:, [at.O_FIRST, at.O_LAST, at.O_ARRIVED_NS, at.O_BEGUN_NS, at.O_FIRST_NS, at.O_LAST_NS]] = -1
    come = np.argsort(served.arrival, kind="stable")
    aborted = np.flatnonzero(served.abort >= 0)
    gone = aborted[np.argsort(served.abort[aborted], kind="stable")]
    g = np.zeros(at.G_FIELDS, np.int64)
    g[at.G_FREE_GPU], g[at.G_FREE_CPU] = settings.num_gpu_blocks, settings.num_cpu_blocks
    token_cost, block_cost = settings.costs(int(req[:, at.R_STOP].max(initial=1)))
    return {
        "p": _parameters(settings, costs is not None, by_time, step_rows, detail),
        "g": g,
        "req": req,
        "told": told,
        "running": np.zeros(slots, np.int32),
        "swapped": np.zeros(slots, np.int32),
        "stack": np.zeros(n + 1, np.int32),
        "come": come.astype(np.int32),
        "come_due": np.ascontiguousarray(served.arrival[come]),
        "gone": gone.astype(np.int32),
        "gone_due": np.ascontiguousarray(served.abort[gone]),
        "batch": np.zeros(slots, np.int32),
        "token_cost": token_cost,
        "block_cost": block_cost,
        "costs": np.zeros(len(WORK) + 1) if costs is None else costs.array(),
        "gaps": np.zeros((GAPS + 2 * slots if costs else 1, 2), np.int64),
        "rows": np.zeros((ROWS if step_rows else 1, at.S_FIELDS), np.int64),
        "moves": np.zeros(((MOVES if step_rows else 0) + 2 * slots + n, 4), np.int32),
        "log": np.zeros(((SCHEDULED if detail else 0) + slots, 2), np.int32),
    }


def _parameters(settings: SettingsV0, timed: bool, by_time: bool, step_rows: bool, detail: bool) -> I64:
    p = np.zeros(at.P_FIELDS, np.int64)
    for place, value in (
        (at.P_BLOCK_SIZE, settings.block_size),
        (at.P_TOTAL, settings.num_gpu_blocks),
        (at.P_WATERMARK, settings.watermark_blocks),
        (at.P_MAX_SEQS, settings.max_num_seqs),
        (at.P_MAX_TOKENS, settings.max_num_batched_tokens),
        (at.P_MAX_LEN, settings.max_model_len),
        (at.P_MODE, at.PREEMPTIONS.index(settings.preemption)),
        (at.P_VICTIM, at.VICTIMS.index(settings.victim)),
        (at.P_MEND_SPACE, "swap-space" in settings.mend),
        (at.P_MEND_LIVELOCK, "livelock" in settings.mend),
        (at.P_MEND_LEAK, "leak" in settings.mend),
        (at.P_MEND_RETURN, "no-return" in settings.mend),
        (at.P_MEND_SPARE, "spare-block" in settings.mend),
        (at.P_TIMED, timed),
        (at.P_ROWS, step_rows),
        (at.P_DETAIL, detail),
        (at.P_BY_TIME, by_time),
    ):
        p[place] = int(value)
    return p
