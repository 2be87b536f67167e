"""Which files are the logs of a trace, and what may therefore not be written to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvtrace_traces.errors import UsageError


def logs_of(path: Path) -> list[Path]:
    """A folder's ``*.kvt`` files, by name; or a file and, where it is the first of a rotated log, the segments beside
    it (a file so named may be another log's, which its header tells)."""
    if path.is_dir():
        return sorted(file for file in path.glob("*.kvt") if file.is_file())
    files, stem = [path], path.name.removesuffix(".kvt")
    while (following := path.with_name(f"{stem}.{len(files)}.kvt")).is_file():
        files.append(following)
    return files


def refuse_input(out: Path, inputs: Iterable[Path]) -> None:
    """Raise :class:`UsageError` where ``out`` is one of the files that are read, of ``inputs``: files and traces.

    Whoever lets an old output be replaced does not want the input gone.
    """
    if out.is_file() and any(file.is_file() and out.samefile(file) for given in inputs for file in logs_of(given)):
        raise UsageError(f"{out} is what is read: give the output another name")
