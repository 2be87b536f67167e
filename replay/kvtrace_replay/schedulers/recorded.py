"""`Recorded`: what reached one engine of a trace, and when; the only thing a scheduler needs to run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.schedulers.carried import Start, carried_start
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import FINISH_REASONS

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
LENGTH = FINISH_REASONS.index("length")
ENDS = [FINISH_REASONS.index(reason) for reason in ("stop", "length", "repetition")]

#: Ways in which requests can arrive, for `Recorded.arrivals`.
ARRIVALS = {
    "step": "requests arrive and are aborted at the recorded scheduler steps",
    "all": "all requests arrive before the first step; aborts at the recorded steps",
    "time": "requests arrive, and are aborted, at times; what a step takes decides which steps these meet",
}


@dataclass(frozen=True, eq=False)
class Recorded:
    """The requests of one engine, in order of arrival. Arrays have one entry per request unless said otherwise.

    Attributes:
        header: the trace's header of this engine.
        prompt, stop, most: int32; tokens of the prompt, prompt and output at its end, and the most it may have.
        reason: int32; index into FINISH_REASONS at its end.
        no_read: bool; it asked not to read the prefix cache.
        priority: int32. arrival_s: float64, the front end's time. request_id: Polars strings.
        arrival_step: int32; the first step that could see it.
        arrival_late: bool; recorded with asynchronous scheduling: whether all outputs of the steps before had arrived,
            that is, whether the engine had run dry.
        abort_step: int32; the last step begun when it was aborted, -1 before the first, -2 for never.
        abort_calls: int32; calls without tokens since that step, if it was there before them.
        abort_early: bool; whether an output was still to come that the engine waited for.
        abort_ns, arrival_ns: int64; by the clock of the log.
        due_ns: int64; when it arrives, in ns since the first did: what `--arrivals time` goes by. Recorded at the front
            end, where it tells.
        tenant: uint64.
        chain, chain_at: int32 identities at the granule, dense, and int64[n + 1] where each request's begin.
        hashes: uint64[identities], what stands in the log for each.
        steps: recorded steps; unfinished: requests whose end the trace does not have; resets: resets of the cache.
        start: the run under way that a cut begins with, None for an engine that begins idle.
    """

    header: dict[str, Any]
    prompt: I32
    stop: I32
    most: I32
    reason: I32
    no_read: npt.NDArray[np.bool_]
    priority: I32
    arrival_s: npt.NDArray[np.float64]
    request_id: pl.Series
    arrival_step: I32
    arrival_late: npt.NDArray[np.bool_]
    abort_step: I32
    abort_calls: I32
    abort_early: npt.NDArray[np.bool_]
    abort_ns: I64
    arrival_ns: I64
    due_ns: I64
    tenant: npt.NDArray[np.uint64]
    chain: I32
    chain_at: I64
    hashes: npt.NDArray[np.uint64]
    steps: int
    unfinished: int
    resets: int
    start: Start | None = None

    @property
    def n_requests(self) -> int:
        return int(self.prompt.size)

    @property
    def granule(self) -> int:
        return int(self.header.get("granule") or self.header["block_size"])

    def stride(self, block_size: int) -> int:
        """Granules in a block. Raises UsageError where there is no whole number of them."""
        if block_size < 1 or block_size % self.granule:
            examples = ", ".join(str(self.granule * k) for k in (1, 2, 3, 4))
            raise UsageError(
                f"--block-size {block_size} is no multiple of the trace's granule of {self.granule} tokens: possible "
                f"are {examples}, ... (a finer granule must be chosen while recording, --granule)"
            )
        return block_size // self.granule

    def blocks(self, block_size: int) -> tuple[I32, I64]:
        """The chains at `block_size`: int32 identities of full blocks, and int64[n + 1] where each request's begin."""
        stride = self.stride(block_size)
        if stride == 1:
            return self.chain, self.chain_at
        lengths = np.diff(self.chain_at) // stride
        at = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=at[1:])
        nth = np.arange(at[-1], dtype=np.int64) - np.repeat(at[:-1], lengths)
        ends = np.repeat(self.chain_at[:-1], lengths) + (nth + 1) * stride - 1
        return np.ascontiguousarray(self.chain[ends]), at

    def ranks(self) -> tuple[I32, I32]:
        """int32 ranks: the order of the waiting queue by priority, without ties; and that of victims, with ties.

        `Request.__lt__` compares priority, arrival time and id; `Scheduler.schedule` takes the victim with the highest
        (priority, arrival time).
        """
        n = self.n_requests
        order = np.lexsort((self.request_id.rank("ordinal").to_numpy(), self.arrival_s, self.priority))
        queue = np.empty(n, np.int32)
        queue[order] = np.arange(n, dtype=np.int32)
        changed = np.ones(n, bool)
        changed[1:] = (np.diff(self.arrival_s[order]) != 0) | (np.diff(self.priority[order]) != 0)
        victims = np.empty(n, np.int32)
        victims[order] = np.cumsum(changed).astype(np.int32)
        return queue, victims

    def arrivals(self, how: str) -> I64:
        """int64[n, 3]: (due, request, whether late); when each arrives, in order. See ARRIVALS. Requests that are under
        way at the begin come first."""
        if how not in ARRIVALS:
            raise UsageError(f"--arrivals {how} is none of {', '.join(ARRIVALS)}")
        steps = self.arrival_step.astype(np.int64)
        due = {"step": steps, "time": self.due_ns}.get(how, np.zeros(self.n_requests, np.int64))
        late = self.arrival_late if how == "step" else np.zeros(self.n_requests, bool)
        rows = np.stack([due, np.arange(self.n_requests), late], axis=1).astype(np.int64)
        begun = 0 if self.start is None else self.start.n_requests
        rows[begun:] = rows[begun:][np.argsort(due[begun:], kind="stable")]
        return np.ascontiguousarray(rows)

    def aborts(self, how: str = "step") -> I64:
        """int64[m, 4]: (due, whether late, request, calls without tokens that come before); when each is aborted, in
        order. By "time" each is aborted so long after its arrival as it was; else at the recorded calls."""
        aborted = np.flatnonzero(self.abort_step >= -1)
        if how == "time":
            due = self.due_ns[aborted] + np.maximum(self.abort_ns - self.arrival_ns, 0)[aborted]
            late = np.ones(aborted.size, bool)
            calls = np.zeros(aborted.size, np.int64)
        else:
            due = self.abort_step[aborted].astype(np.int64) + 1
            late = ~self.abort_early[aborted]
            calls = self.abort_calls[aborted].astype(np.int64)
        rows = np.stack([due, late, aborted, calls], axis=1).astype(np.int64)
        return np.ascontiguousarray(rows[np.lexsort((self.abort_ns[aborted], late, calls, due))])


