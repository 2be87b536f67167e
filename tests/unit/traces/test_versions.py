"""Old logs read for ever, newer minor versions as far as they are known, newer major ones not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import generate
import pytest
from compare import TABLES, assert_same, rows
from make_golden import SHA256

from kvtrace_traces import KvtraceError, docs, open_trace, wire
from kvtrace_traces.schema import EXT_OPS, OPS

HERE = Path(__file__).parent


def test_the_first_log_of_version_1_reads_as_on_its_first_day() -> None:
    assert hashlib.sha256((HERE / "golden-v1.kvt").read_bytes()).hexdigest() == SHA256
    trace = open_trace(HERE / "golden-v1.kvt")
    assert trace.complete
    for table, expected in json.loads((HERE / "golden-v1.json").read_text()).items():
        found = rows(trace, table)
        assert found
        assert [{name: row[name] for name in expected[0]} for row in found] == expected  # columns may have been added


def test_codes_are_fixed() -> None:
    assert {name: op.code for name, op in OPS.items()} == {
        "KEY": 1, "OUTPUT": 2, "CHAIN": 3, "LOOKUP": 4, "HIT": 5, "ALLOC": 6, "ALLOCN": 7, "FILL1": 8, "FILL": 9,
        "FREE": 10, "PREEMPT": 11, "FINISH": 12, "BEGIN": 13, "SCHED": 14, "EXT": 15,
    }  # fmt: skip
    assert {name: op.code for name, op in EXT_OPS.items()}.items() >= {
        "TIME": 1, "REQ": 2, "OWN": 3, "RESET": 4, "EVICT": 5, "SKIP": 6, "INEXACT": 7, "ALLOCX": 8, "HITX": 9,
        "FILLX": 10, "FREEX": 11, "IDS": 12, "STORE": 13, "LOAD": 14, "LOST": 15,
        "TYPE": 16, "ABOUT": 17, "WHEN": 18, "MOVE": 19, "MOVED": 20,
    }.items()  # fmt: skip


@pytest.mark.parametrize("major", [0, 2, 3, 65535])
def test_other_major_versions_are_refused_in_one_clear_line(tmp_path: Path, major: int) -> None:
    data = bytearray((HERE / "golden-v1.kvt").read_bytes())
    data[8:10] = major.to_bytes(2, "little")
    path = tmp_path / "other.kvt"
    path.write_bytes(data)
    with pytest.raises(KvtraceError, match=f"log format {major}") as caught:
        open_trace(path)
    assert "\n" not in str(caught.value)
    assert major == 0 or "upgrade" in str(caught.value)


def test_a_newer_minor_version_reads_as_far_as_it_is_known(tmp_path: Path) -> None:
    settings = generate.Settings(seed=9, steps=40, unknown=0)
    plain, events = generate.play(settings)
    data = bytearray(wire.PREFIX.pack(wire.MAGIC, 1, 7, 0))
    seq = 0

    def put(kind: int, flags: int, body: bytes) -> None:
        nonlocal seq
        data.extend(wire.head(kind, flags, seq, body) + body)
        seq += 1

    def put_json(kind: int, content: dict[str, object]) -> None:
        text = json.dumps(content).encode()
        put(kind, 0, text + b" " * (-len(text) % 4))

    put_json(wire.HEADER, {**generate.header(settings), "log_format": "1.7", "brand_new": {"x": [1]}})
    for flags, body in plain:
        put(wire.OPS, flags | 8, body + (15 | (99 | 2 << 8) << 4).to_bytes(4, "little") + bytes(8))
        put(11, 5, b"what version 1.7 knows..")
    put_json(wire.END, {"events": events, "brand_new": 1})
    newer = tmp_path / "newer.kvt"
    newer.write_bytes(data)
    older = generate.write(settings, tmp_path / "older")[0]
    trace, expected = open_trace(newer), open_trace(older)
    assert trace.complete
    assert_same(trace, {table: rows(expected, table) for table in TABLES})


def test_the_reference_is_what_the_schema_says() -> None:
    done = subprocess.run([sys.executable, "-m", "kvtrace_traces.docs", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (docs.DOCS / "format.md").read_text()
    for name in (*OPS, *EXT_OPS):
        assert text.count(f"`{name}`") >= 1, name
