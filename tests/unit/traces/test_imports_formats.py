"""What each format's records become, by hand."""

from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from importing import column, imported, requests_of

from kvtrace_traces import KvtraceError, UsageError, importers, open_trace
from kvtrace_traces.importers.batches import MAX_ID


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_mooncake(tmp_path: Path) -> None:
    trace = imported(
        "mooncake",
        jsonl(
            {"timestamp": 27, "input_length": 700, "output_length": 9, "hash_ids": [5, MAX_ID]},
            {"timestamp": 27.0000005, "input_length": 0, "output_length": 0, "hash_ids": [], "session_id": "é"},
            {"input_length": 512, "hash_ids": [5], "request_id": 7, "extra": {"nested": [1]}},
        ),
        tmp_path,
    )
    assert requests_of(trace) == [
        (27_000_000, 700, 9, [5, MAX_ID], ""),
        (27_000_000, 0, 0, [], "é"),
        (-1, 512, 0, [5], "7"),
    ]
    assert trace.header["block_size"] == trace.header["granule"] == 512
    assert trace.header["reuse_known"] is True
    assert trace.complete
    assert "turn" not in trace.requests.columns
    assert trace.raw_ids() is None


def test_block_size_of_the_file_of_the_user_and_of_a_later_line(tmp_path: Path) -> None:
    row = {"input_length": 20, "hash_ids": [1, 2], "block_size": 16}
    assert imported("mooncake", jsonl(row, row), tmp_path).header["block_size"] == 16
    assert imported("mooncake", jsonl(row, {**row, "block_size": 8}), tmp_path, block_size=4).header["block_size"] == 4
    with pytest.raises(KvtraceError, match=r"line 2: block_size is 8 where the file began with 16"):
        imported("mooncake", jsonl(row, {**row, "block_size": 8}), tmp_path)


def test_bailian(tmp_path: Path) -> None:
    row = {"timestamp": 61.114, "input_length": 521, "output_length": 132, "hash_ids": [1, 2]}
    trace = imported(
        "bailian",
        jsonl(
            {**row, "chat_id": 55, "parent_chat_id": -1, "type": "text", "turn": 1},
            {**row, "chat_id": 159, "parent_chat_id": 55, "type": "search", "turn": 2},
            {**row, "chat_id": "a", "parent_chat_id": 159, "type": None},
            {**row, "chat_id": 9, "parent_chat_id": "a", "type": "text", "turn": 4},
            {**row, "chat_id": 10, "parent_chat_id": 12345, "type": "größe", "turn": 0},
        ),
        tmp_path,
    )
    assert trace.header["block_size"] == 16
    assert column(trace, "arrival_ns") == [61_114_000_000] * 5
    assert column(trace, "type") == ["text", "search", None, "text", "größe"]
    assert column(trace, "turn") == [1, 2, None, 4, 0]
    assert column(trace, "parent") == [None, 0, 1, 2, None]


def test_parents_are_request_numbers_also_where_records_are_left_out(tmp_path: Path) -> None:
    row = {"timestamp": 1, "input_length": 5, "hash_ids": [], "type": "text"}
    data = jsonl(
        {**row, "chat_id": 1},
        {**row, "chat_id": 2, "hash_ids": [-1]},
        {**row, "chat_id": 3, "parent_chat_id": 1},
        {**row, "chat_id": 4, "parent_chat_id": 3},
    )
    trace = imported("bailian", data, tmp_path, skip_bad=True)
    assert column(trace, "parent") == [None, 0, 1]


def test_lmcache(tmp_path: Path) -> None:
    event = {
        "timestamp": 1711929600.123, "request_id": "req-abc", "model_name": "DeepSeek-V3", "chunk_size": 256,
        "seq_len": 600, "dtypes": ["float8_e4m3fn"], "shapes": [[32, 256, 128]],
    }  # fmt: skip
    long = ["0x" + "ab" * 32, "0x" + "cd" * 32]
    folder = tmp_path / "lookup_hashes"
    folder.mkdir()
    (folder / "lookup_hashes_2_000001.jsonl").write_text(jsonl({**event, "chunk_hashes": long}))
    (folder / "lookup_hashes_1_000000.jsonl").write_text(jsonl({**event, "chunk_hashes": ["0x1f", "-0x2"]}))
    (folder / "notes.txt").write_text("not a log")
    done = importers.run("lmcache", folder, tmp_path / "out.kvt")
    assert done["references"] == 4
    found = requests_of(open_trace(tmp_path / "out.kvt"))
    assert found[0] == (1711929600123000000, 600, 0, [0x1F, MAX_ID - 1], "req-abc")
    assert len({*found[0][3], *found[1][3]}) == 4
    assert done["block_size"] == 256
    assert done["odd_lengths"] == 0


