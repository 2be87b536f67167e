"""The part of the token budget that steps left unused while requests waited."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Finding, adviser


@adviser("token-budget")
def token_budget(case: Case) -> Iterator[Finding]:
    """How much, and whether the limit on running requests or the room for blocks kept them waiting."""
    most = (case.header.get("scheduler") or {}).get("max_num_seqs")
    full = f"count(*) FILTER (WHERE running >= {int(most)})" if most else "NULL"
    query = (
        "SELECT sum(tokens) AS tokens, sum(budget_tokens) AS budget, count(*) AS waiting_steps, "
        f"{full} AS full_batch_steps FROM steps JOIN engines USING (engine_index) "
        f"WHERE waiting > 0 AND engine_index = {case.index}"
    )
    units = {"tokens": "tokens", "budget": "tokens", "waiting_steps": "steps", "full_batch_steps": "steps"}
    figures = case.ask(query, units)
    if not figures or not figures[1].value or figures[0].value is None:
        return
    steps = case.columns(
        "SELECT budget_tokens - tokens AS unused, budget_tokens FROM steps JOIN engines USING (engine_index) "
        f"WHERE waiting > 0 AND engine_index = {case.index} ORDER BY step"
    )
    value = 1 - figures[0].value / figures[1].value
    low, high = interval(steps["unused"].to_numpy(), steps["budget_tokens"].to_numpy())
    text = (
        f"In the {figures[2].value:,.0f} steps after which requests still waited, {value:.1%} of the token budget "
        f"stayed unused (95 %: {low:.1%} to {high:.1%})"
    )
    if most and figures[3].value is not None and figures[2].value:
        share = figures[3].value / figures[2].value
        text += (
            f"; in {share:.1%} of them the batch was full ({most} requests), in the others blocks or tokens were short"
        )
    yield Finding(
        "token-budget", text + ".", tuple(figures), "1 - tokens / budget", value, "ratio", low, high,
        f"summed over those steps of the recorded run; {SAID.format(stretches(steps.height))}",
    )  # fmt: skip
