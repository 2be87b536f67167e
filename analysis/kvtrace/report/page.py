"""One self-contained HTML file of a title, a verdict, tiles and sections. It opens offline, on any screen."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from kvtrace.people import Style, cells
from kvtrace.report.charts import Figure


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, a chart, and the table that the chart was drawn from."""

    title: str
    prose: str
    figure: Figure
    table: pl.DataFrame
    style: Style = field(default_factory=Style)


@dataclass(frozen=True)
class Page:
    """What a page says. Text is plain and gets escaped here; `tiles` are pairs of a label and a figure."""

    title: str
    subtitle: str
    verdict: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    footnotes: Sequence[str]


def build(page: Page) -> str:
    """The page as HTML, with the style, the script and Plotly inside."""
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    figures = json.dumps([section.figure for section in page.sections], ensure_ascii=False, allow_nan=False)
    figures = figures.replace("</", r"<\/")  # text of a trace must not end the script
    tiles = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in page.tiles)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{_text(page.title)} · kvtrace</title>
<style>
{(here / "page.css").read_text("utf-8")}</style>
</head>
<body>
<main>
<header>
<p class="brand">kvtrace</p>
<h1>{_text(page.title)}</h1>
<p class="subtitle">{_text(page.subtitle)}</p>
</header>
<p class="verdict">{_text(page.verdict)}</p>
<dl class="tiles">{tiles}</dl>
{"".join(_section(number, section) for number, section in enumerate(page.sections))}
<footer>{"".join(f"<p>{_text(note)}</p>" for note in page.footnotes)}</footer>
</main>
<script>{get_plotlyjs()}</script>
<script>const FIGURES = {figures};
{(here / "page.js").read_text("utf-8")}</script>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    label = html.escape(str(section.figure["label"]), quote=True)
    return f"""<section>
<h2>{_text(section.title)}</h2>
<p>{_text(section.prose)}</p>
<div class="chart" id="chart-{number}" role="img" aria-label="{label}"></div>
<details><summary>The figures as a table</summary><div class="scroll">{_table(section)}</div></details>
</section>
"""


def _table(section: Section) -> str:
    names, columns, numeric = cells(section.table, section.style)
    sides = [' class="number"' if right else "" for right in numeric]
    head = "".join(f"<th{side}>{_text(name.replace('_', ' '))}</th>" for name, side in zip(names, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{side}>{_text(cell)}</td>" for cell, side in zip(row, sides, strict=True)) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: str) -> str:
    return html.escape(value, quote=False)
