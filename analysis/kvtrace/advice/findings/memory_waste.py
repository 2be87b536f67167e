"""Memory that held nothing: token slots without a token in used blocks, and blocks that nobody held."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Finding, adviser


@adviser("fragmentation")
def fragmentation(case: Case) -> Iterator[Finding]:
    """Internal fragmentation, summed over steps."""
    query = (
        "SELECT sum(wasted_slots) AS wasted_slots, sum(wasted_slots + used_tokens) AS slots "
        f"FROM occupancy WHERE engine_index = {case.index}"
    )
    figures = case.ask(query, {"wasted_slots": "slot-steps", "slots": "slot-steps"})
    if not figures or figures[0].value is None or not figures[1].value:
        return
    steps = case.columns(
        f"SELECT wasted_slots, wasted_slots + used_tokens AS slots FROM occupancy "
        f"WHERE engine_index = {case.index} AND wasted_slots IS NOT NULL ORDER BY step"
    )
    value = figures[0].value / figures[1].value
    low, high = interval(steps["wasted_slots"].to_numpy(), steps["slots"].to_numpy())
    text = (
        f"{value:.1%} of the token slots of used blocks held no token (95 %: {low:.1%} to {high:.1%}): what blocks of "
        f"{case.block_size} tokens cost."
    )
    yield Finding(
        "fragmentation", text, tuple(figures), "wasted_slots / slots", value, "ratio", low, high,
        f"summed over the steps of the recorded run; {SAID.format(stretches(steps.height))}",
    )  # fmt: skip


@adviser("idle-blocks")
def idle_blocks(case: Case) -> Iterator[Finding]:
    """Blocks that are cached but held by no request, and empty ones: memory that requests did not need."""
    query = (
        "SELECT sum(cached_idle) AS cached_idle, sum(free) AS empty, sum(used + cached_idle + free) AS blocks "
        f"FROM occupancy WHERE engine_index = {case.index}"
    )
    figures = case.ask(query, dict.fromkeys(("cached_idle", "empty", "blocks"), "block-steps"))
    if not figures or not figures[2].value or figures[0].value is None or figures[1].value is None:
        return
    steps = case.columns(
        f"SELECT cached_idle, used + cached_idle + free AS blocks FROM occupancy "
        f"WHERE engine_index = {case.index} ORDER BY step"
    )
    value = figures[0].value / figures[2].value
    low, high = interval(steps["cached_idle"].to_numpy(), steps["blocks"].to_numpy())
    text = (
        f"On the mean over steps {value:.1%} of the blocks were cached but held by no request "
        f"(95 %: {low:.1%} to {high:.1%}), and {figures[1].value / figures[2].value:.1%} were empty."
    )
    yield Finding(
        "idle-blocks", text, tuple(figures), "cached_idle / blocks", value, "ratio", low, high,
        f"summed over the steps of the recorded run; {SAID.format(stretches(steps.height))}",
    )  # fmt: skip
