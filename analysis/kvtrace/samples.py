"""The small recorded traces that come with kvtrace."""

from __future__ import annotations

from pathlib import Path

import kvtrace_traces
from kvtrace_traces.errors import UsageError


def folders() -> list[Path]:
    """Where samples may lie: inside the installed package (a wheel), or beside it (a checkout)."""
    package = Path(kvtrace_traces.__file__).parent
    return [package / "samples", package.parent / "samples"]


def names() -> list[str]:
    """The samples that are installed, sorted."""
    return sorted({file.stem for folder in folders() for file in folder.glob("*.kvt")})


def path(name: str) -> Path:
    """The file of one sample.

    Raises UsageError where there is none of that name.
    """
    for folder in folders():
        file = folder / f"{name}.kvt"
        if file.exists():
            return file
    known = ", ".join(names()) or "none is installed"
    raise UsageError(f"there is no sample trace named {name!r} (samples: {known})")
