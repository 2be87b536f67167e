"""`kvtrace policies`: the eviction policies that replays know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import Output, output_options

if TYPE_CHECKING:
    from kvtrace_replay.policies import Policy


@click.command("policies", epilog=examples("kvtrace policies", "kvtrace policies --json"))
@output_options
def command(output: Output) -> int:
    """List the eviction policies: name, rule, paper.

    Also the parameters with their defaults, the semantics in which the rule makes sense, and whether `kvtrace
    simulate` takes it.
    """
    import polars as pl

    from kvtrace import people
    from kvtrace_replay.policies import policies

    rows = [_row(policy) for policy in policies()]
    if output.kind == "people":
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            click.echo(f"{people.bold(row['name'].ljust(width))}  {row['summary']}")
            where = ", ".join([*row["semantics"], *(["simulate"] if row["simulate"] else [])])
            details = [*([":" + ",".join(row["parameters"])] if row["parameters"] else []), where, row["paper"]]
            click.echo(f"{' ' * width}  {people.dim(' · '.join(details))}")
        click.echo(f"{people.bold('NAME+second-touch')}  any of them, placing a block when it is missed a second time")
        click.echo(f"{' ' * width}  {people.dim(':uses=2')}")
    else:
        schema = {"parameters": pl.List(pl.String), "semantics": pl.List(pl.String)}
        output.table(pl.DataFrame(rows, schema_overrides=schema))
    return 0


def _row(policy: Policy) -> dict[str, Any]:
    from kvtrace_replay.policy_docs import drives_the_pool

    return {
        "name": policy.name,
        "summary": policy.summary,
        "parameters": [f"{name}={default}" for name, default in policy.defaults.items()],
        "semantics": list(policy.semantics),
        "simulate": drives_the_pool(policy),
        "paper": policy.paper,
    }
