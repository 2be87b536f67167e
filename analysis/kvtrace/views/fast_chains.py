"""What follows from the chains of requests, in compiled passes: the rows of `request_blocks` and `prefixes`, and the
uses of `reuse`, much faster than their SQL."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace.views.event_arrays import known
from kvtrace.views.extra import frame
from kvtrace_traces.compile import njit

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Blocks(NamedTuple):
    """The requests of an engine with their blocks. `requests`: the rows of the table; of the i-th of them the blocks
    `indptr[i]:indptr[i + 1]` (int64), each with its `identities` (int32); `last_tokens` int32, tokens in the last of
    them; `prompt_blocks` int64, those that lie in the prompt."""

    engine: dict[str, Any]
    requests: pl.DataFrame
    indptr: I64
    identities: I32
    last_tokens: I32
    prompt_blocks: I64

    @property
    def size(self) -> int:
        """Tokens in a block."""
        return int(self.engine["block_size"])

    @property
    def numbers(self) -> I32:
        """int32: the numbers of the requests."""
        return np.ascontiguousarray(self.requests["request"].to_numpy(), np.int32)


def engines(trace: Any) -> list[dict[str, Any]]:
    """The rows of the table `engines`."""
    return frame("engines", trace).to_dicts()


def blocks_of(trace: Any, engine: dict[str, Any]) -> Blocks:
    """The chains of an engine's requests at its block size, as `request_blocks` says."""
    size, granule, imported = engine["block_size"], engine["granule"], engine["source"] == "import"
    stride = size // granule
    requests = trace.requests.filter(pl.col("engine_index") == engine["engine_index"])
    chains = trace.chains(engine["engine_index"])
    numbers = requests["request"].to_numpy()
    starts = np.asarray(chains.indptr, np.int64)[numbers]
    granules = np.asarray(chains.indptr, np.int64)[numbers + 1] - starts
    prompt, output = (requests[name].cast(pl.Int64) for name in ("prompt_tokens", "output_tokens"))
    prompts = prompt.to_numpy()
    if imported:
        lengths = -(-granules // stride)
        last = np.where(lengths > 0, np.clip(prompts - (lengths - 1) * size, 1, size), size)
    else:
        computed = (prompt + output - (output > 0).cast(pl.Int64)) // size
        full = computed.fill_null(np.iinfo(np.int64).max).to_numpy()
        lengths = np.minimum(granules // stride, np.maximum(full, 0))
        last = np.full(len(lengths), size)
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    identities = np.ascontiguousarray(chains.identities, np.int32)
    if stride > 1 or indptr[-1] != len(identities) or not np.array_equal(starts, indptr[:-1]):
        chosen = np.empty(int(indptr[-1]), np.int32)
        _choose(starts, granules, indptr, stride, identities, chosen)
        identities = chosen
    in_prompt = lengths if imported else prompts // size
    return Blocks(engine, requests, indptr, identities, last.astype(np.int32), in_prompt)


@njit
def _choose(starts: I64, granules: I64, indptr: I64, stride: int, identities: I32, chosen: I32) -> None:
    for r in range(starts.size):
        for position in range(indptr[r + 1] - indptr[r]):
            chosen[indptr[r] + position] = identities[starts[r] + min((position + 1) * stride, granules[r]) - 1]


def request_blocks(trace: Any) -> pl.DataFrame:
    """The rows of the view for all engines of a trace, by request and position."""
    parts = []
    for engine in engines(trace):
        held = blocks_of(trace, engine)
        many = len(held.identities)
        request, position, tokens = (np.empty(many, np.int32) for _ in range(3))
        in_prompt = np.empty(many, np.bool_)
        _rows(held.numbers, held.indptr, held.last_tokens, held.prompt_blocks, held.size, request, position, tokens,
              in_prompt)  # fmt: skip
        parts.append(
            pl.DataFrame(
                {
                    "engine_index": pl.repeat(engine["engine_index"], many, dtype=pl.Int16, eager=True),
                    "request": request, "position": position, "identity": held.identities, "tokens": tokens,
                    "in_prompt": in_prompt,
                }
            )
        )  # fmt: skip
    return pl.concat(parts, rechunk=False)


@njit
def _rows(
    numbers: I32, indptr: I64, last_tokens: I32, prompt_blocks: I64, size: int, request: I32, position: I32,
    tokens: I32, in_prompt: Bools,
) -> None:  # fmt: skip
    for r in range(numbers.size):
        begin, end = indptr[r], indptr[r + 1]
        for at in range(begin, end):
            request[at], position[at], tokens[at] = numbers[r], at - begin, size
            in_prompt[at] = at - begin < prompt_blocks[r]
        if end > begin:
            tokens[end - 1] = last_tokens[r]


# ------------------------------------------------------------------------------------------------------ the radix tree


def prefixes(trace: Any) -> pl.DataFrame | None:
    """The rows of the view for all engines of a trace; None where an identity does not always stand for the same
    prefix, as in a damaged log: then its SQL says what they are."""
    parts = []
    for engine in engines(trace):
        made = _nodes(blocks_of(trace, engine))
        if made is None:
            return None
        parts.append(made)
    return pl.concat(parts)


def _nodes(held: Blocks) -> pl.DataFrame | None:
    n = int(held.identities.max(initial=-1)) + 1
    depth, first = np.empty(n, np.int32), np.full(n, -1, np.int32)
    requests, tokens = np.zeros(n, np.int32), np.zeros(n, np.int32)
    if not _pass(held.indptr, held.identities, held.last_tokens, held.size, depth, first, requests, tokens):
        return None
    room = _count(held.indptr, held.identities, first, requests)
    if room < 0:
        return None
    out, counts = np.empty((5, room), np.int32), np.empty((2, room), np.int64)
    _tree(held.indptr, held.identities, first, requests, tokens, out, counts)
    node, parent, begins, blocks, row = out
    each = held.engine["bytes_per_block"]
    kept = pl.Series(blocks).cast(pl.Int64)
    return pl.DataFrame(
        {
            "engine_index": pl.repeat(held.engine["engine_index"], room, dtype=pl.Int16, eager=True),
            "node": node, "parent": known(parent, parent >= 0), "depth": begins, "blocks": blocks,
            "requests": counts[0], "first_request": held.numbers[row], "tokens": counts[1],
            "bytes": kept * each if each is not None else pl.repeat(None, room, dtype=pl.Int64, eager=True),
        }
    )  # fmt: skip


@njit
def _pass(
    indptr: I64, identities: I32, last_tokens: I32, size: int, depth: I32, first: I32, requests: I32, tokens: I32
) -> bool:
    """Fills, by identity, its place, the lowest request (its row), the number of requests and the most tokens; False
    where it has several places, or comes twice in a request."""
    for r in range(last_tokens.size):
        begin, end = indptr[r], indptr[r + 1]
        for at in range(begin, end):
            one = np.intp(np.uint32(identities[at]))
            if first[one] < 0:
                first[one], depth[one] = r, at - begin
            elif depth[one] != at - begin:
                return False
            requests[one] += 1
            tokens[one] = max(tokens[one], last_tokens[r] if at == end - 1 else size)
    return True


@njit
def _count(indptr: I64, identities: I32, first: I32, requests: I32) -> int:
    """How many nodes there are; -1 where the blocks of one do not lie behind one another."""
    nodes = 0
    for r in range(indptr.size - 1):
        before, own = np.int32(0), False
        for at in range(indptr[r], indptr[r + 1]):
            one = np.intp(np.uint32(identities[at]))
            if first[one] != r:
                if own:
                    return -1
                continue
            if not own or requests[one] != before:
                if own and requests[one] > before:
                    return -1
                nodes += 1
            before, own = requests[one], True
    return nodes


@njit
def _tree(indptr: I64, identities: I32, first: I32, requests: I32, tokens: I32, out: I32, counts: I64) -> None:
    """Fills `out` int32[5, nodes]: last identity, the identity before the first (-1), the depth of the first, blocks,
    row of the first request; `counts` int64[2, nodes]: requests and tokens."""
    node = -1
    for r in range(indptr.size - 1):
        own, before = False, np.int32(-1)
        for at in range(indptr[r], indptr[r + 1]):
            one = np.intp(np.uint32(identities[at]))
            if first[one] == r:
                if not own or requests[one] != counts[0, node]:
                    node += 1
                    out[1, node], out[2, node], out[3, node], out[4, node] = before, at - indptr[r], 0, r
                    counts[0, node], counts[1, node] = requests[one], 0
                out[0, node] = identities[at]
                out[3, node] += 1
                counts[1, node] += tokens[one]
                own = True
            before = identities[at]


# --------------------------------------------------------------------------------------------------------------- reuse


def reuse(trace: Any) -> pl.DataFrame:
    """The rows of the view `reuse` for all engines of a trace, in order of use."""
    return pl.concat([_uses(trace, engine) for engine in engines(trace)], rechunk=False)


def _uses(trace: Any, engine: dict[str, Any]) -> pl.DataFrame:
    from kvtrace_replay.reuse import reuse_distances

    held = blocks_of(trace, engine)
    order, times = _order(trace, held)
    lengths = np.diff(held.indptr)[order]
    ends = np.cumsum(lengths)
    many = int(ends[-1]) if ends.size else 0
    request, position, identity = (np.empty(many, np.int32) for _ in range(3))
    row = np.empty(many, np.int32)
    _used(order, held.indptr, held.identities, held.numbers, request, position, identity, row)
    distance, previous = reuse_distances(identity, int(identity.max(initial=-1)) + 1)
    used_ns, since = np.empty(many, np.int64), np.empty(many, np.int64)
    before, nth = np.empty(many, np.int32), row
    _since(row, times, previous, request, used_ns, since, before, nth)
    told = distance >= 0
    timed = bool((times >= 0).all())
    return pl.DataFrame(
        {
            "engine_index": pl.repeat(engine["engine_index"], many, dtype=pl.Int16, eager=True),
            "request": request, "position": position, "identity": identity,
            "time_ns": known(used_ns, np.ones(many, np.bool_) if timed else used_ns >= 0), "nth_use": nth,
            "previous_request": known(before, told), "distance_blocks": known(distance, told),
            "reuse_ns": known(since, told if timed else told & (since >= 0)),
        }
    )  # fmt: skip


def _order(trace: Any, held: Blocks) -> tuple[I64, I64]:
    """The rows of the requests in the order of their uses; and int64, by row: when that was, -1 where not known."""
    mine = pl.col("engine_index") == held.engine["engine_index"]
    rows = held.requests.select("request", "first_step", "arrival_ns").with_row_index("row")
    if held.engine["source"] == "import":
        arrivals = rows["arrival_ns"]
        told = bool((arrivals > 0).any())
        times = arrivals.fill_null(-1).to_numpy() if told else np.full(rows.height, -1)
        return np.arange(rows.height), np.ascontiguousarray(times, np.int64)
    looked = (
        trace.lookups.filter(mine).with_row_index("nth").group_by("request", "step").agg(pl.col("nth").min())
        .rename({"step": "first_step"})
    )  # fmt: skip
    steps = trace.steps.filter(mine).select(pl.col("step").alias("first_step"), "start_ns")
    found = (
        rows.join(steps, on="first_step", how="left", maintain_order="left")
        .join(looked, on=["request", "first_step"], how="left", maintain_order="left")
    )  # fmt: skip
    times = np.ascontiguousarray(found["start_ns"].fill_null(-1).to_numpy(), np.int64)
    used = found.filter(pl.col("first_step").is_not_null()).sort("first_step", "nth", "request", nulls_last=True)
    return used["row"].to_numpy().astype(np.int64), times


@njit
def _used(
    order: I64, indptr: I64, identities: I32, numbers: I32, request: I32, position: I32, identity: I32, row: I32
) -> None:
    n = 0
    for k in range(order.size):
        r = order[k]
        for at in range(indptr[r], indptr[r + 1]):
            request[n], position[n], identity[n], row[n] = numbers[r], at - indptr[r], identities[at], r
            n += 1


@njit
def _since(row: I32, times: I64, previous: I64, request: I32, used_ns: I64, since: I64, before: I32, nth: I32) -> None:
    """Fills when each use was, the time since the use `previous` names and that use's request, -1 for none, and `nth`,
    which use of its block it is. `nth` may lie where `row` does."""
    for n in range(row.size):
        used_ns[n], since[n], before[n] = times[row[n]], -1, -1
        if previous[n] >= 0:
            before[n] = request[previous[n]]
            if used_ns[n] >= 0 and used_ns[previous[n]] >= 0:
                since[n] = used_ns[n] - used_ns[previous[n]]
        nth[n] = nth[previous[n]] + 1 if previous[n] >= 0 else 1
