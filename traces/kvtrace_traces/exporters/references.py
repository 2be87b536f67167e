"""What exporters of references write: the requests of one engine, their blocks, and the ids that name these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvtrace_traces.errors import KvtraceError, UsageError


class References(NamedTuple):
    """The requests of one engine in order of arrival. ``frame``: ``Trace.requests``; request i's blocks are
    ``ids[indptr[i] : indptr[i + 1]]`` (uint64; int64); ``block_size``: tokens in each."""

    frame: pl.DataFrame
    indptr: NDArray[np.int64]
    ids: NDArray[np.uint64]
    block_size: int


def references(trace: Any) -> References:
    """The references of ``trace``.

    An import's ids are those of its file. A recorded trace's are numbers from 0 in order of first use (its own are
    64-bit hashes, which many tools cannot hold), of the whole blocks of prompts: what its requests looked up. Raises
    :class:`UsageError` for a trace of several engines, :class:`KvtraceError` for one of lengths alone.
    """
    if len(trace.engines) != 1:
        raise UsageError(f"{trace.path} holds {len(trace.engines)} engines: export one file at a time")
    header = trace.header
    if header.get("reuse_known") is False:
        raise KvtraceError(
            f"{trace.path} has times and lengths alone ({header.get('format')}): it has no references to export"
        )
    size, granule = int(header["block_size"]), int(header["granule"])
    stride = max(1, size // granule)
    frame, chains = trace.requests, trace.chains()
    # Where a part of the log is missing, so may be the arrival of a request: its chain is left out with it.
    chosen = frame["request"].to_numpy()
    starts, available = chains.indptr[chosen], np.diff(chains.indptr)[chosen]
    if header.get("source") == "import":
        raw = trace.raw_ids()
        ids = chains.hashes[chains.identities] if raw is None else trace.raw_hashes()[raw]
        lengths = -(-available // stride)
    else:
        ids = chains.identities.astype(np.uint64)
        lengths = np.minimum(available // stride, frame["prompt_tokens"].to_numpy().astype(np.int64) // size)
    indptr = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    # A block is named by its last granule; a partial last one by the last there is.
    last = np.minimum((within + 1) * stride, np.repeat(available, lengths)) - 1
    return References(frame, indptr, ids[np.repeat(starts, lengths) + last], size)


@contextmanager
def written(out: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write ``out`` with. It appears whole or not at all; an existing one is replaced only with ``force``."""
    if out.exists() and (out.is_dir() or not force):
        raise UsageError(f"{out} exists: " + ("give a file name" if out.is_dir() else "--force replaces it"))
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        try:
            with part.open("xb") as file:
                yield file
            os.replace(part, out)
        except OSError as error:
            raise KvtraceError(f"{out}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def summary(out: Path, found: References) -> dict[str, Any]:
    """What an exporter returns."""
    return {
        "path": str(out),
        "requests": found.frame.height,
        "references": len(found.ids),
        "block_size": found.block_size,
        "bytes": out.stat().st_size,
    }
