"""Figures as plain Plotly dicts. Colours are names of the page's CSS variables, `$policy-1` and so on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from kvtrace.reports.page import Figure

POINTS = 1200  # more steps than that are averaged: a phone draws these at once, and no screen shows more
LEGEND = 36  # letters of a name
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
    figure = by_capacity(
        rows.with_columns(capacity=pl.col("capacity_blocks").cast(pl.Float64).fill_null(unbounded)),
        "policy", "capacity", column, "prompt tokens found in the cache", unbounded,
        label="Hit ratio against cache capacity, by policy",
    )  # fmt: skip
    ticks = _spread_ticks(finite, unbounded)
    figure["layout"]["xaxis"] |= {
        "tickvals": [*ticks, unbounded],
        "ticktext": [*(f"{tick:,}" for tick in ticks), "∞"],
    }
    return with_own_cache(figure, own_capacity, own_ratio, unbounded)


def by_capacity(
    rows: pl.DataFrame, by: str, capacity: str, column: str, y_title: str, most: float, *, label: str
) -> Figure:
    """A ratio against the capacity, which is drawn by its logarithm: a line for each value of `by`; `most` is the
    capacity at the right end, drawn as that of a cache without bound where `capacity_blocks` is null."""
    traces = []
    colour = 0
    for name in rows[by].unique(maintain_order=True):
        line = rows.filter(pl.col(by) == name).sort(capacity)
        reference = name == "opt"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": in_legend(name),
                "x": line[capacity].to_list(),
                "y": numbers(line[column]),
                "customdata": [_blocks(value) for value in line["capacity_blocks"].to_list()],
                "hovertemplate": "%{y:.2%} at %{customdata}<extra>" + name + "</extra>",
                "line": {
                    "color": "$reference" if reference else f"$policy-{colour % 4 + 1}",
                    "dash": "dot" if reference else _DASHES[colour % 4],
                    "width": 2,
                },
                "marker": {"size": 6, "symbol": "circle-open" if reference else _SYMBOLS[colour % 4]},
            }
        )
        colour += not reference
    drawn = layout("cache capacity, blocks", y_title)
    least = min((value for trace in traces for value in trace["x"]), default=1)
    ticks = _round_ticks(least, most)
    drawn["xaxis"] |= {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [short(tick) for tick in ticks],
        "minor": {"ticks": ""},
    }
    drawn["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return {"data": traces, "layout": drawn, "label": label}


def with_own_cache(figure: Figure, capacity: int | None, ratio: float | None, most: float) -> Figure:
    """A figure by capacity with a mark where the run's own cache stands, and what the engine itself had there."""
    if capacity is None:
        return figure
    place = math.log10(capacity)
    right = place < math.log10(most) - 0.3
    figure["layout"] |= {"shapes": [_mark(capacity)], "annotations": [_label(place, "this run's cache", right)]}
    if ratio is not None:
        figure["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "the engine itself",
                "x": [capacity],
                "y": [ratio],
                "hovertemplate": "%{y:.2%}<extra>the engine itself</extra>",
                "marker": {
                    "symbol": "diamond",
                    "size": 13,
                    "color": "$mark",
                    "line": {"color": "$paper", "width": 2},
                },
                "meta": "mark",
            }
        )
    return figure


def occupancy_by_step(occupancy: pl.DataFrame, preempted_steps: Sequence[int]) -> Figure:
    """What the cache's blocks were doing, stacked over the steps; preemptions stand on top."""
    capacity = int(occupancy.select(pl.sum_horizontal("used", "cached_idle", "free").max()).item())
    shown, each = _thinned(occupancy)
    figure = stack(
        shown.with_columns(pl.col("used", "cached_idle", "free").round(1)),
        "step", OCCUPANCY, "scheduler step", "blocks", label="Use of the cache's blocks over the steps of the run",
        shape="linear" if each > 1 else "hv",
    )  # fmt: skip
    return with_preemptions(figure, preempted_steps, ["preemption"] * len(preempted_steps), capacity)


