"""Workloads in files: one file per engine and block size, whose arrays are mapped into memory, not read.

    8 bytes  b"KVWORKL1"
    8 bytes  little-endian length of what follows
    JSON     {"key": ..., "scalars": {...}, "arrays": {name: [dtype, items, offset]}}
    arrays   each at a multiple of 64 bytes, offsets counted from the first one, little-endian

`of_trace` keeps such a file beside the trace, named after it (`run.kvt` -> `.run.kvt.e0-b16.workload`), so that the
next replay of a large trace starts at once. It is used only where its key fits: the trace's header, the names, sizes,
times of change and last bytes (checksum included) of its files, and the code that made it. Of a trace without an end
record none is kept, for it may still be growing. A folder that cannot be written to only costs that start.
`KVTRACE_WORKLOADS=off` keeps none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvtrace_replay.workload import recorded
from kvtrace_replay.workload.model import Workload
from kvtrace_replay.workload.recorded import from_trace
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.sources import sources_hash

MAGIC = b"KVWORKL1"
ALIGNMENT = 64
LAST_BYTES = 4096  # of a trace's file: the last commits, with their checksums
# Smaller workloads are made as fast as they are found.
KEPT_FROM_REFS = 200_000
_ARRAYS = {
    "identities": "<i4",
    "indptr": "<i8",
    "prompt_blocks": "<i4",
    "hit_cap": "<i4",
    "prompt_tokens": "<i8",
    "last_tokens": "<i4",
    "schedule": "<i8",
    "raw": "<i4",
    "arrival_ns": "<i8",
    "priority": "<i4",
    "request_class": "<i4",
    "held_tokens": "<i8",
}
_opened: WeakKeyDictionary[Any, dict[tuple[int, int], Workload]] = WeakKeyDictionary()


def of_trace(trace: Any, block_size: int | None = None, engine_index: int | None = None) -> Workload:
    """`from_trace`, made once per opened trace, and kept in a file beside it where it is large.

    Arguments and errors as in `from_trace`. The arrays may be read-only maps of that file.
    """
    headers = {int(header["engine_index"]): header for header in trace.engines}
    index = next(iter(headers)) if engine_index is None else engine_index
    if index not in headers or trace.lossy:
        return from_trace(trace, block_size, engine_index)
    size = int(headers[index]["block_size"]) if block_size is None else block_size
    known = _opened.setdefault(trace, {})
    if (index, size) not in known:
        known[index, size] = _of_files(trace, headers[index], size, index)
    return known[index, size]


def _of_files(trace: Any, header: dict[str, Any], size: int, index: int) -> Workload:
    if os.environ.get("KVTRACE_WORKLOADS", "") == "off" or not trace.complete:
        return from_trace(trace, size, index)
    place = _place(Path(trace.path), index, size)
    try:
        key = _key(trace, header, size)
    except OSError:  # the trace is no file any more
        return from_trace(trace, size, index)
    with contextlib.suppress(OSError, KvtraceError):  # a damaged one is made again
        found = load(place, key)
        if found is not None:
            return found
    made = from_trace(trace, size, index)
    if made.n_refs >= KEPT_FROM_REFS:
        with contextlib.suppress(OSError):  # a folder that is read-only or full is no error
            save(made, place, key)
    return made


def _place(path: Path, index: int, size: int) -> Path:
    name = f".{path.name}.e{index}-b{size}.workload"
    return path / name if path.is_dir() else path.with_name(name)


def _key(trace: Any, header: dict[str, Any], size: int) -> str:
    made_by = sources_hash(recorded.__file__)
    mark = hashlib.sha256(json.dumps([made_by, size, header], sort_keys=True, default=str).encode())
    for file in trace.files:
        stat = file.stat()
        mark.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
        with file.open("rb") as opened:
            opened.seek(max(0, stat.st_size - LAST_BYTES))
            mark.update(opened.read())
    return mark.hexdigest()


def save(workload: Workload, path: str | Path, key: str = "") -> None:
    """Write `workload` as the file `path`, whole or not at all. Raises OSError."""
    path = Path(path)
    arrays = {name: getattr(workload, name) for name in _ARRAYS if getattr(workload, name) is not None}
    scalars = {field.name: getattr(workload, field.name) for field in fields(workload) if field.name not in _ARRAYS}
    offsets, at = {}, 0
    for name, array in arrays.items():
        offsets[name] = at
        at += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    told = {"key": key, "scalars": scalars, "arrays": {n: [_ARRAYS[n], arrays[n].size, offsets[n]] for n in arrays}}
    head = json.dumps(told).encode()
    head = head.ljust(_begin(len(head)) - 16)
    handle, part = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + len(head).to_bytes(8, "little") + head)
            for name, array in arrays.items():
                file.seek(_begin(len(head)) + offsets[name])
                array.astype(_ARRAYS[name], copy=False).tofile(file)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _begin(head_bytes: int) -> int:
    """Where the arrays begin: offsets count from there."""
    return -(-(16 + head_bytes) // ALIGNMENT) * ALIGNMENT


def load(path: str | Path, key: str | None = None) -> Workload | None:
    """The workload in `path`, its arrays mapped read-only; None where its key is not `key`.

    Raises KvtraceError where the file is no workload, OSError where it cannot be read.
    """
    path = Path(path)
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        size = int.from_bytes(start[8:], "little")
        if start[:8] != MAGIC or size > length:
            raise KvtraceError(f"{path} is no workload of this version: remove it")
        head = file.read(size)
    try:
        told = json.loads(head)
        if key is not None and told["key"] != key:
            return None
        begin, found = _begin(size), told["arrays"]
        arrays: dict[str, Any] = {
            name: _map(path, length, begin, *found[name]) if name in found else None for name in _ARRAYS
        }
        return Workload(**arrays, **told["scalars"])
    except (ValueError, KeyError, TypeError) as error:
        raise KvtraceError(f"{path} is damaged: remove it") from error


def _map(path: Path, length: int, begin: int, dtype: str, items: int, offset: int) -> npt.NDArray[Any]:
    if items == 0:
        return np.zeros(0, dtype)
    if offset < 0 or items < 0 or begin + offset + items * np.dtype(dtype).itemsize > length:
        raise ValueError("an array ends behind the file")
    # A plain array over the map: what is compiled for arrays in memory serves maps, too.
    return np.asarray(np.memmap(path, dtype, "r", begin + offset, (items,)))
