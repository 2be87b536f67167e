"""Key figures by tenant, client or another property of requests, as `kvtrace stats --by` prints them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace.clients import client_ids
from kvtrace_traces.errors import UsageError

if TYPE_CHECKING:
    from kvtrace.api import Trace

#: What requests can be grouped by, and what that is.
BY = {
    "tenant": "keyed hash of LoRA adapter and cache salt, 16 hexadecimal digits; `none` for neither",
    "client": "the client's part of the request id",
    "priority": "scheduling priority",
    "type": "kind of work, where an import knows it",
    "turn": "place in the conversation, where an import knows it",
}
MISSES = ("cold", "capacity", "preemption", "short", "unread")
_QUERY = """
SELECT r.engine_index, r.request, r.request_id, r.tenant, r.priority, r.prompt_tokens, r.output_tokens,
       r.first_step IS NOT NULL AS scheduled, r.finish_reason::VARCHAR AS finish_reason,
       coalesce(m.lookups, 0) AS lookups, m.* EXCLUDE (engine_index, request, lookups),
       coalesce(p.preemptions, 0) AS preemptions, coalesce(p.preempted_tokens, 0) AS preempted_tokens,
       ttft_ns / 1e9 AS ttft_s, itl_ns / 1e9 AS itl_s, e2e_ns / 1e9 AS e2e_s, queue_ns / 1e9 AS queue_s
FROM requests r
LEFT JOIN (
  SELECT engine_index, request, count(*) AS lookups, sum(tokens_asked)::BIGINT AS tokens_asked,
         sum(tokens_hit)::BIGINT AS tokens_hit,
         sum(tokens_asked) FILTER (WHERE NOT after_preemption)::BIGINT AS first_asked,
         sum(tokens_hit) FILTER (WHERE NOT after_preemption)::BIGINT AS first_hit,
         sum(cold_tokens)::BIGINT AS cold, sum(capacity_tokens)::BIGINT AS capacity,
         sum(preemption_tokens)::BIGINT AS preemption, sum(short_tokens)::BIGINT AS short,
         sum(unread_tokens)::BIGINT AS unread
  FROM misses GROUP BY engine_index, request) m USING (engine_index, request)
LEFT JOIN (
  SELECT engine_index, request, count(*) AS preemptions, sum(tokens_lost)::BIGINT AS preempted_tokens
  FROM preemptions GROUP BY engine_index, request) p USING (engine_index, request)
LEFT JOIN latencies l USING (engine_index, request)
"""


def grouped(trace: Trace | str | os.PathLike[str], by: str, client_pattern: str | None = None) -> pl.DataFrame:
    """Key figures of each group of requests, a row for each engine and group, most prompt tokens first.

    `by`: a key of BY; `client_pattern`: as `clients.client_ids` takes it. Columns: engine_index, the group under the
    name `by` (text), requests, scheduled, prompt_tokens, output_tokens, lookups, tokens_asked and tokens_hit in all of
    them, token_hit_ratio (first admissions), token_hit_ratio_all, the ratios of misses as in `docs/metrics.md`,
    preemptions, preempted_tokens, and of the latencies of requests that were not aborted the median and the 99th
    percentile. Ratios and times are null where there is nothing to divide or to rank.

    Raises UsageError for an unknown `by`, or one that the trace does not know.
    """
    import kvtrace

    if by not in BY:
        raise UsageError(f"--by {by} is none of {', '.join(BY)}")
    opened = kvtrace.open(trace) if isinstance(trace, str | os.PathLike) else trace
    known = opened.requests.columns
    if by in ("type", "turn") and by not in known:
        raise UsageError(f"--by {by}: {opened.path} does not tell it; only some imports do")
    rows = opened.sql(_QUERY)
    if by in ("type", "turn"):
        told = opened.requests.select("engine_index", "request", by)
        rows = rows.join(told, on=["engine_index", "request"], how="left")
    rows = rows.with_columns(_group(rows, by, client_pattern).alias("group"))
    finished = pl.col("finish_reason").is_null() | (pl.col("finish_reason") != "abort")
    latencies = [
        pl.col(f"{name}_s").filter(finished).quantile(q, "linear").alias(f"{name}_p{round(100 * q)}_s")
        for name in ("ttft", "itl", "e2e") for q in (0.5, 0.99)
    ]  # fmt: skip
    sums = ("prompt_tokens", "output_tokens", "lookups", "tokens_asked", "tokens_hit")
    found = rows.group_by("engine_index", "group").agg(
        pl.len().cast(pl.Int64).alias("requests"),
        pl.col("scheduled").sum().cast(pl.Int64),
        *(pl.col(name).cast(pl.Int64).sum() for name in sums),
        _ratio("first_hit", "first_asked").alias("token_hit_ratio"),
        _ratio("tokens_hit", "tokens_asked").alias("token_hit_ratio_all"),
        *(_ratio(kind, "tokens_asked").alias(f"{kind}_miss_ratio") for kind in MISSES),
        pl.col("preemptions").sum().cast(pl.Int64),
        pl.col("preempted_tokens").sum().cast(pl.Int64),
        *latencies,
    )
    order = found.sort(["engine_index", "prompt_tokens", "group"], descending=[False, True, False])
    return order.rename({"group": by})


def _ratio(part: str, whole: str) -> pl.Expr:
    """Sum over sum; null where there is nothing to divide."""
    total = pl.col(whole).sum()
    return pl.when(total > 0).then(pl.col(part).sum() / total)


def _group(rows: pl.DataFrame, by: str, client_pattern: str | None) -> pl.Series:
    """The name of the group of each request, text."""
    if by == "client":
        return client_ids(rows["request_id"], client_pattern)
    if by == "tenant":
        names: dict[Any, str] = {
            value: f"{value:016x}" if value else "none" for value in rows["tenant"].unique().to_list()
        }
        return pl.Series([names[value] for value in rows["tenant"].to_list()], dtype=pl.String)
    return rows[by].cast(pl.String).fill_null("none")
