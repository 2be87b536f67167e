"""An import as what reaches an engine: requests with lengths, times and chains, and vLLM's defaults for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.recorded import LENGTH, Recorded, recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.importers.batches import UNKNOWN
from kvtrace_traces.importers.opened import Imported

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

VERSION = "0.32.0"  # whose rules hold
#: What an import has no setting of: vLLM 0.32 on a GPU of less than 70 GiB under `vllm serve`
#: (`EngineArgs.get_batch_defaults`), with asynchronous scheduling, the default where a GPU is.
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 256, "max_num_batched_tokens": 2048, "prefix_caching": True, "chunked_prefill": True,
    "long_prefill_token_threshold": 0, "scheduling_policy": "fcfs", "async_scheduling": True, "watermark": 0.0,
}  # fmt: skip
COLUMNS = ("prompt_tokens", "output_tokens", "arrival_ns")
UNSET = 0  # the number of blocks of an engine that nobody ran


def requests_reaching(
    trace: Any, engine_index: int | None, arrivals: str, shares: bool = True, carried: bool = False
) -> Recorded:
    """What reaches one engine (default: the first) of a recorded trace or an import.

    Args:
        arrivals: a name of `recorded.ARRIVALS`. shares: whether blocks of requests can be one; else lengths suffice.
        carried: as of `recorded`.

    Raises UsageError where requests are to arrive at steps, or at times, that the trace does not have.
    """
    header = next((h for h in trace.engines if engine_index is None or h["engine_index"] == engine_index), None)
    if header is None or header.get("source") != "import":
        return recorded(trace, engine_index, carried)
    if arrivals == "step":
        raise UsageError(f"--arrivals step: {trace.path} is an import and has no steps; choose all or time")
    return recorded_import(trace, header, shares, arrivals == "time")


def recorded_import(trace: Any, header: dict[str, Any], shares: bool = True, timed: bool = False) -> Recorded:
    """The requests of an import, in its order.

    Its ids of full blocks are the chains of the prompts; a last id of a part of a block is no block here, and of the
    output nothing is known: its blocks are cached and never hit again. Where nobody `shares` there are no chains.

    Raises KvtraceError for requests without lengths, without times where `timed`, and for an import without blocks.
    """
    index = header["engine_index"]
    if shares and header.get("reuse_known") is False:
        raise KvtraceError(
            f"{trace.path} has lengths and no blocks: what requests share is not known; `--engine vllm-v0`, where "
            "nothing is shared, takes it"
        )
    request_id, columns = _columns(trace, index)
    for name in COLUMNS if timed else COLUMNS[:2]:
        if (columns[name] < 0).any():
            row = int(np.argmax(columns[name] < 0))
            raise KvtraceError(f"request {row} of {trace.path} has no {name}: import a log that tells it")
    prompt = columns["prompt_tokens"].astype(np.int64)
    stop = prompt + np.maximum(columns["output_tokens"], 1)
    arrival = np.maximum(columns["arrival_ns"], 0).astype(np.int64)
    n = len(prompt)
    if (prompt < 1).any():
        raise KvtraceError(f"request {int(np.argmax(prompt < 1))} of {trace.path} has an empty prompt: leave it out")
    chain, chain_at, hashes = np.zeros(0, np.int32), np.zeros(n + 1, np.int64), np.zeros(0, np.uint64)
    if shares:
        chain, chain_at, hashes = _full_blocks(trace.chains(index), prompt // int(header["granule"]))
    zeros, no = np.zeros(n, np.int32), np.zeros(n, bool)
    due = arrival - arrival.min(initial=int(arrival[0]) if n else 0)
    return Recorded(
        header={
            **header,
            "engine": "vllm",
            "engine_version": VERSION,
            "scheduler": {},
            "max_model_len": int(stop.max(initial=1)) + 1,  # a model that takes the longest request
        },
        prompt=prompt.astype(np.int32),
        stop=stop.astype(np.int32),
        most=stop.astype(np.int32),
        reason=np.full(n, LENGTH, np.int32),
        no_read=no,
        priority=zeros,
        arrival_s=due / 1e9,
        request_id=request_id,
        arrival_step=zeros,
        arrival_late=no,
        abort_step=zeros - 2,
        abort_calls=zeros,
        abort_early=no,
        abort_ns=np.zeros(n, np.int64),
        arrival_ns=due,
        due_ns=due,
        tenant=np.zeros(n, np.uint64),
        chain=chain,
        chain_at=chain_at,
        hashes=hashes,
        steps=0,
        unfinished=0,
        resets=0,
    )


def _columns(trace: Any, index: int) -> tuple[pl.Series, dict[str, npt.NDArray[Any]]]:
    """What the requests are called, and COLUMNS of them, whole numbers, negative where not known."""
    if isinstance(trace, Imported):
        return trace.request_ids, {name: trace.numbers(name) for name in COLUMNS}
    requests = trace.requests.filter(pl.col("engine_index") == index).sort("request")
    return requests["request_id"], {
        name: requests[name].cast(pl.Int64).fill_null(UNKNOWN).to_numpy() for name in COLUMNS
    }


def _full_blocks(chains: Any, full: I64) -> tuple[I32, I64, npt.NDArray[np.uint64]]:
    """The first `full` entries of each chain, where they begin, and the hash of each identity."""
    begins = np.ascontiguousarray(chains.indptr, np.int64)
    at = np.zeros(len(begins), np.int64)
    np.cumsum(np.minimum(full, np.diff(begins)), out=at[1:])
    chain = np.empty(at[-1], np.int32)
    _copy_heads(np.ascontiguousarray(chains.identities, np.int32), begins, chain, at)
    return chain, at, np.ascontiguousarray(chains.hashes, np.uint64)


@njit
def _copy_heads(whole: I32, begins: I64, heads: I32, at: I64) -> None:
    for i in range(at.size - 1):
        for k in range(at[i + 1] - at[i]):
            heads[at[i] + k] = whole[begins[i] + k]


def imported_settings(source: Recorded) -> Settings:
    """DEFAULTS, without a number of blocks."""
    return Settings(
        num_blocks=UNSET,
        block_size=source.granule,
        max_num_scheduled_tokens=DEFAULTS["max_num_batched_tokens"],
        long_prefill_token_threshold_adaptive=False,
        max_num_active_seqs=None,
        reserve_full_isl=True,
        max_model_len=int(source.header["max_model_len"]),
        rules=NEWEST,
        **DEFAULTS,
    )


def needs_blocks(settings: Settings) -> None:
    """Raises UsageError where nobody said how large the cache is."""
    if settings.num_blocks == UNSET:
        raise UsageError("an import has no cache of its own: give --num-blocks (1000, 10k, 65536tok)")
