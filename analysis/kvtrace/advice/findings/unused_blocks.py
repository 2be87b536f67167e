"""Blocks that were cached and never used again."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Finding, adviser


@adviser("unused-blocks")
def unused_blocks(case: Case) -> Iterator[Finding]:
    """The share of fills that no request hit."""
    query = (
        "SELECT count(*) FILTER (WHERE uses = 0) AS never_used, count(*) AS fills "
        f"FROM block_lifetimes WHERE engine_index = {case.index}"
    )
    figures = case.ask(query, {"never_used": "blocks", "fills": "blocks"})
    if not figures or not figures[1].value:
        return
    unused = case.columns(
        f"SELECT (uses = 0)::TINYINT AS unused FROM block_lifetimes WHERE engine_index = {case.index} ORDER BY fill_ns"
    )["unused"].to_numpy()
    assert figures[0].value is not None
    value = figures[0].value / figures[1].value
    low, high = interval(unused, unused * 0 + 1)
    text = (
        f"{value:.1%} of the {figures[1].value:,.0f} blocks that became cached were never hit "
        f"(95 %: {low:.1%} to {high:.1%}): caching pays for the others only."
    )
    yield Finding(
        "unused-blocks", text, tuple(figures), "never_used / fills", value, "ratio", low, high,
        f"counted in the recorded run; {SAID.format(stretches(unused.size))}",
    )  # fmt: skip
