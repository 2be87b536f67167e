"""What a tier of host memory under the cache would return, by its size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from kvtrace.advice.case import Case
from kvtrace.advice.declare import Figure, Finding, adviser

TIMES = (1, 2, 4, 8, 16)  # the size of the cache above
ENOUGH = 0.9  # of what the largest returns


@adviser("slower-tier")
def slower_tier(case: Case) -> Iterator[Finding]:
    """Tokens found in a tier of each size, and not in the cache above it."""
    from kvtrace.people import seconds
    from kvtrace.tiers import replay_tiers

    if case.capacity is None:
        return
    found: list[tuple[int, Figure, int]] = []
    for times in TIMES:
        blocks = times * case.capacity
        tiers = [f"hbm:{case.capacity}", f"dram:{blocks}"]
        rows = _dram(replay_tiers(case.trace, tiers), case)
        late = _dram(replay_tiers(case.trace, tiers, warmup=0.5), case)
        if rows["why"] or late["why"]:
            return
        command = case.command("replay", "--tier", tiers[0], "--tier", tiers[1])
        where = {"tier": "dram", **({"engine_index": case.index} if case.several else {})}
        figure = Figure(f"dram_{times}x_hits", rows["token_hits"], "tokens", command, "token_hits", where)
        found.append((blocks, figure, late["token_hits"]))
        if blocks + case.capacity >= case.workload.n_identities:
            break
    most = max(figure.value or 0 for _, figure, _ in found)
    if not most:
        return
    blocks, best, late_hits = next(one for one in found if (one[1].value or 0) >= ENOUGH * most)
    assert best.value is not None
    halves = sorted((2 * late_hits, 2 * (best.value - late_hits)))
    sizes = ", ".join(f"{case.size(n)} {figure.value / case.prompt_tokens:.1%}" for n, figure, _ in found
                      if figure.value is not None)  # fmt: skip
    saved, cost = None, case.token_cost
    text = (
        f"A tier of {case.size(blocks)} in host memory would have held {best.value:,.0f} prompt tokens that the cache "
        f"had lost ({best.value / case.prompt_tokens:.1%} of all)"
    )
    figures = [best, *(figure for _, figure, _ in found if figure is not best)]
    if cost is not None and cost.value is not None:
        saved = best.value * cost.value / 1e9
        figures.append(cost)
        text += f", about {seconds(saved)} of prefill, less the time to load them"
    text += f". By size: {sizes}."
    yield Finding(
        "slower-tier", text, tuple(figures), best.name, best.value, "tokens", halves[0], halves[1],
        "open loop, lru, written through; the bounds are twice what each half of the requests finds there",
        float(best.value), saved,
    )  # fmt: skip


def _dram(rows: pl.DataFrame, case: Case) -> dict[str, Any]:
    if "engine_index" in rows.columns:
        rows = rows.filter(pl.col("engine_index") == case.index)
    return rows.filter(pl.col("tier") == "dram").row(0, named=True)
