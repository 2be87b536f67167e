"""`from_trace`: the requests of one engine of a trace, at a block size, as a `Workload`.

Chains are recorded at granule stride: entry j stands for the whole prefix up to token (j + 1) * granule.
A block size of k granules takes every k-th entry; equal entries mean equal whole prefixes, so the
identities stay exact.

A *recorded* trace (from a serving engine) keeps full blocks only, the engine's hit cap, and the
interleaving of admissions and finishes. An *import* keeps its ids as they stand: a partial last block
counts, nothing is capped, every request is replayed at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.workload.carried import NOTHING, carried_state
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.schema import MAX_BLOCK_TOKENS

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


def from_trace(trace: Any, block_size: int | None = None, engine_index: int | None = None) -> Workload:
    """The requests that one engine of `trace` admitted, in order of their number.

    Args:
        trace: a `kvtrace_traces` Trace.
        block_size: tokens a block; default the trace's own; any multiple of its granule.
        engine_index: which engine of a trace that has several (the caller loops); default: the first.

    Recorded requests that were never admitted (no first step) are left out. Before those of a cut stand `carried`
    ones, the state that it begins with (`carried_state`). Raises UsageError for a block size that is no multiple of
    the granule, or of the engine's own in such a cut, or an engine that is not there, KvtraceError for a trace without
    chains.
    """
    header = _header(trace, engine_index)
    engine_index = int(header["engine_index"])
    if header.get("reuse_known") is False:
        raise KvtraceError(
            f"{trace.path} has times and lengths alone ({header.get('format')}): which blocks are the same is not "
            "known, so there is nothing to replay"
        )
    own_size = int(header["block_size"])
    granule = int(header.get("granule") or own_size)
    size = own_size if block_size is None else block_size
    stride = _stride(size, granule)
    recorded = header.get("source") != "import"

    requests = trace.requests.filter(pl.col("engine_index") == engine_index).sort("request")
    chains = trace.chains(engine_index)
    rows = _chain_rows(requests, chains.indptr)
    state = carried_state(trace, header, engine_index, size) if recorded else NOTHING
    begun, idle = state.begun.size, state.lengths.size
    if recorded:
        admitted = np.flatnonzero(requests["first_step"].is_not_null().to_numpy())
        numbers = requests["request"].to_numpy()
        if not np.isin(state.begun, numbers).all():
            raise KvtraceError(f"{trace.path} lacks requests that were under way when it was cut: it is damaged")
        before = np.searchsorted(numbers, state.begun)
        taken = np.concatenate([before, admitted])
        requests, rows = requests[taken], rows[taken]
    prompt_tokens = requests["prompt_tokens"].cast(pl.Int64).to_numpy().astype(np.int64)
    starts = np.asarray(chains.indptr, np.int64)[rows]
    available = np.asarray(chains.indptr, np.int64)[rows + 1] - starts

    if recorded:
        lengths = np.minimum(available // stride, _full_blocks(requests, size))
        prompt_blocks = np.minimum(prompt_tokens // size, lengths)
        hit_cap = np.maximum(prompt_tokens - 1, 0) // size
        if "no_cache_read" in requests.columns:  # vLLM's skip_reading_prefix_cache: such a request never hits
            hit_cap[requests["no_cache_read"].fill_null(False).to_numpy()] = 0
        hit_cap[:begun] = 0
        held = np.where(state.cached < 0, 0, np.maximum(prompt_blocks[:begun], state.cached // size))
        prompt_blocks[:begun] = np.minimum(held, lengths[:begun])
    else:
        lengths = -(-available // stride)
        prompt_blocks = hit_cap = lengths

    indptr = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    ids = np.ascontiguousarray(chains.identities, np.int32)
    n_identities = max(int(ids.max(initial=-1)), int(state.chains.max(initial=-1))) + 1
    if not idle and _as_they_stand(rows, lengths, indptr, chains.indptr):
        entries, identities = None, ids
    else:
        entries = _entries(starts, available, indptr, stride)
        references = np.concatenate([state.chains.astype(np.int32), ids[entries]])
        identities, n_identities = _densify(references, n_identities)
    last_tokens = np.full(lengths.size, size, np.int32)
    if not recorded:
        some = lengths > 0
        last = prompt_tokens - (lengths - 1) * size
        last_tokens[some] = np.clip(last[some], 1, size)

    def led(array: npt.NDArray[Any], value: int = 0) -> Any:
        """`array` of the requests, with `value` for each idle block that the cut carries in before them."""
        return np.concatenate([np.full(idle, value, array.dtype), array]) if idle else array

    own_bytes = header.get("bytes_per_block")
    arrivals = _arrivals(requests)
    priority, classes, held_tokens = _column(requests, "priority", np.int32), _classes(requests), _held_tokens(requests)
    return Workload(
        identities=identities,
        indptr=np.concatenate([[0], np.cumsum(state.lengths), state.chains.size + indptr[1:]]) if idle else indptr,
        prompt_blocks=led(prompt_blocks.astype(np.int32)),
        hit_cap=led(hit_cap.astype(np.int32)),
        prompt_tokens=led(prompt_tokens),
        last_tokens=led(last_tokens, size),
        schedule=_schedule(trace, requests, engine_index, idle) if recorded else None,
        raw=_raw(trace, header, engine_index, starts, available, indptr, stride, entries),
        block_size=size,
        n_identities=n_identities,
        source="recorded" if recorded else "import",
        bytes_per_block=None if own_bytes is None else int(own_bytes) * size // own_size,
        arrival_ns=None if arrivals is None else led(arrivals, int(arrivals.min())),
        priority=None if priority is None else led(priority),
        request_class=None if classes is None else led(classes),
        held_tokens=led(held_tokens),
        carried=idle + begun,
    )


def _as_they_stand(rows: I64, lengths: I64, indptr: I64, chain_indptr: npt.NDArray[Any]) -> bool:
    """Whether the workload's references are the trace's granules, all of them: then they are dense already."""
    return (
        rows.size == len(chain_indptr) - 1
        and indptr[-1] == chain_indptr[-1]
        and bool((rows == np.arange(rows.size)).all())
        and bool((lengths == np.diff(chain_indptr)).all())
    )


def _arrivals(requests: pl.DataFrame) -> I64 | None:
    """When the requests arrived; None where the trace does not know it of all of them (-1), or they are all 0."""
    times = _column(requests, "arrival_ns", np.int64)
    return times if times is not None and times.any() and (times >= 0).all() else None


def _held_tokens(requests: pl.DataFrame) -> I64:
    """Prompt and output; the very last output token is sampled, but never computed (see `_full_blocks`)."""
    output = requests["output_tokens"].cast(pl.Int64).fill_null(0)
    held = requests["prompt_tokens"].cast(pl.Int64) + output - (output > 0).cast(pl.Int64)
    return np.ascontiguousarray(held.to_numpy(), np.int64)


def _column(requests: pl.DataFrame, name: str, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
    if name not in requests.columns or requests[name].null_count():
        return None
    return np.ascontiguousarray(requests[name].to_numpy(), dtype)


def _classes(requests: pl.DataFrame) -> I32 | None:
    """int32[n]: dense numbers of the distinct (type, turn), in sorted order."""
    names = [name for name in ("type", "turn") if name in requests.columns]
    if all(requests[name].null_count() == requests.height for name in names):
        return None
    known = requests.select(names).unique().sort(names).with_row_index("class")
    own = requests.select(names).join(known, on=names, how="left", nulls_equal=True, maintain_order="left")
    return np.ascontiguousarray(own["class"].to_numpy(), np.int32)


def requests_of(trace: Any, engine_index: int | None = None) -> pl.Series:
    """The numbers (i32) of the requests that `from_trace` takes, in its order, carried ones apart."""
    header = _header(trace, engine_index)
    requests = trace.requests.filter(pl.col("engine_index") == int(header["engine_index"])).sort("request")
    if header.get("source") != "import":
        requests = requests.filter(pl.col("first_step").is_not_null())
    return requests["request"]


def _header(trace: Any, engine_index: int | None) -> dict[str, Any]:
    headers = [{"engine_index": position, **header} for position, header in enumerate(trace.engines)]
    if engine_index is None:
        return headers[0]
    for header in headers:
        if int(header["engine_index"]) == engine_index:
            return header
    known = ", ".join(str(header["engine_index"]) for header in headers)
    raise UsageError(f"the trace has no engine {engine_index}: choose from {known}")


def _stride(size: int, granule: int) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1 or size % granule:
        examples = ", ".join(str(granule * k) for k in (1, 2, 3, 4))
        raise UsageError(
            f"block size {size} is no multiple of the trace's granule of {granule} tokens: possible are "
            f"{examples}, ... (a finer granule is for `kvtrace record` or, of texts and tokens, `import`: --granule)"
        )
    if size > MAX_BLOCK_TOKENS:
        raise UsageError(f"block size {size} is too large: at most {MAX_BLOCK_TOKENS:,} tokens")
    return int(size) // granule


def _chain_rows(requests: pl.DataFrame, indptr: npt.NDArray[Any]) -> I64:
    """Which chain belongs to each request: by its number, or by its row where numbers are missing from
    the trace."""
    n_chains = len(indptr) - 1
    if requests.height == n_chains:
        return np.arange(n_chains, dtype=np.int64)
    numbers = requests["request"].cast(pl.Int64).to_numpy().astype(np.int64)
    if numbers.size and int(numbers[-1]) >= n_chains:
        raise KvtraceError(f"the trace has {requests.height} requests but {n_chains} chains: it is damaged")
    return numbers


def _full_blocks(requests: pl.DataFrame, size: int) -> I64:
    """Full blocks of prompt and output that the engine computed; where the output is unknown, no limit but the chain.

    The very last output token is sampled and never computed, so a block that it completes holds no keys for it and
    is not cached (vLLM 0.32.0, `KVCacheManager.allocate_slots`: blocks are cached up to the scheduled tokens).
    """
    output = requests["output_tokens"].cast(pl.Int64)
    tokens = requests["prompt_tokens"].cast(pl.Int64) + output - (output > 0).cast(pl.Int64)
    limit = (tokens // size).fill_null(np.iinfo(np.int64).max)
    return limit.to_numpy().astype(np.int64)


@njit
def _entries(starts: I64, available: I64, indptr: I64, stride: int) -> I64:
    """int64[n_refs]: the position, in the trace's chains, of the granule that ends each block (or the
    last one)."""
    entries = np.empty(indptr[-1], np.int64)
    for r in range(starts.size):
        for j in range(indptr[r + 1] - indptr[r]):
            entries[indptr[r] + j] = starts[r] + min((j + 1) * stride, available[r]) - 1
    return entries


@njit
def _densify(ids: I32, n_ids: int) -> tuple[I32, int]:
    """`ids` renumbered 0, 1, ... in order of first use, and how many there are."""
    number = np.full(n_ids, -1, np.int32)
    dense = np.empty(ids.size, np.int32)
    count = 0
    for i in range(ids.size):
        if number[ids[i]] < 0:
            number[ids[i]] = count
            count += 1
        dense[i] = number[ids[i]]
    return dense, count


def _raw(
    trace: Any,
    header: dict[str, Any],
    engine_index: int,
    starts: I64,
    available: I64,
    indptr: I64,
    stride: int,
    entries: I64 | None,
) -> I32 | None:
    """Dense content ids of the blocks, where the trace has them; a block of several granules is the tuple
    of theirs."""
    content = trace.raw_ids(engine_index) if header.get("source") == "import" else None
    if content is None:
        return None
    ids = np.ascontiguousarray(content, np.int32)
    if stride > 1:
        grouped = _group(ids, starts, available, indptr, stride)
        ids = np.unique(grouped, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int32)
    elif entries is not None:
        ids = ids[entries]
    else:
        return ids
    dense: I32 = _densify(ids, int(ids.max()) + 1 if ids.size else 0)[0]
    return dense


@njit
def _group(ids: I32, starts: I64, available: I64, indptr: I64, stride: int) -> npt.NDArray[np.int32]:
    """int32[n_refs, stride]: the content ids of each block's granules, -1 where the last block has fewer."""
    grouped = np.full((indptr[-1], stride), -1, np.int32)
    for r in range(starts.size):
        for j in range(indptr[r + 1] - indptr[r]):
            for k in range(min(stride, available[r] - j * stride)):
                grouped[indptr[r] + j, k] = ids[starts[r] + j * stride + k]
    return grouped


