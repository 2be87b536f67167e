"""Every command explains itself, and its two examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from kvtrace.cli.main import COMMANDS, SECTIONS, cli


def examples(name: str) -> list[str]:
    command = cli if not name else cli.get_command(click.Context(cli), name)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=name))
    _, found, after = text.partition("Examples:\n")
    assert found, f"{name}: no examples"
    lines = [line.strip() for line in after.splitlines() if line.strip()]
    assert len(lines) == 2, f"{name}: the help must end with two examples"
    return lines


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    assert command.name == name
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


@pytest.mark.parametrize(("name", "number"), [(name, number) for name in ["", *COMMANDS] for number in (0, 1)])
def test_examples_run(name: str, number: int, tmp_path: Path, thrash: Path) -> None:
    line = examples(name)[number]
    (tmp_path / "traces" / "samples").mkdir(parents=True)
    (tmp_path / "traces" / "samples" / "thrash.kvt").symlink_to(thrash)
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", line], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_group_help_lists_every_command(kvtrace_cli: Callable[..., Any]) -> None:
    done = kvtrace_cli("--help")
    assert done.code == 0
    for title, names in SECTIONS.items():
        assert f"{title}:" in done.out
        for name, summary in names.items():
            assert f"  {name} " in done.out
            command = cli.get_command(click.Context(cli), name)
            assert command is not None
            assert command.get_short_help_str(68) == summary


def test_unknown_command_names_the_nearest(kvtrace_cli: Callable[..., Any]) -> None:
    done = kvtrace_cli("repaly")
    assert done.code == 2
    assert "No such command 'repaly'. Did you mean 'replay'?" in done.err
    assert done.out == ""
    assert kvtrace_cli("zzz").code == 2
