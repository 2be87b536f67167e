"""Puts a report together: the runs, their verdicts, the sections that were chosen, in one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

import kvtrace
from kvtrace.api import Trace, open
from kvtrace.metrics.hits import HITS
from kvtrace.metrics.passes import THROUGHPUT
from kvtrace.metrics.waiting import LATENCY
from kvtrace.people import seconds, size
from kvtrace.replays import several
from kvtrace.reports.page import Page, Panel, Section, pieces
from kvtrace.reports.registry import Entry, chosen, with_plot
from kvtrace.reports.run import Run, Untold, runs_of
from kvtrace.reports.verdict import at, curve_of, verdict
from kvtrace.reports.words import share
from kvtrace_traces.errors import UsageError

Paths = str | os.PathLike[str] | Trace | Sequence[str | os.PathLike[str] | Trace]
Note = Callable[[str], None]


def report(
    trace: Paths,
    out: str | os.PathLike[str] = "report.html",
    section: str | Sequence[str] = (),
    force: bool = False,
    progress: Note | None = None,
) -> pl.DataFrame:
    """Write a report on one or several traces to `out`, one HTML file that needs nothing else.

    `section`: names of sections, to have these alone; and `FILE.py:FUNCTION` for sections of one's own, which come
    on top. `progress` is called with a line before each part of the work.

    Returns a row for each panel of the page: section, plot, run, rows (of its table), why (it is empty, else null).
    Raises UsageError for a section that cannot be and where `out` exists and not `force`, KvtraceError where a trace
    cannot be read.
    """
    from kvtrace.cli.output import replacing

    entries = chosen(several(section))
    with replacing(Path(out), force) as part:
        runs = opened(trace)
        page = compose(runs, entries, progress or (lambda _: None))
        with part.open("w", encoding="utf-8") as file:
            file.writelines(pieces(page))
    rows = [
        {"section": shown.name, "plot": panel.name, "run": panel.run or runs[0].name,
         "rows": len(panel.facts) if panel.table is None else panel.table.height, "why": panel.why or None}
        for shown in page.sections for panel in shown.panels
    ]  # fmt: skip
    return pl.DataFrame(rows, schema={"section": pl.String, "plot": pl.String, "run": pl.String, "rows": pl.Int64,
                                      "why": pl.String})  # fmt: skip


def opened(trace: Paths) -> list[Run]:
    """The runs of one or several traces, which are opened where they are paths. Raises UsageError for none."""
    traces = [trace] if isinstance(trace, str | os.PathLike | Trace) else list(trace)
    if not traces:
        raise UsageError("a report needs a trace")
    return runs_of([one if isinstance(one, Trace) else open(one) for one in traces])


def compose(runs: Sequence[Run], entries: Iterable[Entry], progress: Note) -> Page:
    """The page of a report."""
    shown = []
    for entry in entries:
        if entry.across and len(runs) < 2:
            continue
        panels: list[Panel] = []
        for whose in [runs] if entry.across else runs:
            progress(entry.title + (f" ({whose.name})" if isinstance(whose, Run) and len(runs) > 1 else ""))
            panels += made(entry, whose, name_it=len(runs) > 1)
        shown.append(Section(entry.title, panels, entry.name, entry.label or entry.title))
    progress("The verdict")
    several_runs = len(runs) > 1
    paths = ", ".join(dict.fromkeys(run.trace.path.name for run in runs))
    return Page(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        subtitle="" if several_runs else subtitle(runs[0]),
        verdict=[(run.name if several_runs else "", " ".join(verdict(run))) for run in runs],
        tiles=[] if several_runs else tiles(runs[0]),
        sections=shown,
        footnotes=[
            "Replays are open loop, with prefix semantics: the recorded lookups are given, only the cache varies.",
            f"Made by kvtrace {kvtrace.__version__} from {paths}. This page is one file and loads nothing.",
        ],
    )  # fmt: skip


def made(entry: Entry, whose: Any, name_it: bool) -> list[Panel]:
    """The panels of a section; one that says why, where it cannot show anything."""
    name = whose.name if isinstance(whose, Run) and name_it else ""
    try:
        panels = list(entry.panels(whose))
    except Untold as reason:
        panels = [Panel(entry.name, why=_sentence(str(reason)))]
    return [replace(panel, run=name) for panel in panels]


def plot(name: str, trace: Paths) -> list[tuple[Run | None, Panel]]:
    """The panel of one plot for each run (for all together where it compares them).

    Raises UsageError for a name that no plot has; a panel that has nothing to show says why.
    """
    entry = with_plot(name)
    runs = opened(trace)
    if entry.across and len(runs) < 2:
        raise UsageError(f"{name} compares traces: give it two")
    found: list[tuple[Run | None, Panel]] = []
    for whose in [runs] if entry.across else runs:
        panels = made(entry, whose, name_it=len(runs) > 1)
        alone = (
            panels[0]
            if panels and panels[0].why and len(panels) == 1
            else Panel(name, why="The trace tells none of it.")
        )
        panel = next((panel for panel in panels if panel.name == name), alone)
        found.append((whose if isinstance(whose, Run) else None, panel))
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def subtitle(run: Run) -> str:
    """What ran, when and on what, as far as the trace knows."""
    header = run.header
    engine = " ".join(str(part) for part in (header.get("engine"), header.get("engine_version")) if part)
    model = str(header.get("model") or "")
    when = str(header.get("created") or "")[:16].replace("T", " ")
    # A model given as a folder: its own name says enough.
    parts = [model.rsplit("/", 1)[-1] if model.startswith("/") else model, engine, header.get("device"), when]
    if header.get("bytes_per_block") and header.get("num_blocks"):
        parts.append(f"KV cache {size(header['bytes_per_block'] * header['num_blocks'])}")
    return " · ".join(str(part) for part in parts if part)


def tiles(run: Run) -> list[tuple[str, str]]:
    """The figures on top; those that the trace does not know are left out."""
    found = [("requests", f"{run.requests:,}")]
    if run.steps:
        found.append(("steps", f"{run.steps:,}"))
    if run.capacity is not None:
        found.append(("usable blocks", f"{run.capacity:,}"))
    hits, speed, late = run.figures(HITS), run.figures(THROUGHPUT), run.figures(LATENCY)
    rows = curve_of(run)
    most = rows["capacity_blocks"].max()
    for label, value, words in (
        ("tokens found", hits["token_hit_ratio"], share),
        ("with no bound", at(rows, "lru", int(most)) if isinstance(most, int) else None, share),
        ("decode tokens/s", speed["decode_tokens_per_s"] if run.timed else None, lambda value: f"{value:,.0f}"),
        ("TTFT, median", late["ttft_p50_s"] if run.timed else None, seconds),
    ):
        if value is not None:
            found.append((label, words(value)))
    if run.steps:
        found.append(("preemptions", f"{run.trace.preemptions.filter(pl.col('engine_index') == run.engine).height:,}"))
    return found
