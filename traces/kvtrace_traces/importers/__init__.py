"""Reads other programs' traces into ``.kvt``. One file per format; each registers itself with :func:`importer`."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.files import refuse_input
from kvtrace_traces.importers.batches import Piece
from kvtrace_traces.importers.source import Options, Progress, Source

__all__ = ["Importer", "Options", "Source", "formats", "importer", "run"]

Reader = Callable[[Source], Iterator[Piece]]


class Importer(NamedTuple):
    """A registered format.

    ``read`` yields requests, bad records in their places, so that reading can go on after them; ``granule(source)``:
    tokens an id stands for; ``takes``: the options it understands; ``folder``: pattern of the files it takes from a
    folder, if it takes one; ``reuse``: whether its records tell which blocks are the same.
    """

    name: str
    summary: str
    read: Reader
    granule: Callable[[Source], int]
    takes: Collection[str]
    folder: str | None
    reuse: bool


BLOCK_TOKENS = 16  # vLLM's default, where neither the user nor the file names one

_FORMATS: dict[str, Importer] = {}


def importer(
    name: str,
    summary: str,
    granule: Callable[[Source], int],
    takes: Collection[str] = ("block_size",),
    folder: str | None = None,
    reuse: bool = True,
) -> Callable[[Reader], Reader]:
    """Register a generator of :data:`batches.Piece` as the importer of format ``name``; see :class:`Importer`."""

    def register(read: Reader) -> Reader:
        _FORMATS[name] = Importer(name, summary, read, granule, takes, folder, reuse)
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
    granule: int | None = None,
    tokenizer: str | None = None,
    columns: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Import ``src`` as ``out``. Returns a summary for people: requests, references, left_out, content_ids (whether
    ids name content alone; None: not found out), odd_lengths (requests whose number of ids is not that of their
    prompt's blocks), untimed, backwards (requests that arrived before the one before them), reuse_known, notes, ...

    Raises :class:`UsageError` for an unknown format, an option that the format does not take or an output that
    exists, :class:`KvtraceError` for a bad record (naming line and reason) unless ``skip_bad``. Nothing is left
    behind after an error.
    """
    from kvtrace_traces.importers.requests import RequestWriter
    from kvtrace_traces.writer import write_file

    out = Path(out)
    options = Options(block_size, granule, tokenizer, columns or {})
    chosen, source = source_of(format, Path(src), options, progress, out, force)
    header = header_of(chosen, source)
    writer = RequestWriter(chosen.read(source), skip_bad, source)
    target = out.with_name(out.name + f".{os.getpid()}.part") if out.exists() else out
    try:
        written = write_file(str(target), header, writer.bodies, writer.end)
        source.finish()
        if target != out:
            os.replace(target, out)
    except OSError as error:
        raise KvtraceError(f"{out}: {error.strerror}") from None
    return {
        "format": format,
        "path": str(out),
        "block_size": header["block_size"],
        "granule": source.granule,
        "requests": writer.requests,
        "references": writer.references,
        "reuse_known": chosen.reuse,
        "left_out": writer.left_out,
        "first_left_out": writer.first_bad,
        "odd_lengths": writer.odd_lengths if chosen.reuse else 0,
        "untimed": writer.untimed,
        "backwards": writer.backwards,
        "content_ids": writer.parents.several,
        "notes": source.notes,
        "bytes": written,
    }


def source_of(
    format: str,
    src: Path,
    options: Options,
    progress: Progress | None = None,
    out: Path | None = None,
    force: bool = False,
) -> tuple[Importer, Source]:
    """The importer of ``format`` and what it is to read, from the begin. Raises as :func:`run`."""
    chosen = _find(format)
    _check_options(chosen, options)
    if out is not None and out.exists() and (out.is_dir() or not force):
        raise UsageError(f"{out} exists: " + ("give a file name" if out.is_dir() else "--force replaces it"))
    files = _files(chosen, src)
    if out is not None:
        refuse_input(out, files)
    source = Source(src, files, options, progress)
    source.granule = chosen.granule(source)
    source.rewind()
    return chosen, source


def header_of(chosen: Importer, source: Source) -> dict[str, Any]:
    """The header of a trace of these files."""
    return {
        "source": "import",
        "format": chosen.name,
        "engine": None,
        "engine_version": None,
        "engine_index": 0,
        "run_id": secrets.token_hex(8),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "clock_monotonic_ns": 0,
        "clock_wall_ns": 0,
        "imported_from": source.path.name,
        "model": None,
        "block_size": _block_size(chosen, source),
        "granule": source.granule,
        "num_blocks": 0,
        "bytes_per_block": None,
        "prefix_caching": True,
        "reuse_known": chosen.reuse,
        "inexact": [],
    }


def _find(format: str) -> Importer:
    module = format.replace("-", "_")
    if module.isidentifier() and any(found.name == module for found in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")  # mostly all that is needed
        if format in _FORMATS:
            return _FORMATS[format]
    known = formats()
    if format not in known:
        near = difflib.get_close_matches(format, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown format {format!r}: {hint}formats are {', '.join(known)}")
    return known[format]


def _check_options(chosen: Importer, options: Options) -> None:
    for name, value in vars(options).items():
        if value and name not in chosen.takes:
            takers = ", ".join(other.name for other in formats().values() if name in other.takes)
            raise UsageError(f"--{name.replace('_', '-')} means nothing to format {chosen.name}: it is for {takers}")
    for name in ("block_size", "granule"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 1 << 24:
            raise UsageError(f"--{name.replace('_', '-')} {value}: it must lie between 1 and {1 << 24:,} tokens")


def _block_size(chosen: Importer, source: Source) -> int:
    """The block size of the trace: a multiple of the granule, where a format makes its identities itself."""
    granule = source.granule
    if "granule" not in chosen.takes:
        return granule
    size = source.options.block_size or (BLOCK_TOKENS if BLOCK_TOKENS % granule == 0 else granule)
    if size % granule:
        raise UsageError(f"--block-size {size} is no multiple of --granule {granule}: give one that is")
    return size


def _files(chosen: Importer, src: Path) -> list[Path]:
    if src.is_dir() and chosen.folder is not None:
        files = sorted(path for path in src.glob(chosen.folder) if path.is_file())
        if not files:
            raise KvtraceError(f"{src} holds no {chosen.folder}: there is nothing to import")
        return files
    if src.is_dir():
        raise KvtraceError(f"{src} is a folder: format {chosen.name} takes a file")
    if not src.exists():
        raise KvtraceError(f"{src} does not exist")
    if not src.is_file():
        raise KvtraceError(f"{src} is not a file")
    return [src]
