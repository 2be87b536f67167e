"""`kvtrace plot`: one chart of the report, as a page or a picture."""

from __future__ import annotations

from pathlib import Path

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, refuse_to_overwrite, replacing
from kvtrace.cli.traces import TRACE, exit_code, open_traces
from kvtrace_traces.errors import KvtraceError, UsageError


@click.command(
    "plot",
    epilog=examples(
        "kvtrace plot occupancy traces/samples/thrash.kvt -o occupancy.html",
        "kvtrace plot",
    ),
)
@click.argument("name", required=False, metavar="[NAME]")
@click.argument("paths", type=TRACE, nargs=-1, metavar="[TRACE]...")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="A page (.html) or a picture (.png, .svg: with the extra `plot`). Default: NAME.html.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the file where it exists.")
def command(name: str | None, paths: tuple[Path, ...], out: Path | None, force: bool) -> int:
    """Draw one chart of the report.

    Without NAME: list the charts.
    """
    from kvtrace.reports.registry import plots, with_plot

    known = plots()
    if name is None:
        width = max(map(len, known))
        for plot, words in known.items():
            click.echo(f"{plot.ljust(width)}  {words}")
        return 0
    with_plot(name)
    if not paths:
        raise UsageError(f"plot {name} of which trace? kvtrace plot {name} TRACE -o {name}.html")
    out = out or Path(f"{name}.html")
    refuse_to_overwrite(out, force)  # before the work, not after it
    import kvtrace
    from kvtrace.reports import compose, image

    suffix = image.suffix_of(out)
    traces = open_traces(paths)
    found = compose.plot(name, traces)
    if len(found) > 1:
        raise UsageError(f"plot draws one run, and these are {len(found)}: `kvtrace report` draws them all")
    ((run, panel),) = found
    if panel.why or panel.figure is None:
        raise KvtraceError(f"there is nothing to plot: {panel.why[:1].lower()}{panel.why[1:].removesuffix('.')}")
    title = run.name if run else " and ".join(trace.path.stem for trace in traces)
    with replacing(out, force) as part:
        if suffix == ".html":
            made = f"Made by kvtrace {kvtrace.__version__} from {', '.join(trace.path.name for trace in traces)}."
            part.write_text(image.page_of(panel, title, compose.subtitle(run) if run else "", made), encoding="utf-8")
        else:
            heading = str(panel.figure["label"])
            part.write_bytes(image.picture_of(panel, f"{title}: {heading[:1].lower()}{heading[1:]}", suffix))
    note(f"wrote {out}")
    return exit_code(traces)
