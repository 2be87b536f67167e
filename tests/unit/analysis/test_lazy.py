"""Importing kvtrace, and asking for help, must cost next to nothing."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"numpy", "polars", "numba", "duckdb", "pyarrow", "plotly"}


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_import_loads_no_library() -> None:
    assert not modules_after("import kvtrace") & (HEAVY | {"click", "kvtrace_traces", "kvtrace_replay"})


def test_help_loads_only_click() -> None:
    code = "from kvtrace.cli import main\ntry: main()\nexcept SystemExit: pass"
    loaded = modules_after("import sys; sys.argv = ['kvtrace', '--help']\n" + code)
    assert "click" in loaded
    assert not loaded & HEAVY


def test_public_names_resolve() -> None:
    import kvtrace

    for name in kvtrace.__all__:
        assert getattr(kvtrace, name) is not None
    assert set(kvtrace.__all__) <= set(dir(kvtrace))
    assert issubclass(kvtrace.UsageError, kvtrace.KvtraceError)
    assert not hasattr(kvtrace, "no_such_name")
