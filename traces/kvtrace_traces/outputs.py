"""What may not be written to."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from kvtrace_traces.errors import UsageError


def refuse_input(out: Path, inputs: Iterable[Path]) -> None:
    """Raise :class:`UsageError` where ``out`` is read: a file of ``inputs``, a log's further segment, a folder's log.

    Whoever lets an old output be replaced does not want the input gone.
    """
    if not out.is_file():
        return
    for given in inputs:
        if given.is_dir():
            files = [*given.rglob("*.kvt")]
        else:
            further = given.parent.glob(f"{glob.escape(given.stem)}.*.kvt") if given.suffix == ".kvt" else ()
            files = [given, *(file for file in further if file.stem.rpartition(".")[2].isdigit())]
        if any(file.is_file() and out.samefile(file) for file in files):
            raise UsageError(f"{out} is what is read: give the output another name")
