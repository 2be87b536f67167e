"""The bundled sample, broken and doubled copies of it, and a way to run the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from kvtrace import samples
from kvtrace.cli.main import cli
from kvtrace_traces import wire


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def told(err: str) -> str:
    """What a command said, without the note that the first run of a fresh checkout adds."""
    return "".join(line for line in err.splitlines(True) if not line.startswith("kvtrace: compiling"))


@pytest.fixture
def thrash() -> Path:
    return samples.path("thrash")


@pytest.fixture
def kvtrace_cli() -> Callable[..., Ended]:
    """Run a command in this process."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    runner = CliRunner(**apart)

    def run(*args: object, stdin: str | None = None, **env: str) -> Ended:
        done = runner.invoke(cli, [str(arg) for arg in args], input=stdin, env=env)
        return Ended(done.exit_code, done.stdout, told(done.stderr))

    return run


def commits(data: bytes) -> list[wire.Commit]:
    """Every commit of a log."""
    found, offset = [], wire.PREFIX.size
    while isinstance(commit := wire.read_commit(data, offset), wire.Commit):
        found.append(commit)
        offset += wire.HEAD_BYTES + len(commit.body)
    return found


@pytest.fixture
def cut(thrash: Path, tmp_path: Path) -> Path:
    """The sample without its end record, as a killed engine leaves it."""
    data = thrash.read_bytes()
    end = next(commit for commit in commits(data) if commit.kind == wire.END)
    path = tmp_path / "cut.kvt"
    path.write_bytes(data[: end.offset])
    return path


@pytest.fixture
def damaged(thrash: Path, tmp_path: Path) -> Path:
    """The sample with one bit flipped in the middle."""
    data = bytearray(thrash.read_bytes())
    frames = [commit for commit in commits(bytes(data)) if commit.kind == wire.OPS]
    data[frames[len(frames) // 2].offset + wire.HEAD_BYTES] ^= 1
    path = tmp_path / "damaged.kvt"
    path.write_bytes(data)
    return path


@pytest.fixture
def two_engines(thrash: Path, tmp_path: Path) -> Path:
    """A folder with the sample as engine 0 and as engine 1."""
    folder = tmp_path / "two"
    folder.mkdir()
    data = thrash.read_bytes()
    head = commits(data)[0]
    for index in (0, 1):
        changed: dict[str, Any] = {**json.loads(head.body), "engine_index": index, "run_id": f"run-{index}"}
        body = json.dumps(changed).encode()
        body += b" " * (-len(body) % 4)
        rest = data[head.offset + wire.HEAD_BYTES + len(head.body) :]
        start = wire.head(head.kind, head.flags, head.seq, body) + body
        (folder / f"sample-e{index}-1.kvt").write_bytes(data[: head.offset] + start + rest)
    return folder
