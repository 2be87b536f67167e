"""The shape of the house: arrows between packages run one way, and files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kvtrace_traces": ROOT / "traces/kvtrace_traces",
    "kvtrace_tracer": ROOT / "tracer/kvtrace_tracer",
    "kvtrace_replay": ROOT / "replay/kvtrace_replay",
    "kvtrace": ROOT / "analysis/kvtrace",
}
#: tracer -> traces <- replay <- analysis
MAY_IMPORT = {
    "kvtrace_traces": set(),
    "kvtrace_tracer": {"kvtrace_traces"},
    "kvtrace_replay": {"kvtrace_traces"},
    "kvtrace": {"kvtrace_traces", "kvtrace_replay"},
}
MAX_LINES = 500


def sources() -> list[Path]:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "benchmarks", ROOT / "examples", ROOT / "traces/samples"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and package of every import in a file, those inside functions and of `importlib` by name included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield node.lineno, ast.unparse(node.args[0]).strip("f'\"").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted(PACKAGES[package].rglob("*.py"))
        for line, name in imported(path)
        if name in PACKAGES and name not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_long() -> None:
    long = [f"{p.relative_to(ROOT)}: {n}" for p in sources() if (n := len(p.read_text().splitlines())) > MAX_LINES]
    assert not long, "\n".join(long)


def test_there_is_something_to_check() -> None:
    assert all(list(folder.rglob("*.py")) for folder in PACKAGES.values())
