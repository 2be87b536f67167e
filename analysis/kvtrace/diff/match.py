"""Which request of one trace is which of another.

In this order, each for what those before left over: by the engine's name of the request, by the client's part of it
(see `kvtrace.clients`), by prompt, by number. Names and prompts that several requests of a trace share are paired in
order of arrival. Prompts are compared by identities, which two recordings share only if they were given one key;
numbers only where neither names nor prompts say anything, and prompts are equally long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from kvtrace.clients import client_ids
from kvtrace_traces.errors import KvtraceError

METHODS = ("request-id", "client-id", "prompt", "number")
_PAIRS = {"request_a": pl.Int32, "request_b": pl.Int32, "matched_by": pl.String}


def match(a: Any, b: Any, index_a: int, index_b: int, method: str | None = None) -> pl.DataFrame:
    """Pairs of requests of engine `index_a` of trace `a` and `index_b` of `b`: request_a, request_b (i32), matched_by.

    `method`: one of METHODS, to use that alone. Raises KvtraceError where nothing matches.
    """
    rows_a, rows_b = _requests(a, index_a), _requests(b, index_b)
    keys: dict[str, Callable[[pl.DataFrame, Any, int], pl.Series]] = {
        "request-id": lambda rows, trace, index: _named(rows["request_id"]),
        "client-id": lambda rows, trace, index: _named(client_ids(rows["request_id"])),
        "prompt": _prompts,
    }
    found: list[pl.DataFrame] = []
    for name in METHODS[:3] if method is None else [method]:
        if name in keys:
            pairs = _paired(rows_a, keys[name](rows_a, a, index_a), rows_b, keys[name](rows_b, b, index_b))
            found.append(pairs.with_columns(matched_by=pl.lit(name)))
            rows_a = rows_a.filter(~pl.col("request").is_in(pairs["request_a"].implode()))
            rows_b = rows_b.filter(~pl.col("request").is_in(pairs["request_b"].implode()))
    made = pl.concat([pl.DataFrame(schema=_PAIRS), *(pairs.cast(_PAIRS) for pairs in found)])  # type: ignore[arg-type]
    if method == "number" or (method is None and not made.height):
        both = rows_a.join(rows_b, on=["request", "prompt_tokens"], how="inner")
        made = pl.DataFrame(
            {"request_a": both["request"], "request_b": both["request"], "matched_by": ["number"] * both.height},
            schema=_PAIRS,
        )
    if not made.height:
        raise KvtraceError(
            f"no request of {a.path} is one of {b.path}: they differ in names, in prompts (or in the key of their "
            "identities) and in the lengths of prompts of equal number"
        )
    return made.sort("request_a")


def _requests(trace: Any, index: int) -> pl.DataFrame:
    rows: pl.DataFrame = trace.requests.filter(pl.col("engine_index") == index)
    return rows.select("request", "request_id", "prompt_tokens").sort("request")


def _named(names: pl.Series) -> pl.Series:
    """The names, null for the empty one, which names nobody."""
    return pl.select(pl.when(names != "").then(names)).to_series()


def _prompts(rows: pl.DataFrame, trace: Any, index: int) -> pl.Series:
    """What stands for each prompt: the identity of its last whole granule, and its length; null for shorter ones."""
    header = next(header for header in trace.engines if header["engine_index"] == index)
    granule = int(header.get("granule") or header["block_size"])
    chains = trace.chains(index)
    numbers = rows["request"].to_numpy()
    tokens = rows["prompt_tokens"].to_numpy().astype(np.int64)
    begin, end = chains.indptr[numbers], chains.indptr[numbers + 1]
    granules = tokens // granule
    if header.get("source") == "import":  # whose last granule may be a part of one
        granules = end - begin
    known = (granules > 0) & (granules <= end - begin)
    hashes = np.zeros(len(numbers), np.uint64)
    hashes[known] = chains.hashes[chains.identities[(begin + granules - 1)[known]]]
    keys = pl.DataFrame({"hash": hashes, "tokens": tokens, "granule": granule}).select(
        pl.format("{} {} {}", "hash", "tokens", "granule").alias("key")
    )
    return pl.select(pl.when(pl.Series(known)).then(keys["key"])).to_series()


def _paired(rows_a: pl.DataFrame, keys_a: pl.Series, rows_b: pl.DataFrame, keys_b: pl.Series) -> pl.DataFrame:
    """The n-th request with a key in one trace is the n-th with that key in the other."""

    def numbered(rows: pl.DataFrame, keys: pl.Series, side: str) -> pl.DataFrame:
        frame = pl.DataFrame({f"request_{side}": rows["request"], "key": keys.cast(pl.String)})
        return frame.filter(pl.col("key").is_not_null()).with_columns(nth=pl.int_range(pl.len()).over("key"))

    joined = numbered(rows_a, keys_a, "a").join(numbered(rows_b, keys_b, "b"), on=["key", "nth"], how="inner")
    return joined.select("request_a", "request_b")
