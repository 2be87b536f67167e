"""The verdict on a run in five sentences. Each figure is one of `kvtrace stats` or `kvtrace curve`."""

from __future__ import annotations

from typing import Any

import polars as pl

from kvtrace.metrics.hits import HITS
from kvtrace.metrics.memory import USE
from kvtrace.metrics.passes import THROUGHPUT
from kvtrace.metrics.reuse import REUSE
from kvtrace.metrics.waiting import LATENCY, PREEMPTION
from kvtrace.people import seconds
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.words import counted, share

CAUSES = {
    "cold_miss_ratio": "had never been cached",
    "capacity_miss_ratio": "had been cached and evicted",
    "preemption_miss_ratio": "had been lost by preemptions",
    "short_miss_ratio": "was too short for a block",
    "unread_miss_ratio": "came from requests that asked not to read the cache",
}


def verdict(run: Run) -> list[str]:
    """Five sentences: what ran, what was found and why not more, what the memory held, what another size and what
    another policy would find."""
    return [_ran(run), _found(run), _held(run), _size(run), _policy(run)]


def at(rows: pl.DataFrame, policy: str, capacity: int | None, column: str = "token_hit_ratio") -> Any:
    """A figure of a curve; None where it does not tell."""
    found = rows.filter((pl.col("policy") == policy) & (pl.col("capacity_blocks") == capacity))
    return found[column][0] if found.height else None


def curve_of(run: Run) -> pl.DataFrame:
    """The run's curve, empty where it has none."""
    try:
        return run.curve
    except Untold:
        return pl.DataFrame(schema={"policy": pl.String, "capacity_blocks": pl.Int64, "token_hit_ratio": pl.Float64})


def reference_capacity(run: Run, rows: pl.DataFrame) -> int | None:
    """The run's own capacity, or for a trace without a cache the point of the curve next to a tenth of its blocks."""
    if run.capacity is not None:
        return run.capacity
    known = sorted(set(rows.filter(pl.col("token_hit_ratio").is_not_null())["capacity_blocks"].to_list()))
    return min(known, key=lambda size: abs(size - known[-1] / 10)) if known else None


def _ran(run: Run) -> str:
    what = counted(run.requests, "request")
    if run.imported:
        return f"The trace was imported: it tells of {what}, and nothing of the engine that served them."
    speed, late = run.figures(THROUGHPUT), run.figures(LATENCY)
    if not run.steps:
        return f"The trace holds {what} and not one scheduler step."
    if not run.timed:
        return f"A simulated engine served {what} in {run.steps:,} steps, without a clock."
    text = (
        f"The engine served {what} in {seconds(speed['duration_s'])}" if speed["duration_s"] else f"There were {what}"
    )
    if speed["decode_tokens_per_s"] is not None:
        text += (
            f", at {speed['prefill_tokens_per_s']:,.0f} prefill and {speed['decode_tokens_per_s']:,.0f} decode tokens "
            "a second"
        )
    if late["ttft_p50_s"] is not None:
        text += f", with a median time to first token of {seconds(late['ttft_p50_s'])}"
        if late["queue_share_of_ttft"] is not None:
            text += f" ({share(late['queue_share_of_ttft'])} of all such time was queueing)"
    return text + "."


def _found(run: Run) -> str:
    hits = run.figures(HITS)
    if hits["token_hit_ratio"] is None:
        reuse = run.figures(REUSE)
        if reuse["reused_block_ratio"] is None:
            return "No request has a whole block, so a prefix cache has nothing to find."
        return (
            f"Of {reuse['block_uses']:,.0f} uses of blocks {share(reuse['reused_block_ratio'])} were of a block that "
            f"had been used before: the most that any prefix cache can find."
        )
    name, most = max(((name, hits[name] or 0.0) for name in CAUSES), key=lambda pair: pair[1])
    found = share(hits["token_hit_ratio"])
    if not most:
        return f"Its prefix cache found {found} of the prompt tokens, and missed none."
    return (
        f"Its prefix cache found {found} of the prompt tokens; the largest part of its misses, {share(most)} of all "
        f"tokens looked up, {CAUSES[name]}."
    )


def _held(run: Run) -> str:
    use, lost = run.figures(USE), run.figures(PREEMPTION)
    if use["block_utilisation_mean"] is None:
        reuse = run.figures(REUSE)
        if reuse["unique_blocks"] is None:
            return "What the cache held is not known."
        return (
            f"The requests use {reuse['unique_blocks']:,.0f} distinct blocks, "
            f"{share(reuse['single_use_block_ratio'])} of them once: those never pay for being cached."
        )
    text = (
        f"Requests held {share(use['block_utilisation_mean'])} of the {run.capacity:,} blocks on average (at most "
        f"{share(use['block_utilisation_max'])})"
    )
    if not lost["preemptions"]:
        return text + ", and none was preempted."
    return text + (
        f", and {counted(lost['preemptions'], 'preemption')} threw away "
        f"{lost['preempted_tokens']:,} tokens, of which {lost['recomputed_tokens']:,} were computed again "
        f"({share(lost['recomputed_token_ratio'])} of all work)."
    )


def _size(run: Run) -> str:
    rows = curve_of(run)
    own = reference_capacity(run, rows)
    now = at(rows, "lru", own)
    if own is None or now is None:
        return "What a cache of another size would find cannot be told."
    most = rows.filter((pl.col("policy") == "lru") & pl.col("token_hit_ratio").is_not_null())
    largest, ratio = most.sort("capacity_blocks").select("capacity_blocks", "token_hit_ratio").row(-1)
    if not ratio:
        return "No cache of any size would find anything, since no request begins like an earlier one."
    twice = at(rows, "lru", 2 * own)
    if twice is None:
        return (
            f"A cache of {own:,} blocks finds {share(now)} of the prompt tokens under LRU, one that keeps "
            f"everything ({largest:,} blocks) {share(ratio)}."
        )
    return (
        f"Replayed with LRU, twice the cache ({2 * own:,} blocks) would find {share(twice)} of the prompt "
        f"tokens instead of {share(now)}, and one that keeps everything ({largest:,} blocks) {share(ratio)}."
    )


def _policy(run: Run) -> str:
    rows = curve_of(run)
    own = reference_capacity(run, rows)
    now, best_possible = at(rows, "lru", own), at(rows, "opt", own)
    if now is None or best_possible is None:
        return "What another eviction policy would find cannot be told."
    if not best_possible:
        return (
            "No eviction policy can find anything at this size: even Belady's rule, which knows the future, does not."
        )
    others = [name for name in rows["policy"].unique(maintain_order=True).to_list() if name not in ("lru", "opt")]
    best, ratio = max(((name, at(rows, name, own) or 0.0) for name in others), key=lambda pair: pair[1])
    where = "At its own size" if run.capacity is not None else f"At {own:,} blocks"
    gap = (best_possible - now) * 100
    text = f"{where} Belady's rule, which knows the future, finds {share(best_possible)}: {gap:.1f} points above LRU"
    if gap < 1:
        return text + ", so another policy has next to nothing to give."
    if ratio <= now:
        return text + f", and none of {', '.join(others)} beats LRU here."
    return text + f", of which {best} wins {(ratio - now) * 100:.1f}."
