"""The metrics of one engine, slowly: from the rows of the tables and of the slow views, by plain Python."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import slow_views
from slow_views import Row, rows_of

import kvtrace

Figures = dict[tuple[str, str | None], float | None]


def quantile(values: list[float], q: float) -> float | None:
    """Between the two nearest values, linearly."""
    if not values:
        return None
    ranked, place = sorted(values), q * (len(values) - 1)
    low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def ratio(above: float, below: float | None) -> float | None:
    return above / below if below else None


def mean(values: list[float]) -> float | None:
    return ratio(sum(values), len(values))


def correlation(pairs: list[tuple[Any, Any]]) -> float | None:
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(known) < 2:
        return None
    mx, my = sum(x for x, _ in known) / len(known), sum(y for _, y in known) / len(known)
    sx, sy = sum((x - mx) ** 2 for x, _ in known), sum((y - my) ** 2 for _, y in known)
    return None if sx == 0 or sy == 0 else sum((x - mx) * (y - my) for x, y in known) / math.sqrt(sx * sy)


def both(name: str, unit: str, values: list[float]) -> Figures:
    return {(f"{name}_p{n}_{unit}", None): quantile(values, n / 100) for n in (50, 99)}


def power_of_two(number: int) -> str:
    low = 1
    while low * 2 <= number + 1:
        low *= 2
    return "0" if low == 1 else f"{low - 1}-{2 * low - 2}"


def power_of_ten(time_ns: int) -> str:
    units = [(10**9, "s"), (10**6, "ms"), (1000, "us"), (1, "ns")]
    low = 10 ** (len(str(time_ns)) - 1)
    return "from 0" if low == 1 else next(f"from {low // unit} {name}" for unit, name in units if low >= unit)


def cumulated(one: str, up_to: str, values: list[int], name: Any) -> Figures:
    """How many values have each name, and which share of all has it or that of a smaller value."""
    figures: Figures = {}
    for n, value in enumerate(sorted(values), 1):
        at = name(value)
        figures[one, at] = (figures.get((one, at)) or 0) + 1
        figures[up_to, at] = n / len(values)
    return figures


def phases(trace: kvtrace.Trace) -> dict[int, Row]:
    prompts = {row["request"]: row["prompt_tokens"] for row in rows_of(trace, "requests")}
    found: dict[int, Row] = {}
    latest: int | None = None
    for step in rows_of(trace, "steps"):
        end = step["end_ns"]
        duration = None if end is None else end - max(step["start_ns"], latest if latest is not None else 0)
        latest = end if latest is None else latest if end is None else max(latest, end)
        found[step["step"]] = {**step, "duration": duration, "prefill": 0, "prefilling": 0}
    for row in rows_of(trace, "step_requests"):
        own = sum(token < prompts[row["request"]] for token in
                  range(row["computed_before"], row["computed_before"] + row["tokens"]))  # fmt: skip
        found[row["step"]]["prefill"] += own
        found[row["step"]]["prefilling"] += own > 0
    return found


def passes(trace: kvtrace.Trace) -> Figures:
    steps = list(phases(trace).values())
    if not steps:
        return {}
    ends = [step["end_ns"] for step in steps if step["end_ns"] is not None]
    span = (max(ends) - min(step["start_ns"] for step in steps)) / 1e9 if ends else None
    busy = [step["duration"] / 1e9 for step in steps if step["duration"] is not None]
    tokens = [step["tokens"] for step in steps]
    prefill = sum(step["prefill"] for step in steps)
    scheduled = sum(tokens)
    average = scheduled / len(tokens)
    budget = (trace.header.get("scheduler") or {}).get("max_num_scheduled_tokens")
    crowded = [step["tokens"] for step in steps if step["waiting"] > 0]

    def rate(chosen: list[Row]) -> float | None:
        timed = [step for step in chosen if step["duration"] is not None]
        return ratio(sum(step["tokens"] for step in timed), sum(step["duration"] / 1e9 for step in timed))

    one: dict[str, Any] = {
        "steps": len(steps), "duration_s": span, "busy_ratio": ratio(sum(busy), span) if ends else None,
        "scheduled_tokens": scheduled, "prefill_tokens": prefill, "decode_tokens": scheduled - prefill,
        "scheduled_tokens_per_s": ratio(scheduled, span), "prefill_tokens_per_s": ratio(prefill, span),
        "decode_tokens_per_s": ratio(scheduled - prefill, span),
        "prefill_step_tokens_per_s": rate([step for step in steps if step["prefill"]]),
        "decode_step_tokens_per_s": rate([step for step in steps if not step["prefill"]]),
        "step_tokens_mean": average, "step_tokens_max": max(tokens), "step_tokens_max_over_mean": max(tokens) / average,
        "step_tokens_cv": math.sqrt(sum((t - average) ** 2 for t in tokens) / len(tokens)) / average,
        "step_requests_mean": mean([step["requests"] for step in steps]), "prefill_token_ratio": prefill / scheduled,
        "prefill_step_ratio": mean([step["requests"] == step["prefilling"] for step in steps]),
        "decode_step_ratio": mean([not step["prefilling"] for step in steps]),
        "mixed_step_ratio": mean([0 < step["prefilling"] < step["requests"] for step in steps]),
        "unused_budget_ratio": 1 - scheduled / (budget * len(steps)) if budget else None,
        "wasted_budget_ratio": 1 - sum(crowded) / (budget * len(crowded)) if budget and crowded else None,
    }  # fmt: skip
    return {(name, None): value for name, value in one.items()} | both("step", "s", busy)


def tenths(trace: kvtrace.Trace) -> dict[int, str]:
    steps = rows_of(trace, "steps")
    first, past = min(step["start_ns"] for step in steps), max(step["start_ns"] for step in steps) + 1
    return {step["step"]: str(10 * (step["start_ns"] - first) // (past - first)) for step in steps}


def memory(trace: kvtrace.Trace) -> Figures:
    capacity, size = trace.header["num_blocks"] - 1, trace.header["block_size"]
    figures: Figures = {}
    rows = slow_views.occupancy(trace)
    if rows:
        slots = [row["used_tokens"] / (capacity * size) for row in rows if row["used_tokens"] is not None]
        sure = [row for row in rows if row["wasted_slots"] is not None]
        one: dict[str, Any] = {
            "capacity_blocks": capacity, "block_utilisation_mean": mean([row["used"] / capacity for row in rows]),
            "block_utilisation_max": max(row["used"] / capacity for row in rows),
            "slot_utilisation_mean": mean(slots), "slot_utilisation_max": max(slots, default=None),
            "fragmentation_ratio": ratio(sum(row["wasted_slots"] for row in sure),
                                         sum(row["used"] for row in sure) * size),
            "cached_idle_ratio": mean([row["cached_idle"] / capacity for row in rows]),
            "free_ratio": mean([row["free"] / capacity for row in rows]),
            "sharing_degree": ratio(sum(row["holds"] for row in rows), sum(row["used"] for row in rows)),
        }  # fmt: skip
        figures |= {(name, None): value for name, value in one.items()}
        parts, where = defaultdict(list), tenths(trace)
        for row in rows:
            parts[where[row["step"]]].append(row)
        for tenth, part in parts.items():
            known = [row["used_tokens"] / (capacity * size) for row in part if row["used_tokens"] is not None]
            figures["block_utilisation", tenth] = mean([row["used"] / capacity for row in part])
            figures["slot_utilisation", tenth] = mean(known)
    lives = slow_views.block_lifetimes(trace)
    if lives:
        figures |= both("lifetime", "s", [life["lifetime_ns"] / 1e9 for life in lives if life["evict_ns"] is not None])
        figures |= both("idle", "s", [life["idle_ns"] / 1e9 for life in lives if life["idle_ns"] is not None])
        figures |= {
            ("fills", None): len(lives), ("evictions", None): sum(life["evict_ns"] is not None for life in lives),
            ("unused_fill_ratio", None): mean([life["uses"] == 0 for life in lives]),
            ("uses_per_fill", None): mean([life["uses"] for life in lives]),
        }  # fmt: skip
        for own, column in (("lifetimes_of_time", "lifetime_ns"), ("idle_of_time", "idle_ns")):
            for life in lives:
                if life[column] is not None:
                    for name in ("lifetimes_of_time", "idle_of_time"):
                        key = name, power_of_ten(life[column])
                        figures[key] = (figures.get(key) or 0) + (name == own)
    return figures


def hits(trace: kvtrace.Trace) -> Figures:
    rows = slow_views.misses(trace)
    if not rows:
        return {}
    size = trace.header["block_size"]
    first = [row for row in rows if not row["after_preemption"]]
    asked = sum(row["tokens_asked"] for row in rows)
    one: dict[str, Any] = {
        "lookups": len(rows),
        "token_hit_ratio": ratio(sum(row["tokens_hit"] for row in first), sum(row["tokens_asked"] for row in first)),
        "block_hit_ratio": ratio(sum(row["tokens_hit"] // size for row in first),
                                 sum(row["tokens_asked"] // size for row in first)),
        "token_hit_ratio_all": sum(row["tokens_hit"] for row in rows) / asked,
        "request_hit_ratio": mean([row["tokens_hit"] > 0 for row in first]),
        "request_hit_ratio_p50": quantile([row["tokens_hit"] / row["tokens_asked"] for row in first], 0.5),
    } | {
        f"{kind}_miss_ratio": sum(row[f"{kind}_tokens"] for row in rows) / asked
        for kind in ("cold", "capacity", "preemption", "short", "unread")
    }  # fmt: skip
    figures: Figures = {(name, None): value for name, value in one.items()}
    depths, found = Counter[str](), Counter[str]()
    for row in first:
        for position in range(row["tokens_asked"] // size):
            at = power_of_two(position)
            depths[at] += 1
            found[at] += position < row["tokens_hit"] // size
    for at, many in depths.items():
        figures["block_lookups_at_depth", at] = many
        figures["block_hit_ratio_at_depth", at] = found[at] / many
    answers: dict[int, list[int]] = defaultdict(list)
    chains: dict[int, list[Row]] = defaultdict(list)
    for block in slow_views.request_blocks(trace):
        chains[block["request"]].append(block)
    for request, chain in chains.items():
        if not chain[-1]["in_prompt"]:
            answers[chain[-1]["identity"]].append(request)
    turns, where, times = defaultdict(list), tenths(trace), defaultdict(list)
    for row in first:
        heard = [
            block for block in chains[row["request"]]
            if block["in_prompt"] and any(other < row["request"] for other in answers[block["identity"]])
        ]  # fmt: skip
        turns[str(len(heard) + 1)].append(row)
        times[where[row["step"]]].append(row)
    for at, part in turns.items():
        figures["requests_at_turn", at] = len(part)
    for name, parts in (("token_hit_ratio_at_turn", turns), ("token_hit_ratio_at_time", times)):
        for at, part in parts.items():
            figures[name, at] = ratio(sum(r["tokens_hit"] for r in part), sum(r["tokens_asked"] for r in part))
    return figures | cost(trace, rows)


def cost(trace: kvtrace.Trace, rows: list[Row]) -> Figures:
    size = trace.header["block_size"]
    starts = {step["step"]: step["start_ns"] for step in rows_of(trace, "steps")}
    lives = slow_views.block_lifetimes(trace)
    probes, cached = [], []
    for row in rows:
        blocks, most = row["tokens_hit"] // size, max(row["tokens_asked"] - 1, 0) // size
        probes.append(blocks + (blocks < most))
        start = starts[row["step"]]
        cached.append(sum(life["fill_ns"] < start and (life["evict_ns"] is None or life["evict_ns"] >= start)
                          for life in lives))  # fmt: skip
    return {
        ("probes_per_lookup", None): mean([*probes]), ("probes_max", None): max(probes),
        ("cached_blocks_mean", None): mean([*cached]),
        ("probes_cached_correlation", None): correlation(list(zip(probes, cached, strict=True))),
    }  # fmt: skip


def reuse(trace: kvtrace.Trace) -> Figures:
    uses = slow_views.reuse(trace)
    if not uses:
        return {}
    blocks = trace.header.get("num_blocks")
    many = Counter(use["identity"] for use in uses)
    again = [use for use in uses if use["distance_blocks"] is not None]
    figures: Figures = {
        ("block_uses", None): len(uses), ("unique_blocks", None): len(many),
        ("reused_block_ratio", None): len(again) / len(uses), ("uses_per_block", None): len(uses) / len(many),
        ("single_use_block_ratio", None): sum(n == 1 for n in many.values()) / len(many),
        ("unique_blocks_over_capacity", None): len(many) / (blocks - 1) if blocks else None,
        **both("reuse_distance", "blocks", [use["distance_blocks"] for use in again]),
        **both("reuse_time", "s", [use["reuse_ns"] / 1e9 for use in again if use["reuse_ns"] is not None]),
    }  # fmt: skip
    far = [use["distance_blocks"] for use in again]
    figures |= cumulated("reuses_at_distance", "reuses_up_to_distance_ratio", far, power_of_two)
    long = [use["reuse_ns"] for use in again if use["reuse_ns"] is not None]
    figures |= cumulated("reuses_after_time", "reuses_up_to_time_ratio", long, power_of_ten)
    times = [use["time_ns"] for use in uses if use["time_ns"] is not None]
    if times:
        sets: dict[int, set[int]] = defaultdict(set)
        for use in uses:
            sets[10 * (use["time_ns"] - min(times)) // (max(times) + 1 - min(times))].add(use["identity"])
        sizes = [len(part) for part in sets.values()]
        figures["working_set_max_blocks", None] = max(sizes)
        figures["working_set_mean_blocks", None] = sum(sizes) / 10
        figures["working_set_over_capacity", None] = max(sizes) / (blocks - 1) if blocks else None
    nodes = sorted(
        slow_views.prefixes(trace), key=lambda node: (-(node["requests"] - 1) * node["tokens"], node["node"])
    )
    for node in nodes[:5]:
        at = f"identity {node['node']}"
        figures["hot_prefix_requests", at], figures["hot_prefix_tokens", at] = node["requests"], node["tokens"]
        figures["hot_prefix_saved_tokens", at] = (node["requests"] - 1) * node["tokens"]
        figures["hot_prefix_bytes", at] = node["bytes"]
    if "turn" in trace.requests.columns:
        told = {row["request"]: row["turn"] for row in rows_of(trace, "requests")}
        turns = defaultdict(list)
        for use in uses:
            if told[use["request"]] is not None:
                turns[str(told[use["request"]])].append(use["distance_blocks"] is not None)
        figures |= {("reused_block_ratio_at_turn", at): mean([*part]) for at, part in turns.items()}
    return figures


def waiting(trace: kvtrace.Trace) -> Figures:
    requests = [row for row in rows_of(trace, "requests") if row["first_step"] is not None]
    if not requests:
        return {}
    lost = slow_views.preemptions(trace)
    again = sum(row["tokens_recomputed"] or 0 for row in lost)
    figures: Figures = {
        ("preemptions", None): len(lost), ("preempted_blocks", None): sum(row["blocks_lost"] for row in lost),
        ("preempted_request_ratio", None): len({row["request"] for row in lost}) / len(requests),
        ("preempted_tokens", None): sum(row["tokens_lost"] for row in lost), ("recomputed_tokens", None): again,
        ("recomputed_token_ratio", None): again / sum(row["tokens"] for row in rows_of(trace, "steps")),
        **both("preempted", "s", [(row["readmit_ns"] - row["time_ns"]) / 1e9 for row in lost if row["readmit_step"]]),
    }  # fmt: skip
    own = {row["request"]: row for row in requests}
    rows = [row for row in slow_views.latencies(trace) if row["finish_reason"] != "abort"]
    for name, column in (
        ("ttft", "ttft_ns"),
        ("queue", "queue_ns"),
        ("e2e", "e2e_ns"),
        ("generation", "generation_ns"),
    ):
        figures |= both(name, "s", [row[column] / 1e9 for row in rows if row[column] is not None])
    begun = [row for row in rows if row["ttft_ns"] is not None]
    figures["queue_share_of_ttft", None] = ratio(sum(r["queue_ns"] for r in begun), sum(r["ttft_ns"] for r in begun))

    def share(row: Row) -> float | None:
        mine = own[row["request"]]
        return None if mine["cached_tokens"] is None else ratio(mine["cached_tokens"], mine["prompt_tokens"])

    figures["ttft_hit_correlation", None] = correlation([(row["ttft_ns"], share(row)) for row in rows])
    figures["ttft_queue_correlation", None] = correlation([(row["ttft_ns"], row["queue_ns"]) for row in rows])
    figures["e2e_preemption_correlation", None] = correlation(
        [(row["e2e_ns"], own[row["request"]]["preemptions"]) for row in rows]
    )
    return figures | between_tokens(trace)


def between_tokens(trace: kvtrace.Trace) -> Figures:
    """Step by step: an output brings a token where more is computed than ever before, and the whole prompt."""
    ends = {step["step"]: step["end_ns"] for step in rows_of(trace, "steps")}
    prompts = {row["request"]: row["prompt_tokens"] for row in rows_of(trace, "requests")}
    most: dict[int, int] = defaultdict(int)
    last: dict[int, int] = {}
    gaps = []
    for row in rows_of(trace, "step_requests"):
        r, computed = row["request"], row["computed_before"] + row["tokens"]
        if computed > most[r] and computed >= prompts[r]:
            before, now = ends.get(last.get(r, -1)), ends[row["step"]]
            if before is not None and now is not None:
                gaps.append((now - before) / 1e9)
            last[r] = row["step"]
        most[r] = max(most[r], computed)
    gaps.sort()
    return {
        ("itl_mean_s", None): mean(gaps),
        ("itl_p50_s", None): gaps[math.ceil(0.5 * len(gaps)) - 1] if gaps else None,
        ("itl_p99_s", None): gaps[math.ceil(0.99 * len(gaps)) - 1] if gaps else None,
    }


def everything(trace: kvtrace.Trace) -> Figures:
    parts = [reuse(trace)]
    if trace.steps.height:
        parts += [passes(trace), memory(trace), hits(trace), waiting(trace)]
    return {key: value for part in parts for key, value in part.items() if value is not None}
