"""Timelines for Perfetto: well-formed by the Trace Event Format, and true to the trace."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import generate
import numpy as np
import polars as pl
import pytest
from importing import imported

import kvtrace
from kvtrace_traces import KvtraceError, UsageError, exporters, open_trace
from kvtrace_traces.exporters import perfetto
from kvtrace_traces.exporters.phases import Phase, clock, lanes, phases, spells

SAMPLES = sorted((Path(__file__).parents[3] / "traces/samples").glob("*.kvt"))
Event = dict[str, Any]
JOINED = "SELECT * FROM (SELECT * EXCLUDE (finish_reason) FROM latencies) JOIN requests USING (engine_index, request)"
PHASES = {"queue", "prefill", "decode", "preempted", "recompute"}


def exported(trace: Any, folder: Path) -> list[Event]:
    out = folder / "out.json"
    told = exporters.run("perfetto", trace, out, force=True)
    whole = json.loads(out.read_text())
    assert whole["displayTimeUnit"] == "ms"
    assert told["events"] == len(whole["traceEvents"])
    check(whole["traceEvents"])
    return list(whole["traceEvents"])


def check(events: list[Event]) -> None:
    """What the Trace Event Format asks for, of the kinds of events that are written."""
    named: set[tuple[int, int]] = set()
    processes: set[int] = set()
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    counters: dict[tuple[int, str], list[int]] = defaultdict(list)
    open_async: dict[tuple[str, str], int] = {}
    for event in events:
        kind = event["ph"]
        assert kind in "MXiCbe"
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is int
        assert event["pid"] > 0
        assert type(event["ts"]) is int
        assert event["ts"] >= 0
        assert isinstance(event.get("args", {}), dict)
        if kind != "C":
            assert type(event["tid"]) is int
        if kind == "M":
            assert event["name"] in {"process_name", "process_labels", "process_sort_index", "thread_name",
                                     "thread_sort_index"}  # fmt: skip
            if event["name"] == "thread_name":
                assert (event["pid"], event["tid"]) not in named
                named.add((event["pid"], event["tid"]))
            processes.add(event["pid"])
        elif kind == "X":
            assert type(event["dur"]) is int
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind == "i":
            assert event["s"] == "t"
        elif kind == "C":
            assert all(type(value) is int and value >= 0 for value in event["args"].values())
            assert event["args"]
            counters[event["pid"], event["name"]].append(event["ts"])
        else:
            key = event["cat"], event["id"]
            if kind == "b":
                assert key not in open_async
                open_async[key] = event["ts"]
            else:
                assert open_async.pop(key) <= event["ts"]
        if kind in "Xi":
            assert (event["pid"], event["tid"]) in named
        assert event["pid"] in processes
    assert not open_async
    for times in counters.values():
        assert times == sorted(times)
    for own in slices.values():
        nested(own)


def nested(slices: list[tuple[int, int]]) -> None:
    """On one track slices lie within each other or apart."""
    stack: list[int] = []
    for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
        while stack and stack[-1] <= begin:
            stack.pop()
        assert not stack or end <= stack[-1], f"{begin} to {end} reaches beyond {stack[-1]}"
        stack.append(end)


def by_request(events: list[Event]) -> dict[int, tuple[Event, list[Event]]]:
    """Each request's slice, and the phases that follow it in the file on its lane."""
    found: dict[int, tuple[Event, list[Event]]] = {}
    last: list[Event] = []
    for event in events:
        if event.get("cat") == "request":
            last = []
            found[event["args"]["request"]] = event, last
        elif event.get("cat") == "phase":
            last.append(event)
    return found


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_samples_against_the_views(path: Path, tmp_path: Path) -> None:
    trace = kvtrace.open(path)
    events = exported(trace.reader, tmp_path)
    told = by_request(events)
    assert sorted(told) == trace.requests["request"].to_list()
    for row in trace.sql(JOINED).iter_rows(named=True):
        whole, phases = told[row["request"]]
        assert {phase["name"] for phase in phases} <= PHASES
        assert whole["ts"] == row["arrival_ns"] // 1000
        assert whole["args"]["request_id"] == row["request_id"]
        assert whole["args"]["cached_tokens"] == row["cached_tokens"]
        assert whole["args"]["prompt_tokens"] == row["prompt_tokens"]
        at = whole["ts"]
        for phase in phases:
            assert (phase["pid"], phase["tid"], phase["ts"]) == (whole["pid"], whole["tid"], at)
            at += phase["dur"]
        assert at == whole["ts"] + whole["dur"]
        queue = sum(phase["dur"] for phase in phases if phase["name"] == "queue")
        assert queue == (row["arrival_ns"] + row["queue_ns"]) // 1000 - row["arrival_ns"] // 1000
        if row["finish_ns"] is not None:
            assert at == row["finish_ns"] // 1000
            assert whole["args"]["finish_reason"] == row["finish_reason"]
            paused = sum(phase["dur"] for phase in phases if phase["name"] == "preempted")
            assert abs(paused - row["preempted_ns"] / 1000) <= row["preemptions"] + 1
            assert [p["name"] for p in phases].count("preempted") == row["preemptions"]
        else:
            assert whole["args"]["finish_reason"] == "unfinished"
        if row["preemptions"] == 0 and row["first_token_ns"] is not None:
            first = next(phase for phase in phases if phase["name"] == "prefill")
            assert first["ts"] + first["dur"] == row["first_token_ns"] // 1000
    done = trace.sql("SELECT request, sum(tokens) AS tokens FROM step_requests GROUP BY request")
    for request, tokens in done.iter_rows():
        assert tokens == sum(phase.get("args", {}).get("tokens", 0) for phase in told[request][1])


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.stem)
def test_steps_and_counters_against_the_views(path: Path, tmp_path: Path) -> None:
    trace = kvtrace.open(path)
    events = exported(trace.reader, tmp_path)
    steps = [event for event in events if event.get("cat") == "step"]
    rows = trace.sql("SELECT * FROM steps JOIN step_phases USING (engine_index, step) ORDER BY step")
    assert [event["args"]["step"] for event in steps] == rows["step"].to_list()
    for name in ("prefill_tokens", "decode_tokens", "requests", "running", "waiting", "free_blocks"):
        assert [event["args"][name] for event in steps] == rows[name].to_list()
    for event, row in zip(steps, rows.iter_rows(named=True), strict=True):
        assert (event["ph"] == "i") == (row["end_ns"] is None)
        if row["end_ns"] is not None:
            begin = row["end_ns"] - row["duration_ns"]
            assert (event["ts"], event["dur"]) == (begin // 1000, row["end_ns"] // 1000 - begin // 1000)
    blocks = [(event["ts"], event["args"]) for event in events if event["ph"] == "C" and event["name"] == "blocks"]
    expected: list[tuple[int, Event]] = []
    for row in trace.sql("SELECT * FROM occupancy ORDER BY step").iter_rows(named=True):
        counts = {"used": row["used"], "cached idle": row["cached_idle"], "free": row["free"]}
        if not expected or expected[-1][1] != counts:
            expected.append((row["start_ns"] // 1000, counts))
    assert blocks == expected
    evicted = sum(
        event["args"]["blocks"] for event in events if event.get("cat") == "cache" and event["name"] == "evict"
    )
    assert evicted == trace.sql("SELECT count(*) FROM block_events WHERE kind = 'evict'").item()
    preempted = [event["args"]["request"] for event in events if event.get("cat") == "preemption"]
    assert preempted == trace.preemptions["request"].to_list()


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_random_logs(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 30):
        (file,) = generate.write(generate.random_settings(seed), tmp_path / f"log{seed}")
        trace = open_trace(file)
        if not trace.steps.height:
            with pytest.raises(KvtraceError, match="has no steps"):
                exporters.run("perfetto", trace, tmp_path / "no.json")
            continue
        told = by_request(exported(trace, tmp_path))
        assert sorted(told) == trace.requests["request"].to_list()
        tokens = dict(trace.step_requests.group_by("request").agg(pl.col("tokens").sum()).iter_rows())
        for request, (_, own) in told.items():
            done = sum(phase.get("args", {}).get("tokens", 0) for phase in own)
            assert done == tokens.get(request, 0), f"seed {seed}, request {request}"


def made_by_hand(spans: list[tuple[int, ...]], lost: list[tuple[int, ...]], finish_ns: int = -1) -> list[Phase]:
    """The phases of a request of 30 tokens that came at 5; step n begins at 10 n, and its output comes at 10 n + 9."""
    n = np.arange(12)
    steps = pl.DataFrame({"step": n, "start_ns": 10 * n, "end_ns": 10 * n + 9})
    columns = ["request", "first_step", "steps", "tokens", "computed_before"]
    of_spans = pl.DataFrame([(7, *span) for span in spans], schema=columns, orient="row")
    columns = ["request", "step", "time_ns", "tokens_lost"]
    of_losses = pl.DataFrame([(7, *loss) for loss in lost], schema=dict.fromkeys(columns, pl.Int64), orient="row")
    return phases(spells(np.array([7]), of_spans, of_losses), 0, clock(steps), 30, 5, finish_ns)


def test_phases_by_hand() -> None:
    """Preempted with 33 tokens computed and a 34th sampled: it recomputes until it has computed 34 again."""
    spans = [(1, 1, 20, 0), (2, 1, 10, 20), (3, 3, 1, 30), (7, 1, 20, 0), (8, 1, 11, 20), (9, 1, 3, 31), (10, 1, 1, 34)]
    assert made_by_hand(spans, [(6, 60, 33)], 109) == [
        Phase("queue", 5, 10, 0, 0), Phase("prefill", 10, 29, 30, 2), Phase("decode", 29, 60, 3, 3),
        Phase("preempted", 60, 70, 0, 0), Phase("recompute", 70, 99, 34, 3), Phase("decode", 99, 109, 1, 1),
    ]  # fmt: skip


def test_phases_of_requests_that_get_nowhere() -> None:
    assert made_by_hand([], []) == [Phase("queue", 5, 119, 0, 0)]
    assert made_by_hand([], [], 5) == [Phase("queue", 5, 5, 0, 0)]
    never = made_by_hand([(1, 1, 20, 0)], [(2, 20, 20)], 50)
    assert never == [Phase("queue", 5, 10, 0, 0), Phase("prefill", 10, 20, 20, 1), Phase("preempted", 20, 50, 0, 0)]
    twice = made_by_hand([(1, 1, 20, 0), (3, 1, 20, 0)], [(2, 20, 20), (4, 40, 20)])
    assert [phase.name for phase in twice] == ["queue", "prefill", "preempted", "recompute", "preempted"]
    assert twice[-1].end_ns == 119


def test_several_engines_share_a_clock(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for index, wall in ((0, 5_000_000_000), (1, 5_000_700_000)):
        settings = generate.random_settings(3)
        commits, events = generate.play(settings)
        header = generate.header(settings, engine_index=index, clock_wall_ns=wall)
        header["run_id"] = f"run{index}"
        end = {"time_ns": 0, "commits": len(commits), "events": events}
        generate.write_file(str(folder / f"e{index}.kvt"), header, lambda c=commits: iter(c), lambda e=end: e)
    events = exported(open_trace(folder), tmp_path)
    ones, twos = ([e for e in events if e["pid"] == pid and e["ph"] != "M"] for pid in (1, 2))
    assert len(ones) == len(twos) > 0
    assert {b["ts"] - a["ts"] for a, b in zip(ones, twos, strict=True)} <= {699, 700}
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "engine 0: toy", 2: "engine 1: toy"}


def test_a_run_without_a_clock_says_so(tmp_path: Path) -> None:
    settings = generate.random_settings(4)
    commits, events = generate.play(settings)
    end = {"time_ns": 0, "commits": len(commits), "events": events}
    header = generate.header(settings, clock="logical")
    generate.write_file(str(tmp_path / "log.kvt"), header, lambda: iter(commits), lambda: end)
    trace = open_trace(tmp_path / "log.kvt")
    made = exported(trace, tmp_path)
    labels = [event["args"]["labels"] for event in made if event["name"] == "process_labels"]
    assert labels == ["toy 1, no clock: times only order"]
    starts = dict(trace.steps.select("step", "start_ns").iter_rows())
    arrivals = dict(trace.requests.select("request", "arrival_step").iter_rows())
    for request, (whole, _) in by_request(made).items():
        if arrivals[request] in starts:
            assert whole["ts"] == starts[arrivals[request]] // 1000


def test_gzip_by_suffix(tmp_path: Path) -> None:
    trace = open_trace(SAMPLES[0])
    exporters.run("perfetto", trace, tmp_path / "a.json")
    exporters.run("perfetto", trace, tmp_path / "a.json.gz")
    packed = (tmp_path / "a.json.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.json").read_bytes()
    with pytest.raises(UsageError, match="--force replaces it"):
        exporters.run("perfetto", trace, tmp_path / "a.json")


def test_an_import_has_no_steps(tmp_path: Path) -> None:
    trace = imported("mooncake", '{"timestamp": 0, "input_length": 5, "hash_ids": [1]}\n', tmp_path)
    with pytest.raises(KvtraceError, match="has no steps, which a timeline is made of"):
        exporters.run("perfetto", trace, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_names_of_requests_are_escaped(tmp_path: Path) -> None:
    made = Made(requests=3, steps=10, many=2)
    made.requests = made.requests.with_columns(request_id=pl.Series(['a"b\\', "é\n", ""]))
    told = by_request(exported(made, tmp_path))
    assert [told[r][0]["name"] for r in range(3)] == ['a"b\\', "é\n", "request 2"]


@pytest.mark.parametrize("seed", range(20))
def test_lanes_against_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    begins = rng.integers(0, 60, 80)
    ends = begins + rng.integers(0, 15, 80)
    chosen, many = lanes(begins, ends)
    under_way = [int(((begins <= t) & (ends > t)).sum()) for t in range(80)]
    assert max(under_way) <= many <= max(under_way) + 1  # an empty interval may need a lane of its own
    for lane in range(many):
        nested(sorted(zip(begins[chosen == lane].tolist(), ends[chosen == lane].tolist(), strict=True)))
        own = sorted(zip(begins[chosen == lane], ends[chosen == lane], strict=True))
        assert all(a[1] <= b[0] for a, b in pairwise(own))


class Made:
    """A trace of any size, made at once: `many` requests run at a time, 10 steps each; all arrive at 0 if `burst`."""

    def __init__(self, requests: int, steps: int, many: int, burst: bool = False, events: int = 0) -> None:
        self.path = Path("made.kvt")
        self.header = {"source": "vllm", "engine_index": 0, "num_blocks": 1001, "block_size": 16}
        self.engines = [self.header]
        n, r = np.arange(steps), np.arange(requests)
        first = r // many * 10
        self.steps = pl.DataFrame({
            "engine_index": np.zeros(steps, np.int16), "step": n.astype(np.int32), "start_ns": n * 10_000,
            "end_ns": n * 10_000 + 9_500, "requests": np.full(steps, many, np.int32),
            "tokens": np.where(n % 10, many, 30 * many).astype(np.int32), "running": np.full(steps, many, np.int32),
            "waiting": (n % 7).astype(np.int32), "free_blocks": (n % 900).astype(np.int32),
        })  # fmt: skip
        self.requests = pl.DataFrame({
            "engine_index": np.zeros(requests, np.int16), "request": r.astype(np.int32),
            "request_id": [f"request-{i}" for i in r], "arrival_ns": np.zeros(requests, np.int64) if burst else
            first * 10_000, "arrival_step": first.astype(np.int32), "prompt_tokens": np.full(requests, 30, np.int32),
            "cached_tokens": np.zeros(requests, np.int32), "output_tokens": np.full(requests, 9, np.int32),
            "preemptions": np.zeros(requests, np.int32), "priority": np.zeros(requests, np.int32),
            "first_step": first.astype(np.int32), "finish_ns": (first + 9) * 10_000 + 9_500,
            "finish_reason": ["length"] * requests,
        })  # fmt: skip
        twice = np.repeat(r, 2)
        late = np.tile([0, 1], requests)
        self.step_spans = pl.DataFrame({
            "engine_index": np.zeros(2 * requests, np.int16), "request": twice.astype(np.int32),
            "first_step": (first[twice] + late).astype(np.int32), "steps": (1 + 8 * late).astype(np.int32),
            "tokens": np.where(late, 1, 30).astype(np.int32), "computed_before": (30 * late).astype(np.int32),
        })  # fmt: skip
        self.preemptions = pl.DataFrame(schema={
            "engine_index": pl.Int16, "step": pl.Int32, "time_ns": pl.Int64, "request": pl.Int32,
            "blocks_lost": pl.Int32, "tokens_lost": pl.Int32,
        })  # fmt: skip
        kinds = pl.Enum(["allocate", "hit", "fill", "free", "evict", "reset", "store", "load"])
        e = np.arange(events)
        self.block_events = pl.DataFrame({
            "engine_index": np.zeros(events, np.int16), "time_ns": e * 10_000 * steps // max(events, 1),
            "step": (e * steps // max(events, 1)).astype(np.int32),
            "kind": pl.Series([["evict", "allocate", "fill", "free"][i % 4] for i in range(events)], dtype=kinds),
            "block": (e // 4 % 1000).astype(np.int32), "identity": (e // 4).astype(np.int32),
        })  # fmt: skip


def test_a_burst_draws_its_queue_apart(tmp_path: Path) -> None:
    events = exported(Made(requests=3000, steps=1000, many=30, burst=True), tmp_path)
    assert len([e for e in events if e["name"] == "thread_name" and "lane" in e["args"]["name"]]) == 30
    waited = [e for e in events if e["ph"] == "b"]
    assert len(waited) == 3000 - 30  # the first thirty did not wait
    assert {e["name"] for e in waited} == {"queue"}
    assert {e["name"] for e in events if e.get("cat") == "phase"} == {"prefill", "decode"}


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_a_million_events_in_little_memory(tmp_path: Path) -> None:
    """What is held at a time is batches and some numbers a request and step, far less than the text."""
    exporters.run("perfetto", Made(requests=10, steps=20, many=5), tmp_path / "warm.json")
    made = Made(requests=200_000, steps=100_000, many=20, events=400_000)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_bytes("VmRSS")
    told = exporters.run("perfetto", made, tmp_path / "out.json")
    peak = resident_bytes("VmHWM") - before
    assert told["events"] > 1_000_000
    assert told["bytes"] > 100_000_000
    assert peak < 150_000_000, peak
    with (tmp_path / "out.json").open() as file:
        lines = 0
        for line in file:
            if lines % 100 == 1:
                assert json.loads(line.rstrip(",\n"))["ph"] in "MXiC"
            lines += 1
            if line == "]}\n":
                break
    assert (lines, file.closed) == (told["events"] + 2, True)


def test_batches_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Sink:
        def write(self, data: bytes) -> None:
            sizes.append(len(data))

    count = perfetto._write((f'{{"n":{i}}}' for i in range(50_000)), Sink(), 0)  # type: ignore[arg-type]
    assert count == 50_000
    assert max(sizes) < 100_000
