"""Arrays to Polars: every frame gets the columns and types that the schema declares."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvtrace_traces.schema import ENUMS, TABLES, Column

_TYPES: dict[str, Any] = {
    "i8": pl.Int8, "i16": pl.Int16, "i32": pl.Int32, "i64": pl.Int64, "u64": pl.UInt64, "f64": pl.Float64,
    "bool": pl.Boolean, "str": pl.String,
}  # fmt: skip


def dtype(column: Column) -> Any:
    """The Polars type of a column of the schema."""
    if column.dtype.startswith("enum:"):
        return pl.Enum(list(ENUMS[column.dtype[5:]]))
    return _TYPES[column.dtype]


def schema(table: str) -> dict[str, Any]:
    """Polars schema of a table: column name to type, without the columns that only some traces have."""
    return {column.name: dtype(column) for column in TABLES[table].columns if not column.optional}


def frame(table: str, columns: Mapping[str, Any]) -> pl.DataFrame:
    """A frame of ``table`` from arrays of equal length, one per column.

    Integers stand for nulls where they are negative and the schema allows nulls; an enum comes as its codes (-1 for
    null); a string column as a ready Series. A missing column that is not optional is a programming error (KeyError).
    """
    series = []
    for column in TABLES[table].columns:
        if column.optional and column.name not in columns:
            continue
        values = columns[column.name]
        series.append(_series(column, values) if not isinstance(values, pl.Series) else values.alias(column.name))
    return pl.DataFrame(series)


def _series(column: Column, values: NDArray[Any]) -> pl.Series:
    kind = dtype(column)
    if column.dtype.startswith("enum:"):
        return _enum(column, np.ascontiguousarray(values))
    made = pl.Series(column.name, np.ascontiguousarray(values))
    if column.nullable and values.dtype.kind == "i" and len(values) and int(values.min()) < 0:
        made = pl.select(pl.when(made >= 0).then(made)).to_series().alias(column.name)
    return made if made.dtype == kind else made.cast(kind)


def _enum(column: Column, codes: NDArray[Any]) -> pl.Series:
    kind = dtype(column)
    made = pl.Series(column.name, codes)
    if column.nullable and len(codes):
        made = pl.select(pl.when(made >= 0).then(made)).to_series().alias(column.name)
    made = made.cast(pl.UInt8)
    # Polars 2 reads codes through the cat namespace, Polars 1 through a cast.
    return made.cat.to(kind) if hasattr(made.cat, "to") else made.cast(kind)


def strings(name: str, starts: NDArray[np.int64], lengths: NDArray[np.int32], data: NDArray[np.uint8]) -> pl.Series:
    """A string column: value i is ``data[starts[i] : starts[i] + lengths[i]]``, back to back and in order."""
    if not lengths.any():
        return pl.repeat("", len(lengths), dtype=pl.String, eager=True).alias(name)
    import pyarrow as pa  # takes as long to import as all else here

    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if len(starts) and not np.array_equal(offsets[:-1], starts - starts[0]):
        pieces = [bytes(data[s : s + n]).decode("utf-8", "replace") for s, n in zip(starts, lengths, strict=True)]
        return pl.Series(name, pieces, dtype=pl.String)
    first = int(starts[0]) if len(starts) else 0
    body = np.ascontiguousarray(data[first : first + int(offsets[-1])])
    array = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(offsets), pa.py_buffer(body))
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:  # a damaged or foreign log: ids that are no UTF-8
        pieces = [bytes(body[a:b]).decode("utf-8", "replace") for a, b in pairwise(offsets)]
        return pl.Series(name, pieces, dtype=pl.String)
    made = pl.from_arrow(array)
    assert isinstance(made, pl.Series)
    return made.alias(name)
