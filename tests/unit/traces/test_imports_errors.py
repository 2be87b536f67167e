"""Bad input is one clear error that names the place and the reason; or, with ``skip_bad``, one of so many left out."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from importing import FORMATS, imported, requests_of

from kvtrace_traces import KvtraceError, UsageError, importers, open_trace

GOOD = {
    "mooncake": '{"timestamp": 0, "input_length": 5, "output_length": 9, "hash_ids": [1]}',
    "ragpulse": '{"timestamp": "0", "input_length": 5, "hash_ids": {"user_input": [1]}}',
    "bailian": '{"timestamp": 0, "input_length": 5, "hash_ids": [1], "chat_id": 0}',
    "lmcache": '{"timestamp": 0, "seq_len": 5, "chunk_hashes": ["0x1"]}',
    "openai": '{"prompt_token_ids": [1, 2, 3]}',
    "sharegpt": '{"conversations": [{"from": "gpt", "token_ids": [1]}]}',
    "kv-cache-tester": '{"requests": [{"t": 0, "in": 5, "hash_ids": [1]}]}',
}
WRONG = [
    ("mooncake", b"\xff\xfe", "it is not UTF-8"),
    ("mooncake", b"{", "it is not JSON"),
    ("mooncake", b"[" * 100_000, "it is not JSON"),
    ("mooncake", b"[1]", "it is not a JSON object"),
    ("mooncake", b"{}", "it has no hash_ids"),
    ("mooncake", b'{"hash_ids": 1}', "hash_ids is not a list"),
    ("mooncake", b'{"hash_ids": [-1]}', "hash_ids holds -1, which is no whole number from 0 to 2^64-1"),
    ("mooncake", b'{"hash_ids": [18446744073709551616]}', "holds 18446744073709551616, which is no whole number"),
    ("mooncake", b'{"hash_ids": [1.5]}', "hash_ids holds 1.5, which is no whole number"),
    ("mooncake", b'{"hash_ids": [true]}', "hash_ids holds True, which is no whole number"),
    ("mooncake", b'{"hash_ids": ["1"]}', "hash_ids holds '1', which is no whole number"),
    ("mooncake", b'{"hash_ids": []}', "it has no input_length"),
    ("mooncake", b'{"hash_ids": [], "input_length": -1}', "input_length is -1, not a number of tokens"),
    ("mooncake", b'{"hash_ids": [], "input_length": 2147483648}', "is 2147483648, not a number of tokens"),
    ("mooncake", b'{"hash_ids": [], "input_length": 1, "timestamp": NaN}', "is nan, not a number of"),
    ("mooncake", b'{"hash_ids": [], "input_length": 1, "timestamp": -0.5}', "is -0.5: it must lie between 0 and"),
    ("mooncake", b'{"hash_ids": [], "input_length": 1, "timestamp": 1e300}', "must lie between 0 and 9,223,372,036"),
    ("mooncake", b'{"hash_ids": [], "input_length": 1, "timestamp": "5"}', "is '5', not a number"),
    ("bailian", b'{"hash_ids": [], "input_length": 1}', "it has no chat_id"),
    ("bailian", b'{"hash_ids": [], "input_length": 1, "chat_id": [1]}', "chat_id is [1], neither a number nor a text"),
    ("bailian", b'{"hash_ids": [], "input_length": 1, "chat_id": 1, "turn": -1}', "turn is -1, not a number of a turn"),
    ("bailian", b'{"hash_ids": [], "input_length": 1, "chat_id": 1, "type": 5}', "type is 5, not a text"),
    ("ragpulse", b'{"hash_ids": {"spam": [1]}, "input_length": 1}', "hash_ids has 'spam', which is none of sys_prompt"),
    ("ragpulse", b'{"hash_ids": {"history": [-1]}, "input_length": 1}', "hash_ids.history holds -1"),
    ("ragpulse", b'{"hash_ids": {}, "input_length": 1, "timestamp": "soon"}', "is 'soon', not a number"),
    ("lmcache", b'{"seq_len": 5}', "it has no chunk_hashes"),
    ("lmcache", b'{"chunk_hashes": ["12"], "seq_len": 5}', "chunk_hashes holds '12', which is no hash in hexadecimal"),
    ("openai", b'{"model": "x"}', "it has none of messages, prompt, input or prompt_token_ids"),
    ("openai", b'{"prompt_token_ids": [1, -1]}', "prompt_token_ids holds -1, which is no token id"),
    ("openai", b'{"prompt_token_ids": [1], "created": -5}', "created is -5: it must lie between"),
    ("openai", b'{"prompt": ["a", "b"]}', "prompt holds several prompts: write a record for each"),
    ("openai", b"[1", "it is not JSON"),
    ("sharegpt", b'{"id": 1}', "it has no list of conversations"),
    ("sharegpt", b'{"conversations": [5]}', "conversations holds 5, which is no object"),
    ("kv-cache-tester", b'{"id": 1}', "it is no object with a list of requests"),
    ("kv-cache-tester", b'{"requests": [{"t": -1, "in": 5}]}', "requests[0]: t is -1: it must lie between"),
    ("kv-cache-tester", b'{"requests": [], "block_size": 7}', "block_size is 7 where the first conversation has 64"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "line", "reason"), WRONG)
def test_a_bad_record_is_named_or_left_out(tmp_path: Path, format: str, line: bytes, reason: str) -> None:
    good = GOOD[format].encode()
    data = good + b"\n\n" + line + b"\n" + good + b"\n"
    with pytest.raises(KvtraceError) as caught:
        imported(format, data, tmp_path)
    text = str(caught.value)
    assert "data.in, line 3: " in text
    assert reason in text
    assert text.endswith("(--skip-bad leaves such records out)")
    assert "\n" not in text
    assert not (tmp_path / "data.kvt").exists()
    trace = imported(format, data, tmp_path, skip_bad=True)
    assert trace.requests.height == 2
    assert trace.complete


@pytest.mark.parametrize(
    ("format", "data", "reason"),
    [
        ("csv", "request,id\n0,1\n0,-1\n", "line 3: -1 is not between 0 and 2^64-1"),
        ("csv", "request,id\n0,1\n,1\n", "line 3: its request is empty"),
        ("csv", "id\n1\n1,2\n", "line 3: it has 2 fields, not 1"),
        ("csv", "id,time_s\n1,1\n1,-2\n", "line 3: time_s is -2: it must lie between"),
        ("csv", "id,time_s\n1,1\n1,NaN\n", "line 3: time_s is NaN, not a number of seconds"),
        ("csv", 'id\n1\n"open\n', "line 3: it is no line of a CSV"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,1\n2023-02-30 00:00:00,1,1\n", "line 3: TIMESTAMP is"),
        (
            "azure",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,1\n5,-1,1\n",
            "line 3: ContextTokens is '-1', not a number",
        ),
        (
            "burstgpt",
            "Timestamp,Request tokens,Response tokens\n5,1,1\nsoon,1,1\n",
            "line 3: Timestamp is 'soon', neither",
        ),
        ("ids", "1\n1\n-5\n", "line 3: -5 is not between 0 and 2^64-1"),
        ("ids", "1\n1\na\rb\n", "line 3: a carriage return stands within it"),
    ],
)
def test_a_bad_line_of_a_table(tmp_path: Path, format: str, data: str, reason: str) -> None:
    with pytest.raises(KvtraceError, match=r"data\.in, ") as caught:
        imported(format, data, tmp_path)
    assert reason in str(caught.value)
    assert imported(format, data, tmp_path, skip_bad=True).requests.height >= 1


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_a_file_without_records(tmp_path: Path, format: str, data: bytes) -> None:
    for skip_bad in (False, True):
        with pytest.raises(KvtraceError) as caught:
            imported(format, data, tmp_path, skip_bad=skip_bad)
        assert "\n" not in str(caught.value)
        assert "data.in" in str(caught.value)
    assert not (tmp_path / "data.kvt").exists()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_what_is_no_file(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    what = (
        r"holds no (\*|lookup_hashes_\*)\.jsonl?" if FORMATS[format].folder else "is a folder: format .* takes a file"
    )
    with pytest.raises(KvtraceError, match=what):
        importers.run(format, folder, tmp_path / "out.kvt")
    with pytest.raises(KvtraceError, match="does not exist"):
        importers.run(format, tmp_path / "nothing", tmp_path / "out.kvt")
    with pytest.raises(KvtraceError, match="is not a file"):
        importers.run(format, "/dev/null", tmp_path / "out.kvt")


@pytest.mark.parametrize("format", sorted(GOOD))
def test_other_bytes_than_the_formats(tmp_path: Path, format: str) -> None:
    for data in (bytes(range(256)) * 40, b"\x00" * 1000, struct.pack("<100d", *range(100)), b"hello\nworld\n"):
        with pytest.raises(KvtraceError) as caught:
            imported(format, data, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["mooncake", "ids", "csv", "oracle-general", "openai"])
def test_packed_data_that_ends_early(tmp_path: Path, format: str) -> None:
    data = b"id\n" + b"5\n" * 100_000 if format == "csv" else (GOOD.get(format, "5") + "\n").encode() * 50_000
    for packed in (pa.Codec("zstd").compress(data, asbytes=True), gzip.compress(data)):
        with pytest.raises(KvtraceError, match="the packed data is cut short or damaged") as caught:
            imported(format, packed[:-5], tmp_path, skip_bad=True)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "data.kvt").exists()


def test_oracle_general_of_a_wrong_size_or_kind(tmp_path: Path) -> None:
    record = struct.pack("<IQIq", 0, 1, 1, -1)
    with pytest.raises(KvtraceError, match=r"no multiple of 24 bytes \(7 are left after 2 records\)"):
        imported("oracle-general", record * 2 + b"\0" * 7, tmp_path)
    with pytest.raises(KvtraceError, match="make no sense: it is not oracleGeneral"):
        imported("oracle-general", b"1,2,3,hello,world,and,so,on\n" * 24, tmp_path)


def test_a_list_that_goes_wrong_ends_there(tmp_path: Path) -> None:
    good = '{"prompt_token_ids": [1]}'
    for text, line in [(f"[{good},\n {good}", 2), (f"[{good}\n {good}]", 2), (f"[{good},]", 1), (f"[{good}] x", 1)]:
        with pytest.raises(KvtraceError, match=f"line {line}: "):
            imported("openai", text, tmp_path)
        assert imported("openai", text, tmp_path, skip_bad=True).requests.height in (1, 2)


def test_long_lists_are_read_as_a_stream(tmp_path: Path) -> None:
    rows = [{"prompt_token_ids": list(range(i % 50)), "id": "é" * (i % 300)} for i in range(6_000)]
    whole = requests_of(imported("openai", json.dumps(rows, indent=1), tmp_path, granule=1))
    lines = requests_of(imported("openai", "".join(json.dumps(row) + "\n" for row in rows), tmp_path, granule=1))
    assert [(row[1], len(row[3]), row[4]) for row in whole] == [(row[1], len(row[3]), row[4]) for row in lines]
    assert len(whole) == 6_000


@pytest.mark.parametrize(
    ("format", "options", "reason"),
    [
        ("moncake", {}, "unknown format 'moncake': did you mean mooncake"),
        ("mooncake", {"tokenizer": "x"}, "--tokenizer means nothing to format mooncake: it is for openai, sharegpt"),
        ("ids", {"columns": {"id": "1"}}, "--columns means nothing to format ids: it is for csv"),
        ("openai", {"granule": 6, "block_size": 16}, "--block-size 16 is no multiple of --granule 6"),
        ("openai", {"tokenizer": "nowhere.json"}, "--tokenizer nowhere.json: there is no such file"),
        ("mooncake", {"block_size": 1 << 25}, "it must lie between 1 and"),
        ("csv", {"columns": {"ids": "1"}}, "--columns ids=...: the columns are id, request"),
    ],
)
def test_wrong_options(tmp_path: Path, format: str, options: dict[str, Any], reason: str) -> None:
    data = "id\n1\n" if format == "csv" else GOOD.get(format, "1") + "\n"
    with pytest.raises(UsageError) as caught:
        imported(format, data, tmp_path, **options)
    assert reason in str(caught.value)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--columns id=obj: .* has columns a, b"):
        imported("csv", "a,b\n1,2\n", tmp_path, columns={"id": "obj"})
    with pytest.raises(UsageError, match=r"--columns id=3: .* has columns 1 to 2"):
        imported("csv", "1,2\n", tmp_path, columns={"id": "3"})
    with pytest.raises(KvtraceError, match="has no column id: say which it is with --columns id=NAME"):
        imported("csv", "a,b\n1,2\n", tmp_path)
    with pytest.raises(UsageError, match="has time_s and time_ms: choose one"):
        imported("csv", "id,time_s,time_ms\n1,2,3\n", tmp_path)
    with pytest.raises(KvtraceError, match="its line of names has no column TIMESTAMP"):
        imported("azure", "a,b,c\n1,2,3\n", tmp_path)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1 holds text: name its tokenizer with --tokenizer tiktoken:NAME"):
        imported("openai", '{"prompt": "hello"}', tmp_path)
    with pytest.raises(UsageError, match=r"line 1 holds text: name its tokenizer"):
        imported("sharegpt", '{"conversations": [{"from": "human", "value": "hello"}]}', tmp_path)


def test_a_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_text('{"not": "one"}')
    with pytest.raises(KvtraceError, match=r"bad\.json is no tokenizer\.json"):
        imported("openai", '{"prompt": "hello"}', tmp_path, tokenizer=str(tmp_path / "bad.json"))


def test_outputs_are_not_overwritten_and_nothing_stays_after_an_error(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "out.kvt"
    source.write_text("1\n")
    importers.run("ids", source, out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="--force replaces it"):
        importers.run("ids", source, out)
    source.write_text("1\n-1\n")
    with pytest.raises(KvtraceError, match="line 2"):
        importers.run("ids", source, out, force=True)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out.kvt"]
    with pytest.raises(KvtraceError, match="No such file or directory"):
        importers.run("mooncake", source, tmp_path / "no" / "out.kvt")


def test_one_request_and_ids_twice_in_one(tmp_path: Path) -> None:
    trace = imported("mooncake", '{"input_length": 1500, "hash_ids": [7, 7, 7]}', tmp_path)
    assert requests_of(trace) == [(-1, 1500, 0, [7, 7, 7], "")]
    assert trace.raw_ids().tolist() == [0, 0, 0]  # content ids: 7 stands behind nothing and behind 7
    assert trace.chains().identities.tolist() == [0, 1, 2]


def test_the_longest_names_and_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtrace_traces.importers.source.CHUNK_BYTES", 1 << 16)
    rows = [
        {"input_length": 5, "hash_ids": list(range(100_000)), "request_id": "x" + "é" * 5000},
        {"input_length": 5, "hash_ids": [], "request_id": "x" * 4096},
        {"input_length": 5, "hash_ids": list(range(65_536)), "request_id": "abc"},
        {"input_length": 5, "hash_ids": list(range(32_768)), "request_id": ""},
        *({"input_length": 5, "hash_ids": [i, i + 1], "request_id": str(i)} for i in range(20_000)),
    ]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    trace = imported("mooncake", data, tmp_path)
    found = requests_of(trace)
    assert trace.complete
    assert not trace.damaged_frames
    for row, (_, _, _, ids, name) in zip(rows, found, strict=True):
        assert ids == row["hash_ids"]
        assert name == str(row["request_id"]).encode()[:4096].decode(errors="ignore")


def test_what_readers_know_of_an_import(tmp_path: Path) -> None:
    imported("mooncake", GOOD["mooncake"] + '\n{"input_length": 1, "hash_ids": []}\n', tmp_path)
    trace = open_trace(tmp_path / "data.kvt", recover="strict")
    assert trace.info["source"] == "import"
    assert trace.info["requests"] == 2
