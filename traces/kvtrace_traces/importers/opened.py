"""Opens a file of another tool as it is: what importing it and opening the trace would give, without a trace between.

For one question to one file that is the shorter way: nothing is written, and read again. What is asked for are the
requests and the chains of their block ids; all else, an import does not have.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvtrace_traces import content, tables
from kvtrace_traces.compile import njit
from kvtrace_traces.engine_log import Chains
from kvtrace_traces.errors import KvtraceError, UsageError
from kvtrace_traces.importers import Importer, Options, header_of, source_of
from kvtrace_traces.importers.batches import Bad, Batch
from kvtrace_traces.importers.fields import object_of
from kvtrace_traces.importers.source import LOOK_BYTES, Progress, Source
from kvtrace_traces.schema import TABLES

SPARSE = 4  # ids up to so many times their number are numbered by a table, larger ones by hashing


def recognised(path: Path) -> str | None:
    """The format of a file that can be opened as it is, by its first record; None where it is none of these."""
    if not path.is_file():
        return None
    try:
        source = Source(path, [path], Options())
        _, _, line = next(source.lines(LOOK_BYTES))
        row = object_of(line)
    except (KvtraceError, OSError, StopIteration, ValueError):
        return None
    own = {"hash_ids", "input_length"} <= row.keys() and "chat_id" not in row
    return "mooncake" if own else None


class Imported:
    """The requests of a foreign file, with those attributes of an opened trace that replays and simulations ask for.

    ``engines``: one header; ``requests``: a frame as of a trace; ``files``: the file. It is never lossy: a record that
    cannot be read raises instead.
    """

    complete = True
    lossy = False
    dropped = 0
    damaged_frames = 0

    def __init__(self, chosen: Importer, source: Source) -> None:
        self.path = source.path
        self.files = source.files
        # Nothing by chance, so that what is kept of the file (`kvtrace_replay.workload.store`) is known again.
        self.header = {**header_of(chosen, source), "run_id": None, "created": None}
        self.engines = [self.header]
        self.warnings: list[str] = []
        self._chosen, self._source = chosen, source
        self._raw: tuple[NDArray[np.int32], NDArray[np.uint64]] | None = None

    def __getattr__(self, name: str) -> Any:
        """A table of which an import has no rows."""
        if name in TABLES and name != "requests":
            return pl.DataFrame(schema=tables.schema(name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @cached_property
    def requests(self) -> pl.DataFrame:
        """The table of requests, as a trace of the import has it."""
        return _requests(self._batches, self.request_ids)

    @cached_property
    def request_ids(self) -> pl.Series:
        """What the file calls its requests, an empty text where it does not."""
        sizes = _joined(self._batches, "name_sizes")
        starts = np.zeros(len(sizes), np.int64)
        np.cumsum(sizes[:-1], out=starts[1:])
        return tables.strings("request_id", starts, sizes, _joined(self._batches, "text"))

    def numbers(self, name: str) -> NDArray[Any]:
        """``arrival_ns`` (int64), ``prompt_tokens`` or ``output_tokens`` (int32) of each request, -1 where not known:
        a column of ``requests`` for those who need no table."""
        return _joined(self._batches, name)

    @cached_property
    def _batches(self) -> list[Batch]:
        """The records of the file, read at the first question. Raises :class:`KvtraceError`."""
        source, batches = self._source, []
        for piece in self._chosen.read(source):
            if isinstance(piece, Bad):
                where = source.where(piece.file, piece.line)
                raise KvtraceError(f"{where}: {piece.reason} (`kvtrace import --skip-bad` leaves such records out)")
            assert isinstance(piece, Batch)
            batches.append(piece._replace(text=_names(piece)))
        if not batches:
            raise KvtraceError(f"{self.path} holds no request")
        source.finish()
        return batches

    @cached_property
    def _chains(self) -> Chains:
        batches = self._batches
        lengths = np.concatenate([np.diff(batch.indptr) for batch in batches])
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        ids = [batch.ids[batch.indptr[0] : batch.indptr[-1]] for batch in batches]
        values, unique = numbered(ids[0] if len(ids) == 1 else np.concatenate(ids))
        if content.many_parents(indptr, values, len(unique)):
            self._raw = values, unique
            chained = np.empty(len(values), np.uint64)
            content.chain(indptr, values, unique, chained)
            values, unique = numbered(chained)
        return Chains(indptr, values, unique)

    def chains(self, engine_index: int | None = None) -> Chains:
        """The identities of the requests, as of a trace."""
        return self._chains

    def raw_ids(self, engine_index: int | None = None) -> NDArray[np.int32] | None:
        """int32, parallel to ``chains().identities``: dense ids where the file's name content; else None."""
        return None if not self._chains or self._raw is None else self._raw[0]

    def raw_hashes(self, engine_index: int | None = None) -> NDArray[np.uint64] | None:
        """uint64, by the dense ids of :meth:`raw_ids`: the ids as the file has them; None where there are none."""
        return None if not self._chains or self._raw is None else self._raw[1]

    def snapshot(self, engine_index: int | None = None) -> None:
        """None: no engine was under way."""


