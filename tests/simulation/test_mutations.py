"""Every rule is noticed when it is missing, and documented as it is."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest

from kvtrace_replay.schedulers import families
from kvtrace_replay.schedulers.sweep import WHY
from kvtrace_traces.schema import INEXACT

from . import mutations
from .kernel import kernel_run
from .mutations import DOCS, GROUPS, case_named, compared, explained, kernel_words, rows_of, told_apart
from .twin import simulate
from .twin_rules import RULES
from .twin_words import CannotFinish

TEXT = DOCS.read_text()
ROWS = {rule: (function, count, first) for rule, function, count, first in rows_of(TEXT)}


def section(heading: str) -> str:
    """The part of the documentation below a heading."""
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("rule", compared())
def test_a_missing_rule_is_noticed(rule: str) -> None:
    """On the case that the documentation names as the first."""
    case = case_named(ROWS[rule][2])
    words = kernel_words(case)
    assert not told_apart(case, words, None)
    assert told_apart(case, words, rule)


def test_the_table_is_of_these_rules_and_cases() -> None:
    """The counts are checked by `python -m simulation.mutations --check`."""
    cases = sum(len(group.seeds) for group in GROUPS)
    assert f"| rule | function in vLLM | of {cases:,} cases | first |" in TEXT
    assert {rule: function for rule, (function, _, _) in ROWS.items()} == {
        rule: explained(rule)[1] for rule in compared()
    }
    assert all(0 < count <= cases for _, count, _ in ROWS.values())


def test_the_script_counts_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few cases."""
    monkeypatch.setattr(mutations, "GROUPS", (GROUPS[0]._replace(seeds=(250, 304)),))
    cases, found = mutations.counted()
    assert cases == 2
    assert list(found) == compared()
    case = case_named("0.32.0 seed 250")
    words = kernel_words(case)
    for rule, (count, first) in found.items():
        assert (first == "0.32.0 seed 250") == told_apart(case, words, rule)
        assert (first == "none") == (count == 0)
    rows = list(rows_of(f"{mutations.BEGIN}\n{mutations.table()}\n{mutations.END}"))
    assert [(row[0], row[2], row[3]) for row in rows] == [(rule, *value) for rule, value in found.items()]


def test_the_script_writes_and_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{mutations.BEGIN}\n{mutations.END}\nafter\n")

    def status(option: str, row: str) -> int:
        monkeypatch.setattr(mutations, "table", lambda: f"| head |\n|---|\n{row}")
        monkeypatch.setattr(sys, "argv", ["mutations", option, str(path)])
        return mutations.main()

    seen = "| `rule` | function | 3 | 0.32.0 seed 1 |"
    assert status("--check", seen) == 1
    assert status("--write", seen) == 0
    assert path.read_text() == f"before\n{mutations.BEGIN}\n| head |\n|---|\n{seen}\n{mutations.END}\nafter\n"
    assert status("--check", seen) == 0
    assert status("--check", seen.replace("3", "4")) == 1
    assert status("--write", seen.replace("3", "0")) == 1, "a rule that nothing notices"


def test_late_hashes_is_a_rule_of_one_version_and_not_in_the_kernel() -> None:
    """In 0.10.0 it shows in the twin, while the kernel does as 0.10.1 does: that is why the kernel leaves it out."""
    seen = 0
    for seed in range(60):
        case = mutations.random_case(seed, families.rules_of("0.10.0"), asynchronous=True, policy="fcfs")
        try:
            with_it = simulate(case.requests, case.settings)
            without = simulate(case.requests, case.settings, "late-hashes")
        except CannotFinish:
            continue
        seen += with_it != without
        assert mutations.difference(kernel_run(case), mutations.twin_in_words(without)) is None
    assert seen > 0


def documented() -> dict[str, str]:
    """By rule, its item in the documentation."""
    items = re.findall(r"^- \*\*`([a-z-]+)`\*\* · (.*(?:\n  .*)*)", TEXT, re.M)
    assert len(dict(items)) == len(items)
    return dict(items)


def test_every_rule_has_its_item() -> None:
    items = documented()
    assert set(items) == set(RULES)
    for rule, item in items.items():
        function = re.split(r"[,;]", explained(rule)[1])[0]
        assert item.startswith(f"`{function}"), rule
        assert re.match(r"`[\w.]+`: \S", item), rule


def changes() -> list[tuple[str, str]]:
    """(flag, version from which it differs) in the families, oldest first."""
    found, before = [], families.FIRST
    for version in families.CHECKED:
        rules = families.rules_of(version)
        found += [(flag, version) for flag in rules._fields if getattr(rules, flag) != getattr(before, flag)]
        before = rules
    return found


def test_how_versions_differ_is_what_the_families_say() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| [^|]+ \| `([\w.]+)` \|$", section("How versions differ"), re.M)
    assert sorted(row[:2] for row in rows) == sorted(changes())
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), key=lambda v: [int(x) for x in v.split(".")])
    read_in = families.Rules.__doc__ or ""
    for flag, _, function in rows:
        paragraph = next(part for part in read_in.split("\n\n") if part.strip().startswith(f"``{flag}``"))
        assert function in paragraph.replace("\n    ", " "), flag


@cache
def named_as_left_out() -> set[str]:
    rows = re.findall(r"^\| ((?:`[a-z-]+` ?)+) \| [^|]+ \|$", section("What is not simulated"), re.M)
    return {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}


def test_what_is_left_out_has_the_names_that_the_tool_says() -> None:
    assert named_as_left_out() == set(INEXACT) | set(WHY)
