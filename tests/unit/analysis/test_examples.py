"""The examples run, print what their README shows, and are all listed there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from unit.test_readme import fits, run

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```", README, re.S | re.M)


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[command.split("/")[-1] for command, _ in BLOCKS])
def test_an_example_prints_what_is_shown(command: str, shown: str) -> None:
    done = run(command, ROOT)
    assert done.returncode == 0, done.stderr
    assert fits(shown.splitlines(), done.stdout.splitlines()), done.stdout
    assert len(shown.splitlines()) == len(done.stdout.splitlines())


def test_all_are_listed() -> None:
    assert len(BLOCKS) >= 5
    for path in FOLDER.iterdir():
        if path.name != "README.md" and not path.name.startswith(("_", ".")):
            assert f"]({path.name}" in README, path.name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (FOLDER / link).exists(), link
