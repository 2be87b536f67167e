"""Which cases tell a twin without one of its rules apart from the compiled scheduler; the table in the documentation.

    cd tests && PYTHONPATH=../replay:../traces python -m simulation.mutations --check [FILE] | --write [FILE]

FILE is docs/vllm-semantics.md if not given. Takes minutes: every rule of `twin_rules.RULES` is broken on every case.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_replay.schedulers.families import rules_of
from kvtrace_traces.errors import UsageError

from .cases import RARE, Case, random_case
from .kernel import difference, kernel_run, twin_in_words
from .twin import simulate
from .twin_rules import RULES
from .twin_words import CannotFinish

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vllm-semantics.md"
BEGIN, END = "<!-- begin mutations -->", "<!-- end mutations -->"
#: Not in the compiled scheduler, see test_kernel.
NOT_COMPARED = ("late-hashes",)


class Group(NamedTuple):
    """Cases at the rules of one version."""

    version: str
    seeds: tuple[int, ...]
    policy: str | None = None

    @property
    def name(self) -> str:
        return self.version if self.policy is None else f"{self.version} {self.policy}"

    def case(self, seed: int) -> Case:
        return random_case(seed, rules_of(self.version), policy=self.policy)


#: The newest rules; what random cases show once in a thousand; and rules that newer versions do not have.
GROUPS = (
    Group("0.32.0", tuple(range(250, 500))),
    Group("0.32.0", RARE, "priority"),
    Group("0.11.2", tuple(range(100))),
)


def kernel_words(case: Case) -> dict[str, Any] | None:
    """What the compiled scheduler does on a case; None if it never ends."""
    try:
        return kernel_run(case)
    except UsageError:
        return None


def told_apart(case: Case, words: dict[str, Any] | None, broken: str | None) -> bool:
    """Whether the twin without the rule `broken` (None: the twin as it is) does anything otherwise than `words`."""
    try:
        mine = twin_in_words(simulate(case.requests, case.settings, broken))
    except CannotFinish:
        return words is not None
    except Exception:  # without the rule its own bookkeeping may not hold together
        if broken is None:
            raise
        return True
    return words is None or difference(mine, words) is not None


def explained(rule: str) -> tuple[str, str]:
    """The sentence of a rule, and the function of vLLM that it mirrors, with what else stands in its brackets."""
    match = re.fullmatch(r"(.*) \(([^()]*)\)\.", RULES[rule])
    assert match, RULES[rule]
    return match[1], match[2]


def compared() -> list[str]:
    return [rule for rule in RULES if rule not in NOT_COMPARED]


def counted() -> tuple[int, dict[str, tuple[int, str]]]:
    """The number of cases; and by rule how many tell it apart, and the first of these."""
    found: dict[str, list[str]] = {rule: [] for rule in compared()}
    cases = 0
    for group in GROUPS:
        for seed in group.seeds:
            case = group.case(seed)
            words = kernel_words(case)
            assert not told_apart(case, words, None), f"twin and kernel differ: {group.name} seed {seed}"
            cases += 1
            for rule, names in found.items():
                if told_apart(case, words, rule):
                    names.append(f"{group.name} seed {seed}")
    return cases, {rule: (len(names), names[0] if names else "none") for rule, names in found.items()}


def table() -> str:
    """The table in the documentation, between its markers."""
    cases, found = counted()
    lines = [f"| rule | function in vLLM | of {cases:,} cases | first |", "|---|---|---|---|"]
    lines += [f"| `{rule}` | {explained(rule)[1]} | {count} | {first} |" for rule, (count, first) in found.items()]
    return "\n".join(lines)


def rows_of(text: str) -> Iterator[tuple[str, str, int, str]]:
    """Rule, function, count and first case of each row of the table in `text`."""
    part = text.split(BEGIN)[1].split(END)[0]
    for line in part.strip().splitlines()[2:]:
        rule, function, count, first = (cell.strip() for cell in line.strip("|").split("|"))
        yield rule.strip("`"), function, int(count), first


def case_named(name: str) -> Case:
    """The case that a row of the table names."""
    group_name, _, seed = name.rpartition(" seed ")
    return next(group for group in GROUPS if group.name == group_name and int(seed) in group.seeds).case(int(seed))


def main() -> int:
    """Check or write the table. Status 1 if it is out of date, or some rule is told apart by no case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--check", nargs="?", type=Path, const=DOCS, metavar="FILE")
    choice.add_argument("--write", nargs="?", type=Path, const=DOCS, metavar="FILE")
    arguments = parser.parse_args()
    path = arguments.check or arguments.write
    renewed = table()
    text = path.read_text()
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{renewed}\n{END}{rest.split(END)[1]}"
    unseen = [rule for rule, _, count, _ in rows_of(wanted) if count == 0]
    if unseen:
        print("told apart by no case: " + ", ".join(unseen), file=sys.stderr)
    if arguments.write:
        path.write_text(wanted)
    elif text != wanted:
        print(f"{path.name} is out of date: run `python -m simulation.mutations --write`", file=sys.stderr)
        return 1
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main())
