"""One self-contained HTML file of a title, a verdict, tiles and sections. It opens offline, on any screen."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from kvtrace.people import Style, cells

Figure = dict[str, Any]
LONG = 40  # longer text breaks into lines
HERE = Path(__file__).parent
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Panel:
    """A paragraph, a chart, and the table that the chart was drawn from.

    `figure` is a Plotly figure (see `charts`), or None where the table itself is to be seen, or `why` says that there
    is nothing to show. `facts`: labels and values instead of a table. `height`: of the chart, in rem; None lets the
    page choose. `run`: whose it is, where there are several.
    """

    name: str
    prose: str = ""
    figure: Figure | None = None
    table: pl.DataFrame | None = None
    style: Style = field(default_factory=Style)
    title: str = ""
    height: float | None = None
    facts: Sequence[tuple[str, str]] = ()
    why: str = ""
    run: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with its panels. `name`: its anchor; `label`: what the list of sections calls it."""

    title: str
    panels: Sequence[Panel]
    name: str = ""
    label: str = ""


@dataclass(frozen=True)
class Page:
    """What a page says. Text is plain and gets escaped here; `verdict` has paragraphs, each with the run that it is
    about (empty where there is one), `tiles` are pairs of a label and a figure."""

    title: str
    subtitle: str
    verdict: Sequence[tuple[str, str]]
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    footnotes: Sequence[str]


def build(page: Page) -> str:
    """The page as HTML, with the style, the script and Plotly inside."""
    return "".join(pieces(page))


def pieces(page: Page) -> Iterator[str]:
    """The page as HTML, piece by piece."""
    from plotly.offline import get_plotlyjs

    verdict = "".join(f'<p class="verdict">{_run(whose)}{_text(words)}</p>' for whose, words in page.verdict)
    tiles = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in page.tiles)
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(page.title)} · kvtrace</title>
<style>
{(HERE / "page.css").read_text("utf-8")}</style>
</head>
<body>
{_contents(page.sections)}<main id="top">
<header>
<p class="brand">kvtrace</p>
<h1>{_text(page.title)}</h1>
<p class="subtitle">{_text(page.subtitle)}</p>
</header>
{verdict}
{f'<dl class="tiles">{tiles}</dl>' if tiles else ""}
"""
    for section in page.sections:
        yield from _section(section)
    yield f"""<footer>{"".join(f"<p>{_text(note)}</p>" for note in page.footnotes)}</footer>
</main>
<script>{get_plotlyjs()}</script>
<script>{(HERE / "page.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _contents(sections: Sequence[Section]) -> str:
    named = [section for section in sections if section.name]
    if len(named) < 3:
        return ""
    links = "".join(
        f'<li><a href="#{_attribute(section.name)}">{_text(section.label or section.title)}</a></li>'
        for section in named
    )
    return f'<nav aria-label="Sections"><ol>{links}</ol></nav>\n'


def _section(section: Section) -> Iterator[str]:
    anchor = f' id="{_attribute(section.name)}"' if section.name else ""
    yield f"<section{anchor}>\n<h2>{_text(section.title)}</h2>\n"
    for panel in section.panels:
        yield _panel(panel)
    yield "</section>\n"


def _panel(panel: Panel) -> str:
    title = f"<h3>{_run(panel.run)}{_text(panel.title)}</h3>\n" if panel.run or panel.title else ""
    prose = f"<p>{_text(panel.prose)}</p>\n" if panel.prose else ""
    if panel.why:
        return f'<div class="panel">{title}<p class="empty">{_text(panel.why)}</p></div>\n'
    if panel.facts:
        listed = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in panel.facts)
        return f'<div class="panel">{title}{prose}<dl class="facts">{listed}</dl></div>\n'
    if panel.figure is None:
        table = "" if panel.table is None else f'<div class="scroll open">{_table(panel.table, panel.style)}</div>\n'
        return f'<div class="panel">{title}{prose}{table}</div>\n'
    assert panel.table is not None
    label = _attribute(str(panel.figure["label"]))
    height = f' style="height:{panel.height}rem"' if panel.height else ""
    names, columns, numeric = cells(panel.table, panel.style)
    data = {
        "figure": {"data": panel.figure["data"], "layout": panel.figure["layout"]},
        "head": [name.replace("_", " ") for name in names],
        "numeric": numeric,
        "columns": columns,
    }
    return f"""<div class="panel" data-plot="{_attribute(panel.name)}">
{title}{prose}<div class="chart"{height} role="img" aria-label="{label}"></div>
<details><summary>The figures as a table</summary><div class="scroll" tabindex="0" role="region" \
aria-label="{label}"></div></details>
<script type="application/json">{_json(data)}</script>
</div>
"""


def _run(name: str) -> str:
    return f'<span class="run" title="{_attribute(name)}">{_text(name)}</span> ' if name else ""


def _table(table: pl.DataFrame, style: Style) -> str:
    names, columns, numeric = cells(table, style)
    sides = [
        ' class="number"' if right else ' class="long"' if max(map(len, column), default=0) > LONG else ""
        for right, column in zip(numeric, columns, strict=True)
    ]
    head = "".join(f"<th{side}>{_text(name.replace('_', ' '))}</th>" for name, side in zip(names, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{_text(cell)}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c")  # text of a trace must not end the script


def _text(value: str) -> str:
    return html.escape(value, quote=False)


def _attribute(value: str) -> str:
    return html.escape(value, quote=True)