def open_import(
    path: str | Path, format: str | None = None, block_size: int | None = None, progress: Progress | None = None
) -> Imported:
    """Open a file in another tool's format (default: by its first record) as the requests that importing it gives.

    It is read at the first question, which raises :class:`KvtraceError` for a bad record, naming line and reason, and
    for a file without requests. Raises :class:`UsageError` for a file of another format.
    """
    path = Path(path)
    format = format or recognised(path)
    if format != "mooncake":
        raise UsageError(f"{path} cannot be opened as it is: `kvtrace import` makes a trace of it")
    return Imported(*source_of(format, path, Options(block_size), progress))


def _names(batch: Batch) -> NDArray[np.uint8]:
    """The bytes of the names alone, one after the other, so that a batch does not keep its part of the file."""
    sizes = batch.name_sizes
    if not sizes.any():
        return np.empty(0, np.uint8)
    parts = [batch.text[s : s + n] for s, n in zip(batch.name_starts, sizes, strict=True)]
    return np.concatenate(parts)


def _joined(batches: list[Batch], name: str) -> NDArray[Any]:
    """A column of all batches."""
    parts = [getattr(batch, name) for batch in batches]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _requests(batches: list[Batch], request_ids: pl.Series) -> pl.DataFrame:
    """The table of requests, as a trace of the import has it."""
    arrival, output = _joined(batches, "arrival_ns"), _joined(batches, "output_tokens")
    n = len(arrival)
    none, zero = np.full(n, -1, np.int32), np.zeros(n, np.int32)
    known = arrival >= 0
    lengths = np.concatenate([np.diff(batch.indptr) for batch in batches])
    return tables.frame(
        "requests",
        {
            "engine_index": np.zeros(n, np.int16),
            "request": np.arange(n, dtype=np.int32),
            "request_id": request_ids,
            "arrival_ns": arrival,
            "arrival_s": np.where(known, arrival / 1e9, np.nan),
            "arrival_step": zero,
            "prompt_tokens": _joined(batches, "prompt_tokens"),
            "output_tokens": output,
            "max_tokens": output,
            "priority": zero,
            "tenant": np.zeros(n, np.uint64),
            "no_cache_read": np.zeros(n, np.bool_),
            "cached_tokens": none,
            "preemptions": zero,
            "first_step": none,
            "last_step": none,
            "finish_step": none,
            "finish_empty_calls": none,
            "finish_ns": np.full(n, -1, np.int64),
            "finish_reason": np.full(n, -1, np.int8),
            "chain_granules": lengths.astype(np.int32),
        },
    )


def numbered(ids: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """int32: ``ids`` numbered in order of first use, and uint64: the distinct ones in that order."""
    most = int(ids.max(initial=0))
    if most < SPARSE * len(ids) + 1024:
        numbers = np.full(most + 1, -1, np.int32)
    else:
        _, inverse = np.unique(ids, return_inverse=True)
        ranks = inverse.astype(np.uint64).reshape(-1)
        values, order = numbered(ranks)
        first = np.empty(len(order), np.uint64)
        first[values] = ids
        return values, first
    values, unique = np.empty(len(ids), np.int32), np.empty(min(len(ids), len(numbers)), np.uint64)
    found = _number(ids, numbers, values, unique)
    return values, unique[:found].copy()


@njit
def _number(ids, numbers, values, unique):
    """``numbers`` int32, -1: the number of each id, given as it comes. Returns how many there are."""
    found = np.int32(0)
    for i in range(len(ids)):
        key = np.intp(ids[i])
        number = numbers[key]
        if number < 0:
            number = found
            numbers[key] = number
            unique[number] = ids[i]
            found += 1
        values[i] = number
    return found
