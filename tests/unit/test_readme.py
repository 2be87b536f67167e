"""The README is true: every command in it runs as printed and prints what it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.S | re.M)


def commands() -> list[tuple[str, list[str]]]:
    """(command, lines shown) of every console block, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in BLOCKS:
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def needs_engine(command: str) -> bool:
    return "record" in shlex.split(command)[:2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that looks like the checkout; what the commands write stays in it."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(ROOT / "traces" / "samples", folder / "traces" / "samples")
    return folder


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "NO_COLOR": "1"}
    return subprocess.run(shlex.split(command), cwd=place, env=env, capture_output=True, text=True, timeout=300)


def fits(shown: list[str], printed: list[str]) -> bool:
    """Whether the lines shown are those printed; `...` stands for the rest of a line or for any lines."""
    if not shown:
        return True
    head, rest = shown[0], shown[1:]
    if head.strip() == "...":
        return any(fits(rest, printed[i:]) for i in range(len(printed) + 1)) if rest else True
    if not printed:
        return False
    same = printed[0].startswith(head[:-3].rstrip()) if head.endswith("...") else printed[0].rstrip() == head.rstrip()
    return same and fits(rest, printed[1:])


def check(command: str, shown: list[str], place: Path) -> None:
    done = run(command, place)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert fits(shown, lines), f"README shows\n{chr(10).join(shown)}\nand it prints\n{done.stdout}"
    if shown and shown[-1].strip() != "...":
        assert lines[-1].startswith(shown[-1].removesuffix("...").rstrip())


def test_the_first_screen() -> None:
    """What it is, why, and output or a picture before anything else."""
    assert README.index("```console") < README.index("## ")
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file()
    for link in re.findall(r"[^!]\[[^\]]+\]\(([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_commands_without_the_engine(place: Path) -> None:
    """One after the other, for later ones use what earlier ones wrote."""
    ours = [(command, shown) for command, shown in commands() if not needs_engine(command)]
    assert len(ours) >= 6
    for command, shown in ours:
        check(command, shown, place)


@pytest.mark.engine
def test_commands_with_the_engine(place: Path) -> None:
    ours = [(command, shown) for command, shown in commands() if needs_engine(command)]
    assert ours
    for command, shown in ours:
        check(command, shown, place)


def test_python_block(place: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    done = subprocess.run([sys.executable, "-c", block], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_targets() -> None:
    """The targets that the README names exist, and say what they do in `make help`."""
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "fast", "check", "demo-live"} <= named
    for target in named:
        done = subprocess.run(["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_ci_runs_the_test_command() -> None:
    assert "make test" in README
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text()
