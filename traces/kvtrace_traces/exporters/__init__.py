"""Writes traces in other formats. One file per format; each registers itself with :func:`exporter`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces.errors import UsageError
from kvtrace_traces.files import refuse_input

Writer = Callable[..., dict[str, Any]]


class Exporter(NamedTuple):
    """A registered format; ``write(trace, out, force)`` returns a summary; it may have options of its own."""

    name: str
    summary: str
    write: Writer


_FORMATS: dict[str, Exporter] = {}


def exporter(name: str, summary: str) -> Callable[[Writer], Writer]:
    """Register a function as the exporter of format ``name``."""

    def register(write: Writer) -> Writer:
        _FORMATS[name] = Exporter(name, summary, write)
        return write

    return register


def formats() -> dict[str, Exporter]:
    """All formats by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_FORMATS.items()))


def run(format: str, trace: Any, out: str | Path, force: bool = False, **options: Any) -> dict[str, Any]:
    """Export ``trace`` as ``out``. Raises :class:`UsageError` for an unknown format or an output that exists."""
    known = formats()
    if format not in known:
        near = difflib.get_close_matches(format, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown format {format!r}: {hint}formats are {', '.join(known)}")
    out = Path(out)
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")
    refuse_input(out, [Path(trace.path)])
    return known[format].write(trace, out, force, **options)
