"""`kvtrace simulate` and `kvtrace.simulate`: rows, grids, files, the run as a trace, and what wrong values are told."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import kvtrace
from kvtrace import samples
from kvtrace.cli import simulate as cli
from kvtrace.simulations import simulate_trace
from kvtrace_replay.schedulers.settings import VARIABLE
from kvtrace_replay.schedulers.sweep import WHY
from kvtrace_traces import wire

DOCS = Path(__file__).resolve().parents[3] / "docs" / "simulate.md"
KEYS = [
    "engine", "num_blocks", "block_size", "requests", "steps", "preemptions", "evictions", "hit_tokens",
    "lookup_tokens", "duration_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "output_tokens_per_s", "exact",
    "why",
]  # fmt: skip


@pytest.fixture
def chat() -> Path:
    return samples.path("chat")


def rows_of(done: Any) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)
    return found


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def with_header(source: Path, place: Path, **changes: Any) -> Path:
    """A copy of a log with another header."""
    data = source.read_bytes()
    head = wire.read_commit(data, wire.PREFIX.size)
    assert isinstance(head, wire.Commit)
    body = json.dumps({**json.loads(head.body), **changes}).encode()
    body += b" " * (-len(body) % 4)
    start = wire.head(head.kind, head.flags, head.seq, body) + body
    place.write_bytes(data[: head.offset] + start + data[head.offset + wire.HEAD_BYTES + len(head.body) :])
    return place


# ---------------------------------------------------------------- rows


def test_the_own_setting_gives_what_was_recorded(kvtrace_cli: Callable[..., Any], chat: Path) -> None:
    (row,) = rows_of(kvtrace_cli("simulate", chat, "--json"))
    trace = kvtrace.open(chat)
    assert set(KEYS) <= set(row)
    assert row["steps"] == trace.steps.height
    assert row["preemptions"] == trace.preemptions.height
    assert row["evictions"] == trace.block_events.filter(pl.col("kind") == "evict").height
    assert row["hit_tokens"] == trace.lookups["tokens_hit"].sum()
    assert row["lookup_tokens"] == trace.lookups["tokens_asked"].sum()
    assert row["requests"] == trace.requests.height
    assert (row["exact"], row["why"], row["arrivals"]) == (True, None, "step")
    times = [row[name] for name in KEYS if name.endswith("_s")]
    assert all(isinstance(value, float) and value > 0 for value in times)
    (bare,) = rows_of(kvtrace_cli("simulate", chat, "--timing", "none", "--json"))
    assert {bare[name] for name in KEYS if name.endswith("_s")} == {None}
    assert {**row, **{name: None for name in row if name.endswith("_s")}, "seconds": 0} == {**bare, "seconds": 0}


def test_command_and_call_agree(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    rows = rows_of(kvtrace_cli("simulate", thrash, "--num-blocks", "0.1k,200", "--max-num-seqs", "8,32", "--json"))
    assert [(row["num_blocks"], row["max_num_seqs"]) for row in rows] == [(100, 8), (100, 32), (200, 8), (200, 32)]
    assert [row["exact"] for row in rows] == [False, False, False, True]
    assert len({(row["steps"], row["evictions"]) for row in rows}) == 4
    frame = kvtrace.simulate(thrash, num_blocks=[100, "200"], max_num_seqs=[8, 32])
    assert without_seconds(frame.to_dicts()) == without_seconds(rows)
    assert frame.schema["duration_s"] == pl.Float64


def test_the_call_takes_every_setting() -> None:
    assert set(VARIABLE) <= set(inspect.signature(kvtrace.simulate).parameters)


def test_the_command_takes_every_setting() -> None:
    names = {param.name for param in cli.command.params}
    assert set(VARIABLE) <= names
    assert {f"no_{name}" for name in ("prefix_caching", "chunked_prefill", "async_scheduling")} <= names


@pytest.mark.parametrize(
    ("cells", "ours", "theirs"),
    [
        (1, "--num-blocks=150", "--num-gpu-blocks-override=150"),
        (1, "--num-blocks 150", "--num_gpu_blocks_override 150"),
        (1, "--no-prefix-caching", "--no-enable-prefix-caching"),
        (2, "--prefix-caching --no-prefix-caching", "--enable_prefix_caching --no_enable_prefix_caching"),
        (1, "--no-chunked-prefill --max-num-batched-tokens 2048",
         "--no-enable-chunked-prefill --max_num_batched_tokens 2048"),
        (2, "--async-scheduling --no-async-scheduling", "--async_scheduling --no_async_scheduling"),
        (1, "--long-prefill-token-threshold 64", "--long_prefill_token_threshold 64"),
        (1, "--scheduling-policy priority", "--scheduling_policy priority"),
    ],
)  # fmt: skip
def test_vllms_spellings(cells: int, ours: str, theirs: str, kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    """Each setting shows in the row, and vLLM's spelling makes the same one."""
    mine = without_seconds(rows_of(kvtrace_cli("simulate", thrash, *ours.split(), "--json")))
    assert mine == without_seconds(rows_of(kvtrace_cli("simulate", thrash, *theirs.split(), "--json")))
    own = without_seconds(rows_of(kvtrace_cli("simulate", thrash, "--json")))
    assert mine != own
    assert len(mine) == cells