def with_preemptions(figure: Figure, x: Sequence[Any], words: Sequence[str], capacity: int) -> Figure:
    """A figure of blocks with a mark on top wherever requests were preempted."""
    if x:
        figure["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "preemption",
                "x": list(x),
                "y": [capacity * 1.04] * len(x),
                "text": list(words),
                "marker": {"symbol": "triangle-down", "size": 9, "color": "$alarm"},
                "hovertemplate": "%{text}<extra></extra>",
                "cliponaxis": False,
                "meta": "mark",
            }
        )
    figure["layout"]["yaxis"] |= {"range": [0, capacity * 1.08], "tickformat": ","}
    return figure


Band = tuple[str, str, str]  # the name of a band, the column that it shows, its colour
OCCUPANCY: tuple[Band, ...] = (
    ("in use", "used", "$used"),
    ("cached, idle", "cached_idle", "$idle"),
    ("free", "free", "$free"),
)


def stack(
    frame: pl.DataFrame, x: str, bands: Sequence[Band], x_title: str, y_title: str, *, label: str,
    shape: str = "linear", format: str = ",.0f",
) -> Figure:  # fmt: skip
    """Areas on top of one another: a band for each column."""
    places = numbers(frame[x])
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": places,
            "y": numbers(frame[column]),
            "stackgroup": "all",
            "line": {"width": 0, "color": colour, "shape": shape},
            "fillcolor": colour,
            "hovertemplate": f"%{{y:{format}}} {name}<extra></extra>",
        }
        for name, column, colour in bands
    ]
    drawn = layout(x_title, y_title)
    drawn["xaxis"] |= {"tickformat": ",~r"}
    drawn["yaxis"] |= {"tickformat": ",~r", "rangemode": "tozero"}
    drawn["hovermode"] = "x unified"
    return {"data": traces, "layout": drawn, "label": label}


def bars(
    frame: pl.DataFrame, x: str, bands: Sequence[Band], x_title: str, y_title: str, *, label: str, format: str = ",",
    mode: str = "stack",
) -> Figure:  # fmt: skip
    """Bars, those of several bands on top of one another (or beside, with mode="group"); `x` names texts or numbers."""
    places = frame[x].to_list() if frame.schema[x] == pl.String else numbers(frame[x])
    traces: list[Figure] = [
        {
            "type": "bar",
            "name": name,
            "x": places,
            "y": numbers(frame[column]),
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{y:{format}}} {name}<extra></extra>",
        }
        for name, column, colour in bands
    ]
    drawn = layout(x_title, y_title)
    drawn["xaxis"] |= {"type": "category"} if frame.schema[x] == pl.String else {"tickformat": ",~r"}
    drawn["yaxis"] |= {"tickformat": format if "%" in format else ",~r", "rangemode": "tozero"}
    drawn |= {"barmode": mode, "bargap": 0.18, "hovermode": "x unified", "showlegend": len(bands) > 1}
    return {"data": traces, "layout": drawn, "label": label}


def lines(
    frame: pl.DataFrame, by: str, x: str, y: str, x_title: str, y_title: str, *, label: str, format: str = ",",
    markers: bool = True,
) -> Figure:  # fmt: skip
    """A line for each value of `by`."""
    traces = []
    for index, name in enumerate(frame[by].unique(maintain_order=True)):
        line = frame.filter(pl.col(by) == name)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if markers else "lines",
                "name": in_legend(name),
                "x": numbers(line[x]),
                "y": numbers(line[y]),
                "hovertemplate": f"%{{x}}: %{{y:{format}}}<extra>{name}</extra>",
                "line": {"color": f"$policy-{index % 4 + 1}", "dash": _DASHES[index // 4 % 4], "width": 2},
                "marker": {"size": 6, "symbol": _SYMBOLS[index % 4]},
            }
        )
    drawn = layout(x_title, y_title)
    drawn["xaxis"] |= {"tickformat": ",~r"}
    drawn["yaxis"] |= {"tickformat": format, "rangemode": "tozero"}
    return {"data": traces, "layout": drawn, "label": label}


