"""What preemptions made the engine compute again, and what would spare it."""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace.advice.case import Case
from kvtrace.advice.confidence import SAID, interval, stretches
from kvtrace.advice.declare import Figure, Finding, adviser

LARGER = (1.25, 1.5, 2, 3, 4)  # caches, times the engine's own
SMALLER = (0.75, 0.5, 0.25)  # batches


@adviser("preemption")
def preemption(case: Case) -> Iterator[Finding]:
    """Tokens computed twice, and the smallest change of those tried that leaves none to preempt."""
    from kvtrace.people import seconds

    query = (
        "SELECT sum(tokens_recomputed) AS recomputed_tokens, count(*) AS preemptions "
        f"FROM preemptions WHERE engine_index = {case.index}"
    )
    figures = case.ask(query, {"recomputed_tokens": "tokens", "preemptions": "times"})
    if not figures or not figures[1].value:
        return
    each = case.columns(
        "SELECT coalesce(tokens, 0) AS tokens FROM requests LEFT JOIN (SELECT engine_index, request, "
        "sum(tokens_recomputed) AS tokens FROM preemptions GROUP BY ALL) USING (engine_index, request) "
        f"WHERE engine_index = {case.index} ORDER BY request"
    )["tokens"].to_numpy()
    value = figures[0].value or 0
    low, high = interval(each)
    text = (
        f"{figures[1].value:,.0f} preemptions made the engine compute {value:,.0f} tokens again "
        f"(95 %: {low:,.0f} to {high:,.0f})"
    )
    saved = None
    if (cost := case.token_cost) is not None and cost.value is not None:
        saved = value * cost.value / 1e9
        figures.append(cost)
        text += f", about {seconds(saved)} of prefill"
    spared, cures = _cures(case)
    text += ". " + (" ".join(cures) if cures else "")
    yield Finding(
        "preemption", text.strip(), (*figures, *spared), "recomputed_tokens", value, "tokens", low, high,
        f"counted in the recorded run; {SAID.format(stretches(each.size))}", float(value), saved,
    )  # fmt: skip


def _cures(case: Case) -> tuple[list[Figure], list[str]]:
    """The smallest of the larger caches, and the largest of the smaller batches, without preemptions."""
    if case.open_because is not None or case.capacity is None:
        return [], []
    figures, lines = [], []
    blocks = [int(case.capacity * times) + 1 for times in LARGER]
    rows = case.simulated({"num_blocks": blocks})
    best = next((row for row in rows if row.row["preemptions"] == 0), rows[-1] if rows else None)
    if best is not None:
        figures.append(best.figure("preemptions_in_larger_cache", "preemptions", "times"))
        lines.append(f"With {case.size(best.row['num_blocks'] - 1)} there would be {best.row['preemptions']:,}.")
    most = int(case.header["scheduler"]["max_num_seqs"])
    batches = sorted({max(1, int(most * times)) for times in SMALLER}, reverse=True)
    rows = case.simulated({"max_num_seqs": batches})
    best = next((row for row in rows if row.row["preemptions"] == 0), rows[-1] if rows else None)
    if best is not None:
        figures += [
            best.figure("preemptions_in_smaller_batch", "preemptions", "times"),
            best.figure("steps_in_smaller_batch", "steps", "steps"),
        ]
        lines.append(
            f"With at most {best.row['max_num_seqs']} requests at a time, {best.row['preemptions']:,}, "
            f"in {best.row['steps']:,} steps."
        )
    if figures:
        lines.append("(Closed loop; at other settings arrivals may meet other steps.)")
    return figures, lines
