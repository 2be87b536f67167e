"""What the tracer brings into a serving process: the standard library and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("numpy", "numba", "polars", "duckdb", "click", "pyarrow", "plotly", "vllm", "torch")
TRACER = sorted(
    f"kvtrace_tracer.{p.stem}" for p in (ROOT / "tracer/kvtrace_tracer").glob("*.py") if p.stem != "__init__"
)
LIGHT = [
    "kvtrace_traces",
    "kvtrace_traces.schema",
    "kvtrace_traces.wire",
    "kvtrace_traces.walk",
    "kvtrace_traces.writer",
]


def isolated(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter whose path has the standard library and the two packages alone."""
    start = f"import sys; sys.path += [{str(ROOT / 'traces')!r}, {str(ROOT / 'tracer')!r}]\n"
    return subprocess.run([sys.executable, "-I", "-S", "-c", start + code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", [*LIGHT, "kvtrace_tracer", *TRACER])
def test_the_standard_library_is_enough(module: str) -> None:
    done = isolated(f"import {module}\nprint(*[m for m in {HEAVY} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_tracers_modules_were_found() -> None:
    assert "kvtrace_tracer.hooks" in TRACER


def test_heavy_modules_stay_out_where_they_are_installed() -> None:
    code = "import sys, " + ", ".join([*LIGHT, *TRACER]) + f"\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_a_log_is_written_without_any_package(tmp_path: Path) -> None:
    code = f"""
from kvtrace_traces.writer import LogWriter
from kvtrace_tracer.log import Log
writer = LogWriter({str(tmp_path / "log")!r}, {{"block_size": 1, "granule": 1, "num_blocks": 1}})
log = Log(writer, 0, lambda: None)
log.begin_frame()
log.words.extend((1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
log.ext("RESET")
log.events += 1
log.close()
print(*[m for m in {HEAVY} if m in sys.modules])
"""
    done = isolated(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    from kvtrace_traces import open_trace

    trace = open_trace(tmp_path / "log.kvt")
    assert trace.complete
    assert trace.block_events["kind"].to_list() == ["reset"]
