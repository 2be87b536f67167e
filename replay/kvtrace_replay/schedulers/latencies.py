"""What a timed run says of latency and throughput, in one row and by request."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

#: Columns of a row, seconds but for the last two (tokens a second). Null where nothing is timed.
SUMMARY = (
    "duration_s", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "itl_mean_s", "itl_p50_s", "itl_p90_s",
    "itl_p99_s", "e2e_mean_s", "e2e_p50_s", "e2e_p90_s", "e2e_p99_s", "queue_mean_s", "queue_p50_s", "queue_p90_s",
    "queue_p99_s", "output_tokens_per_s", "total_tokens_per_s",
)  # fmt: skip
ARRIVED, BEGUN, FIRST, LAST = range(4)


def request_times(times: I64, output_tokens: I64) -> dict[str, F64]:
    """Seconds of each request, NaN where something never was: `arrival_s` (since the run began), `queue_s` (until its
    first step), `ttft_s`, `itl_s` (the mean between its tokens), `e2e_s` (until its last token).

    times: int64[n, 4], ns: when each arrived, began, had its first token and its last; -1 for never.
    """
    told = np.where(times >= 0, times / 1e9, np.nan)
    arrived = told[:, ARRIVED]
    between = np.where(output_tokens > 1, output_tokens - 1, np.nan)
    return {
        "arrival_s": arrived,
        "queue_s": told[:, BEGUN] - arrived,
        "ttft_s": told[:, FIRST] - arrived,
        "itl_s": (told[:, LAST] - told[:, FIRST]) / between,
        "e2e_s": told[:, LAST] - arrived,
    }


def weighted_quantile(values: F64, weights: I64, share: float) -> float | None:
    """The least of `values`, each standing for `weights` observations, that at least `share` of them do not exceed."""
    if not values.size:
        return None
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    at = int(np.searchsorted(reached, share * reached[-1], side="left"))
    return float(values[order][min(at, len(values) - 1)])


def summary(
    times: I64, gaps: I64, duration_ns: int, prompt_tokens: int, output_tokens: I64, begin_ns: int | None = None
) -> dict[str, Any]:
    """The columns of SUMMARY.

    times, output_tokens: as `request_times` takes them. gaps: int64[m, 2], (ns between two tokens of a request, how
    many such pairs). duration_ns: when the last output arrived. prompt_tokens: of all requests that ended. begin_ns:
    when the time counted begins, by default with the first arrival.
    """
    told = request_times(times, output_tokens)
    begin = begin_ns
    if begin is None:
        begin = int(times[:, ARRIVED][times[:, ARRIVED] >= 0].min(initial=duration_ns))
    seconds = (duration_ns - begin) / 1e9
    row: dict[str, Any] = dict.fromkeys(SUMMARY)
    row["duration_s"] = seconds
    between, many = gaps[:, 0] / 1e9, gaps[:, 1]
    if many.sum():
        row["itl_mean_s"] = float((between * many).sum() / many.sum())
    for name in ("ttft", "e2e", "queue"):
        values = told[f"{name}_s"]
        values = values[np.isfinite(values)]
        if values.size:
            row[f"{name}_mean_s"] = float(values.mean())
        for share in (50, 90, 99):
            row[f"{name}_p{share}_s"] = weighted_quantile(values, np.ones(values.size, np.int64), share / 100)
    for share in (50, 90, 99):
        row[f"itl_p{share}_s"] = weighted_quantile(between, many, share / 100)
    if seconds > 0:
        row["output_tokens_per_s"] = int(output_tokens.sum()) / seconds
        row["total_tokens_per_s"] = (prompt_tokens + int(output_tokens.sum())) / seconds
    return row