def test_lmcaches_agent_traces_are_after_mooncakes_pattern(tmp_path: Path) -> None:
    row = {"timestamp": 2.5, "input_length": 40, "output_length": 3, "block_size": 16, "hash_ids": [0, 1]}
    trace = imported("lmcache", jsonl(row), tmp_path)
    assert requests_of(trace) == [(2_500_000, 40, 3, [0, 1], "")]
    assert trace.header["block_size"] == 16


def test_ragpulse_as_published(tmp_path: Path) -> None:
    parts = {"user_input": [9], "sys_prompt": [1, 2], "passages_ids": [5, 6], "history": [], "web_search": [7]}
    other = {"sys_prompt": [1, 2], "passages_ids": [6, 5], "history": [], "web_search": [], "user_input": [9]}
    data = jsonl(
        {"timestamp": "27", "input_length": 3861, "output_length": 127, "hash_ids": parts, "session_id": "s"},
        {"timestamp": "28.5", "input_length": 3000, "output_length": 127, "hash_ids": other, "session_id": "t"},
    )
    done = importers.run("ragpulse", _file(tmp_path, data), tmp_path / "out.kvt")
    assert done["content_ids"] is True
    trace = open_trace(tmp_path / "out.kvt")
    assert requests_of(trace) == [
        (27_000_000_000, 3861, 127, [1, 2, 5, 6, 7, 9], "s"),
        (28_500_000_000, 3000, 127, [1, 2, 6, 5, 9], "t"),
    ]
    chains = trace.chains()
    first, second = chains.identities[:6], chains.identities[6:]
    assert first[:2].tolist() == second[:2].tolist()
    assert not {*first[2:].tolist()} & {*second[2:].tolist()}  # the same passages behind other ones


def conversation(name: str, *starts: float, **more: Any) -> dict[str, Any]:
    requests = [
        {"t": t, "type": "s", "in": 64 * (i + 1), "out": 5, "hash_ids": list(range(1, i + 2))}
        for i, t in enumerate(starts)
    ]
    return {"id": name, "block_size": 64, "requests": requests, **more}


def test_ids_of_kv_cache_tester_are_local_to_a_conversation(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    nested = conversation("a", 0.0, 5.0)
    agent = {"t": 2.0, "type": "subagent", "agent_id": "x", "subagent_type": "Explore",
             "requests": [{"t": 2.5, "type": "n", "in": 64, "out": 1, "hash_ids": [1]},
                          {"t": 3.5, "type": "n", "in": 128, "out": 1, "hash_ids": [1, 9]}]}  # fmt: skip
    nested["requests"].insert(1, agent)
    (folder / "trace_1.json").write_text(json.dumps(nested))
    (folder / "trace_2.json").write_text(json.dumps(conversation("b", 0.0, 1.0), indent=1))
    done = importers.run("kv-cache-tester", folder, tmp_path / "out.kvt")
    trace = open_trace(tmp_path / "out.kvt")
    rows = requests_of(trace)
    assert [row[0] / 1e9 for row in rows] == [0, 0, 1, 2.5, 3.5, 5]
    assert [row[4] for row in rows] == ["a", "b", "b", "a/x", "a/x", "a"]
    a, b, b2, x, x2, a2 = (row[3] for row in rows)
    assert not {*a, *x, *x2, *a2} & {*b, *b2}
    assert x == a
    assert a2[:1] == a
    assert x2[:1] == a
    assert b2[:1] == b
    assert column(trace, "type") == ["main", "main", "main", "Explore", "Explore", "main"]
    assert column(trace, "turn") == [1, 1, 2, 1, 2, 2]
    assert column(trace, "parent") == [None, None, 1, None, 3, 0]
    assert "without a common clock" in done["notes"][0]
    assert done["block_size"] == 64


def test_kv_cache_tester_in_lines_and_with_global_ids(tmp_path: Path) -> None:
    local = imported("kv-cache-tester", jsonl(conversation("a", 0), conversation("b", 0)), tmp_path)
    assert len(local.chains().hashes) == 2
    rows = [conversation(name, 0, hash_id_scope="global") for name in "ab"]
    assert len(imported("kv-cache-tester", jsonl(*rows), tmp_path).chains().hashes) == 1
    listed = imported("kv-cache-tester", json.dumps([conversation("a", 0), conversation("b", 0)]), tmp_path)
    assert requests_of(listed) == requests_of(local)


def test_a_bad_conversation_of_kv_cache_tester_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    bad = conversation("a", 0.0, 1.0)
    bad["requests"][1]["in"] = "many"
    (folder / "good.json").write_text(json.dumps(conversation("b", 0.0)))
    (folder / "wrong.json").write_text(json.dumps(bad))
    with pytest.raises(KvtraceError, match=r"wrong\.json, line 1: requests\[1\]: in is 'many', not a number of tokens"):
        importers.run("kv-cache-tester", folder, tmp_path / "out.kvt")
    done = importers.run("kv-cache-tester", folder, tmp_path / "out.kvt", skip_bad=True)
    assert (done["requests"], done["left_out"]) == (1, 1)
    assert "wrong.json, line 1" in done["first_left_out"]


def test_azure_and_burstgpt_know_no_reuse(tmp_path: Path) -> None:
    data = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n2024-05-10 00:00:00.009930+00:00,396,109\r\n"
    )
    trace = imported("azure", data, tmp_path)
    assert requests_of(trace) == [(1700158546680590000, 374, 44, [], ""), (1715299200009930000, 396, 109, [], "")]
    assert trace.header["reuse_known"] is False
    burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    trace = imported("burstgpt", burst, tmp_path)
    assert requests_of(trace) == [(5_000_000_000, 472, 18, [], "")]
    assert column(trace, "type") == ["API log"]
    newer = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,a,1,GPT-4,1,1,2,Conversation log\n6,,1,GPT-4,1,1,2,API log\n7.5,a,1,GPT-4,1,1,2,Conversation log\n"
    )
    trace = imported("burstgpt", newer, tmp_path)
    assert column(trace, "parent") == [None, None, 0]
    assert column(trace, "arrival_ns")[2] == 7_500_000_000
    assert trace.header["reuse_known"] is False


