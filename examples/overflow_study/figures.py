"""The figures, as plain Plotly dicts."""

from __future__ import annotations

from typing import Any

import polars as pl
from experiments import AS_IS, MENDED

Figure = dict[str, Any]
STYLE = {
    "recompute": ("recompute", "#b5532a", "solid", "circle"),
    "swap": ("swap, pinned", "#2563a8", "solid", "square"),
    "swap-pageable": ("swap, pageable", "#7aa6d6", "dash", "square-open"),
    "hybrid": ("hybrid", "#4d8b3f", "dot", "diamond-open"),
}
PANELS = ("overhead, s", "of it, overflows alone, s", "beyond recompute, s")
DECADES = 20  # a y that spans more than this is logarithmic
FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#222"}


def _layout(rows: int, columns: int, height: int) -> Figure:
    return {
        "font": FONT, "paper_bgcolor": "white", "plot_bgcolor": "white", "height": height,
        "margin": {"l": 60, "r": 20, "t": 60, "b": 50}, "hovermode": "closest",
        "grid": {"rows": rows, "columns": columns, "pattern": "independent", "xgap": 0.16, "ygap": 0.32},
        "legend": {"orientation": "h", "y": 1.04, "yanchor": "bottom", "x": 0},
    }  # fmt: skip


def _axis(title: str, **more: Any) -> Figure:
    return {"title": {"text": title}, "gridcolor": "#e5e5e5", "linecolor": "#999", "zerolinecolor": "#999", **more}


def _number(panel: int) -> str:
    return "" if panel == 0 else str(panel + 1)


def _short(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else str(tokens)


def _lines(data: pl.DataFrame, x: str, y: str, panel: int) -> list[Figure]:
    traces = []
    for way, (name, colour, dash, symbol) in STYLE.items():
        line = data.filter(pl.col("way") == way).sort(x)
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "legendgroup": way, "showlegend": panel == 0,
            "x": line[x].to_list(), "y": [round(value, 6) for value in line[y].to_list()],
            "customdata": line.select("preemptions", "waiting_s").rows(),
            "hovertemplate": "%{x}: %{y:.3f} s<br>%{customdata[0]} victims, %{customdata[1]:.2f} s of waiting"
            f"<extra>{name}</extra>",
            "line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": symbol, "size": 7},
            "xaxis": f"x{_number(panel)}", "yaxis": f"y{_number(panel)}",
        })  # fmt: skip
    return traces


def overheads(data: pl.DataFrame, x: str, title: str, log: bool = True) -> Figure:
    """Three panels: the overhead, what of it overflows themselves take, and the difference from recompute; a row of
    them for each engine. `log`: of x."""
    data = data.sort(x, "way")
    if "engine" not in data.columns:
        data = data.with_columns(engine=pl.lit(AS_IS))
    keys = ["engine", x]
    of_recompute = data.filter(pl.col("way") == "recompute").select(*keys, base="overhead_s")
    data = data.join(of_recompute, on=keys, maintain_order="left").with_columns(
        beyond=pl.col("overhead_s") - pl.col("base")
    )
    engines = [engine for engine in (AS_IS, MENDED) if engine in data["engine"]]
    figure = _layout(len(engines), 3, 90 + 330 * len(engines))
    ticks = sorted(set(data[x].to_list()))
    traces = []
    for row, engine in enumerate(engines):
        part = data.filter(pl.col("engine") == engine)
        for column, y in enumerate(("overhead_s", "overflow_s", "beyond")):
            panel = row * 3 + column
            traces += _lines(part, x, y, panel)
            kind = (
                {"type": "log", "tickvals": ticks, "ticktext": [_short(tick) for tick in ticks], "tickangle": 0}
                if log
                else {"tickformat": ".0%"}
            )
            figure[f"xaxis{_number(panel)}"] = _axis(title, **kind)
            positive = part.filter(pl.col(y) > 0)[y].to_list()
            wide = column < 2 and max(positive) > DECADES * min(positive)
            upright = {"type": "log", "dtick": 1} if wide else {"rangemode": "normal"}
            figure[f"yaxis{_number(panel)}"] = _axis(PANELS[column], **upright)
        if len(engines) > 1:
            figure.setdefault("annotations", []).append({
                "text": f"<b>{engine}</b>", "showarrow": False, "xref": "paper", "yref": f"y{_number(row * 3)} domain",
                "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom",
            })  # fmt: skip
    return {"data": traces, "layout": figure}


