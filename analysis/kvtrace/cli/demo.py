"""`kvtrace demo`: what kvtrace does, on a recorded run that comes with it."""

from __future__ import annotations

from pathlib import Path

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, replacing
from kvtrace.cli.traces import TRACE, exit_code, open_traces

PAGE = Path("kvtrace-demo.html")
QUERY = """
SELECT kind, count(*) AS events, count(DISTINCT block) AS blocks, count(DISTINCT request) AS requests
FROM block_events GROUP BY kind ORDER BY events DESC
""".strip()


@click.command("demo", epilog=examples("kvtrace demo", "kvtrace demo traces/samples/thrash.kvt"))
@click.argument("path", type=TRACE, required=False, metavar="[TRACE]")
def command(path: Path | None) -> int:
    """Show what kvtrace does, on a bundled trace.

    Replays it, asks it a question in SQL, and writes ./kvtrace-demo.html (over an older one).

    With TRACE, the same for a trace of your own.
    """
    import kvtrace
    from kvtrace import people, samples
    from kvtrace.reports import demo

    (trace,) = open_traces([path or samples.path("thrash")])
    if len(trace.engines) > 1:
        note(f"{len(trace.engines)} engines: showing the first; `kvtrace replay` shows all")
    rows = demo.replay_grid(trace)
    info = trace.info
    click.echo(f"{trace.path.name}: {info['requests']:,} requests, {info['steps']:,} steps")
    click.echo()
    click.echo(people.bold("Prompt tokens found in the cache, by its size and policy"))
    click.echo(people.render(*demo.side_by_side(rows))[0])
    click.echo()
    click.echo(click.wrap_text(demo.verdict(demo.find(trace, rows)), width=90))
    if trace.block_events.height:
        click.echo()
        click.echo(people.dim("\n".join(f"sql> {line}" for line in QUERY.splitlines())))
        click.echo(people.render(trace.sql(QUERY), people.Style(wrap=False))[0])
    click.echo()
    with replacing(PAGE, force=True) as part:
        part.write_text(demo.page(trace, rows, kvtrace.__version__), encoding="utf-8")
    click.echo(f"The same as a page, with charts: {PAGE}")
    note(f"next: kvtrace replay {trace.path} --policy lru,fifo --capacity 10%,50%,inf")
    return exit_code([trace])