def heat(
    frame: pl.DataFrame, x: str, y: str, z: str, x_title: str, y_title: str, z_title: str, cell: tuple[float, float],
    extent: tuple[float, float], *, label: str,
) -> Figure:  # fmt: skip
    """A heat map: a row of `frame` for each cell that is not empty, `x` and `y` its lower corner, `cell` their width
    and height, `extent` where all ends."""
    columns, rows = (math.ceil(round(whole / size, 6)) for whole, size in zip(extent, cell, strict=True))
    values: list[list[Any]] = [[None] * columns for _ in range(rows)]
    for left, low, value in zip(frame[x].to_list(), frame[y].to_list(), numbers(frame[z]), strict=True):
        values[min(rows - 1, round(low / cell[1]))][min(columns - 1, round(left / cell[0]))] = value
    most = frame[z].quantile(0.995) or frame[z].max()
    trace = {
        "type": "heatmap",
        "z": values,
        "x0": cell[0] / 2, "dx": cell[0], "y0": cell[1] / 2, "dy": cell[1],
        "zmin": 0, "zmax": most,
        "colorscale": [[0, "$heat-0"], [0.25, "$heat-1"], [0.5, "$heat-2"], [0.75, "$heat-3"], [1, "$heat-4"]],
        "hovertemplate": "%{z:,.4~g} " + z_title + "<br>" + x_title + " %{x:,.4~g}, " + y_title + " %{y:,.0f}"
                         "<extra></extra>",
        "colorbar": {
            "orientation": "h", "thickness": 8, "len": 0.45, "x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom",
            "outlinewidth": 0, "title": {"text": z_title, "side": "top", "font": {"size": 12, "color": "$soft"}},
            "nticks": 4, "tickfont": {"size": 11},
        },
    }  # fmt: skip
    drawn = layout(x_title, y_title)
    drawn["xaxis"] |= {"range": [0, extent[0]], "tickformat": ",~r"}
    drawn["yaxis"] |= {"range": [0, extent[1]], "tickformat": ",~r", "showgrid": False}
    return {"data": [trace], "layout": drawn, "label": label}


def over_time(figure: Figure, extent: float, slices: int | None = None) -> Figure:
    """A figure whose x axis goes from 0 to `extent`, so that all of a page line up; bars are as wide as a slice."""
    figure["layout"]["xaxis"] |= {"range": [0, extent], "tickformat": ",~r"}
    figure["layout"]["margin"]["l"] = 66  # room for most labels, so that they begin at one place, too
    if slices:
        for trace in figure["data"]:
            trace |= {"offset": 0, "width": extent / slices}
        figure["layout"]["bargap"] = 0
    return figure


def marked_place(x: float, text: str, last: float) -> Figure:
    """What a layout needs for a labelled mark at a place of an axis of categories that ends at `last`."""
    label = _label(x, text, right=x < last / 2) | {"y": 1}  # above the bars, where the margin has room for it
    return {"shapes": [_mark(x)], "annotations": [label], "margin": {"l": 8, "r": 16, "t": 26, "b": 8}}


def in_legend(name: str) -> str:
    """A name that leaves room for the chart; hovering shows all of it."""
    return name if len(name) <= LEGEND else name[: LEGEND - 1] + "…"


def numbers(values: pl.Series) -> list[Any]:
    """The values for a figure: floats with the seven digits that a screen could show, null for what is no number."""
    if not values.dtype.is_float():
        return values.to_list()
    return [None if v is None or not math.isfinite(v) else float(f"{v:.7g}") for v in values.to_list()]


def _thinned(frame: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """At most POINTS rows, each the mean of as many steps as the second value says."""
    each = -(-frame.height // POINTS)
    if each <= 1:
        return frame, 1
    groups = frame.with_row_index("bin").with_columns(pl.col("bin") // each)
    return groups.group_by("bin", maintain_order=True).mean().drop("bin"), each


def layout(x: str, y: str) -> Figure:
    axis = {"gridcolor": "$grid", "linecolor": "$axis", "zeroline": False, "automargin": True, "ticks": "",
            "fixedrange": True}  # fmt: skip
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


def _round_ticks(least: float, most: float) -> list[float]:
    """1, 2, 5, 10 and so on between the two, the ones alone where that would be many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(max(most, least))) + 1)
    several = (1, 2, 5) if len(powers) <= 4 else (1, 3) if len(powers) <= 5 else (1,)
    return [digit * 10**power for power in powers for digit in several if least <= digit * 10**power <= most * 1.05]


def short(value: float) -> str:
    """A number for the end of an axis: 200, 5k, 1M."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"


def _blocks(value: int | None) -> str:
    return "an unbounded cache" if value is None else f"{value:,} blocks"