def recorded(trace: Any, engine_index: int | None = None, carried: bool = False) -> Recorded:
    """What reached engine `engine_index` (default: the first) of `trace` (`kvtrace_traces` Trace).

    `carried`: whether the caller can take up the run under way that a cut begins with (`Recorded.start`).

    Raises KvtraceError for a trace without steps or chains (an import has no scheduler), and for one that is marked
    inexact, by the name of the reason.
    """
    header = next((h for h in trace.engines if engine_index is None or h["engine_index"] == engine_index), None)
    if header is None:
        known = ", ".join(str(h["engine_index"]) for h in trace.engines)
        raise UsageError(f"the trace has no engine {engine_index}: choose from {known}")
    index = header["engine_index"]
    _refuse(trace, header, carried)
    requests = trace.requests.filter(pl.col("engine_index") == index).sort("request")
    steps = trace.steps.filter(pl.col("engine_index") == index)
    if not steps.height or not requests.height:
        raise KvtraceError(f"{trace.path} has no scheduler steps, so there is nothing to run again")
    chains = trace.chains(index)
    if len(chains.indptr) - 1 != requests.height:
        raise KvtraceError(f"{trace.path} has {requests.height} requests but {len(chains.indptr) - 1} chains")
    numbers = _columns(requests)
    finished, aborted = numbers["finished"], numbers["aborted"]
    most = numbers["prompt"] + numbers["max"]
    limit = int(header.get("max_model_len") or np.iinfo(np.int32).max)
    stop = np.where(finished & ~aborted, numbers["prompt"] + numbers["output"], most)
    reason = np.where(finished & ~aborted, numbers["reason"], LENGTH)
    # The output that the engine waited for when the abort came: at a depth of two that of the call before the last one,
    # which is the last step's where a call without tokens followed.
    ends = steps["end_ns"].cast(pl.Int64).fill_null(np.iinfo(np.int64).max).to_numpy()
    behind = 1 if header["scheduler"].get("async_scheduling") else 0
    behind_last = np.where(numbers["finish_calls"] > 0, 0, behind)
    of = np.clip(numbers["finish_step"] - behind_last, 0, len(ends) - 1)
    first_ns = int(steps["start_ns"][0])
    before = numbers["finish_ns"] < first_ns
    start = carried_start(trace, header, first_ns) if carried else None
    waited, due_ns = ends[of], since_first(requests, header)
    if start is not None:
        due_ns = since_begin(requests, due_ns, first_ns, start.n_requests)
        if start.due:
            waited = np.where(numbers["finish_step"] < behind_last, first_ns + start.due_ns, waited)
    abort_step = np.where(aborted, np.where(before, -1, numbers["finish_step"]), -2)
    events = trace.block_events
    return Recorded(
        header=header,
        prompt=numbers["prompt"].astype(np.int32),
        stop=np.minimum(stop, limit).astype(np.int32),
        most=np.minimum(most, np.iinfo(np.int32).max).astype(np.int32),
        reason=reason.astype(np.int32),
        no_read=requests["no_cache_read"].fill_null(False).to_numpy(),
        priority=numbers["priority"].astype(np.int32),
        arrival_s=requests["arrival_s"].fill_null(0.0).to_numpy(),
        request_id=requests["request_id"],
        arrival_step=numbers["arrival_step"].astype(np.int32),
        arrival_late=(behind > 0)
        & (numbers["arrival_step"] > 0)
        & (numbers["arrival_ns"] >= ends[np.clip(numbers["arrival_step"] - 1, 0, len(ends) - 1)]),
        abort_step=abort_step.astype(np.int32),
        # Who came after that step was not there in all of these calls: an engine may have idled before.
        abort_calls=np.where(numbers["arrival_step"] > abort_step, 0, numbers["finish_calls"]).astype(np.int32),
        abort_early=aborted & (numbers["finish_ns"] < waited),
        abort_ns=numbers["finish_ns"],
        arrival_ns=numbers["arrival_ns"],
        due_ns=due_ns,
        tenant=requests["tenant"].to_numpy(),
        chain=np.ascontiguousarray(chains.identities, np.int32),
        chain_at=np.ascontiguousarray(chains.indptr, np.int64),
        hashes=np.ascontiguousarray(chains.hashes, np.uint64),
        steps=steps.height,
        unfinished=int((~finished).sum()),
        resets=events.filter((pl.col("engine_index") == index) & (pl.col("kind") == "reset")).height,
        start=start,
    )


