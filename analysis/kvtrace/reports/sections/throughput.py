"""Tokens a second and requests a step, over time."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.passes import BALANCE, THROUGHPUT
from kvtrace.people import Style, number, seconds
from kvtrace.reports.charts import Band, numbers, over_time, stack
from kvtrace.reports.page import Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run
from kvtrace.reports.words import share

SLICES = 240
PHASES: tuple[Band, ...] = (("decode", "decode", "$decode"), ("prefill", "prefill", "$prefill"))


@section(
    "throughput",
    title="Throughput and the mix of the steps",
    label="Throughput",
    order=30,
    plots={
        "throughput": "Prefill and decode tokens a second, over time.",
        "step-mix": "Requests of a step in prefill and decode, and those waiting, over time.",
    },
)
def throughput(run: Run) -> Iterator[Panel]:
    """Two charts over the same slices of the time."""
    axis = run.axis
    frame, width = timeline(run)
    whole, balance = run.figures(THROUGHPUT), run.figures(BALANCE)
    if axis.is_time and whole["scheduled_tokens_per_s"] is not None:
        prose = (
            f"{whole['prefill_tokens_per_s']:,.0f} prefill and {whole['decode_tokens_per_s']:,.0f} decode tokens a "
            f"second over {seconds(whole['duration_s'])}; steps took {seconds(whole['step_p50_s'])} at the median and "
            f"{seconds(whole['step_p99_s'])} at the 99th percentile. A token is counted where its step begins."
        )
        rates = frame.select(
            axis.name, *((pl.col(f"{name}_tokens") / width).round(1).alias(f"{name}_tokens_per_s")
                         for name in ("prefill", "decode")), "prefill_tokens", "decode_tokens",
        )  # fmt: skip
        columns, title = "{}_tokens_per_s", "tokens a second"
    else:
        prose = "The run has no clock: tokens are counted by step, not by second."
        rates = frame.select(
            axis.name, *((pl.col(f"{name}_tokens") / pl.col("steps")).round(1).fill_nan(0.0).alias(
                f"{name}_tokens_per_step") for name in ("prefill", "decode")), "prefill_tokens", "decode_tokens",
        )  # fmt: skip
        columns, title = "{}_tokens_per_step", "tokens a step"
    bands = [(name, columns.format(column), colour) for name, column, colour in PHASES]
    figure = stack(rates, axis.name, bands, axis.title, title, label="Prefill and decode tokens over time", shape="hv")
    over_time(figure, axis.extent)
    yield Panel("throughput", prose, figure, rates, Style(cells=axis.cells), title="Tokens")

    mix = frame.select(axis.name, "steps", "prefill_requests", "decode_requests", "waiting_requests", "tokens_per_step")
    prose = (
        f"A step had {number(balance['step_requests_mean'])} requests and {number(balance['step_tokens_mean'])} tokens "
        f"on average (coefficient of variation {number(balance['step_tokens_cv'])}); "
        f"{share(balance['decode_step_ratio'])} of the steps were decode alone, "
        f"{share(balance['mixed_step_ratio'])} mixed, {share(balance['prefill_step_ratio'])} prefill alone."
    )
    if balance["wasted_budget_ratio"] is not None:
        prose += (
            f" While requests waited, {share(balance['wasted_budget_ratio'])} of the steps' token budget went unused."
        )
    bands = [(name, f"{column}_requests", colour) for name, column, colour in PHASES]
    figure = stack(
        mix, axis.name, bands, axis.title, "requests a step, mean", label="Requests of a step over time", shape="hv",
        format=",.1f",
    )  # fmt: skip
    figure["data"].append(
        {
            "type": "scatter", "mode": "lines", "name": "waiting", "x": numbers(mix[axis.name]),
            "y": numbers(mix["waiting_requests"]), "line": {"color": "$ink", "width": 1.5, "dash": "dot"},
            "hovertemplate": "%{y:,.1f} waiting<extra></extra>",
        }
    )  # fmt: skip
    over_time(figure, axis.extent)
    yield Panel("step-mix", prose, figure, mix, Style(cells=axis.cells), title="Requests in a step")


def timeline(run: Run) -> tuple[pl.DataFrame, float]:
    """Sums and means over the steps that began in each slice of the time, and the slice's width in shown seconds."""
    axis = run.axis
    count = max(1, min(SLICES, run.steps // 4))
    found = run.sql(f"""
        SELECT {axis.slice(count)} AS slice, count(*) AS steps, sum(prefill_tokens) AS prefill_tokens,
               sum(decode_tokens) AS decode_tokens, avg(prefill_requests) AS prefill_requests,
               avg(decode_requests) AS decode_requests, avg(waiting) AS waiting_requests, avg(tokens) AS tokens_per_step
        FROM steps JOIN step_phases USING (engine_index, step)
        WHERE engine_index = {{engine}} GROUP BY slice ORDER BY slice""")
    grid = pl.DataFrame({"slice": pl.int_range(count, eager=True, dtype=pl.Int32)})
    frame = (
        grid.join(found, on="slice", how="left", maintain_order="left")
        .with_columns(pl.exclude("slice").fill_null(0))
        .with_columns(pl.col("prefill_requests", "decode_requests", "waiting_requests", "tokens_per_step").round(2))
        .select(axis.begin("slice", count), pl.exclude("slice"))
    )
    return frame, (axis.past - axis.first) / count / 1e9
