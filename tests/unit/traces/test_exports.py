"""What goes out comes in again the same; and means to other programs what it means here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importing import column, imported, requests_of

from kvtrace_traces import KvtraceError, UsageError, exporters, importers, open_trace
from kvtrace_traces.files import refuse_input
from kvtrace_traces.importers.batches import MAX_ID

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "traces/samples/thrash.kvt"
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
IDS = st.one_of(st.integers(0, 5), st.integers(0, MAX_ID))
MOONCAKE = st.lists(
    st.fixed_dictionaries(
        {"input_length": st.integers(0, 5000), "output_length": st.integers(0, (1 << 31) - 1),
         "hash_ids": st.lists(IDS, max_size=6)},
        optional={
            "timestamp": st.one_of(
                st.integers(0, 9_000_000_000_000), st.decimals(0, 10**9, allow_nan=False, places=6).map(str)
            ),
            "request_id": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        },
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def jsonl(rows: list[dict[str, Any]]) -> str:
    """Lines of JSON; a timestamp that is a text stands as the number it says."""
    lines = []
    for row in rows:
        stamp = row.get("timestamp")
        rest = json.dumps({key: value for key, value in row.items() if key != "timestamp"})
        lines.append(f'{{"timestamp": {stamp}, {rest[1:]}\n' if stamp is not None else rest + "\n")
    return "".join(lines)


def exported(format: str, trace: Any, folder: Path) -> Path:
    out = folder / "out.file"
    exporters.run(format, trace, out, force=True)
    return out


@QUICK
@given(MOONCAKE, st.sampled_from([None, 16, 512]))
def test_mooncake_there_and_back(tmp_path: Path, rows: list[dict[str, Any]], block_size: int | None) -> None:
    first = imported("mooncake", jsonl(rows), tmp_path, block_size=block_size)
    expected, size = requests_of(first), first.header["block_size"]
    assert [row[3] for row in expected] == [row["hash_ids"] for row in rows]
    again = imported("mooncake", exported("mooncake", first, tmp_path).read_bytes(), tmp_path)
    assert requests_of(again) == expected
    assert again.header["block_size"] == size


@QUICK
@given(MOONCAKE)
def test_csv_there_and_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    first = imported("mooncake", jsonl(rows), tmp_path)
    expected = [row[:4] for row in requests_of(first)]
    again = imported("csv", exported("csv", first, tmp_path).read_bytes(), tmp_path, block_size=512)
    assert [row[:4] for row in requests_of(again)] == expected
    twice = exported("csv", again, tmp_path).read_bytes()
    assert twice == exported("csv", open_trace(tmp_path / "data.kvt"), tmp_path).read_bytes()


def with_next(pairs: list[tuple[int, int]]) -> bytes:
    """Records of oracleGeneral for (time, id), the slow way."""
    ids = [identity for _, identity in pairs]
    records = []
    for i, (time, identity) in enumerate(pairs):
        later = [j + 1 for j in range(i + 1, len(ids)) if ids[j] == identity]
        records.append(struct.pack("<IQIq", time, identity, 1, later[0] if later else -1))
    return b"".join(records)


@QUICK
@given(st.lists(st.tuples(st.integers(0, (1 << 32) - 1), IDS), min_size=1, max_size=30))
def test_oracle_general_there_and_back(tmp_path: Path, pairs: list[tuple[int, int]]) -> None:
    data = with_next(pairs)
    trace = imported("oracle-general", data, tmp_path)
    assert exported("oracle-general", trace, tmp_path).read_bytes() == data


@QUICK
@given(st.lists(st.one_of(st.integers(0, MAX_ID).map(str), st.text("abcé", min_size=1)), min_size=1, max_size=30))
def test_plain_ids_to_oracle_general(tmp_path: Path, ids: list[str]) -> None:
    trace = imported("ids", "\n".join(ids), tmp_path)
    again = imported("oracle-general", exported("oracle-general", trace, tmp_path).read_bytes(), tmp_path)
    assert [row[3] for row in requests_of(again)] == [row[3] for row in requests_of(trace)]


def test_requests_become_their_references(tmp_path: Path) -> None:
    rows = [{"timestamp": 1500, "input_length": 9, "hash_ids": [5, 6]}, {"input_length": 9, "hash_ids": []},
            {"timestamp": 2999.9, "input_length": 9, "hash_ids": [5]}]  # fmt: skip
    trace = imported("mooncake", "".join(json.dumps(row) + "\n" for row in rows), tmp_path)
    assert exported("oracle-general", trace, tmp_path).read_bytes() == with_next([(1, 5), (1, 6), (2, 5)])


def test_content_ids_go_out_as_they_came(tmp_path: Path) -> None:
    rows = [{"timestamp": 0, "input_length": 9, "hash_ids": ids} for ids in ([900, 5], [5, 900], [MAX_ID, 5])]
    trace = imported("mooncake", jsonl(rows), tmp_path)
    assert trace.raw_ids() is not None
    told = [json.loads(line) for line in exported("mooncake", trace, tmp_path).read_text().splitlines()]
    assert [row["hash_ids"] for row in told] == [row["hash_ids"] for row in rows]


def test_granules_go_out_as_blocks(tmp_path: Path) -> None:
    data = "".join(json.dumps({"prompt_token_ids": list(range(n))}) + "\n" for n in (16, 31, 40, 3))
    trace = imported("openai", data, tmp_path, granule=4)
    told = [json.loads(line) for line in exported("mooncake", trace, tmp_path).read_text().splitlines()]
    assert [len(row["hash_ids"]) for row in told] == [1, 2, 3, 0]
    assert [row["block_size"] for row in told] == [16] * 4
    assert told[0]["hash_ids"] == told[1]["hash_ids"][:1] == told[2]["hash_ids"][:1]
    assert column(trace, "prompt_tokens") == [row["input_length"] for row in told]


@pytest.mark.parametrize("format", ["mooncake", "csv"])
def test_a_recorded_trace(tmp_path: Path, format: str) -> None:
    trace = open_trace(SAMPLE)
    out = exported(format, trace, tmp_path)
    importers.run(format, out, tmp_path / "again.kvt", block_size=trace.header["block_size"])
    again = open_trace(tmp_path / "again.kvt")
    for name in ("prompt_tokens", "output_tokens", "arrival_ns"):
        assert column(again, name) == [value or 0 for value in column(trace, name)]
    size, chains = trace.header["block_size"], trace.chains()
    stride = size // trace.header["granule"]
    expected = []
    for request, prompt in trace.requests.select("request", "prompt_tokens").rows():
        chain = chains.identities[chains.indptr[request] : chains.indptr[request + 1]].tolist()
        expected.append(chain[stride - 1 :: stride][: prompt // size])
    assert [row[3] for row in requests_of(again)] == expected


def test_beladys_rule_on_what_goes_out_is_that_of_the_judge(tmp_path: Path) -> None:
    """libCacheSim reads the file, and its Belady's misses need the next accesses to be right."""
    judge = pytest.importorskip("libcachesim")
    ids = [(i * i) % 97 + (i % 5) * 13 for i in range(4000)]
    trace = imported("ids", "\n".join(map(str, ids)), tmp_path)
    out = tmp_path / "trace.oracleGeneral"
    exporters.run("oracle-general", trace, out)
    reader = judge.TraceReader(str(out), judge.TraceType.ORACLE_GENERAL_TRACE)
    assert [(request.obj_id, request.obj_size) for request in reader] == [(i, 1) for i in ids]
    for capacity in (5, 40, 90):
        cache = judge.Belady(cache_size=capacity)
        reader = judge.TraceReader(str(out), judge.TraceType.ORACLE_GENERAL_TRACE)
        misses, _ = cache.process_trace(reader)
        assert round(misses * len(ids)) == belady_misses(ids, capacity)


