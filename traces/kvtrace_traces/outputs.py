"""What may not be written to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvtrace_traces.errors import UsageError


def refuse_input(out: Path, inputs: Iterable[Path]) -> None:
    """Raise :class:`UsageError` where ``out`` is a file that is read, one of ``inputs`` or in a folder of them.

    Whoever lets an old output be replaced does not want the input gone.
    """
    if not out.is_file():
        return
    for given in inputs:
        files = given.rglob("*") if given.is_dir() else [given]
        if any(file.is_file() and out.samefile(file) for file in files):
            raise UsageError(f"{out} is what is read: give the output another name")
