"""Files of our own Parquet writer are read by Arrow, Polars and DuckDB, and hold what was put in."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from kvtrace_traces.exporters import parquet
from kvtrace_traces.parquet import encode, thrift
from kvtrace_traces.parquet.file import File, Values, where_negative

WHOLE: dict[Any, tuple[int, int]] = {
    pl.Int8: (-(1 << 7), (1 << 7) - 1), pl.Int16: (-(1 << 15), (1 << 15) - 1), pl.Int32: (-(1 << 31), (1 << 31) - 1),
    pl.Int64: (-(1 << 63), (1 << 63) - 1), pl.UInt64: (0, (1 << 64) - 1),
}  # fmt: skip
TYPES = [
    *WHOLE, pl.Boolean, pl.Float64, pl.String, pl.Enum(["a", "bb", "c"]), pl.Enum(["one"]),
    pl.Enum([f"kind {i}" for i in range(9)]),
]  # fmt: skip
LENGTHS = [0, 1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 130, 257, 1000, 3000]


def random_column(rng: random.Random, dtype: Any, rows: int) -> pl.Series:
    """Alike, ascending, small, extreme or any values, some or all of them null."""
    nulls = rng.choice([0, 0, 0.1, 0.9, 1])
    low, high = WHOLE.get(dtype, (0, 0))
    style: Callable[[int], Any] = rng.choice(
        [lambda i: rng.randint(low, high), lambda i: min(high, 3 * i), lambda i: rng.choice([low, high]),
         lambda i: rng.randint(0, 100), lambda i: high]
    )  # fmt: skip
    calm, word = rng.choice([0.02, 0.9]), ""
    values: list[Any] = []
    for i in range(rows):
        if isinstance(dtype, pl.Enum):
            word = word if word and rng.random() > calm else rng.choice(dtype.categories.to_list())
        if rng.random() < nulls:
            values.append(None)
        elif dtype == pl.Boolean:
            values.append(rng.random() < 0.5)
        elif dtype == pl.Float64:
            values.append(rng.choice([0.5, -1e300, float(i)]))
        elif dtype == pl.String:
            values.append(rng.choice(["", "a", "ünïcode" * rng.randrange(3), str(i)]))
        else:
            values.append(word if isinstance(dtype, pl.Enum) else style(i))
    return pl.Series(values, dtype=dtype)


@pytest.mark.parametrize("seed", range(80))
def test_what_is_written_is_what_others_read(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    rows = LENGTHS[seed % len(LENGTHS)]
    monkeypatch.setattr(parquet, "PAGE", rng.choice([1, 3, 100, 65_536] if rows < 300 else [700, 65_536]))
    monkeypatch.setattr(parquet, "ROW_GROUP", rng.choice([1, 200, 1 << 20] if rows < 300 else [900, 1 << 20]))
    frame = pl.DataFrame({f"c{i}": random_column(rng, dtype, rows) for i, dtype in enumerate(TYPES)})
    path = tmp_path / "file.parquet"
    assert parquet.write_pieces([frame], path) == rows
    again = pl.read_parquet(path)
    assert again.schema == frame.schema
    assert_frame_equal(again, frame)
    assert_frame_equal(pl.DataFrame(pq.read_table(path)), frame, check_dtypes=False, categorical_as_str=True)
    scan = f"FROM read_parquet('{path}')"
    assert_frame_equal(
        pl.DataFrame(duckdb.connect().execute(scan).to_arrow_table()),
        frame,
        check_dtypes=False,
        categorical_as_str=True,
    )
    told = pq.ParquetFile(path).metadata
    assert sum(told.row_group(i).num_rows for i in range(told.num_row_groups)) == rows
    for i, dtype in enumerate(TYPES[: len(WHOLE)]):  # whose smallest and largest values let readers leave out groups
        column = frame[f"c{i}"]
        if column.null_count() == rows:
            continue
        for value in (column.min(), column.max()):
            many = sum(one == value for one in column)
            assert duckdb.connect().execute(f"SELECT count(*) {scan} WHERE c{i} = {value!s}").fetchall() == [(many,)]
            found = pl.scan_parquet(path).filter(pl.col(f"c{i}") == pl.lit(value, dtype)).select(pl.len()).collect()
            assert found.item() == many


def test_bounds_and_nulls_of_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    parquet.write_pieces([pl.DataFrame({"a": pl.Series([5, None, -7, 3], dtype=pl.Int32)})], path)
    told = pq.ParquetFile(path).metadata.row_group(0).column(0).statistics
    assert told is not None
    assert (told.min, told.max, told.null_count, told.num_values) == (-7, 5, 1, 3)


def test_pages_may_come_from_one_buffer(tmp_path: Path) -> None:
    buffer = np.empty(100, np.int32)
    expected: list[int | None] = []
    with File(tmp_path / "file.parquet", {"a": pl.Int32, "b": pl.Int32}, 250) as file:
        for page in range(10):
            buffer[:] = np.arange(100) * (page + 1) - 50
            file.add({"a": Values(buffer), "b": where_negative(buffer)}, 100)
            expected += buffer.tolist()
    assert file.rows == 1000
    frame = pl.read_parquet(tmp_path / "file.parquet")
    assert frame["a"].to_list() == expected
    assert frame["b"].to_list() == [None if value < 0 else value for value in expected]
    assert pq.ParquetFile(tmp_path / "file.parquet").metadata.num_row_groups == 4


def test_an_error_leaves_no_whole_file(tmp_path: Path) -> None:
    def fail() -> None:
        with File(tmp_path / "file.parquet", {"a": pl.Int32}, 10) as file:
            file.add({"a": Values(np.arange(3, dtype=np.int32))}, 3)
            file.add({}, 3)

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table(tmp_path / "file.parquet")


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_packed_numbers_need_no_more_room_than_was_made(dtype: Any) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    rng = np.random.default_rng(1)
    for many in (0, 1, 2, 129, 500):
        values = rng.choice(np.array([low, high, 0, 1], dtype), many)
        out = np.empty(encode.room(many), np.uint8)
        used = encode.delta_packed(values, np.iinfo(dtype).bits, out)
        assert used <= out.size
        assert encode.run_lengths((values & 7).astype(np.uint8), 3, out) <= out.size


def test_thrift_numbers() -> None:
    assert thrift.varint(0) == b"\0"
    assert thrift.varint(300) == b"\xac\x02"  # as the protocol's own text has it
    assert (
        thrift.struct((1, thrift.I32, -1), (3, thrift.BINARY, b"ab"), (4, thrift.I64, None)) == b"\x15\x01\x28\x02ab\0"
    )
    assert thrift.struct((1, thrift.LIST_I32, list(range(15)))) == b"\x19\xf5\x0f" + bytes(range(0, 30, 2)) + b"\0"
