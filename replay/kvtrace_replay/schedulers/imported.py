"""An import as what reaches an engine: requests with lengths, times and chains, and vLLM's defaults for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.recorded import LENGTH, Recorded, recorded, since_first
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_traces.errors import KvtraceError, UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

VERSION = "0.32.0"  # whose rules hold
#: What an import has no setting of: vLLM 0.32 on a GPU of less than 70 GiB under `vllm serve`
#: (`EngineArgs.get_batch_defaults`), with asynchronous scheduling, the default where a GPU is.
DEFAULTS: dict[str, Any] = {
    "max_num_seqs": 256, "max_num_batched_tokens": 2048, "prefix_caching": True, "chunked_prefill": True,
    "long_prefill_token_threshold": 0, "scheduling_policy": "fcfs", "async_scheduling": True, "watermark": 0.0,
}  # fmt: skip
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
    requests = trace.requests.filter(pl.col("engine_index") == index).sort("request")
    if shares and header.get("reuse_known") is False:
        raise KvtraceError(
            f"{trace.path} has lengths and no blocks: what requests share is not known; `--engine vllm-v0`, where "
            "nothing is shared, takes it"
        )
    for name in ("prompt_tokens", "output_tokens", *(["arrival_ns"] if timed else [])):
        if requests[name].null_count():
            row = int(requests[name].is_null().arg_max() or 0)
            raise KvtraceError(f"request {row} of {trace.path} has no {name}: import a log that tells it")
    prompt = requests["prompt_tokens"].cast(pl.Int64).to_numpy()
    stop = prompt + np.maximum(requests["output_tokens"].cast(pl.Int64).to_numpy(), 1)
    n = len(prompt)
    if (prompt < 1).any():
        raise KvtraceError(f"request {int(np.argmax(prompt < 1))} of {trace.path} has an empty prompt: leave it out")
    chain, chain_at, hashes = np.zeros(0, np.int32), np.zeros(n + 1, np.int64), np.zeros(0, np.uint64)
    if shares:
        chain, chain_at, hashes = _full_blocks(trace.chains(index), prompt // int(header["granule"]))
    zeros, no = np.zeros(n, np.int32), np.zeros(n, bool)
    due = since_first(requests, header)
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
        request_id=requests["request_id"],
        arrival_step=zeros,
        arrival_late=no,
        abort_step=zeros - 2,
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


def _full_blocks(chains: Any, full: I64) -> tuple[I32, I64, npt.NDArray[np.uint64]]:
    """The first `full` entries of each chain, where they begin, and the hash of each identity."""
    kept = np.minimum(full, np.diff(chains.indptr))
    at = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=at[1:])
    nth = np.arange(at[-1], dtype=np.int64) - np.repeat(at[:-1], kept)
    chain = np.asarray(chains.identities)[np.repeat(chains.indptr[:-1], kept) + nth]
    return np.ascontiguousarray(chain, np.int32), at, np.ascontiguousarray(chains.hashes, np.uint64)


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
