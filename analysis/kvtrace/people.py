"""Tables and figures for people: aligned, with units and thousands separators, as narrow as they can be."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

MAX_ROWS = 1000
MAX_TEXT = 60
# Numbers that name something are not counted, so they carry no thousands separators.
_NAMES = re.compile(r"(^|_)(step|request|block|identity|index|tenant|group|pid|rank|hash)$")


@dataclass(frozen=True)
class Style:
    """How one table is shown: `columns` (default all), `cells` (a formatter by column), and header words.

    `wrap` breaks headers at their underscores; without it they stay as they are, to be copied into a query.
    """

    columns: Sequence[str] | None = None
    cells: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    wrap: bool = True


def cells(frame: pl.DataFrame, style: Style) -> tuple[list[str], list[list[str]], list[bool]]:
    """The shown columns: their names, their cells as text, and whether each holds numbers."""
    names = [name for name in (style.columns or frame.columns) if name in frame.columns]
    texts = [[_cell(name, value, style) for value in frame[name].to_list()] for name in names]
    return names, texts, [frame.schema[name].is_numeric() for name in names]


def render(frame: pl.DataFrame, style: Style) -> tuple[str, int]:
    """The table as text, and how many rows were left out at its end."""
    shown = frame.head(MAX_ROWS)
    names, columns, numeric = cells(shown, style)
    heads = [
        _head(name, max(map(len, column), default=0), style.wrap) for name, column in zip(names, columns, strict=True)
    ]
    depth = max((len(head) for head in heads), default=0)
    widths = [
        max([len(part) for part in head] + [len(cell) for cell in column])
        for head, column in zip(heads, columns, strict=True)
    ]

    def line(parts: Sequence[str]) -> str:
        aligned = [
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    padded = [[""] * (depth - len(head)) + head for head in heads]
    top = [line([head[level] for head in padded]) for level in range(depth)]
    rule = "  ".join("─" * width for width in widths)
    body = [line(row) for row in zip(*columns, strict=True)]
    return "\n".join([*(bold(text) for text in top), dim(rule), *body]), frame.height - shown.height


def _head(name: str, width: int, wrap: bool) -> list[str]:
    """A header in as few lines as its column is wide for."""
    if not wrap:
        return [name]
    lines: list[str] = []
    for word in name.split("_"):
        if lines and len(lines[-1]) + 1 + len(word) <= max(width, 7):
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def _cell(name: str, value: Any, style: Style) -> str:
    if name in style.cells:
        return style.cells[name](value)
    if value is None:
        return "-"
    if name.endswith("_ratio") and isinstance(value, float):
        return percent(value)
    if name in ("seconds", "duration_s") and isinstance(value, float):
        return seconds(value)
    return figure(name, value)


def figure(name: str, value: Any) -> str:
    """One value; `name` tells counts from numbers that merely name something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if _NAMES.search(name) else f"{value:,}"
    if isinstance(value, float):
        return number(value)
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def number(value: float) -> str:
    """A float with about four figures that matter."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if decimals <= 8 else f"{value:.3g}"


def percent(value: float | None, decimals: int = 2) -> str:
    """A ratio as per cent."""
    return "-" if value is None or not math.isfinite(value) else f"{value * 100:.{decimals}f}%"


def seconds(value: float | None) -> str:
    """A duration in the unit that reads best."""
    if value is None or not math.isfinite(value):
        return "-"
    for limit, factor, unit in (
        (1e-3, 1e6, "µs"),
        (1.0, 1e3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 1 / 60, "min"),
    ):
        if abs(value) < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 3600:,.1f} h"


def size(value: float | None) -> str:
    """Bytes in the binary unit that reads best."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def capacity(value: int | None) -> str:
    """A capacity in blocks; null is an unbounded cache."""
    return "inf" if value is None else f"{value:,}"


def bold(text: str) -> str:
    """The text, bold where stdout is a terminal that may show it."""
    return f"\x1b[1m{text}\x1b[0m" if _coloured() else text


def dim(text: str) -> str:
    """The text, dim where stdout is a terminal that may show it."""
    return f"\x1b[2m{text}\x1b[0m" if _coloured() else text


def _coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