def test_switches_and_their_opposites() -> None:
    assert cli.chosen({"prefix_caching": True, "no_prefix_caching": True, "chunked_prefill": False,
                       "no_chunked_prefill": True, "num_blocks": None, "watermark": [0.1]}) == {
        "prefix_caching": [True, False], "chunked_prefill": [False], "watermark": [0.1],
    }  # fmt: skip


def test_a_block_size_keeps_the_bytes(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, "--block-size", "32,96", "--json")
    assert [(row["num_blocks"], row["block_size"]) for row in json.loads(done.out)] == [(200, 32), (66, 96)]
    assert "96 tokens a block with the bytes unchanged: 66 blocks" in done.err
    assert "32 tokens a block with" not in done.err
    done = kvtrace_cli("simulate", thrash, "--block-size", "64", "--num-blocks", "200", "--json")
    assert json.loads(done.out)[0]["num_blocks"] == 200
    assert "unchanged" not in done.err


def test_amounts_of_blocks(thrash: Path) -> None:
    frame = kvtrace.simulate(thrash, num_blocks=["6400tok", "16MiB"], arrivals="all")
    assert frame["num_blocks"].to_list() == [200, 1024]


def test_all_at_once(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, "--arrivals", "all", "--num-blocks", "150", "--json")
    (row,) = rows_of(done)
    assert (row["arrivals"], row["exact"]) == ("all", True)
    assert "arrivals all: all requests arrive before the first step" in done.err


# ---------------------------------------------------------------- what people see


def test_table_shows_what_varies(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, "--num-blocks", "100,200", "--max-num-seqs", "32")
    head = done.out.split("─")[0].split()
    assert head.count("blocks") == 1
    assert "seqs" not in head
    assert max(map(len, done.out.splitlines())) <= 100
    assert kvtrace_cli("simulate", thrash, "--timing", "none").out.split("─")[0].split() == [
        "token", "hit", "hit", "steps", "preemptions", "evictions", "tokens", "ratio", "exact", "seconds",
    ]  # fmt: skip
    assert {"ttft", "itl", "output"} <= set(kvtrace_cli("simulate", thrash).out.split("─")[0].split())


def test_facts(kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, "--num-blocks", "5,100,200")
    assert "the scheduler of vLLM 0.32.0, 192 requests; recorded with 200 blocks of 32 tokens: 1,245 steps" in done.err
    assert "arrivals step: requests arrive and are aborted at the recorded scheduler steps" in done.err
    assert f"1 of 2 rows is not bound to be exact, wall-clock-arrivals: {WHY['wall-clock-arrivals']}" in done.err
    assert "1 of 2 rows is exact given equal tokens" in done.err
    assert "not run: 5 blocks of 32 tokens can never serve request" in done.err
    alone = kvtrace_cli("simulate", thrash, "--num-blocks", "100").err
    assert "the row is not bound to be exact" in alone
    assert "given equal tokens" not in alone


