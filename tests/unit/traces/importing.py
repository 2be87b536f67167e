"""What importers yield, as plain tuples; reading with a format, with its scanner or line by line with care."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from kvtrace_traces import Trace, importers, open_trace
from kvtrace_traces.importers import columns, csv_file
from kvtrace_traces.importers import source as sources
from kvtrace_traces.importers.batches import Bad, Batch, Ids

FORMATS = importers.formats()


def told(pieces: Iterator[Any]) -> list[tuple[Any, ...]]:
    """One tuple for each request or bad record."""
    found: list[tuple[Any, ...]] = []
    for piece in pieces:
        if isinstance(piece, Bad):
            found.append(("bad", piece.line, piece.reason))
        elif isinstance(piece, Ids):
            times = [None] * len(piece.ids) if piece.arrival_ns is None else piece.arrival_ns.tolist()
            found += [("id", *pair) for pair in zip(piece.ids.tolist(), times, strict=True)]
        else:
            found += [request(piece, i) for i in range(len(piece.arrival_ns))]
    return found


def request(batch: Batch, i: int) -> tuple[Any, ...]:
    """Request `i` of a batch."""
    ids = batch.ids[batch.indptr[i] : batch.indptr[i + 1]].tolist()
    name = batch.text[batch.name_starts[i] :][: batch.name_sizes[i]].tobytes().decode()
    row = (int(batch.arrival_ns[i]), int(batch.prompt_tokens[i]), int(batch.output_tokens[i]), ids, name)
    about = batch.about
    if about is None:
        return (*row, None, -1, -1, -1)
    kind = None if about.types[i] < 0 else about.names[about.types[i]]
    return (*row, kind, int(about.turns[i]), int(about.own[i]), int(about.parents[i]))


def read(format: str, data: bytes, folder: Path, careful: bool = False, chunk: int = 0, **options: Any) -> list[Any]:
    """What the importer of `format` makes of `data`. `careful`: no line is plain enough for its scanner; `chunk`: bytes
    that it gets at a time."""
    path = folder / "source"
    path.write_bytes(data)
    chosen = FORMATS[format]
    source = sources.Source(path, [path], importers.Options(**options))
    source.granule = chosen.granule(source)
    if chunk:
        pieces, chunks = source.pieces, source.chunks
        source.pieces = lambda file, size=chunk: pieces(file, chunk)  # type: ignore[method-assign]
        source.chunks = lambda size=chunk: chunks(chunk)  # type: ignore[method-assign]
    with (
        mock.patch.object(columns, "runs", _nothing_plain if careful else columns.runs),
        mock.patch.object(csv_file, "runs", _nothing_plain if careful else columns.runs),
    ):
        return told(chosen.read(source))


def _nothing_plain(good: Any) -> Iterator[tuple[int, int, bool]]:
    if len(good):
        yield 0, len(good), False


def imported(format: str, data: bytes | str, folder: Path, **options: Any) -> Trace:
    """The trace that `data` becomes."""
    source, out = folder / "data.in", folder / "data.kvt"
    source.write_bytes(data.encode() if isinstance(data, str) else data)
    importers.run(format, source, out, force=True, **options)
    return open_trace(out)


def requests_of(trace: Trace) -> list[tuple[Any, ...]]:
    """Arrival, prompt, output, ids (as the file has them) and name of every request."""
    chains, raw = trace.chains(), trace.raw_ids()
    ids = chains.hashes[chains.identities] if raw is None else trace.raw_hashes()[raw]
    columns = trace.requests.select("arrival_ns", "prompt_tokens", "output_tokens", "request_id").rows()
    bounds = chains.indptr.tolist()
    return [
        (arrival, prompt, output, ids[bounds[i] : bounds[i + 1]].tolist(), name)
        for i, (arrival, prompt, output, name) in enumerate(columns)
    ]


def column(trace: Trace, name: str) -> list[Any]:
    """A column of the requests."""
    values: list[Any] = trace.requests[name].to_list()
    return values