def since_first(requests: pl.DataFrame, header: dict[str, Any]) -> I64:
    """int64: when each request arrived, in ns since the first did: by the front end's time where every request has one,
    for the scheduler's own is that of the step that took it up."""
    front = requests["arrival_s"] if "arrival_s" in requests.columns else pl.Series([], dtype=pl.Float64)
    known = front.is_finite().all() and (front > 0).all()
    if header.get("clock") != "simulated" and len(front) and known and not front.null_count():
        times = front.to_numpy()
        return np.asarray(np.round((times - times.min()) * 1e9), np.int64)
    own = requests["arrival_ns"].cast(pl.Int64).fill_null(0).to_numpy()
    return np.asarray(own - own.min(initial=int(own[0]) if own.size else 0), np.int64)


def since_begin(requests: pl.DataFrame, due_ns: I64, begin_ns: int, carried: int) -> I64:
    """int64: `due_ns`, in ns since the first call of a cut, 0 for the `carried` first requests. Times of the front end
    are set as late as the scheduler's own allow."""
    own = requests["arrival_ns"].cast(pl.Int64).fill_null(0).to_numpy()
    later = (own - due_ns)[carried:]
    due = np.maximum(due_ns + int(later.min(initial=2**62)) - begin_ns, 0) if later.size else np.zeros_like(due_ns)
    due[:carried] = 0
    return np.asarray(due, np.int64)


def _columns(requests: pl.DataFrame) -> dict[str, Any]:
    def number(column: str, absent: int = 0) -> I64:
        return requests[column].cast(pl.Int64).fill_null(absent).to_numpy().astype(np.int64)

    reason = requests["finish_reason"].to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    return {
        "prompt": number("prompt_tokens"),
        "output": number("output_tokens"),
        "max": np.maximum(number("max_tokens"), 1),
        "priority": number("priority"),
        "arrival_step": number("arrival_step"),
        "arrival_ns": number("arrival_ns"),
        "finish_step": number("finish_step"),
        "finish_calls": number("finish_empty_calls"),
        "finish_ns": number("finish_ns"),
        "reason": reason,
        "finished": reason >= 0,
        "aborted": (reason >= 0) & ~np.isin(reason, ENDS),
    }


def _refuse(trace: Any, header: dict[str, Any], carried: bool) -> None:
    if header.get("source") == "import" or not isinstance(header.get("scheduler"), dict):
        raise KvtraceError(
            f"{trace.path} was imported: it has no scheduler steps to run again; `kvtrace replay` takes it"
        )
    taken = ("untested-engine", "carried-state") if carried else ("untested-engine",)
    names = [name for name in header.get("inexact", ()) if name not in taken]
    if names == ["carried-state"]:
        raise KvtraceError(
            f"{trace.path} begins with a run under way, which this engine, or a tier of host memory, does not take up: "
            "simulate the trace that it was cut from"
        )
    if names:
        raise KvtraceError(
            f"{trace.path} is marked inexact ({', '.join(names)}), so its scheduler cannot be run again exactly; "
            "`kvtrace replay` takes it"
        )
