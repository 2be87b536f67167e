"""Scanners are only a quicker way: whatever stands in a file, they and the careful readers make the same of it."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import importing
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtrace_traces.importers.batches import MAX_ID
from kvtrace_traces.importers.fields import date_ns, nanoseconds
from kvtrace_traces.importers.json_lines import identity_of_hex
from kvtrace_traces.importers.parents import Parents

NUMBERS = [
    "0", "1", "7", "12345", "511", "512", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "99999999999999999999", "-1", "-0", "-5", "00", "01", "+1", "1.",
    ".5",
    "0.5", "1.0", "2586.78", "0.0000005", "0.0000015", "0.0000025", "1e3", "1E3", "1e+3", "1.5e-3", "1e400", "-1e400",
    "1e-400", "1e999999999999999999999", "9223372036854.775807", "9223372036854.775808", "9223372036.854775807",
    "123456789012345678.5", "1234567890123456789.5", "0.1234567890123456789", "NaN", "Infinity", "-Infinity",
    "1_000", "0x1f", "1e", "1e-", "--1", "5 ", "\\t5",
]  # fmt: skip
OTHERS = [
    "true", "false", "null", "tru", "nul", '""', '"text"', '"tab\\tbed"', '"caf\\u00e9"', '"café"', '"\\ud800"',
    '"open',
    '"new\nline"', '"q\\"uote"', "[]", "[1]", "[1,2", "[ 1 , 2 ]", "[1 2]", "[,]", "[1,]", "[true]", '["a"]',
    "[[1]]", "{}",
    '{"a":1}', '{"sys_prompt":[1],"user_input":[2]}', "", "\x7f", "\x00", '"\x1f"',
]  # fmt: skip
LISTS = ["[]", "[1]", "[1,2,3]", "[1, 2, 3]", "[0,18446744073709551615]", "[18446744073709551616]", "[-1]", "[1.0]",
         "[1e2]", "[true]", "[null]", "[ 4,5 ]", "[4 ,5]", "[4,\t5]", "[04]", "[1,,2]", "[1,2", "[7,7,7]",
         '["0x1f"]', '["0xAb", "0x0"]', '["-0x5"]', f'["0x{"f" * 64}", "0x{"e" * 40}"]', '["0x"]', '["1f"]', '["0xg"]',
         f'["0x{"1" * 16}"]', f'["0x{"1" * 17}"]', f'["-0x{"1" * 17}"]', "[1, \"0x2\"]"]  # fmt: skip
FIELDS = {
    "mooncake": ("timestamp", "input_length", "output_length", "hash_ids", "block_size", "request_id", "session_id"),
    "ragpulse": ("timestamp", "input_length", "output_length", "hash_ids", "block_size", "request_id", "session_id"),
    "bailian": ("timestamp", "input_length", "output_length", "hash_ids", "chat_id", "parent_chat_id", "turn", "type"),
    "lmcache": ("timestamp", "seq_len", "chunk_hashes", "chunk_size", "request_id"),
}
LISTED = {"hash_ids", "chunk_hashes"}


def plain_line(rng: random.Random, format: str) -> str:
    """A record that is right, mostly written plainly."""
    row: dict[str, Any] = {}
    for field in FIELDS[format]:
        if field in LISTED:
            ids = [rng.randrange(50) for _ in range(rng.randrange(4))]
            row[field] = [hex(i) for i in ids] if format == "lmcache" else ids
        elif field in ("request_id", "session_id", "type"):
            row[field] = rng.choice(["a", "bc", "text", "é", ""])
        elif field == "timestamp":
            row[field] = rng.choice([0, 5, 2586.78, 1e-7])
        elif field not in ("block_size", "chunk_size"):
            row[field] = rng.randrange(1000)
    keys = [key for key in row if rng.random() < 0.9 or key in LISTED]
    rng.shuffle(keys)
    return json.dumps({key: row[key] for key in keys}, ensure_ascii=rng.random() < 0.5)


def value_for(rng: random.Random, name: str) -> str:
    """Any value, most often of the kind that belongs there."""
    return rng.choice(LISTS if name in LISTED and rng.random() < 0.8 else NUMBERS if rng.random() < 0.7 else OTHERS)


def written(rng: random.Random, parts: list[tuple[str, str]]) -> str:
    """Names and values as an object, spaced somehow."""
    spaced = [
        f'{rng.choice(["", " "])}"{name}"{rng.choice(["", " "])}:{rng.choice(["", " "])}{value}'
        for name, value in parts
    ]
    return "{" + rng.choice([",", ", ", " ,"]).join(spaced) + "}"


def one_odd_line(rng: random.Random, format: str) -> str:
    """A record that is right, but for one field that may be anything or stand there twice."""
    parts = [(name, json.dumps(value)) for name, value in json.loads(plain_line(rng, format)).items()]
    at = rng.randrange(len(parts) + 1)
    name = rng.choice([*FIELDS[format], "other", "hash\\u005fids"]) if at == len(parts) else parts[at][0]
    twice = at == len(parts) or rng.random() < 0.2
    parts[at : at if twice else at + 1] = [(name, value_for(rng, name))]
    return written(rng, parts)


def odd_line(rng: random.Random, format: str) -> str:
    """A line that may be anything."""
    names = [rng.choice([*FIELDS[format], "other", "é"]) for _ in range(rng.randrange(1, 8))]
    line = written(rng, [(name, value_for(rng, name)) for name in names])
    if rng.random() < 0.1:
        at = rng.randrange(len(line))
        line = line[:at] + rng.choice(["", ",", "}", "{", "[", '"', " ", "\t"]) + line[at + rng.randrange(2) :]
    return rng.choice(["", "", "", " ", "\t", "\ufeff"]) + line + rng.choice(["", "", "", " ", "\r", "x", "{}"])


def document(rng: random.Random, format: str) -> bytes:
    """Lines of all kinds."""
    lines = []
    for _ in range(rng.randrange(1, 60)):
        kind = rng.random()
        if kind < 0.2:
            lines.append(plain_line(rng, format).encode())
        elif kind < 0.7:
            lines.append(one_odd_line(rng, format).encode("utf-8", "surrogatepass"))
        elif kind < 0.95:
            lines.append(odd_line(rng, format).encode("utf-8", "surrogatepass"))
        else:
            lines.append(rng.choice([b"", b" \t\r", b"\x0c", b"\xff\xfe", b"[1]", b"null", b"5", b"\x00"]))
    return b"\n".join(lines) + rng.choice([b"", b"\n", b"\n\n"])


@pytest.mark.parametrize("format", FIELDS)
def test_json_lines(tmp_path: Path, format: str) -> None:
    plain = 0
    for seed in range(400):
        rng = random.Random(f"{format}{seed}")
        data = document(rng, format)
        options = {"block_size": 16} if rng.random() < 0.5 else {}
        expected = importing.read(format, data, tmp_path, careful=True, **options)
        got = importing.read(format, data, tmp_path, chunk=rng.choice([0, 0, 64, 300]), **options)
        assert got == expected, (seed, data)
        plain += sum(row[0] != "bad" for row in got)
    assert plain > 3000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes(tmp_path: Path, lines: list[bytes]) -> None:
    data = b"\n" + b"\n".join(lines)  # at its very beginning, two bytes mean gzip
    for format in ("mooncake", "bailian", "ids"):
        assert importing.read(format, data, tmp_path) == importing.read(format, data, tmp_path, careful=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"hash_ids": st.lists(st.one_of(st.integers(-3, 3), st.integers(0, MAX_ID + 2)), max_size=5)},
            optional={
                "timestamp": st.one_of(st.integers(-2, 10**13), st.floats(), st.booleans(), st.none()),
                "input_length": st.one_of(st.integers(-1, 1 << 33), st.floats(), st.booleans()),
                "output_length": st.integers(-1, 1 << 32),
                "request_id": st.one_of(st.text(max_size=5), st.integers()),
                "more": st.recursive(st.none() | st.text(max_size=3), st.lists, max_leaves=4),
            },
        ),
        max_size=5,
    )
)
def test_json_of_any_shape(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode() or b"\n"
    assert importing.read("mooncake", data, tmp_path) == importing.read("mooncake", data, tmp_path, careful=True)


CELLS = [*NUMBERS, "", " ", "abc", '"quoted"', '"a,b"', '"a""b"', '"open', "é", "2023-11-16 18:15:46.6805900",
         "2023-11-16 18:15:46", "2023-11-16T18:15:46Z", "2023-11-16 18:15:46.1+02:00", "2023-02-29 00:00:00",
         "2024-02-29 23:59:59.999999999", "1969-12-31 00:00:00", "2262-04-12 00:00:00", "2023-13-01 00:00:00", "007",
         "2000-02-29 01:02:03.5", "2100-03-01 00:00:00", "1999-12-31 23:59:60", "12 ", "\xb2"]  # fmt: skip


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("burstgpt", "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"),
        ("csv", "request,id,time_s,tokens,output_tokens"),
        ("csv", "id"),
        ("csv", "time_ms,other,id"),
    ],
)
def test_csv_lines(tmp_path: Path, format: str, names: str) -> None:
    width = names.count(",") + 1
    likely = ["5", "6", "17", "2023-11-16 18:15:46.6805900", "abc"]
    for seed in range(300):
        rng = random.Random(f"{format}{names}{seed}")
        lines = [rng.choice(["", "\n", "  \n"]) + names]
        for _ in range(rng.randrange(1, 9)):
            cells = [rng.choice(likely if rng.random() < 0.8 else CELLS) for _ in range(width)]
            if rng.random() < 0.05:
                cells.append("1")
            lines.append(rng.choice([",".join(cells), ",".join(cells), ",".join(cells), "", " "]))
        data = rng.choice(["\n", "\r\n"]).join(lines).encode() + rng.choice([b"", b"\n", b"\xff\n"])
        expected = importing.read(format, data, tmp_path, careful=True)
        assert importing.read(format, data, tmp_path, chunk=rng.choice([0, 50])) == expected, (seed, data)


def test_plain_ids(tmp_path: Path) -> None:
    some = ["1", "0", "18446744073709551615", "18446744073709551616", "-1", "+5", "", " ", "abc", "é", "12 ", " 12",
            "1\r", "1\r\r", "007", "9999999999999999999", "99999999999999999999", "1.5", "+", "-", "+-5", "\x0b",
            "1\x000"]  # fmt: skip
    for seed in range(1000):
        rng = random.Random(seed)
        data = "\n".join(rng.choice(some) for _ in range(rng.randrange(12))).encode() + rng.choice(
            [b"", b"\n", b"\xff"]
        )
        expected = importing.read("ids", data, tmp_path, careful=True)
        assert importing.read("ids", data, tmp_path, chunk=rng.choice([0, 5])) == expected, (seed, data)


def test_plain_files_need_no_careful_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all the above would hold of a scanner that takes nothing."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("read with care")

    monkeypatch.setattr("kvtrace_traces.importers.columns.one_by_one", refuse)
    monkeypatch.setattr("kvtrace_traces.importers.csv_file._careful", refuse)
    monkeypatch.setattr("kvtrace_traces.importers.ids._careful", refuse)
    mooncake = '{"timestamp": 1.5, "input_length": 5, "output_length": 2, "hash_ids": [1, 2], "session_id": "x"}\n'
    bailian = (
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 6.1, "input_length": 5, "type": "text", "hash_ids": [3]}'
    )
    lmcache = '{"timestamp": 1.5, "request_id": "r", "seq_len": 5, "dtypes": ["int8"], "chunk_hashes": ["0xab"]}'
    assert len(importing.read("mooncake", mooncake.encode() * 3, tmp_path)) == 3
    assert len(importing.read("bailian", bailian.encode(), tmp_path)) == 1
    assert len(importing.read("lmcache", lmcache.encode(), tmp_path)) == 1
    assert len(importing.read("ids", b"1\n2\r\n3", tmp_path)) == 3
    assert len(importing.read("csv", b"request,id,time_s\n0,1,0.5\n0,2,0.5\na,,1\n", tmp_path)) == 2
    dated = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
    assert len(importing.read("azure", dated, tmp_path)) == 1
    burst = b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    assert len(importing.read("burstgpt", burst, tmp_path)) == 1


@given(st.integers(0, MAX_ID), st.integers(0, 70))
def test_hashes_in_hexadecimal(value: int, zeros: int) -> None:
    text = f"{value:x}"
    if len(text) + zeros <= 16:
        assert identity_of_hex("0x" + "0" * zeros + text) == value
        assert identity_of_hex("-0x" + text) == (-value) % (1 << 64)
    long = f"0x{value:016x}{value:016x}"
    assert identity_of_hex(long) == identity_of_hex(long.upper().replace("X", "x"))
    assert identity_of_hex(long) != identity_of_hex(long[:-1] + ("1" if long[-1] == "0" else "0"))


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2261, 1, 1)))
def test_dates(moment: Any) -> None:
    epoch = datetime(1970, 1, 1)
    expected = round((moment - epoch) // timedelta(microseconds=1)) * 1000
    assert date_ns(str(moment), "t") == expected


def test_times_are_exact() -> None:
    assert nanoseconds(Decimal("0.0000005"), "t", 6) == 0  # half to even
    assert nanoseconds(Decimal("0.0000015"), "t", 6) == 2
    assert nanoseconds(Decimal("1711929600.123456789"), "t", 9) == 1711929600123456789
    assert nanoseconds((1 << 63) - 1, "t", 0) == (1 << 63) - 1
    with pytest.raises(ValueError, match="it must lie between 0 and 9,223,372,036 seconds"):
        nanoseconds(9223372037, "t", 9)


@pytest.mark.parametrize("spread", [1, 1 << 20, 1 << 40])
def test_ids_with_several_parents_are_seen(spread: int) -> None:
    """Against the plain dictionary, in batches, through the growth of the table and with ids that collide in it."""
    for seed in range(200):
        rng = random.Random(seed)
        slow: dict[int, int] = {}
        fast, several = Parents(), False
        pool = rng.choice([3, 200, 20_000])
        for _ in range(rng.randrange(1, 6)):
            rows: list[list[int]] = []
            for _ in range(rng.randrange(40)):
                if seed % 2:  # prefix ids: each has one parent
                    start = rng.randrange(pool) // 100 * 100
                    rows.append([spread * i for i in range(start, start + rng.randrange(100))])
                else:
                    rows.append([spread * rng.randrange(pool) for _ in range(rng.randrange(4))])
            for row in rows:
                before = -1
                for identity in row:
                    several |= slow.setdefault(identity, before) != before
                    before = identity
            indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
            fast.see(indptr, np.array([i for row in rows for i in row], np.uint64))
            assert fast.several is several, seed


def test_the_search_for_parents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtrace_traces.importers.parents.MOST_IDS", 1 << 12)
    fast = Parents()
    for first in range(0, 100_000, 10_000):
        fast.see(np.array([0, 10_000], np.int64), np.arange(first, first + 10_000, dtype=np.uint64))
    assert fast.several is None
