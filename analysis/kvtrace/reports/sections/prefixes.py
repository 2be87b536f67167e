"""The prefix tree of the requests, as an icicle: what they share, and how many share it."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.people import Style, size
from kvtrace.reports.charts import layout
from kvtrace.reports.page import Figure, Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold

NODES = 250
LEVELS = 9
ROOT = "all"


@section(
    "prefixes",
    title="What requests have in common",
    label="Prefix tree",
    order=80,
    plots={"prefixes": "The tree of prefixes that requests share, as an icicle."},
)
def prefixes(run: Run) -> Iterator[Panel]:
    """The nodes of the radix tree that more than one request goes through."""
    run.require("chains")
    frame, nodes = shared(run)
    if not frame.height:
        raise Untold("no two requests share a block")
    best = frame.sort("saved_tokens", descending=True).row(0, named=True)
    prose = (
        "Each bar is a stretch of tokens, as wide as the number of requests whose prompts and outputs go through it; "
        "below it are the ways in which they go on. Stronger colours save more: the most is "
        f"{best['saved_tokens']:,} tokens, by the {best['tokens']:,} that {best['requests']:,} requests share. Bare "
        "ground below a bar: requests that go on alone. A click goes deeper."
    )
    if frame.height < nodes:
        prose += f" Shown are the {frame.height:,} most shared of {nodes:,} nodes with more than one request."
    yield Panel("prefixes", prose, _icicle(frame, run.requests), frame, Style(cells={"bytes": size}), height=26)


def shared(run: Run) -> tuple[pl.DataFrame, int]:
    """The nodes that most requests go through, each after its parent, and how many there are with more than one."""
    nodes = int(
        run.sql("SELECT count(*) FROM prefixes WHERE engine_index = {engine} AND requests > 1").item()
    )  # fmt: skip
    # A parent has more requests than its child, or as many and lies before it: so it comes first.
    frame = run.sql(f"""
        SELECT node, parent, depth, blocks, requests, tokens, (requests - 1) * tokens AS saved_tokens, bytes
        FROM prefixes WHERE engine_index = {{engine}} AND requests > 1
        ORDER BY requests DESC, depth, node LIMIT {NODES}""")
    return frame, nodes


def _icicle(frame: pl.DataFrame, requests: int) -> Figure:
    nodes = frame["node"].to_list()
    parents = [ROOT if parent is None else str(parent) for parent in frame["parent"].to_list()]
    saved = frame["saved_tokens"].to_list()
    words = [
        f"{row['tokens']:,} tokens" for row in frame.iter_rows(named=True)
    ]  # fmt: skip
    hover = [
        f"{row['requests']:,} requests, {row['tokens']:,} tokens in {row['blocks']:,} blocks, after "
        f"{row['depth']:,} blocks<br>saves up to {row['saved_tokens']:,} tokens<br>identity {row['node']}"
        for row in frame.iter_rows(named=True)
    ]
    trace = {
        "type": "icicle",
        "ids": [ROOT, *map(str, nodes)],
        "labels": ["all requests", *words],
        "parents": ["", *parents],
        "values": [requests, *frame["requests"].to_list()],
        "customdata": [f"{requests:,} requests", *hover],
        "branchvalues": "total",
        "maxdepth": LEVELS,
        "tiling": {"orientation": "v", "pad": 1},
        "pathbar": {"visible": False},
        "marker": {
            "colors": [0, *saved],
            "colorscale": [[0, "$heat-0"], [0.02, "$heat-1"], [0.3, "$heat-2"], [0.65, "$heat-3"], [1, "$heat-4"]],
            "cmin": 0,
            "cmax": max(saved),
            "showscale": False,
            "line": {"width": 0},
        },
        "textinfo": "label+value",
        "texttemplate": "%{label}<br>%{value:,} requests",
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    drawn = layout("", "")
    drawn |= {"margin": {"l": 0, "r": 0, "t": 4, "b": 0}, "uniformtext": {"minsize": 10, "mode": "hide"}}
    return {"data": [trace], "layout": drawn, "label": "Tree of the prefixes that requests share"}