def over_time(calls: pl.DataFrame, bins: pl.DataFrame) -> Figure:
    """Throughput, GPU occupancy and CPU occupancy over time; recompute on the left, swap on the right."""
    layout = _layout(3, 2, 760)
    traces = []
    for column, way in enumerate(("recompute", "swap")):
        name, colour, _, _ = STYLE[way]
        mine, binned = calls.filter(pl.col("way") == way), bins.filter(pl.col("way") == way)
        for row, (source, x, y, title, shape) in enumerate((
            (binned, "second", "tokens_per_s", "tokens computed a second", "hv"),
            (mine, "start_s", "gpu_share", "GPU blocks in use", "hv"),
            (mine, "start_s", "cpu_blocks", "CPU blocks in use", "hv"),
        )):  # fmt: skip
            panel = row * 2 + column
            traces.append({
                "type": "scatter", "mode": "lines", "name": name, "showlegend": row == 0,
                "x": [round(value, 3) for value in source[x].to_list()],
                "y": [round(value, 4) for value in source[y].to_list()],
                "line": {"color": colour, "width": 1.5, "shape": shape}, "xaxis": f"x{_number(panel)}",
                "yaxis": f"y{_number(panel)}", "hovertemplate": "%{y} at %{x:.1f} s<extra></extra>",
            })  # fmt: skip
            layout[f"xaxis{_number(panel)}"] = _axis("s", matches="x")
            more = {"tickformat": ".0%", "range": [0, 1.02]} if y == "gpu_share" else {"rangemode": "tozero"}
            layout[f"yaxis{_number(panel)}"] = _axis(title, **more)
    layout["yaxis6"] |= {"matches": "y5"}
    return {"data": traces, "layout": layout}


def bounds(small: pl.DataFrame, large: pl.DataFrame) -> Figure:
    """Overhead of each way to choose, as a part of recompute's."""
    layout = _layout(1, 2, 420)
    shown = (
        ("swap_s", "swap, pinned", STYLE["swap"][1], "square"), ("hybrid_s", "hybrid", STYLE["hybrid"][1], "diamond"),
        ("best_of_three_s", "best of the three", "#888", "line-ew-open"),
        ("best_cut_s", "best single cut", "#c9a227", "triangle-up"),
        ("best_assignment_s", "best of all choices", "#222", "x"),
    )  # fmt: skip
    traces = []
    for panel, data in enumerate((small, large)):
        for column, name, colour, symbol in shown:
            values = (data[column].cast(pl.Float64) / data["recompute_s"]).to_list()
            if values[0] is not None:
                traces.append({
                    "type": "scatter", "mode": "markers", "name": name, "legendgroup": column,
                    "showlegend": panel == 0, "x": data["case"].to_list(),
                    "y": [round(value, 4) for value in values],
                    "marker": {"color": colour, "symbol": symbol, "size": 10},
                    "xaxis": f"x{_number(panel)}", "yaxis": f"y{_number(panel)}",
                    "hovertemplate": "%{y:.1%} of recompute's<extra>" + name + "</extra>",
                })  # fmt: skip
        layout[f"xaxis{_number(panel)}"] = _axis("")
        layout[f"yaxis{_number(panel)}"] = _axis("overhead, of recompute's", tickformat=".0%")
    return {"data": traces, "layout": layout}
