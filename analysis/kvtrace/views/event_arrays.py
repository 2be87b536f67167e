"""Block events as arrays, a piece at a time, for the kernels of views; and the columns that kernels fill, as series."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from kvtrace_traces.play import Events
from kvtrace_traces.schema import BLOCK_EVENT_KINDS

NO_TIME = np.iinfo(np.int64).min


def pieces(trace: Any, header: dict[str, Any]) -> Iterator[Events]:
    """The block events of an engine, in order: what the log plays, or, of a trace that only has the frame, that."""
    if hasattr(trace, "pieces"):
        return iter(trace.pieces(header["engine_index"]))
    return iter([_whole(trace.block_events.filter(pl.col("engine_index") == header["engine_index"]))])


def block_count(trace: Any, header: dict[str, Any]) -> int:
    """One more than the largest number of a block that the engine's events may have."""
    told = max(1, int(header.get("num_blocks") or 0))
    if hasattr(trace, "pieces"):
        return told
    return max(told, int(trace.block_events["block"].fill_null(-1).max() or 0) + 1)


def _whole(frame: pl.DataFrame) -> Events:
    narrow = np.empty((4, frame.height), np.int32)
    for row, name in zip(narrow, ("step", "request", "block", "identity"), strict=True):
        row[:] = frame[name].fill_null(-1).to_numpy()
    kinds = frame["kind"].cast(pl.Enum(list(BLOCK_EVENT_KINDS))).to_physical()
    return Events(
        narrow, np.ascontiguousarray(frame["time_ns"].to_numpy(), np.int64),
        np.ascontiguousarray(kinds.to_numpy(), np.uint8),
        np.ascontiguousarray(frame["group"].fill_null(-1).to_numpy(), np.int16),
    )  # fmt: skip


def known(values: npt.NDArray[Any], told: npt.NDArray[np.bool_]) -> pl.Series:
    """The values, null where they are not told. They are not copied."""
    values = np.ascontiguousarray(values)
    bits = None if told.all() else pa.py_buffer(np.packbits(told, bitorder="little"))
    array = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [bits, pa.py_buffer(values)])
    made = pl.from_arrow(array)
    assert isinstance(made, pl.Series)
    return made
