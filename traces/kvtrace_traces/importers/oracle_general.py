"""libCacheSim's ``oracleGeneral``, packed with zstd or not: records of 24 bytes, little-endian, without gaps.

    0           4            12          16                      24
    | time u32  | object u64 | size u32  | next access i64       |

``time`` is in seconds; ``next access`` is what Belady's rule needs, and is found anew here. Each record is a request of
one block: a cache of blocks has no sizes, and those in the file are left out. The layout is that of
``oracleGeneralBin.h`` of libCacheSim.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.importers import importer
from kvtrace_traces.importers.batches import Ids, Piece
from kvtrace_traces.importers.source import Source

_FARTHEST = 1 << 48
RECORD = np.dtype([("time_s", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


@importer(
    "oracle-general", "libCacheSim oracleGeneral, .zst or not: each record is a request of one block",
    granule=lambda source: source.options.block_size or 1,
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request of one block a record."""
    (file,) = source.files
    kept, least, most, records = b"", 1 << 32, 0, 0
    for piece in source.pieces(file):
        data = kept + piece if kept else piece
        whole = len(data) // RECORD.itemsize
        found = np.frombuffer(data, RECORD, whole)
        kept = data[whole * RECORD.itemsize :]
        if not whole:
            continue
        if not records:
            _check(file, found)
        records += whole
        least, most = min(least, int(found["size"].min())), max(most, int(found["size"].max()))
        yield Ids(np.ascontiguousarray(found["object"]), found["time_s"].astype(np.int64) * 1_000_000_000)
    if kept:
        raise KvtraceError(
            f"{file}: its size is no multiple of {RECORD.itemsize} bytes ({len(kept)} are left after "
            f"{records:,} records): it is cut short, or not oracleGeneral"
        )
    if most > least:
        source.notes.append(f"objects of {least:,} to {most:,} bytes count as a block each: sizes are left out")


def _check(file: Path, found: NDArray[Any]) -> None:
    """Raise where these are the bytes of another format: in no trace do next accesses lie so far ahead."""
    ahead = found["next"][:1024]
    wrong = (ahead < -2) | ((ahead > _FARTHEST) & (ahead != np.iinfo(np.int64).max))
    if wrong.any():
        raise KvtraceError(f"{file}: next accesses like {int(ahead[wrong][0])} make no sense: it is not oracleGeneral")
