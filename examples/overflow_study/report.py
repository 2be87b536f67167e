"""What the study prints, and the pages it writes."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from experiments import AS_IS, GPU, MODEL
from reasons import disagreements, why
from shapes import Answer, Shape

TITLES = {
    "2a": "overhead against block size, 2 requests",
    "2b": "overhead against tokens evicted in an overflow, 2 requests",
    "3a": "overhead against sequence length, 16 requests",
    "3b": "overhead against memory for keys and values, 32 requests",
    "4": "over time, 32 requests, 12 % of memory",
}
WIDTH = 120
VISIBLE_S = 0.001
CLAIM, ANSWER = 50, 60


def _cell(answer: Answer) -> str:
    return f"{'yes' if answer.holds else 'NO':3} {answer.measured}"


def shapes_table(shapes: Sequence[Shape]) -> list[str]:
    """The shapes, figure by figure: whether each holds in the overhead, and in what overflows themselves take."""
    lines: list[str] = []
    head = ("", "")
    for shape in shapes:
        if (shape.figure, shape.engine) != head:
            head = (shape.figure, shape.engine)
            engine = f", {shape.engine}" if shape.figure in ("2a", "2b") else ""
            lines += ["", f"({shape.figure}) {TITLES[shape.figure]}{engine}"]
            if shape.part is not None:
                lines.append(f"{'':{CLAIM + 2}}{'overhead':{ANSWER}}overflows alone")
        part = "" if shape.part is None else _cell(shape.part)
        lines.append(f"  {shape.claim:{CLAIM}}{_cell(shape.total):{ANSWER}}{part}".rstrip())
    return lines


def answers(shapes: Sequence[Shape]) -> pl.DataFrame:
    """The same as a table; the reason where a shape does not hold in the overhead."""
    rows = []
    for shape in shapes:
        row: dict[str, Any] = {"figure": shape.figure, "engine": shape.engine, "shape": shape.claim}
        for name, answer in (("overhead", shape.total), ("overflows_alone", shape.part)):
            row[f"{name}_holds"] = None if answer is None else answer.holds
            row[name] = None if answer is None else answer.measured
        rows.append({**row, "why_not": None if shape.total.holds else why(shape, "total")})
    return pl.DataFrame(rows, infer_schema_length=None)


def reasons_text(shapes: Sequence[Shape]) -> list[str]:
    """Where the simulation disagrees, and why."""
    lines = ["", "where it disagrees, and why"]
    for number, (reason, where) in enumerate(disagreements(shapes).items(), 1):
        lines += textwrap.wrap(f"{number}. {'; '.join(dict.fromkeys(where))}.", WIDTH, subsequent_indent="   ")
        lines += textwrap.wrap(reason, WIDTH, initial_indent="   ", subsequent_indent="   ")
    return lines


def bounds_table(small: pl.DataFrame, large: pl.DataFrame) -> list[str]:
    """Overheads of the ways to choose, s."""
    lines = ["", "choosing for each victim: overhead, s"]
    lines.append(
        f"{'':16}{'victims':>9}{'recompute':>11}{'swap':>9}{'hybrid':>9}{'best of 3':>11}{'best cut':>10}"
        f"{'best of all':>13}{'choices':>9}"
    )
    for row in [*small.iter_rows(named=True), *large.iter_rows(named=True)]:
        best = "" if row["best_assignment_s"] is None else f"{row['best_assignment_s']:.2f}"
        tried = "" if row["assignments"] is None else f"{row['assignments']:,}" + ("" if row["complete"] else "*")
        lines.append(
            f"{row['case']:16}{row['victims']:9}{row['recompute_s']:11.2f}{row['swap_s']:9.2f}{row['hybrid_s']:9.2f}"
            f"{row['best_of_three_s']:11.2f}{row['best_cut_s']:10.2f}{best:>13}{tried:>9}".rstrip()
        )
    if not small["complete"].all():
        lines.append("* victims with equal numbers of tokens got the same choice")
    both = pl.concat([small, large], how="diagonal_relaxed")
    pure = pl.min_horizontal("recompute_s", "swap_s")
    worse, better = (
        both.filter(pl.col("hybrid_s") > pure + VISIBLE_S),
        both.filter(pl.col("hybrid_s") < pure - VISIBLE_S),
    )
    gain = float((1 - small["best_assignment_s"] / small["best_of_three_s"]).to_numpy().max())
    lines.append(
        f"hybrid is better than either pure way in {len(better)} of {len(both)} runs and worse than the better one in "
        f"{len(worse)}; the best choice is up to {gain:.0%} below the best of 3"
    )
    return lines


def _named(shape: Shape) -> str:
    return f"({shape.figure}) {shape.claim}{'' if shape.engine == AS_IS else ', mended'}"


def sensitivity_table(assumed: dict[str, list[Shape]]) -> list[str]:
    """Under which assumptions each shape holds: those that are not answered alike by all of them."""
    names = list(assumed)
    lines = [
        "",
        "other assumptions: share of the bf16 rate / link in GB/s / us a copy",
        "y or n: holds in the overhead, and in overflows alone",
    ]
    lines.append(f"{'':61}" + "".join(f"{name:>12}" for name in names))
    for at, shape in enumerate(next(iter(assumed.values()))):
        if shape.claim.startswith("swap below recompute"):
            since = [rows[at].total.since for rows in assumed.values()]
            said = ["never" if one is None else f"{round(one, -2):,.0f}" if one else "always" for one in since]
            lines.append(f"{_named(shape) + ': from':61}" + "".join(f"{one:>12}" for one in said))
    alike = 0
    for rows in zip(*assumed.values(), strict=True):
        cells = ["".join("-" if a is None else "y" if a.holds else "n" for a in (row.total, row.part)) for row in rows]
        if len(set(cells)) == 1:
            alike += 1
            continue
        lines.append(f"{_named(rows[0]):61}" + "".join(f"{cell.rstrip('-'):>12}" for cell in cells))
    lines.append(f"the other {alike} have the same answers under all of them")
    return lines


def page(figures: dict[str, tuple[str, str, dict[str, Any]]], text: Sequence[str]) -> str:
    """One self-contained page. `figures`: by name, heading, what was run, figure."""
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    parts = []
    for name, (heading, said, figure) in figures.items():
        drawn = to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"figure-{name}", validate=False)
        parts.append(f"<h2>{html.escape(heading)}</h2><p>{html.escape(said)}</p>{drawn}")
    told = html.escape("\n".join(text))
    return PAGE.format(title=f"Overflow: {MODEL} on {GPU}", script=get_plotlyjs(), figures="\n".join(parts), text=told)


def write_figure(path: Path, figure: dict[str, Any], name: str) -> None:
    """A page with one figure; it takes Plotly from `plotly.min.js` beside it."""
    from plotly.io import to_html

    path.write_text(
        to_html(figure, include_plotlyjs="plotly.min.js", div_id=f"figure-{name}", validate=False), encoding="utf-8"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }}
pre {{ font-size: 12px; overflow-x: auto; background: #f6f6f6; padding: 1rem; }} h2 {{ margin-top: 2.5rem; }}
</style><script>{script}</script></head><body>
<h1>{title}</h1>
<p>Simulated: the scheduler and block manager of vLLM 0.4.2, with times of a roofline. Overhead is how much later the
last request ends than with memory for all requests at once. What overflows themselves take of it is the copies, the
tokens computed for a second time, and the calls that do only this; the rest is waiting: more calls, because fewer
requests decode together.</p>
{figures}
<h2>Shapes, disagreements, choices, assumptions</h2><pre>{text}</pre>
</body></html>
"""
