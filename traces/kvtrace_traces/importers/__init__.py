"""Reads other programs' traces into ``.kvt``. One file per format; each registers itself with :func:`importer`."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.importers.requests import Record, RequestWriter
from kvtrace_traces.writer import write_file

Reader = Callable[["Source"], Iterator[Record]]
Progress = Callable[[int, int], None]


class Source(NamedTuple):
    """A file to import. ``lines()`` yields ``(number, line)``; ``block_size`` is what the user gave, if anything."""

    path: Path
    block_size: int | None
    progress: Progress | None

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines of the file that are not blank, numbered from 1."""
        total = self.path.stat().st_size
        done = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                done += len(line)
                if self.progress is not None and number % 4096 == 0:
                    self.progress(done, total)
                if line.strip():
                    yield number, line


class Importer(NamedTuple):
    """A registered format. ``read`` yields records, bad ones included (``Record.bad``), so that reading can go on after
    them; ``granule(source)``: tokens a block."""

    name: str
    summary: str
    read: Reader
    granule: Callable[[Source], int]


_FORMATS: dict[str, Importer] = {}


def importer(name: str, summary: str, granule: Callable[[Source], int]) -> Callable[[Reader], Reader]:
    """Register a generator of :class:`Record` as the importer of format ``name``."""

    def register(read: Reader) -> Reader:
        _FORMATS[name] = Importer(name, summary, read, granule)
        return read

    return register


def formats() -> dict[str, Importer]:
    """All formats by name; importing every module of this package is what finds them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_FORMATS.items()))


def run(
    format: str,
    src: str | Path,
    out: str | Path,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Import ``src`` as ``out``. Returns a summary for people: requests, references, left_out, content_ids,
    odd_lengths (requests whose number of ids is not that of their prompt's blocks), ...

    Raises :class:`UsageError` for an unknown format or an output that exists, :class:`KvtraceError` for a bad record
    (naming line and reason) unless ``skip_bad``. Nothing is left behind after an error.
    """
    src, out = Path(src), Path(out)
    known = formats()
    if format not in known:
        near = difflib.get_close_matches(format, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown format {format!r}: {hint}formats are {', '.join(known)}")
    if not src.is_file():
        raise KvtraceError(f"{src} is not a file" if src.exists() else f"{src} does not exist")
    if out.exists() and (out.is_dir() or not force):
        raise UsageError(f"{out} exists: " + ("give a file name" if out.is_dir() else "--force replaces it"))
    if block_size is not None and block_size < 1:
        raise UsageError(f"--block-size {block_size}: a block has at least one token")
    chosen = known[format]
    source = Source(src, block_size, progress)
    granule = chosen.granule(source)
    header: dict[str, Any] = {
        "source": "import",
        "format": format,
        "engine": None,
        "engine_version": None,
        "engine_index": 0,
        "run_id": secrets.token_hex(8),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "clock_monotonic_ns": 0,
        "clock_wall_ns": 0,
        "imported_from": src.name,
        "model": None,
        "block_size": granule,
        "granule": granule,
        "num_blocks": 0,
        "bytes_per_block": None,
        "prefix_caching": True,
        "inexact": [],
    }
    writer = RequestWriter(chosen.read(source), skip_bad, src, granule)
    target = out.with_name(out.name + f".{os.getpid()}.part") if out.exists() else out
    try:
        write_file(str(target), header, writer.bodies, writer.end)
        if target != out:
            os.replace(target, out)
    except OSError as error:
        raise KvtraceError(f"{out}: {error.strerror}") from None
    from kvtrace_traces.trace import open_trace

    return {
        "format": format,
        "path": str(out),
        "block_size": granule,
        "requests": writer.requests,
        "references": writer.references,
        "left_out": writer.left_out,
        "first_left_out": writer.first_bad,
        "odd_lengths": writer.odd_lengths,
        "content_ids": open_trace(out).raw_ids() is not None,
        "bytes": out.stat().st_size,
    }
