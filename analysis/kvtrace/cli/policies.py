"""`kvtrace policies`: the eviction policies that replays know."""

from __future__ import annotations

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options


@click.command("policies", epilog=examples("kvtrace policies", "kvtrace policies --json"))
@output_options
def command(output: Output) -> int:
    """List the eviction policies: name, rule, paper."""
    import polars as pl

    from kvtrace import people
    from kvtrace_replay.policies import policies

    known = policies()
    if output.kind == "people":
        width = max(len(policy.name) for policy in known)
        for policy in known:
            click.echo(f"{people.bold(policy.name.ljust(width))}  {policy.summary}")
            click.echo(f"{' ' * width}  {people.dim(policy.paper)}")
    else:
        columns = ("name", "summary", "paper")
        output.table(pl.DataFrame({name: [getattr(policy, name) for policy in known] for name in columns}))
    return 0