def test_a_row_that_cannot_be_run_says_why(thrash: Path) -> None:
    lost, own = kvtrace.simulate(thrash, num_blocks=[5, 200]).to_dicts()
    assert lost["steps"] is None
    assert lost["exact"] is None
    assert "can never serve" in lost["why"]
    assert own["exact"] is True


# ---------------------------------------------------------------- files


def test_per_request(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    assert kvtrace_cli("simulate", chat, "--per-request", tmp_path / "r.parquet").code == 0
    found = pl.read_parquet(tmp_path / "r.parquet")
    assert found.columns == [
        "request", "request_id", "cached_tokens", "preemptions", "first_step", "last_step", "finish_step",
        "finish_reason", "hit_tokens", "prompt_tokens", "output_tokens",
        "arrival_s", "queue_s", "ttft_s", "itl_s", "e2e_s",
    ]  # fmt: skip
    trace = kvtrace.open(chat)
    found = found.drop("arrival_s", "queue_s", "ttft_s", "itl_s", "e2e_s")
    told = trace.requests.select(name for name in found.columns if name != "hit_tokens")
    assert found.drop("hit_tokens").equals(told.with_columns(pl.col("finish_reason").cast(pl.String)))
    hits = trace.lookups.group_by("request").agg(pl.col("tokens_hit").sum()).sort("request")
    assert found["hit_tokens"].to_list() == hits["tokens_hit"].to_list()


def test_per_step(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    assert kvtrace_cli("simulate", chat, "--per-step", tmp_path / "s.csv").code == 0
    found = pl.read_csv(tmp_path / "s.csv")
    assert found.columns == [
        "step", "requests", "tokens", "running", "waiting", "free_blocks", "preempted", "empty_calls",
        "prefill_requests", "evictions", "prefill_tokens", "used_blocks", "start_ns", "end_ns",
    ]  # fmt: skip
    assert (found["start_ns"] < found["end_ns"]).all()
    assert found["start_ns"].is_sorted()
    assert (found["used_blocks"] + found["free_blocks"] == 55).all()
    assert (found["prefill_tokens"] + found["requests"] - found["prefill_requests"] == found["tokens"]).all()
    trace = kvtrace.open(chat)
    for name in found.columns[:8]:
        assert found[name].to_list() == trace.steps[name].to_list(), name
    evicted = trace.block_events.filter(pl.col("kind") == "evict").group_by("step").len()
    told = dict(evicted.iter_rows())
    assert found["evictions"].to_list() == [told.get(step, 0) for step in found["step"]]
    prefills = trace.step_requests.join(trace.requests.select("request", "prompt_tokens"), on="request")
    some = set(prefills.filter(pl.col("computed_before") < pl.col("prompt_tokens"))["step"].to_list())
    assert some <= set(found.filter(pl.col("prefill_requests") > 0)["step"].to_list())
    # Decode is one token past the prompt; what is computed again after a preemption is prefill, too.
    decode = (pl.col("tokens") == 1) & (pl.col("computed_before") >= pl.col("prompt_tokens"))
    sums = prefills.group_by("step").agg(pl.col("tokens").filter(~decode).sum()).sort("step")
    assert found["prefill_tokens"].to_list() == sums["tokens"].to_list()


def test_files_of_a_grid_name_the_cell(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    args = ("--num-blocks", "5,60,80", "--scheduling-policy", "fcfs", "--per-step", tmp_path / "s.json")
    assert kvtrace_cli("simulate", chat, *args, "--per-request", tmp_path / "r.json").code == 0
    for name in ("s.json", "r.json"):
        rows = json.loads((tmp_path / name).read_text())
        assert next(iter(rows[0])) == "num_blocks"
        assert {row["num_blocks"] for row in rows} == {60, 80}
    steps = {row["num_blocks"]: row["step"] + 1 for row in json.loads((tmp_path / "s.json").read_text())}
    told = kvtrace.simulate(chat, num_blocks=[60, 80])
    assert steps == dict(zip(told["num_blocks"], told["steps"], strict=True))


def test_nothing_is_overwritten(kvtrace_cli: Callable[..., Any], chat: Path, tmp_path: Path) -> None:
    for option, name in (("--per-request", "r.csv"), ("--per-step", "s.csv"), ("-o", "o.kvt")):
        (tmp_path / name).write_text("mine")
        done = kvtrace_cli("simulate", chat, option, tmp_path / name)
        assert (done.code, done.out) == (2, "")
        assert "exists; --force overwrites it" in done.err
        assert (tmp_path / name).read_text() == "mine"
        assert kvtrace_cli("simulate", chat, option, tmp_path / name, "--force").code == 0
        assert (tmp_path / name).read_bytes() != b"mine"


# ---------------------------------------------------------------- the run as a trace


@pytest.mark.parametrize("sample", ["thrash", "chat"])
def test_the_run_as_a_trace(sample: str, kvtrace_cli: Callable[..., Any], tmp_path: Path) -> None:
    """At the own settings, table for table what was recorded, but for the clock and the numbers of identities."""
    out = tmp_path / "again.kvt"
    done = kvtrace_cli("simulate", samples.path(sample), "-o", out)
    assert done.code == 0
    assert f"wrote {out}" in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["again.kvt"]
    told, again = kvtrace.open(samples.path(sample)), kvtrace.open(out)
    clock = {"arrival_ns", "finish_ns", "start_ns", "end_ns", "time_ns", "identity"}
    for table in ("requests", "steps", "step_requests", "step_spans", "lookups", "preemptions", "block_events"):
        one, other = getattr(told, table), getattr(again, table)
        assert one.drop(clock, strict=False).equals(other.drop(clock, strict=False)), table
    for trace, hashes in ((told, told.chains(0).hashes), (again, again.chains(0).hashes)):
        trace.__dict__["named"] = [None if i is None else int(hashes[i]) for i in trace.block_events["identity"]]
    assert told.__dict__["named"] == again.__dict__["named"]
    assert again.header["source"] == "simulated"
    assert again.header["simulated"] == {"run_id": told.header["run_id"], "arrivals": "step", "why": []}
    assert again.complete


def test_every_command_reads_it(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    out = tmp_path / "larger.kvt"
    done = kvtrace_cli("simulate", thrash, "--num-blocks", "300", "--block-size", "64", "-o", out, "--json")
    (row,) = rows_of(done)
    assert kvtrace.open(out).header["simulated"]["why"] == ["wall-clock-arrivals"]
    info = json.loads(kvtrace_cli("info", out, "--json").out)
    assert (info["num_blocks"], info["block_size"], info["steps"]) == (300, 64, row["steps"])
    assert info["preemptions"] == row["preemptions"]
    page = kvtrace_cli("info", out)
    assert page.err == ""
    assert "simulated" in page.out
    verified = kvtrace_cli("verify", out)
    assert verified.code == 0, verified.out
    assert re.search(r"^ok +simulation ", verified.out, re.M)
    evicted = kvtrace_cli("sql", out, "SELECT count(*) AS n FROM block_events WHERE kind = 'evict'", "--csv")
    assert evicted.out == f"n\n{row['evictions']}\n"
    assert kvtrace_cli("replay", out, "--capacity", "inf").code == 0
    assert kvtrace_cli("export", "parquet", out, "-o", tmp_path / "tables").code == 0
    assert pl.read_parquet(tmp_path / "tables" / "steps.parquet").height == row["steps"]
    (again,) = rows_of(kvtrace_cli("simulate", out, "--json"))
    assert again["exact"] is True
    differ = {key for key in row if row[key] != again[key]}
    # The second run learns what steps cost from the first one's, which a sum of costs made.
    assert {key for key in differ if not key.endswith("_s")} <= {"exact", "why", "seconds"}
    assert all(again[key] == pytest.approx(row[key], rel=0.02) for key in differ if key.endswith("_s"))


@pytest.mark.parametrize("args", ["--num-blocks 100,200", "--prefix-caching --no-prefix-caching"])
def test_one_run_makes_a_trace(args: str, kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    done = kvtrace_cli("simulate", thrash, *args.split(), "-o", tmp_path / "o.kvt")
    assert (done.code, done.out) == (2, "")
    assert "-o writes one run, and these settings make 2: give one value of " in done.err
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(
    kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvtrace.simulations.write_run", burst)
    done = kvtrace_cli("simulate", thrash, "-o", tmp_path / "o.kvt", KVTRACE_DEBUG="")
    assert done.code == 1
    assert f"cannot write {tmp_path / 'o.kvt'}: No space left" in done.err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- several engines, wrong values, odd traces


def test_several_engines(kvtrace_cli: Callable[..., Any], two_engines: Path, thrash: Path, tmp_path: Path) -> None:
    frame = kvtrace.simulate(two_engines, num_blocks=[100, 200])
    assert frame["engine_index"].to_list() == [0, 0, 1, 1]
    single = kvtrace.simulate(thrash, num_blocks=[100, 200])["steps"].to_list()
    assert frame["steps"].to_list() == single * 2
    done = kvtrace_cli("simulate", two_engines, "--per-step", tmp_path / "s.parquet")
    assert done.code == 0
    assert "engine 1: the scheduler of vLLM" in done.err
    steps = pl.read_parquet(tmp_path / "s.parquet")
    assert steps.columns[0] == "engine_index"
    assert steps["engine_index"].unique().sort().to_list() == [0, 1]
    refused = kvtrace_cli("simulate", two_engines, "-o", tmp_path / "o.kvt")
    assert refused.code == 2
    assert "-o writes the run of one engine" in refused.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--num-blocks 0", "'0' for --num-blocks comes to 0 blocks"),
        ("--num-blocks 1", "--num-blocks 1 must be a whole number from 2"),
        ("--num-blocks 5", "5 blocks of 32 tokens can never serve request"),
        ("--num-blocks abc", "'abc' for --num-blocks is not a size: write blocks (1000, 10k)"),
        ("--num-blocks inf", "'inf' for --num-blocks is not a size"),
        ("--num-blocks nan", "'nan' for --num-blocks is not a size"),
        ("--num-blocks -5", "'-5' for --num-blocks is negative"),
        ("--num-blocks ,", "the list is empty"),
        ("--block-size 48", "--block-size 48 is no multiple of the trace's granule of 32 tokens: possible are 32, 64"),
        ("--block-size 0", "--block-size 0 is no multiple"),
        ("--block-size inf", "'inf' is no whole number"),
        ("--max-num-seqs 0", "--max-num-seqs 0 must be a whole number from 1"),
        ("--max-num-seqs 1.5", "'1.5' is no whole number; write 1000 or 10k"),
        ("--max-num-seqs 99999999999", "--max-num-seqs 99999999999 must be"),
        ("--max-num-batched-tokens 8", "--max-num-batched-tokens 8 is below --max-num-seqs 32"),
        ("--no-chunked-prefill", "--no-chunked-prefill needs --max-num-batched-tokens of at least the model's 2048"),
        ("--watermark 2", "--watermark 2.0 must be a share of the blocks, from 0 to below 1"),
        ("--watermark nan", "--watermark nan must be a share"),
        ("--watermark x", "is no list of numbers"),
        ("--long-prefill-token-threshold 99999", "is above the model's 2048 tokens"),
        ("--scheduling-policy x", "--scheduling-policy x is none of fcfs, priority"),
        ("--scheduling-policy fcfs,x", "--scheduling-policy x is none of fcfs, priority"),
        ("--engine sglang", "--engine sglang is none of vllm-v1"),
        ("--arrivals time --timing none", "--arrivals time needs to know what a step costs"),
        ("--arrivals now", "--arrivals now is none of step, all, time"),
        ("--timing nowhere.toml", "nowhere.toml"),
        ("--rate x2 --arrivals step", "--rate is of --arrivals time"),
        ("--rate fast", "--rate fast: write x2"),
        ("--rate 0", "--rate 0: write x2"),
        ("--rate 1e-12", "--rate 1e-12: write x2"),
        ("--rate 0.000000001", "give a higher rate"),
        ("--victim oldest", "--victim oldest is none of vllm, last, first"),
        ("--per-request r.txt", "r.txt ends in none of .csv, .parquet, .json"),
        ("-o nowhere/o.kvt", "there is no folder nowhere"),
    ],
)
def test_wrong_values(args: str, words: str, kvtrace_cli: Callable[..., Any], thrash: Path) -> None:
    done = kvtrace_cli("simulate", thrash, *args.split())
    assert (done.code, done.out) == (2, ""), done
    assert words in done.err
    assert sum(line.startswith("kvtrace: error: ") for line in done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [{"block_size": 32.5}, {"block_size": float("inf")}, {"max_num_seqs": True}, {"max_num_seqs": []},
     {"prefix_caching": "yes"}, {"watermark": "much"}, {"num_blocks": float("nan")}, {"scheduling_policy": 3}],
)  # fmt: skip
def test_wrong_values_in_a_call(given: dict[str, Any], thrash: Path) -> None:
    with pytest.raises(kvtrace.UsageError):
        kvtrace.simulate(thrash, **given)


def test_a_watermark_before_its_time(thrash: Path, tmp_path: Path) -> None:
    old = with_header(thrash, tmp_path / "old.kvt", engine_version="0.20.1")
    with pytest.raises(kvtrace.UsageError, match=r"has no watermark, it came with 0\.24"):
        kvtrace.simulate(old, watermark=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine_version": "0.8.5"}, "no rules for vLLM 0.8.5; they are known from 0.10 on"),
        ({"engine_version": "main"}, "'main' is no version of vLLM"),
        ({"inexact": ["connector"]}, "is marked inexact (connector)"),
        ({"scheduler": {}}, "does not tell its scheduler's settings"),
    ],
)
def test_traces_that_cannot_be_simulated(
    changes: dict[str, Any], words: str, kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path
) -> None:
    done = kvtrace_cli("simulate", with_header(thrash, tmp_path / "odd.kvt", **changes), KVTRACE_DEBUG="")
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert done.err.count("\n") == 1


def test_lossy_traces(kvtrace_cli: Callable[..., Any], damaged: Path) -> None:
    done = kvtrace_cli("simulate", damaged, KVTRACE_DEBUG="")
    assert (done.code, done.out) == (1, "")
    assert "is lossy (see `kvtrace info`)" in done.err
    allowed = kvtrace_cli("simulate", damaged, "--allow-lossy", "--json")
    assert allowed.code == 3
    (row,) = json.loads(allowed.out)
    assert row["exact"] is False
    assert "lossy" in row["why"].split(", ")


def test_a_killed_trace_is_named(kvtrace_cli: Callable[..., Any], thrash: Path, tmp_path: Path) -> None:
    data = thrash.read_bytes()
    offset, ends = wire.PREFIX.size, []
    while isinstance(commit := wire.read_commit(data, offset), wire.Commit):
        ends.append(offset)
        offset += wire.HEAD_BYTES + len(commit.body)
    (tmp_path / "killed.kvt").write_bytes(data[: ends[len(ends) // 2]])
    done = kvtrace_cli("simulate", tmp_path / "killed.kvt", "--json")
    (row,) = rows_of(done)
    assert row["why"] == "unfinished-requests"
    assert WHY["unfinished-requests"] in done.err


def test_progress_of_a_grid(thrash: Path) -> None:
    said: list[tuple[int, int]] = []
    trace = kvtrace.open(thrash)
    simulate_trace(trace, {"num_blocks": [100, 200, 300]}, progress=lambda *done: said.append(done))
    assert said == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------- the page


def test_the_page_names_what_keeps_it_from_being_exact() -> None:
    told = dict(re.findall(r"^\| `([a-z][a-z-]+)` \| (.+) \|$", DOCS.read_text(), re.M))
    assert told == WHY


def test_the_page_names_every_setting() -> None:
    text = DOCS.read_text()
    assert [name for name in VARIABLE if f"--{name.replace('_', '-')}" not in text] == []
    assert [alias for alias in cli.ALIASES if f"--{alias}" not in text and not alias.startswith("no-")] == []
