"""A comparison in a few lines for people: totals, what changed and why, and the requests that changed most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import polars as pl

from kvtrace.diff.compare import Difference
from kvtrace.diff.why import REASONS
from kvtrace.people import Style, bold, dim, number, percent, render, seconds

if TYPE_CHECKING:
    from kvtrace.api import Trace

TIMES = {"queue_s": "queue time", "ttft_s": "time to first token", "e2e_s": "end to end"}


def page(a: Trace, b: Trace, found: Difference, top: int) -> Iterator[str]:
    """The lines that `kvtrace diff` prints."""
    yield f"{bold('A')}  {a.path}"
    yield f"{bold('B')}  {b.path}"
    yield ""
    yield from matched(found)
    yield ""
    text, _ = render(totals(found), Style())
    yield text
    yield ""
    yield bold("Changed from A to B")
    yield from changes(found)
    why = list(reasons(found))
    if why:
        yield ""
        yield bold("Why less was found, block by block")
        yield from why
    changed = most(found, top)
    if changed.height:
        yield ""
        yield bold(f"The {changed.height} requests whose hits changed most" if changed.height > 1 else "The request")
        text, _ = render(changed, Style())
        yield text


def matched(found: Difference) -> Iterator[str]:
    """How requests were matched, and what was not."""
    by = found.requests.group_by("matched_by").len().sort("len", descending=True)
    how = ", ".join(f"{count:,} by {name}" for name, count in by.rows())
    yield f"{found.requests.height:,} requests matched: {how}"
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only.height:
            some = ", ".join(map(str, only["request"].head(5).to_list()))
            yield f"{only.height:,} only in {name}: {some}{', ...' if only.height > 5 else ''}"


def totals(found: Difference) -> pl.DataFrame:
    """Sums and medians over the matched requests in both traces, as text."""
    rows = found.requests

    def side(column: str, name: str) -> pl.Series:
        return rows[f"{column}_{name}"]

    figures: list[tuple[Any, ...]] = []
    ratios = []
    for name in ("a", "b"):
        admitted = rows.filter(pl.col(f"cached_tokens_{name}").is_not_null())
        asked = int(admitted[f"prompt_tokens_{name}"].sum())
        ratios.append(int(admitted[f"cached_tokens_{name}"].sum()) / asked if asked else None)
    figures.append(("tokens found / prompt tokens", *ratios, percent))
    for label, column in (
        ("tokens found at first admission", "cached_tokens"),
        ("tokens found after preemptions", "cached_after_preemption"),
        ("preemptions", "preemptions"), ("output tokens", "output_tokens"),
    ):  # fmt: skip
        figures.append((label, *(int(side(column, name).sum()) for name in ("a", "b")), lambda n: f"{n:,}"))
    for column, label in (("queue_steps", "steps in the queue, median"), ("steps", "steps to the end, median")):
        figures.append((label, *(side(column, name).median() for name in ("a", "b")), number))
    for column, label in TIMES.items():
        both = [side(column, name) for name in ("a", "b")]
        if all(values.null_count() < len(values) for values in both):
            figures.append((f"{label}, median", *(values.median() for values in both), seconds))
    return pl.DataFrame(
        [(label, *(_told(value, show) for value in values)) for label, *values, show in figures],
        schema=["of matched requests", "A", "B"],
        orient="row",
    )


def _told(value: Any, show: Any) -> str:
    return "-" if value is None else str(show(value))


CHANGES = (
    ("hits", "cached_tokens", "requests gained hits", "requests lost hits", "tokens"),
    ("preemptions", "preemptions", "requests were preempted more often", "requests less often", "times"),
    ("output", "output_tokens", "requests generated more", "requests generated less", "tokens"),
    ("steps", "steps", "requests took more steps to their end", "requests took fewer", "steps"),
    ("time", "e2e_s", "requests took longer end to end", "requests took less time", "s"),
)
"""Of each line: its name, the column, what to say of those with more of it in B and of those with less, unit."""


def changes(found: Difference) -> Iterator[str]:
    """How many requests gained, lost, were preempted, slowed down."""
    rows = found.requests
    for name, column, greater, less, unit in CHANGES:
        change = (rows[f"{column}_b"].cast(pl.Float64) - rows[f"{column}_a"].cast(pl.Float64)).drop_nulls()
        if not change.len():
            continue
        parts = []
        for values, words in ((change.filter(change > 0), greater), (change.filter(change < 0), less)):
            if values.len():
                amount = abs(float(values.sum()))
                told = seconds(amount) if unit == "s" else f"{amount:,.0f} {unit}"
                parts.append(f"{values.len():,} {words} ({told} in all)")
        yield f"  {dim(name.ljust(11))}  {', '.join(parts) or 'the same'}"


def reasons(found: Difference) -> Iterator[str]:
    """For each trace, what had become of the blocks that only the other one found."""
    for name in ("a", "b"):
        blocks = found.blocks.filter(pl.col("worse") == name)
        if not blocks.height:
            continue
        counts = dict(blocks.group_by("reason").len().rows())
        yield f"  in {name.upper()}, of {blocks.height:,} blocks that the other found:"
        for reason, words in REASONS.items():
            if reason in counts:
                yield f"    {counts[reason]:>8,}  {reason}: {words}"
        by = blocks.filter(pl.col("evicted_by").is_not_null()).group_by("evicted_by").len()
        by = by.sort(["len", "evicted_by"], descending=[True, False]).head(3)
        if by.height:
            yield "              most were evicted for " + ", ".join(f"request {r} ({n:,})" for r, n in by.rows())


def most(found: Difference, top: int) -> pl.DataFrame:
    """The requests with the greatest change of hits, and the first block that the poorer lookup missed."""
    changed = found.requests.filter(pl.col("hit_change").fill_null(0) != 0)
    order = changed.with_columns(size=pl.col("hit_change").abs()).sort(["size", "request_a"], descending=[True, False])
    rows = order.head(top)
    return rows.select(
        pl.col("request_a").alias("request A"), pl.col("request_b").alias("request B"),
        pl.col("prompt_tokens_a").alias("prompt tokens"), pl.col("cached_tokens_a").alias("found A"),
        pl.col("cached_tokens_b").alias("found B"), pl.col("hit_change").alias("change"),
        pl.Series("why", [sentence(row) for row in rows.iter_rows(named=True)], dtype=pl.String),
    )  # fmt: skip


def sentence(row: dict[str, Any]) -> str:
    """Why the first block of those was not found, in words."""
    where = f"{(row['worse'] or '').upper()}: block {row['position']}"
    if row["reason"] == "evicted":
        who = f"for request {row['evicted_by']}" if row["evicted_by"] is not None else "by order"
        return f"{where} evicted {who} in step {row['evicted_step']}"
    return f"{where} {row['reason']}"
