"""Where the looked-up tokens were: found in the cache, or not, and why."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from kvtrace.metrics.hits import HITS, HITS_BY_DEPTH, HITS_BY_TURN
from kvtrace.people import Style, percent
from kvtrace.reports.charts import Band, bars, layout, over_time
from kvtrace.reports.page import Figure, Panel
from kvtrace.reports.registry import section
from kvtrace.reports.run import Run, Untold
from kvtrace.reports.words import share

SLICES = 80
OUTCOMES: tuple[Band, ...] = (
    ("hit", "tokens_hit", "$hit"),
    ("capacity", "capacity_tokens", "$capacity"),
    ("preemption", "preemption_tokens", "$preempted"),
    ("cold", "cold_tokens", "$cold"),
    ("too short", "short_tokens", "$short"),
    ("not read", "unread_tokens", "$unread"),
)
MEANINGS = {
    "hit": "found in the cache",
    "capacity": "had been cached, and was evicted",
    "preemption": "the request had computed it, and lost it by preemption",
    "cold": "never cached before",
    "too short": "behind the last block that a lookup may find",
    "not read": "the request asked not to read the cache",
}


@section(
    "hits",
    title="Hits, and why not more",
    label="Hits",
    order=40,
    plots={
        "hits": "What became of all looked-up tokens: hits, and misses by cause.",
        "hits-over-time": "The same over time.",
        "hits-by-depth": "Hit ratio by the place of a block in its prompt.",
        "hits-by-turn": "Hit ratio by the turn of the conversation.",
    },
)
def hits(run: Run) -> Iterator[Panel]:
    """All lookups, then over time, by depth and by turn."""
    whole = run.figures(HITS)
    if whole["token_hit_ratio_all"] is None:
        run.rows(HITS)  # tells why
        raise Untold("no request looked anything up")
    sums = run.sql(
        "SELECT " + ", ".join(f"sum({column}) AS {column}" for _, column, _ in OUTCOMES)
        + ", sum(tokens_asked) AS asked FROM misses WHERE engine_index = {engine}"
    ).row(0, named=True)  # fmt: skip
    table = pl.DataFrame(
        [(name, MEANINGS[name], sums[column], sums[column] / sums["asked"]) for name, column, _ in OUTCOMES],
        schema={"outcome": pl.String, "meaning": pl.String, "tokens": pl.Int64, "share": pl.Float64},
        orient="row",
    )
    prose = (
        f"{share(whole['request_hit_ratio'])} of the requests found something at their first admission: "
        f"{share(whole['token_hit_ratio'])} of their tokens, {share(whole['block_hit_ratio'])} of their full "
        f"blocks. With the lookups after preemptions it is {share(whole['token_hit_ratio_all'])} of "
        f"{sums['asked']:,} tokens; the rest is in the bar by the cause of its miss."
    )
    yield Panel("hits", prose, _one_bar(table), table, Style(cells={"share": percent}), title="All lookups", height=8.5)
    yield _over_time(run)
    yield _ratios(
        run.rows(HITS_BY_DEPTH), "hits-by-depth", "By depth", "place of the block in its prompt, from 0",
        "block_hit_ratio_at_depth", "full blocks found",
        "A prefix cache finds prompts from their begin on: the deeper a block, the less often it is found.",
    )  # fmt: skip
    yield _ratios(
        run.rows(HITS_BY_TURN), "hits-by-turn", "By turn", "turn of the conversation, as far as blocks tell",
        "token_hit_ratio_at_turn", "tokens found", "A turn is told by the answers that its prompt begins with.",
    )  # fmt: skip


def _one_bar(table: pl.DataFrame) -> Figure:
    colours = {name: colour for name, _, colour in OUTCOMES}
    drawn = layout("tokens looked up", "")
    traces = [
        {
            "type": "bar", "orientation": "h", "name": row["outcome"], "x": [row["tokens"]], "y": [""],
            "text": [share(row["share"]) if row["share"] >= 0.06 else ""], "textposition": "inside",
            "insidetextanchor": "middle", "textangle": 0, "constraintext": "none",
            "textfont": {"color": "$cold-ink" if row["outcome"] == "cold" else "$on-colour"},
            "marker": {"color": colours[row["outcome"]], "line": {"width": 0}},
            "hovertemplate": f"%{{x:,}} tokens, {percent(row['share'])}<extra>{row['outcome']}</extra>",
        }
        for row in table.iter_rows(named=True) if row["tokens"]
    ]  # fmt: skip
    drawn["xaxis"] |= {"tickformat": ",~r", "range": [0, int(table["tokens"].sum())], "nticks": 6}
    drawn["yaxis"] |= {"showticklabels": False, "showgrid": False}
    drawn |= {"barmode": "stack", "bargap": 0.1}
    return {"data": traces, "layout": drawn, "label": "What became of all looked-up tokens"}


def _over_time(run: Run) -> Panel:
    axis = run.axis
    count = max(1, min(SLICES, run.steps // 4))
    sums = ", ".join(f"sum({column}) AS {column}" for _, column, _ in OUTCOMES)
    frame = run.sql(f"""
        SELECT {axis.slice(count)} AS slice, {sums}
        FROM misses JOIN (SELECT engine_index, step, start_ns FROM steps) USING (engine_index, step)
        WHERE engine_index = {{engine}} GROUP BY slice ORDER BY slice""")
    shown = [band for band in OUTCOMES if frame[band[1]].sum()]
    frame = frame.select(axis.begin("slice", count), *(column for _, column, _ in shown))
    figure = bars(
        frame, axis.name, shown, axis.title, "tokens looked up", label="Looked-up tokens over time, by what became of "
        "them",
    )  # fmt: skip
    over_time(figure, axis.extent, count)
    return Panel("hits-over-time", "Lookups by the step that made them.", figure, frame,
                 Style(cells=axis.cells), title="Over time")  # fmt: skip


def _ratios(
    rows: pl.DataFrame, name: str, title: str, x_title: str, column: str, y_title: str, prose: str
) -> Panel:  # fmt: skip
    """Bars of one ratio, a bar for each part."""
    if not rows.height:
        return Panel(name, title=title, why="No prompt has a full block.")
    frame = rows.drop("engine_index").rename({"at": "part"}).filter(pl.col(column).is_not_null())
    label = f"{y_title.capitalize()}, {title[:1].lower()}{title[1:]}"
    figure = bars(frame, "part", [(y_title, column, "$hit")], x_title, y_title, label=label, format=".0%")
    figure["layout"]["yaxis"]["range"] = [0, 1]
    figure["data"][0] |= {
        "text": [percent(value, 0) for value in frame[column].to_list()], "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y:.2%} " + y_title + "<extra></extra>",
    }  # fmt: skip
    return Panel(name, prose, figure, frame, Style(cells={column: percent}), title=title, height=17)
