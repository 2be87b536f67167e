"""The table of policies in `docs/policies.md`, made from the registry.

`python -m kvtrace_replay.policy_docs --write` (or `--check`), in the checkout, or with `--file PAGE`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvtrace_replay.policies.registry import Policy, policies
from kvtrace_traces.errors import KvtraceError, UsageError

PAGE = Path("docs/policies.md")
BEGIN, END = "<!-- table of policies: made by kvtrace_replay.policy_docs -->", "<!-- end of the table -->"


def drives_the_pool(policy: Policy) -> bool:
    """Whether `kvtrace simulate --policy` takes it."""
    from kvtrace_replay.schedulers.sweep import policy_called

    try:
        policy_called(policy.name)
    except UsageError:
        return False
    return True


def table() -> str:
    """The policies as a table in Markdown, by name."""
    lines = ["| name | parameters | rule | semantics | simulate | source |", "|---|---|---|---|---|---|"]
    for policy in policies():
        parameters = ", ".join(f"`{name}={default}`" for name, default in policy.defaults.items())
        stand_ins = [f"{kind} (runs `{name}`)" for kind, name in policy.stand_in.items()]
        cells = (
            f"`{policy.name}`", parameters, policy.summary, ", ".join([*policy.semantics, *stand_ins]),
            "yes" if drives_the_pool(policy) else "no", policy.paper,
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def renewed(page: str) -> str:
    """The page's text with the table as it is now. Raises KvtraceError where the page has no place for it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise KvtraceError(f"the page has no table of policies: it must stand between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtrace_replay.policy_docs", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="renew the table in the page")
    what.add_argument("--check", action="store_true", help="fail where the table is not as it should be")
    parser.add_argument("--file", type=Path, default=PAGE, help=f"the page (default: {PAGE})")
    options = parser.parse_args(arguments)
    try:
        old = options.file.read_text()
        new = renewed(old)
        if options.write and new != old:
            options.file.write_text(new)
    except (OSError, KvtraceError) as error:
        print(f"{options.file}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    if options.check and new != old:
        print(f"{options.file} is out of date: python -m kvtrace_replay.policy_docs --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
