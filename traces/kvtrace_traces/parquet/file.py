"""A Parquet file, written a page of each column at a time. Format: parquet.thrift and README.md of Apache Parquet's.

Whole numbers are delta-packed, enumerations are a dictionary with run lengths, all else stands as it is; pages are
compressed with Snappy, which every reader knows, where that makes them smaller. A column's smallest and largest number
are kept for each row group.

Why not a library's writer: block events are most of a trace, and pyarrow encodes a file in one thread (118 ns an event,
decoding included, where this takes 47 to 62); DuckDB's threads took 270 ns of CPU, for files 45 % larger. All that is
here is how pages of whole numbers are packed. Compression, types and every reader in the tests are Arrow's, Polars' and
DuckDB's own.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from kvtrace_traces.parquet import encode, thrift
from kvtrace_traces.parquet.thrift import BINARY, I32, I64, LIST_BINARY, LIST_I32, LIST_STRUCT, STRUCT

MAGIC = b"PAR1"
BOOLEAN, INT32, INT64, DOUBLE, BYTE_ARRAY = 0, 1, 2, 5, 6
UTF8, UINT_64, INT_8, INT_16 = 0, 14, 15, 16
OPTIONAL = 1
PLAIN, RLE, DELTA_BINARY_PACKED, RLE_DICTIONARY = 0, 3, 5, 8
UNCOMPRESSED, SNAPPY = 0, 1
DATA_PAGE, DICTIONARY_PAGE = 0, 2
WORTH = 0.95  # of its size, at most, is what a compressed page must have
_KINDS: dict[Any, tuple[int, int | None]] = {
    pl.Int8: (INT32, INT_8), pl.Int16: (INT32, INT_16), pl.Int32: (INT32, None), pl.Int64: (INT64, None),
    pl.UInt64: (INT64, UINT_64), pl.Float64: (DOUBLE, None), pl.Boolean: (BOOLEAN, None), pl.String: (BYTE_ARRAY, UTF8),
    pl.Enum: (BYTE_ARRAY, UTF8),
}  # fmt: skip


class Values(NamedTuple):
    """A page of a column. ``numbers``: one a row, of an enumeration the codes; ``present`` bool: False for a null,
    whose number counts for nothing; None: there are no nulls. Of strings, ``numbers`` are int64 bounds in ``text``, and
    only those that are present stand there."""

    numbers: NDArray[Any]
    present: NDArray[np.bool_] | None = None
    text: NDArray[np.uint8] | None = None


def of_series(series: pl.Series) -> Values:
    """The values of a Polars column."""
    present = series.is_not_null().to_numpy() if series.null_count() else None
    if series.dtype == pl.String:
        array = series.drop_nulls().rechunk().to_arrow().cast(pa.large_string())
        bounds = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
        text = array.buffers()[2]
        return Values(bounds, present, np.frombuffer(text, np.uint8) if text else np.empty(0, np.uint8))
    if isinstance(series.dtype, pl.Enum):
        series = series.to_physical()
    return Values((series if present is None else series.fill_null(strategy="zero")).to_numpy(), present)


def where_negative(numbers: NDArray[Any]) -> Values:
    """Numbers of which negative ones stand for null."""
    present = numbers >= 0
    return Values(numbers, None if present.all() else present)


class _Chunk:
    """A column of the row group under way."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.physical, _ = _KINDS[dtype.base_type()]
        self.dictionary = dtype.categories.to_list() if isinstance(dtype, pl.Enum) else None
        self.encoding = PLAIN
        if self.dictionary is not None:
            self.encoding = RLE_DICTIONARY
        elif dtype.is_signed_integer():
            self.encoding = DELTA_BINARY_PACKED
        self.codec: int | None = None
        self.pages: list[Any] = []
        self.raw = self.packed = self.rows = self.nulls = 0
        self.bounds: tuple[Any, Any] | None = None

    def add(self, values: Values, rows: int) -> None:
        """A page of so many ``rows``."""
        numbers, present = values.numbers, values.present
        if present is None:
            levels = thrift.varint(rows << 1) + b"\1"
        else:
            levels = thrift.varint((rows + 7) // 8 << 1 | 1) + np.packbits(present, bitorder="little").tobytes()
            self.nulls += rows - int(np.count_nonzero(present))
            if values.text is None:
                numbers = numbers[present]
        self.rows += rows
        body = b"".join((len(levels).to_bytes(4, "little"), levels, self._encoded(numbers, values.text)))
        kind = struct_of_data_page(rows, self.encoding)
        self._page(DATA_PAGE, body, (5, STRUCT, kind))

    def dictionary_page(self) -> tuple[Any, ...]:
        """What comes before the data pages."""
        assert self.dictionary is not None
        body = b"".join(len(t).to_bytes(4, "little") + t for t in (word.encode() for word in self.dictionary))
        kind = thrift.struct((1, I32, len(self.dictionary)), (2, I32, PLAIN))
        pages, self.pages = self.pages, []
        self._page(DICTIONARY_PAGE, body, (7, STRUCT, kind))
        first, self.pages = self.pages, pages
        return tuple(first)

    def _page(self, what: int, body: Any, kind: tuple[int, int, bytes]) -> None:
        if self.codec != UNCOMPRESSED:
            smaller = pa.compress(body, codec="snappy", asbytes=False)
            if self.codec is None:
                self.codec = SNAPPY if smaller.size < WORTH * len(body) else UNCOMPRESSED
        stored = smaller if self.codec == SNAPPY else body
        head = thrift.struct((1, I32, what), (2, I32, len(body)), (3, I32, len(stored)), kind)
        self.pages += [head, stored]
        self.raw += len(head) + len(body)
        self.packed += len(head) + len(stored)

    def _encoded(self, numbers: NDArray[Any], text: NDArray[np.uint8] | None) -> Any:
        if text is not None:
            out = np.empty(4 * (numbers.size - 1) + int(numbers[-1] - numbers[0]), np.uint8)
            return out[: encode.plain_strings(numbers, text, out)].data
        if self.dictionary is not None:
            width = max(1, (len(self.dictionary) - 1).bit_length())
            out = np.empty(encode.room(numbers.size), np.uint8)
            out[0] = width
            return out[: 1 + encode.run_lengths(numbers.astype(np.uint8, copy=False), width, out[1:])].data
        if self.physical == BOOLEAN:
            return np.packbits(numbers, bitorder="little").tobytes()
        if numbers.size and self.physical != DOUBLE:
            low, high = numbers.min(), numbers.max()
            self.bounds = (low, high) if self.bounds is None else (min(low, self.bounds[0]), max(high, self.bounds[1]))
        if self.encoding == PLAIN:
            return np.ascontiguousarray(numbers).data.cast("B") if numbers.size else b""
        bits = 64 if self.physical == INT64 else 32
        wide = np.ascontiguousarray(numbers, np.int64 if bits == 64 else np.int32)
        out = np.empty(encode.room(numbers.size), np.uint8)
        return out[: encode.delta_packed(wide, bits, out)].data


def struct_of_data_page(rows: int, encoding: int) -> bytes:
    """A DataPageHeader: levels are run lengths."""
    return thrift.struct((1, I32, rows), (2, I32, encoding), (3, I32, RLE), (4, I32, RLE))


class File:
    """A Parquet file of columns with the Polars types ``schema``; at its end, also of an error, it is closed."""

    def __init__(self, path: Path, schema: Mapping[str, Any], row_group: int) -> None:
        self.rows = 0
        self._schema = {name: dtype() if isinstance(dtype, type) else dtype for name, dtype in schema.items()}
        self._row_group = row_group
        self._groups: list[bytes] = []
        self._chunks = self._begin()
        self._file = path.open("wb")
        self._at = self._file.write(MAGIC)

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._end_group()
                footer = self._footer()
                self._file.write(footer + len(footer).to_bytes(4, "little") + MAGIC)

    def add(self, columns: Mapping[str, Values], rows: int) -> None:
        """Rows, as a page of each column: best some ten thousand. The arrays may be overwritten afterwards."""
        if not rows:
            return
        for name, chunk in self._chunks.items():
            chunk.add(columns[name], rows)
        self.rows += rows
        if next(iter(self._chunks.values())).rows >= self._row_group:
            self._end_group()

    def _begin(self) -> dict[str, _Chunk]:
        return {name: _Chunk(dtype) for name, dtype in self._schema.items()}

    def _end_group(self) -> None:
        chunks, self._chunks = self._chunks, self._begin()
        rows = next(iter(chunks.values())).rows
        if not rows:
            return
        begin = self._at
        columns = [self._write(name, chunk) for name, chunk in chunks.items()]
        raw = sum(chunk.raw for chunk in chunks.values())
        self._groups.append(
            thrift.struct(
                (1, LIST_STRUCT, columns), (2, I64, raw), (3, I64, rows), (5, I64, begin), (6, I64, self._at - begin)
            )
        )

    def _write(self, name: str, chunk: _Chunk) -> bytes:
        """Write a column of a row group, and return its ColumnChunk."""
        begin = self._at
        dictionary = chunk.dictionary_page() if chunk.dictionary is not None else ()
        data = begin + sum(len(part) for part in dictionary)
        self._file.writelines(dictionary)
        self._file.writelines(chunk.pages)
        self._at += chunk.packed
        low, high = (bound.tobytes() for bound in self._bounds(chunk)) if chunk.bounds else (None, None)
        told = thrift.struct((3, I64, chunk.nulls), (5, BINARY, high), (6, BINARY, low))
        encodings = sorted({chunk.encoding, RLE} | ({PLAIN} if dictionary else set()))
        meta = thrift.struct(
            (1, I32, chunk.physical), (2, LIST_I32, encodings), (3, LIST_BINARY, [name.encode()]),
            (4, I32, chunk.codec), (5, I64, chunk.rows), (6, I64, chunk.raw), (7, I64, chunk.packed), (9, I64, data),
            (11, I64, begin if dictionary else None), (12, STRUCT, told),
        )  # fmt: skip
        return thrift.struct((2, I64, begin), (3, STRUCT, meta))

    @staticmethod
    def _bounds(chunk: _Chunk) -> tuple[Any, Any]:
        """The smallest and largest number in the width in which they are stored."""
        assert chunk.bounds is not None
        width = np.int32 if chunk.physical == INT32 else np.uint64 if chunk.dtype == pl.UInt64 else np.int64
        return width(chunk.bounds[0]), width(chunk.bounds[1])

    def _footer(self) -> bytes:
        elements = [thrift.struct((4, BINARY, b"schema"), (5, I32, len(self._schema)))]
        for name, dtype in self._schema.items():
            physical, converted = _KINDS[dtype.base_type()]
            elements.append(
                thrift.struct((1, I32, physical), (3, I32, OPTIONAL), (4, BINARY, name.encode()), (6, I32, converted))
            )
        # Polars and Arrow find the types there that Parquet has not.
        arrow = base64.b64encode(pl.DataFrame(schema=self._schema).to_arrow().schema.serialize())
        order = thrift.struct((1, STRUCT, thrift.struct()))  # of each column: that of its type
        return thrift.struct(
            (1, I32, 2), (2, LIST_STRUCT, elements), (3, I64, self.rows), (4, LIST_STRUCT, self._groups),
            (5, LIST_STRUCT, [thrift.struct((1, BINARY, b"ARROW:schema"), (2, BINARY, arrow))]),
            (6, BINARY, b"kvtrace"), (7, LIST_STRUCT, [order] * len(self._schema)),
        )  # fmt: skip
