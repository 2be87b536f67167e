"""The wheel, as a user gets it: whole, with its samples, and its tracer usable without a single dependency."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as `pip install --no-deps` leaves it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = {name.rsplit("/", 1)[1]: name for name in names if ".dist-info/" in name}
        entries = archive.read(metadata["entry_points.txt"]).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"kvtrace", "kvtrace_traces", "kvtrace_tracer", "kvtrace_replay"}
    assert {"kvtrace_traces/samples/thrash.kvt", "kvtrace_traces/samples/chat.kvt"} <= set(names)
    assert "LICENSE" in metadata
    assert "[vllm.general_plugins]" in entries
    assert "kvtrace = kvtrace_tracer:register" in entries
    assert "kvtrace = kvtrace.cli:main" in entries
    sources = {p.relative_to(ROOT / top).as_posix() for top in ("traces", "tracer", "replay", "analysis")
               for p in (ROOT / top).glob("kvtrace*/**/*.py")}  # fmt: skip
    assert sources <= set(names)


def test_the_tracer_needs_nothing_else(installed: Path, tmp_path: Path) -> None:
    """With the standard library and the wheel alone, the plugin loads, stays inert, and arms when asked."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import kvtrace_tracer, os\n"
        "finders = len(sys.meta_path); kvtrace_tracer.register(); assert len(sys.meta_path) == finders\n"
        "os.environ['KVTRACE_OUT'] = 'x'; kvtrace_tracer.register(); kvtrace_tracer.register()\n"
        "assert len(sys.meta_path) == finders + 1\n"
        "import kvtrace_tracer.attach, kvtrace_tracer.hooks, kvtrace_tracer.blocks, kvtrace_tracer.log\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('numpy', 'numba', 'polars', 'duckdb', 'click')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(installed)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_it_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """`kvtrace demo` out of the wheel finds its sample there, not in the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kvtrace", "demo"], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kvtrace-demo.html").stat().st_size > 1 << 20
    where = subprocess.run(
        [sys.executable, "-c", "import kvtrace.samples as s; print(s.path('chat'))"],
        capture_output=True, text=True, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert str(installed) in where.stdout, where.stderr