def belady_misses(ids: list[int], capacity: int) -> int:
    """Belady's rule, the slow way."""
    cache: set[int] = set()
    misses = 0
    following = following_uses(ids)
    due: dict[int, float] = {}
    for i, identity in enumerate(ids):
        if identity not in cache:
            misses += 1
            if len(cache) == capacity:
                cache.discard(max(cache, key=due.__getitem__))
            cache.add(identity)
        due[identity] = following(i)
    return misses


def following_uses(ids: list[int]) -> Callable[[int], float]:
    last: dict[int, float] = {}
    found = [0.0] * len(ids)
    for i in range(len(ids) - 1, -1, -1):
        found[i] = last.get(ids[i], float("inf"))
        last[ids[i]] = i
    return found.__getitem__


@pytest.mark.parametrize("format", ["mooncake", "csv", "oracle-general"])
def test_outputs_are_not_overwritten(tmp_path: Path, format: str) -> None:
    trace, out = open_trace(SAMPLE), tmp_path / "out"
    exporters.run(format, trace, out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="--force replaces it"):
        exporters.run(format, trace, out)
    assert exporters.run(format, trace, out, force=True)["bytes"] == len(before)
    assert out.read_bytes() == before
    with pytest.raises(UsageError, match="give a file name"):
        exporters.run(format, trace, tmp_path, force=True)
    with pytest.raises(KvtraceError, match="there is no folder"):
        exporters.run(format, trace, tmp_path / "no" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_oracle_general_cannot_hold(tmp_path: Path) -> None:
    late = imported("mooncake", '{"timestamp": 4294967296000, "input_length": 5, "hash_ids": [1]}', tmp_path)
    with pytest.raises(KvtraceError, match=r"beyond 2\^32 seconds"):
        exporters.run("oracle-general", late, tmp_path / "out")
    empty = imported("mooncake", '{"input_length": 5, "hash_ids": []}', tmp_path)
    with pytest.raises(KvtraceError, match="has no references"):
        exporters.run("oracle-general", empty, tmp_path / "out")


def test_unknown_formats_name_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean oracle-general"):
        exporters.run("oraclegeneral", None, "out")
    assert {"csv", "mooncake", "oracle-general", "parquet"} <= set(exporters.formats())


@pytest.mark.parametrize("format", ["mooncake", "csv", "oracle-general"])
def test_lengths_alone_are_no_references(tmp_path: Path, format: str) -> None:
    lengths = imported("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,1\n", tmp_path)
    with pytest.raises(KvtraceError, match=r"times and lengths alone \(azure\)"):
        exporters.run(format, lengths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["mooncake", "csv", "oracle-general", "parquet", "perfetto"])
def test_the_trace_itself_is_never_the_output(tmp_path: Path, format: str) -> None:
    kept = tmp_path / "kept.kvt"
    kept.write_bytes(SAMPLE.read_bytes())
    (tmp_path / "link.kvt").symlink_to(kept)
    for trace in (open_trace(kept), open_trace(tmp_path)):
        for out in (kept, tmp_path / "link.kvt"):
            with pytest.raises(UsageError, match="is what is read"):
                exporters.run(format, trace, out, force=True)
    assert kept.read_bytes() == SAMPLE.read_bytes()
    (tmp_path / "kept.1.kvt").write_text("a further segment, as far as the name goes")
    with pytest.raises(UsageError, match="is what is read"):
        refuse_input(tmp_path / "kept.1.kvt", [kept])
    refuse_input(tmp_path / "kept.1.kvt", [tmp_path / "keep.kvt", tmp_path / "kept.jsonl"])
    (tmp_path / "kept.old.kvt").write_text("no segment")
    refuse_input(tmp_path / "kept.old.kvt", [kept])


def test_what_is_imported_is_never_the_output(tmp_path: Path) -> None:
    source = tmp_path / "ids.txt"
    source.write_text("1\n2\n")
    with pytest.raises(UsageError, match="is what is read"):
        importers.run("ids", source, source, force=True)
    assert source.read_text() == "1\n2\n"