def _schedule(trace: Any, requests: pl.DataFrame, engine_index: int, idle: int) -> I64:
    """Admissions and finishes in log order.

    Within a step admissions come first (vLLM schedules, runs, then takes the outputs), in order of their
    lookups, requests without one by their number; finishes follow in order of time, then of admission.
    Before all stand the `idle` blocks that a cut carries in, then the requests that had begun before it.
    """
    n = requests.height
    own = trace.lookups.lazy().filter(pl.col("engine_index") == engine_index).with_row_index("order").collect()
    first = (
        own.join(requests.select("request", "first_step"), on="request")
        .filter(pl.col("step") == pl.col("first_step"))
        .group_by("request")
        .agg(pl.col("order").min().cast(pl.Int64))
    )
    table = requests.select("request", "first_step", "finish_step", "finish_ns").join(
        first, on="request", how="left", maintain_order="left"
    )
    late = np.iinfo(np.int64).max
    number = np.arange(n, dtype=np.int64)
    first_step = table["first_step"].cast(pl.Int64).fill_null(-1).to_numpy().astype(np.int64)
    order = table["order"].fill_null(late).to_numpy().astype(np.int64)
    admission = np.lexsort((number, order, first_step))
    rank = np.empty(n, np.int64)
    rank[admission] = number

    finished = table["finish_step"].is_not_null().to_numpy()
    finish_step = np.maximum(table["finish_step"].cast(pl.Int64).fill_null(late).to_numpy(), first_step)
    finish_ns = table["finish_ns"].cast(pl.Int64).fill_null(late).to_numpy()
    finish = np.lexsort((rank, finish_ns, finish_step))
    finish = finish[finished[finish]]

    entry = np.concatenate([admission + 1, -(finish + 1)])
    step = np.concatenate([first_step[admission], finish_step[finish]])
    # Stable: admissions, which stand first, stay before the finishes of their step.
    entry = entry[np.argsort(step, kind="stable")]
    blocks = np.repeat(np.arange(1, idle + 1), 2) * np.tile([1, -1], idle)
    return np.concatenate([blocks, np.sign(entry) * (np.abs(entry) + idle)]).astype(np.int64)
