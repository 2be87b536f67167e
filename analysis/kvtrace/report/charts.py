"""Figures as plain Plotly dicts. Colours are names of the page's CSS variables, `$policy-1` and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

Figure = dict[str, Any]

POINTS = 1200  # more steps than that are averaged: a phone draws these at once, and no screen shows more
_DASHES = ("solid", "dash", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "triangle-up", "cross")


def hit_ratio_by_capacity(
    rows: pl.DataFrame, own_capacity: int | None, own_ratio: float | None, column: str = "token_hit_ratio"
) -> Figure:
    """Hit ratio against capacity, a line for each policy.

    `rows` are rows of a replay; a null capacity is an unbounded cache and stands at the right end.
    `own_capacity` and `own_ratio` mark the recorded run itself.
    """
    rows = rows.filter(pl.col(column).is_not_null())
    finite = sorted(set(rows["capacity_blocks"].drop_nulls().to_list()))
    # The unbounded cache gets a place of its own, as far from the last capacity as that is from the one
    # before.
    step = finite[-1] / finite[-2] if len(finite) > 1 else 2.0
    unbounded = (finite[-1] if finite else 1) * min(max(step, 1.3), 2.0)
    traces = []
    for index, policy in enumerate(rows["policy"].unique(maintain_order=True)):
        line = (
            rows.filter(pl.col("policy") == policy)
            .with_columns(x=pl.col("capacity_blocks").cast(pl.Float64).fill_null(unbounded))
            .sort("x")
        )
        reference = policy == "opt"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": policy,
                "x": line["x"].to_list(),
                "y": line[column].to_list(),
                "customdata": [_blocks(value) for value in line["capacity_blocks"].to_list()],
                "hovertemplate": "%{y:.2%} at %{customdata}<extra>" + policy + "</extra>",
                "line": {
                    "color": "$reference" if reference else f"$policy-{index % 4 + 1}",
                    "dash": "dot" if reference else _DASHES[index % 4],
                    "width": 2,
                },
                "marker": {"size": 7, "symbol": "circle-open" if reference else _SYMBOLS[index % 4]},
            }
        )
    shapes, annotations = [], []
    if own_capacity is not None:
        place = math.log10(own_capacity)
        shapes.append(_mark(own_capacity))
        annotations.append(_label(place, "this run's cache", right=place < math.log10(unbounded) - 0.3))
        if own_ratio is not None:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "the engine itself",
                    "x": [own_capacity],
                    "y": [own_ratio],
                    "hovertemplate": "%{y:.2%}<extra>the engine itself</extra>",
                    "marker": {
                        "symbol": "diamond",
                        "size": 13,
                        "color": "$mark",
                        "line": {"color": "$paper", "width": 2},
                    },
                }
            )
    ticks = _spread_ticks(finite, unbounded)
    layout = _layout("cache capacity, blocks", "prompt tokens found in the cache")
    layout["xaxis"] |= {
        "type": "log",
        "tickvals": [*ticks, unbounded],
        "ticktext": [*(f"{tick:,}" for tick in ticks), "∞"],
        "minor": {"ticks": ""},
    }
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    layout |= {"shapes": shapes, "annotations": annotations}
    return {"data": traces, "layout": layout, "label": "Hit ratio against cache capacity, by policy"}


def occupancy_by_step(occupancy: pl.DataFrame, preempted_steps: Sequence[int]) -> Figure:
    """What the cache's blocks were doing, stacked over the steps; preemptions stand on top."""
    capacity = int(occupancy.select(pl.sum_horizontal("used", "cached_idle", "free").max()).item())
    shown, each = _thinned(occupancy)
    bands = [
        ("in use", "used", "$used"),
        ("cached, idle", "cached_idle", "$idle"),
        ("free", "free", "$free"),
    ]
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": shown["step"].to_list(),
            "y": shown[column].round(1).to_list(),
            "stackgroup": "blocks",
            "line": {"width": 0, "color": colour, "shape": "linear" if each > 1 else "hv"},
            "fillcolor": colour,
            "hovertemplate": "%{y:,.0f} " + name + "<extra></extra>",
        }
        for name, column, colour in bands
    ]
    if preempted_steps:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "preemption",
                "x": list(preempted_steps),
                "y": [capacity * 1.04] * len(preempted_steps),
                "marker": {"symbol": "triangle-down", "size": 9, "color": "$alarm"},
                "hovertemplate": "preemption in step %{x:,}<extra></extra>",
                "cliponaxis": False,
            }
        )
    layout = _layout("scheduler step", "blocks")
    layout["yaxis"] |= {"range": [0, capacity * 1.08], "tickformat": ","}
    layout["xaxis"] |= {"tickformat": ","}
    layout["hovermode"] = "x unified"
    return {"data": traces, "layout": layout, "label": "Use of the cache's blocks over the steps of the run"}


def _thinned(frame: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """At most POINTS rows, each the mean of as many steps as the second value says."""
    each = -(-frame.height // POINTS)
    if each <= 1:
        return frame, 1
    groups = frame.with_row_index("bin").with_columns(pl.col("bin") // each)
    return groups.group_by("bin", maintain_order=True).mean().drop("bin"), each


def _layout(x: str, y: str) -> Figure:
    axis = {"gridcolor": "$grid", "linecolor": "$axis", "zeroline": False, "automargin": True, "ticks": ""}
    title = {"standoff": 12, "font": {"size": 13, "color": "$soft"}}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "$font", "size": 13, "color": "$ink"},
        "hoverlabel": {"bgcolor": "$card", "bordercolor": "$axis", "font": {"color": "$ink"}},
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "xanchor": "left",
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "xaxis": axis | {"title": title | {"text": x}, "showgrid": False, "showline": True},
        "yaxis": axis | {"title": title | {"text": y}},
        "hovermode": "closest",
        "dragmode": False,
    }


def _mark(x: float) -> Figure:
    line = {"color": "$mark", "width": 1, "dash": "dot"}
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": line,
        "layer": "below",
    }


def _label(log_x: float, text: str, right: bool) -> Figure:
    return {
        "x": log_x,
        "y": 0.02,
        "yref": "paper",
        "yanchor": "bottom",
        "xanchor": "left" if right else "right",
        "xshift": 5 if right else -5,
        "text": text,
        "showarrow": False,
        "font": {"color": "$mark", "size": 12},
    }


def _spread_ticks(values: Sequence[int], unbounded: float) -> list[int]:
    """Those capacities whose labels do not run into one another, the largest first."""
    kept: list[int] = []
    room = math.log10(unbounded / values[0]) / 9 if values else 0.0
    for value in reversed(values):
        if not kept or math.log10(kept[-1] / value) >= room:
            kept.append(value)
    return kept[::-1]


def _blocks(value: int | None) -> str:
    return "an unbounded cache" if value is None else f"{value:,} blocks"