def oracle(*records: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<IQIq", *record) for record in records)


@pytest.mark.parametrize("packed", [None, "zstd", "gzip"])
def test_oracle_general(tmp_path: Path, packed: str | None) -> None:
    data = oracle((5, MAX_ID, 100, 3), (5, 7, 200, -1), (6, MAX_ID, 100, -2), (4294967295, 0, 1, (1 << 63) - 1))
    if packed:
        data = pa.Codec(packed).compress(data, asbytes=True)
    done = importers.run("oracle-general", _file(tmp_path, data), tmp_path / "out.kvt")
    trace = open_trace(tmp_path / "out.kvt")
    assert requests_of(trace) == [
        (5_000_000_000, 1, 0, [MAX_ID], ""), (5_000_000_000, 1, 0, [7], ""), (6_000_000_000, 1, 0, [MAX_ID], ""),
        (4_294_967_295_000_000_000, 1, 0, [0], ""),
    ]  # fmt: skip
    assert column(trace, "arrival_s") == [5, 5, 6, 4294967295]
    assert done["notes"] == ["objects of 1 to 200 bytes count as a block each: sizes are left out"]


def test_oracle_general_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    times, ids = np.sort(rng.integers(0, 3000, 50_000)), rng.integers(0, 1 << 60, 50_000)
    data = oracle(*[(int(t), int(i), 1, -1) for t, i in zip(times, ids, strict=True)])
    pieces = importers.Source.pieces
    monkeypatch.setattr(importers.Source, "pieces", lambda self, file: pieces(self, file, 10_007))
    trace = imported("oracle-general", data, tmp_path)
    assert trace.complete
    assert [row[0] for row in requests_of(trace)] == [int(t) * 10**9 for t in times]
    assert [row[3] for row in requests_of(trace)] == [[int(i)] for i in ids]


def test_plain_ids(tmp_path: Path) -> None:
    trace = imported("ids", f"1\n 2 \n\nabc\n{MAX_ID}\nabc\n", tmp_path)
    ids = [row[3] for row in requests_of(trace)]
    assert [ids[0], ids[1], ids[3]] == [[1], [2], [MAX_ID]]
    assert ids[2] == ids[4]
    assert column(trace, "arrival_ns") == [-1] * 5


def test_csv(tmp_path: Path) -> None:
    data = "request,id,time_s,tokens,output_tokens\na,1,0.5,40,7\na,x,,,\nb,,1,5,\na,1,2,16,1\n"
    rows = requests_of(imported("csv", data, tmp_path, block_size=16))
    assert rows[0][:3] == (500_000_000, 40, 7)
    assert rows[0][3][0] == 1
    assert len(rows[0][3]) == 2
    assert rows[1] == (1_000_000_000, 5, 0, [], "")
    assert rows[2] == (2_000_000_000, 16, 1, [1], "")
    named = imported("csv", "ts,obj\n3,5\n1,5\n", tmp_path, columns={"id": "obj", "time_ms": "ts"})
    assert [row[::3] for row in requests_of(named)] == [(3_000_000, [5]), (1_000_000, [5])]
    bare = imported("csv", "3,5\n1,5\n", tmp_path, columns={"id": "2", "time_us": "1"})
    assert [row[::3] for row in requests_of(bare)] == [(3_000, [5]), (1_000, [5])]
    untold = imported("csv", "request,id\n0,1\n0,2\n", tmp_path, block_size=16)
    assert requests_of(untold) == [(-1, 32, 0, [1, 2], "")]


def test_requests_of_a_csv_that_span_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtrace_traces.importers.source.CHUNK_BYTES", 1)
    chunks = importers.Source.chunks
    monkeypatch.setattr(importers.Source, "chunks", lambda self, size=7: chunks(self, 7))
    rows = [(r, [10 * r + i for i in range(r % 4)]) for r in range(20)]
    data = "request,id\n" + "".join(f"{r},{i}\n" for r, ids in rows for i in ids or [""])
    assert [row[3] for row in requests_of(imported("csv", data, tmp_path))] == [ids for _, ids in rows]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a word a token."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {
        word: i for i, word in enumerate(["?", "<", "|", "im_start", "im_end", "user", "assistant", ">", *"abcdefgh"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


def chat(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_openai_chats_share_prefixes_and_leave_no_text(tmp_path: Path, words: Path) -> None:
    said = ("a b c d a b c d", "e f", "g h g h")
    data = jsonl(
        {"messages": chat(said[0]), "timestamp": 1700000000.25, "usage": {"completion_tokens": 3}, "id": "one"},
        {
            "body": {"messages": chat(*said), "created": 1700000001},
            "response": {"choices": [{"message": {"content": "a b"}}]},
        },
        {"request_json": json.dumps({"messages": chat("a b c d a b c x")}), "ts": "2023-11-14 22:13:20"},
        {"prompt": "a b c", "created_at": 1700000000250, "max_tokens": 5},
    )
    trace = imported("openai", data, tmp_path, tokenizer=str(words), granule=2)
    rows = requests_of(trace)
    assert [row[0] for row in rows] == [
        1700000000250000000,
        1700000001000000000,
        1700000000000000000,
        1700000000250000000,
    ]
    assert [row[2] for row in rows] == [3, 2, 0, 0]
    assert rows[0][4] == "one"
    assert [len(row[3]) for row in rows] == [row[1] // 2 for row in rows]
    # All of the first prompt stands before the second one's answer, the mark that asks for it included.
    common = len(rows[0][3])
    assert common > 5
    assert rows[1][3][:common] == rows[0][3]
    other = sum(a == b for a, b in zip(rows[0][3], rows[2][3], strict=False))
    assert 0 < other < common
    assert trace.header["granule"] == 2
    assert trace.header["block_size"] == 16
    content = (tmp_path / "data.kvt").read_bytes()
    assert b"a b c" not in content
    again = requests_of(imported("openai", data, tmp_path, tokenizer=str(words), granule=2))
    assert again[0][3] != rows[0][3]  # a new key


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    tokens = list(range(100))
    data = jsonl(
        {"prompt_token_ids": tokens},
        {"body": {"prompt": tokens[:50]}, "output_token_ids": [1, 2]},
        {"token_ids": [*tokens[:47], 99, 99, 99]},
        {"input_ids": []},
    )
    rows = requests_of(imported("openai", data, tmp_path))
    assert [len(row[3]) for row in rows] == [6, 3, 3, 0]
    assert rows[1][3] == rows[0][3][:3]
    assert rows[2][3][:2] == rows[0][3][:2]
    assert rows[2][3][2] != rows[0][3][2]
    assert [row[1:3] for row in rows] == [(100, 0), (50, 2), (50, 0), (0, 0)]
    coarse = imported("openai", data, tmp_path, block_size=32)
    assert coarse.header["granule"] == coarse.header["block_size"] == 32
    assert [len(row[3]) for row in requests_of(coarse)] == [3, 1, 1, 0]


def test_a_finer_granule_says_the_same_at_its_multiples(tmp_path: Path) -> None:
    rng = random.Random(5)
    prefixes = [[rng.randrange(5) for _ in range(40)] for _ in range(3)]
    prompts = [
        rng.choice(prefixes)[: rng.randrange(40)] + [rng.randrange(3) for _ in range(rng.randrange(9))]
        for _ in range(60)
    ]
    data = jsonl(*({"prompt_token_ids": prompt} for prompt in prompts))
    fine = requests_of(imported("openai", data, tmp_path, granule=1))
    for granule in (2, 4, 5):
        coarse = requests_of(imported("openai", data, tmp_path, granule=granule, block_size=20))
        names: dict[int, int] = {}
        for mine, theirs in zip(coarse, fine, strict=True):
            picked = theirs[3][granule - 1 :: granule]
            assert [names.setdefault(a, b) for a, b in zip(mine[3], picked, strict=True)] == picked
        assert len(set(names.values())) == len(names)


def test_sharegpt(tmp_path: Path, words: Path) -> None:
    said = [("human", "a b c d"), ("gpt", "e f"), ("human", "g h"), ("gpt", "a"), ("human", "b")]
    conversations = [{"id": "x", "conversations": [{"from": who, "value": text} for who, text in said]},
                     {"id": "silent", "conversations": []},
                     {"id": "y", "conversations": [{"from": "gpt", "value": "a b"}]}]  # fmt: skip
    for data in (json.dumps(conversations, indent=2), jsonl(*conversations)):
        source = _file(tmp_path, data)
        done = importers.run("sharegpt", source, tmp_path / "out.kvt", tokenizer=str(words), granule=1, force=True)
        trace = open_trace(tmp_path / "out.kvt")
        rows = requests_of(trace)
        assert [row[0] for row in rows] == [-1, -1, -1]
        assert [row[2] for row in rows] == [2, 1, 2]
        assert column(trace, "turn") == [1, 2, 1]
        assert column(trace, "parent") == [None, 0, None]
        assert rows[1][3][: len(rows[0][3])] == rows[0][3]
        assert done["notes"] == ["1 conversations have no answer, and so no request"]


def test_tiktoken_by_name(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    with pytest.raises(UsageError, match=r"tiktoken knows .*cl100k_base"):
        imported("openai", jsonl({"prompt": "a"}), tmp_path, tokenizer="tiktoken:nothing")
    try:
        encoding = tiktoken.get_encoding("cl100k_base")
    except Exception:
        with pytest.raises(KvtraceError, match="could not load cl100k_base"):
            imported("openai", jsonl({"prompt": "a"}), tmp_path, tokenizer="tiktoken:cl100k_base")
        return
    rows = requests_of(imported("openai", jsonl({"prompt": "Hello there"}), tmp_path, tokenizer="tiktoken:cl100k_base"))
    assert rows[0][1] == len(encoding.encode("Hello there"))


@pytest.mark.parametrize("missing", ["tiktoken", "tokenizers"])
def test_a_tokenizer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    named = "tiktoken:cl100k_base" if missing == "tiktoken" else str(tmp_path)
    with pytest.raises(KvtraceError, match=f"pip install {missing}"):
        imported("openai", jsonl({"prompt": "a"}), tmp_path, tokenizer=named)


def test_packed_text(tmp_path: Path) -> None:
    row = jsonl({"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [1, 2]}).encode()
    plain = requests_of(imported("mooncake", row * 3, tmp_path))
    assert requests_of(imported("mooncake", gzip.compress(row) * 3, tmp_path)) == plain
    assert requests_of(imported("mooncake", pa.Codec("zstd").compress(row * 3, asbytes=True), tmp_path)) == plain


def _file(folder: Path, data: str | bytes) -> Path:
    path = folder / "some.file"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_progress_goes_up_and_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtrace_traces.importers.source.CHUNK_BYTES", 1000)
    told: list[tuple[int, int]] = []
    source = _file(tmp_path, "123456789\n" * 2000)
    pieces = importers.Source.pieces
    monkeypatch.setattr(importers.Source, "pieces", lambda self, file, size=0: pieces(self, file, 700))
    importers.run("ids", source, tmp_path / "out.kvt", progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 5
    assert told[-1] == (20_000, 20_000)
    assert {total for _, total in told} == {20_000}


@pytest.mark.parametrize("format", ["ids", "csv", "mooncake"])
def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path, format: str) -> None:
    data = {"ids": "1\n2\n1\n", "csv": "id\n1\n2\n1\n", "mooncake": '{"input_length": 5, "hash_ids": [1]}\n'}[format]
    marked = imported(format, "\ufeff" + data, tmp_path)
    assert requests_of(marked) == requests_of(imported(format, data, tmp_path))
