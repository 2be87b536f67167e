"""Working sets: the distinct blocks used in each window of time, or of requests (Denning, CACM 11(5), 1968)."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import polars as pl

from kvtrace_replay.capacity import distinct_blocks
from kvtrace_replay.curves.lru import read_only, references
from kvtrace_replay.workload.model import Workload
from kvtrace_traces.compile import njit
from kvtrace_traces.errors import UsageError

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_UNITS_NS = {"ms": 10**6, "s": 10**9, "min": 60 * 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_OF_REQUESTS = "a number of requests (1000)"
_FORMS = f"write a time (500ms, 60s, 5min, 1h) or {_OF_REQUESTS}"
_MOST_WINDOWS = 10_000_000


def parse_window(text: str | int) -> tuple[int | None, int | None]:
    """(nanoseconds, None) for a time, (None, requests) for a bare number. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|m|h|)", str(text).strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is no window: {_FORMS}")
    number, unit = match.groups()
    amount = float(number) * _UNITS_NS.get(unit, 1)
    if amount < 1 or amount >= 2**62 or (not unit and not amount.is_integer()):
        raise UsageError(f"{text!r} is no window: {_FORMS}")
    return (None, int(amount)) if not unit else (round(amount), None)


def working_sets(workload: Workload, window: str | int, semantics: str = "prefix") -> pl.DataFrame:
    """A row for each window, one after the other from the first arrival on, empty ones included.

    Args:
        workload: the requests of one engine.
        window: `60s`, `500ms`, `5min`, `1h`, or a number of requests.
        semantics: "object" counts content ids, where the import has them; others count the chains' identities.

    A request uses all blocks of its chain, output included, in the window of its arrival; windows of requests
    count in order of arrival, where it is known. Columns: window, from 0; window_start_s, on the trace's clock, and
    window_s (null for windows of requests); first_request, how many arrivals came before (null for windows of
    time); requests; block_lookups, all uses; distinct_blocks; distinct_tokens, a block being as full as it was seen in
    the window; distinct_bytes, null where the bytes of a block are unknown.

    Raises UsageError for a window that is none, one of time where no times are known, and one so short that
    there would be more than 10 million.
    """
    length_ns, length_requests = parse_window(window)
    workload.validate()
    n = workload.n_requests - workload.carried  # what a cut carries in did not arrive in it
    arrival = workload.arrival_ns
    order = workload.carried + (
        np.arange(n) if arrival is None else np.argsort(arrival[workload.carried :], kind="stable")
    )
    start_ns = 0
    if length_requests is not None:
        number = np.arange(n, dtype=np.int64) // length_requests
    elif arrival is None:
        raise UsageError(f"this trace knows no arrival times: write {_OF_REQUESTS} instead of {window}")
    else:
        assert length_ns is not None
        start_ns = int(arrival[order[0]]) if n else 0
        number = (arrival[order] - start_ns) // length_ns
    windows = int(number[-1]) + 1 if n else 0
    if windows > _MOST_WINDOWS:
        raise UsageError(f"windows of {window} would be {windows:,}: take longer ones")
    refs = references(workload, semantics)
    requests, lookups, blocks, tokens = _count(
        read_only(refs), read_only(workload.indptr), read_only(workload.last_tokens), workload.block_size, order,
        number, windows, distinct_blocks(workload, semantics),
    )  # fmt: skip
    at = np.arange(windows, dtype=np.int64)
    timed = length_ns is not None
    nothing = pl.Series([None] * windows, dtype=pl.Float64)
    size = workload.bytes_per_block
    return pl.DataFrame(
        {
            "window": at,
            "window_start_s": (start_ns + at * (length_ns or 0)) / 1e9 if timed else nothing,
            "window_s": np.full(windows, (length_ns or 0) / 1e9) if timed else nothing,
            "first_request": nothing.cast(pl.Int64) if timed else at * (length_requests or 0),
            "requests": requests,
            "block_lookups": lookups,
            "distinct_blocks": blocks,
            "distinct_tokens": tokens,
            "distinct_bytes": nothing.cast(pl.Int64) if size is None else blocks * size,
        }
    )


@njit
def _count(
    refs: I32, indptr: I64, last_tokens: I32, block_size: int, order: I64, number: I64, windows: int, n_identities: int
) -> tuple[I64, I64, I64, I64]:
    """(requests, references, distinct blocks, their tokens), int64[windows] each. `order` int64[n_requests] are the
    requests by arrival, `number` int64[n_requests] the windows that they fall in."""
    requests = np.zeros(windows, np.int64)
    lookups = np.zeros(windows, np.int64)
    blocks = np.zeros(windows, np.int64)
    tokens = np.zeros(windows, np.int64)
    used_in = np.full(n_identities, -1, np.int32)
    filled = np.zeros(n_identities, np.int32)
    for i in range(order.size):
        r, window = order[i], number[i]
        requests[window] += 1
        end = indptr[r + 1]
        lookups[window] += end - indptr[r]
        for p in range(indptr[r], end):
            key = np.intp(np.uint32(refs[p]))
            held = last_tokens[r] if p == end - 1 else block_size
            if used_in[key] != window:
                used_in[key] = window
                blocks[window] += 1
                filled[key] = 0
            if held > filled[key]:
                tokens[window] += held - filled[key]
                filled[key] = held
    return requests, lookups, blocks, tokens
