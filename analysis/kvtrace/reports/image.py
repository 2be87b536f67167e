"""One chart as a file: a page of its own, or a picture drawn by kaleido."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from kvtrace.reports.page import HERE, Page, Panel, Section, build
from kvtrace_traces.errors import KvtraceError, UsageError

SUFFIXES = (".html", ".png", ".svg")
WIDTH = 1000
REM = 16


def suffix_of(path: Path) -> str:
    """What a file's name asks for. Raises UsageError where that is none of SUFFIXES, KvtraceError where it needs
    kaleido, which is not there."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path} ends in none of {', '.join(SUFFIXES)}: name the format by the suffix")
    if suffix != ".html" and importlib.util.find_spec("kaleido") is None:
        missing = f"{suffix} needs the extra `plot`: pip install 'kvtrace[plot]'"
        raise KvtraceError(f"{missing} (.html needs nothing more)")
    return suffix


def page_of(panel: Panel, title: str, subtitle: str, note: str) -> str:
    """A page with one panel."""
    return build(Page(title, subtitle, [], [], [Section(panel.title or title, [panel])], [note]))


def picture_of(panel: Panel, title: str, suffix: str) -> bytes:
    """The chart in the page's light colours, as PNG (two pixels to each of its own) or SVG.

    Raises KvtraceError where kaleido cannot draw, say for want of a browser.
    """
    import plotly.io

    assert panel.figure is not None
    drawn = themed(panel.figure, palette())
    drawn["layout"] |= {
        "paper_bgcolor": palette()["paper"],
        "plot_bgcolor": palette()["paper"],
        "title": {"text": title.replace("<", "&lt;"), "x": 0, "xref": "paper", "font": {"size": 16}},
    }
    drawn["layout"]["margin"] = {"l": 20, "r": 24, "t": 96, "b": 20} | {
        key: value for key, value in drawn["layout"]["margin"].items() if value > 20
    }
    height = max(420, round((panel.height or 25) * REM) + 80)
    figure = {"data": drawn["data"], "layout": drawn["layout"]}
    try:
        made: bytes = plotly.io.to_image(
            figure, format=suffix.removeprefix("."), width=WIDTH, height=height, scale=2 if suffix == ".png" else 1,
            validate=False,
        )  # fmt: skip
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise KvtraceError(f"kaleido cannot draw: {lines[0] if lines else type(error).__name__} (try .html)") from error
    return made


def palette() -> dict[str, str]:
    """The light colours and the font, as `page.css` has them."""
    (root,) = re.findall(r"^:root \{(.*?)^\}", (HERE / "page.css").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return {name: value.strip() for name, value in re.findall(r"--([\w-]+):([^;]+);", root)}


def themed(value: Any, colours: dict[str, str]) -> Any:
    """The figure with the colours that it names, as the page's script puts them in."""
    if isinstance(value, str) and value.startswith("$"):
        return colours[value[1:]]
    if isinstance(value, list | tuple):
        return [themed(item, colours) for item in value]
    if isinstance(value, dict):
        return {key: themed(item, colours) for key, item in value.items()}
    return value
