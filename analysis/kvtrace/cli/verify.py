"""`kvtrace verify`: does the trace agree with itself, and with the rules of its engine?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvtrace.cli.examples import examples
from kvtrace.cli.output import note, print_object
from kvtrace.cli.traces import DAMAGED, TRACE, exit_code, is_lossy, open_traces


@click.command(
    "verify",
    epilog=examples(
        "kvtrace verify traces/samples/thrash.kvt",
        "kvtrace verify traces/samples/thrash.kvt --json",
    ),
)
@click.argument("trace", type=TRACE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--allow-lossy", is_flag=True, help="Check a trace with missing content, too.")
def command(trace: Path, as_json: bool, allow_lossy: bool) -> int:
    """Check a trace against itself: exit code 0 only without a mismatch."""
    from kvtrace_replay.verify import verify

    (opened,) = open_traces([trace])
    if is_lossy(opened) and not allow_lossy:
        note(f"error: {trace} is lossy, so mismatches would prove nothing; --allow-lossy checks what is there")
        return DAMAGED
    found = verify(opened.reader, allow_lossy=allow_lossy)
    if as_json:
        print_object(found)
    else:
        width = max((len(check["name"]) for check in found["checks"]), default=0)
        for check in found["checks"]:
            click.echo(f"{_mark(check)}  {check['name'].ljust(width)}  {_outcome(check)}")
        click.echo(f"{found['requests']:,} requests, {found['mismatches']:,} mismatches")
    return 1 if found["mismatches"] else exit_code([opened])


def _mark(check: dict[str, Any]) -> str:
    return "BAD" if check["mismatches"] else "-- " if check.get("skipped") else "ok "


def _outcome(check: dict[str, Any]) -> str:
    if check["mismatches"]:
        return f"{check['mismatches']:,} of {check['checked']:,} break the rule: {check['rule']}; {check['first']}"
    if check.get("skipped"):
        return f"not checked: {check['skipped']}"
    return f"{check['checked']:,} checked: {check['rule']}"
