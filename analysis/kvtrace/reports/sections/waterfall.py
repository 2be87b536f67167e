"""The slowest requests: where their time went."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.waiting import ITL, LATENCY
from kvtrace.people import seconds
from kvtrace.reports.charts import layout, numbers
from kvtrace.reports.page import Figure, Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold

SLOWEST = 30
PHASES = (("queued", "queue_s", "$queue"), ("prefill", "prefill_s", "$prefill"), ("decode", "decode_s", "$decode"))


@section(
    "slowest",
    title="The slowest requests",
    label="Slowest requests",
    order=100,
    plots={"slowest": "The slowest requests: queued, prefill, decode, preempted."},
)
def slowest(run: Run) -> Iterator[Panel]:
    """Bars of the phases of a request, the slowest on top."""
    run.require("scheduled")
    if not run.timed:
        raise Untold("the run has no clock")
    frame = phases(run)
    if not frame.height:
        raise Untold("no request came to its end")
    late, gaps = run.figures(LATENCY), run.figures(ITL)
    prose = (
        f"From arrival to the end requests took {seconds(late['e2e_p50_s'])} at the median and "
        f"{seconds(late['e2e_p99_s'])} at the 99th percentile; the first token came after "
        f"{seconds(late['ttft_p50_s'])} and {seconds(late['ttft_p99_s'])}"
    )
    if gaps["itl_p50_s"] is not None:
        prose += f", the next ones {seconds(gaps['itl_p50_s'])} and {seconds(gaps['itl_p99_s'])} after one another"
    prose += f". Below are the {frame.height} slowest, from their arrivals on." if frame.height > 1 else "."
    height = max(9.0, 4.5 + 0.95 * frame.height)
    yield Panel("slowest", prose, _figure(run, frame), frame, height=height)


def phases(run: Run) -> pl.DataFrame:
    """The slowest requests that ended and were not aborted, with their phases in seconds; preempted_s lies in them."""
    return run.sql(f"""
        SELECT request, request_id, queue_ns / 1e9 AS queue_s, (ttft_ns - queue_ns) / 1e9 AS prefill_s,
               generation_ns / 1e9 AS decode_s, preempted_ns / 1e9 AS preempted_s, e2e_ns / 1e9 AS e2e_s,
               prompt_tokens, cached_tokens, output_tokens, preemptions
        FROM latencies JOIN (
          SELECT engine_index, request, request_id, prompt_tokens, cached_tokens, output_tokens, preemptions
          FROM requests) USING (engine_index, request)
        WHERE engine_index = {{engine}} AND e2e_ns IS NOT NULL AND ttft_ns IS NOT NULL AND finish_reason <> 'abort'
        ORDER BY e2e_s DESC, request LIMIT {SLOWEST}""")


def _figure(run: Run, frame: pl.DataFrame) -> Figure:
    names = [f"request {request}" for request in frame["request"].to_list()]
    traces: list[Figure] = []
    base = pl.zeros(frame.height, eager=True)
    for name, column, colour in PHASES:
        traces.append(
            {
                "type": "bar", "orientation": "h", "name": name, "y": names, "x": numbers(frame[column]),
                "base": numbers(base), "marker": {"color": colour, "line": {"width": 0}},
                "hovertemplate": f"%{{y}}: {name} %{{customdata}}<extra></extra>",
                "customdata": [seconds(value) for value in frame[column].to_list()],
            }
        )  # fmt: skip
        base = base + frame[column]
    away = _away(run, frame["request"].to_list())
    if away.height:
        traces.append(
            {
                "type": "bar", "orientation": "h", "name": "preempted",
                "y": [f"request {request}" for request in away["request"].to_list()],
                "x": numbers(away["away_s"]), "base": numbers(away["after_s"]), "meta": "mark",
                "marker": {"color": "$preempted", "line": {"width": 0}},
                "hovertemplate": "%{y}: preempted %{customdata}<extra></extra>",
                "customdata": [seconds(value) for value in away["away_s"].to_list()],
            }
        )  # fmt: skip
    drawn = layout("time since the request's arrival, s", "")
    drawn["xaxis"] |= {"rangemode": "tozero", "tickformat": ",~r", "showgrid": True}
    drawn["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "showgrid": False,
                       "dtick": 1}  # fmt: skip
    drawn |= {"barmode": "overlay", "bargap": 0.3}
    return {"data": traces, "layout": drawn, "label": "Phases of the slowest requests"}


def _away(run: Run, requests: list[int]) -> pl.DataFrame:
    """When these requests were preempted, in seconds from their arrival, and for how long."""
    listed = ", ".join(map(str, requests))
    return run.sql(f"""
        SELECT request, (time_ns - arrival_ns) / 1e9 AS after_s, (readmit_ns - time_ns) / 1e9 AS away_s
        FROM preemptions JOIN (SELECT engine_index, request, arrival_ns FROM requests) USING (engine_index, request)
        WHERE engine_index = {{engine}} AND request IN ({listed}) AND readmit_ns IS NOT NULL
        ORDER BY request, after_s""")
