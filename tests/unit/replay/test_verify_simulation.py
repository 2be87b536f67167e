"""`verify` simulates: what the scheduler's rules do not give is seen, and what cannot be promised is not claimed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.recorded import recorded
from kvtrace_replay.schedulers.settings import own_settings
from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace, wire
from simulation.cases import Case, aborted_after_empty_calls, random_case
from simulation.kernel import as_recorded, as_settings

SAMPLES = Path(__file__).resolve().parents[3] / "traces" / "samples"
SAMPLE = SAMPLES / "thrash.kvt"


def simulation(trace: Any) -> dict[str, Any]:
    """What the check says."""
    (found,) = [check for check in verify(trace, allow_lossy=True)["checks"] if check["name"] == "simulation"]
    return found


def altered(table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> dict[str, Any]:
    trace = open_trace(SAMPLE)
    trace.__dict__[table] = change(getattr(trace, table))
    return simulation(trace)


def add(column: str, row: int) -> Callable[[pl.DataFrame], pl.DataFrame]:
    here = pl.int_range(pl.len()) == row
    return lambda frame: frame.with_columns(
        pl.when(here).then(pl.col(column) + 1).otherwise(column).cast(frame[column].dtype).alias(column)
    )


def without(row: int) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: frame.filter(pl.int_range(pl.len()) != row)


def with_header(changes: dict[str, Any], source: Path, place: Path) -> Path:
    """A copy of a log with another header."""
    data = source.read_bytes()
    head = wire.read_commit(data, wire.PREFIX.size)
    assert isinstance(head, wire.Commit)
    body = json.dumps({**json.loads(head.body), **changes}).encode()
    body += b" " * (-len(body) % 4)
    start = wire.head(head.kind, head.flags, head.seq, body) + body
    place.write_bytes(data[: head.offset] + start + data[head.offset + wire.HEAD_BYTES + len(head.body) :])
    return place


@pytest.mark.parametrize("sample", ["thrash", "chat"])
def test_the_samples_come_out_again(sample: str) -> None:
    trace = open_trace(SAMPLES / f"{sample}.kvt")
    found = simulation(trace)
    tables = (trace.steps, trace.step_spans, trace.lookups, trace.preemptions, trace.block_events, trace.requests)
    assert (found["mismatches"], found["skipped"], found["first"]) == (0, None, None)
    assert found["checked"] == sum(table.height for table in tables)


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("steps", "running", "steps row 10 (step 10): running "),
        ("steps", "waiting", "steps row 10 (step 10): waiting "),
        ("step_spans", "computed_before", "step_spans row 10 "),
        ("lookups", "tokens_hit", "lookups row 10 (step "),
        ("preemptions", "tokens_lost", "preemptions row 10 (step "),
        ("block_events", "block", "block_events row 10 (step 0, request "),
        ("block_events", "request", "block_events row 10 (step 0, request "),
        ("requests", "first_step", "requests row 10 (step "),
        ("requests", "cached_tokens", "requests row 10 (step "),
    ],
)
def test_a_figure_off_by_one(table: str, column: str, words: str) -> None:
    found = altered(table, add(column, 10))
    assert found["mismatches"] == 1
    assert found["first"].startswith(words)
    assert f"{column} " in found["first"]
    assert ", simulated " in found["first"]


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens", "arrival_step"])
def test_another_request_makes_another_run(column: str) -> None:
    """What the simulation starts from is changed: then many rows differ, or none can be made."""
    assert altered("requests", add(column, 40))["mismatches"] >= 1


@pytest.mark.parametrize("table", ["steps", "step_spans", "lookups", "preemptions", "block_events"])
def test_a_row_less(table: str) -> None:
    """A row in the middle moves all that follow; the last one is missing at the end."""
    trace = open_trace(SAMPLE)
    rows = getattr(trace, table).height
    assert altered(table, without(5))["mismatches"] > 1
    last = altered(table, without(rows - 1))
    assert last["mismatches"] >= 1
    assert "is not in the trace" in last["first"]


def test_another_identity() -> None:
    """Identities are compared by what they stand for: one taken for another is seen."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        filled = frame.with_row_index().filter(pl.col("kind") == "fill")["index"][7]
        return add("identity", filled)(frame)

    found = altered("block_events", change)
    assert found["mismatches"] == 1
    assert "hash " in found["first"]


def test_another_setting_is_seen(tmp_path: Path) -> None:
    header = open_trace(SAMPLE).header
    scheduler = {**header["scheduler"], "max_num_seqs": 31}
    found = simulation(open_trace(with_header({"scheduler": scheduler}, SAMPLE, tmp_path / "other.kvt")))
    assert found["mismatches"] > 100
    assert found["first"].startswith("steps row ")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine_version": "0.8.5"}, "no rules for vLLM 0.8.5"),
        ({"engine_version": "main"}, "is no version of vLLM"),
        ({"engine_version": "0.33.0"}, "newer-engine"),
        ({"inexact": ["connector"]}, "marked inexact"),
        ({"parallel": {"pipeline": 2}}, "pipeline-parallel"),
        ({"scheduler": {"policy": "fcfs"}}, "does not tell its scheduler's settings"),
    ],
)
def test_what_it_says_where_it_cannot(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    found = simulation(open_trace(with_header(changes, SAMPLE, tmp_path / "other.kvt")))
    assert why in found["skipped"]
    assert (found["checked"], found["mismatches"]) == (0, 0)


def test_an_untested_version_is_checked(tmp_path: Path) -> None:
    found = simulation(open_trace(with_header({"inexact": ["untested-engine"]}, SAMPLE, tmp_path / "other.kvt")))
    assert (found["mismatches"], found["skipped"]) == (0, None)


def test_a_lossy_trace_is_not(tmp_path: Path) -> None:
    data = bytearray(SAMPLE.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.kvt").write_bytes(data)
    assert "lossy" in simulation(open_trace(tmp_path / "damaged.kvt"))["skipped"]


def commit_ends(data: bytes) -> list[int]:
    ends, offset = [], wire.PREFIX.size
    while isinstance(commit := wire.read_commit(data, offset), wire.Commit):
        offset += wire.HEAD_BYTES + len(commit.body)
        ends.append(offset)
    return ends


@pytest.mark.parametrize("sample", ["thrash", "chat"])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.27, 0.5, 0.51, 0.52, 0.9, 0.99])
def test_a_killed_engine(sample: str, part: float, tmp_path: Path) -> None:
    """What the trace saw before its end comes out, also where it ends between a step and its output."""
    data = (SAMPLES / f"{sample}.kvt").read_bytes()
    ends = commit_ends(data)
    (tmp_path / "killed.kvt").write_bytes(data[: ends[int(part * len(ends))]])
    trace = open_trace(tmp_path / "killed.kvt")
    found = simulation(trace)
    assert (found["mismatches"], found["skipped"]) == (0, None), found
    assert found["checked"] > trace.steps.height


def test_a_killed_engine_with_a_figure_off_by_one(tmp_path: Path) -> None:
    data = SAMPLE.read_bytes()
    ends = commit_ends(data)
    (tmp_path / "killed.kvt").write_bytes(data[: ends[len(ends) // 2]])
    for table in ("steps", "step_spans", "lookups", "preemptions", "block_events", "requests"):
        for column in {"steps": "waiting", "requests": "first_step"}.get(table, "request"), None:
            trace = open_trace(tmp_path / "killed.kvt")
            frame = getattr(trace, table)
            if column is None and table == "requests":
                continue
            trace.__dict__[table] = (without(3) if column is None else add(column, 3))(frame)
            assert simulation(trace)["mismatches"], (table, column)


@pytest.mark.parametrize("table", ["lookups", "preemptions", "block_events"])
def test_a_killed_engine_misses_nothing_before_its_last_step(table: str, tmp_path: Path) -> None:
    data = SAMPLE.read_bytes()
    ends = commit_ends(data)
    (tmp_path / "killed.kvt").write_bytes(data[: ends[len(ends) // 2]])
    trace = open_trace(tmp_path / "killed.kvt")
    frame = getattr(trace, table)
    trace.__dict__[table] = frame.filter(pl.col("step") < frame["step"].unique().sort()[-3])
    found = simulation(trace)
    assert found["mismatches"]
    assert "is not in the trace" in found["first"]


def test_an_asynchronous_engine_that_ran_dry(tmp_path: Path) -> None:
    """A request that came after all outputs meets the engine then, not while the last output is under way."""
    source = recorded(open_trace(SAMPLE))
    settings = own_settings(source.header).changed_to(async_scheduling=True)
    for blocks in (100, 300):
        write_run(tmp_path / f"{blocks}.kvt", source, settings.changed_to(num_blocks=blocks))
        found = simulation(open_trace(tmp_path / f"{blocks}.kvt"))
        assert found["mismatches"] == 0
        assert found["skipped"] is None


def test_a_simulated_run_comes_out_again(tmp_path: Path) -> None:
    """Also where the run, at other settings, idles between two arrivals."""
    source = recorded(open_trace(SAMPLE))
    settings = own_settings(source.header)
    for blocks in (100, 300, 400, 1000):
        for arrivals in ("step", "all"):
            path = tmp_path / f"{blocks}-{arrivals}.kvt"
            write_run(path, source, settings.changed_to(num_blocks=blocks), arrivals)
            found = verify(open_trace(path))
            assert not [check for check in found["checks"] if check["mismatches"] or check["skipped"]]


def random_run(case: Case, place: Path, longer: int = 0) -> Any:
    """A case simulated, opened; where `longer`, requests run on by so many tokens that nobody knows."""
    source, settings = as_recorded(case), as_settings(case.settings)
    most = min((settings.num_blocks - 1) * settings.block_size, settings.max_model_len)
    stop = np.minimum(source.stop + longer, np.maximum(source.stop, most)).astype(np.int32)
    why = ["unfinished-requests"] if longer else []
    write_run(place, replace(source, stop=stop, most=np.maximum(source.most, stop)), settings, why=why)
    return open_trace(place)


#: Among them aborts of an idle engine, aborts while a call is under way, and one who resumes right after an empty call
#: that preempted it.
@pytest.mark.parametrize("seed", [9, 45, 51, 117, 138, 159, 175, *range(200, 230)])
def test_random_runs_have_no_mismatch(seed: int, tmp_path: Path) -> None:
    found = verify(random_run(random_case(seed), tmp_path / "run.kvt"))
    assert not [check for check in found["checks"] if check["mismatches"] or check["skipped"]]


@pytest.mark.parametrize("seed", range(316, 346))
def test_runs_with_aborts_after_calls_without_tokens(seed: int, tmp_path: Path) -> None:
    found = verify(random_run(aborted_after_empty_calls(random_case(seed), seed), tmp_path / "run.kvt"))
    assert not [check for check in found["checks"] if check["mismatches"] or check["skipped"]]


def test_only_an_idle_engine_takes_requests_before_their_step(tmp_path: Path) -> None:
    """In runs of a larger engine, done sooner: those of one recorded step, once all before them have ended."""
    early = 0
    for seed in range(400, 460):
        case = aborted_after_empty_calls(random_case(seed, asynchronous=True), seed)
        source = recorded(random_run(case, tmp_path / f"{seed}.kvt"))
        settings = as_settings(case.settings)
        model = case.settings.max_model_len
        more = settings.changed_to(
            num_blocks=4 * settings.num_blocks, max_num_batched_tokens=4 * model, max_num_seqs=64
        )
        write_run(tmp_path / f"{seed}-more.kvt", source, more)
        told = open_trace(tmp_path / f"{seed}-more.kvt").requests.sort("request")
        came, ended = told["arrival_ns"].to_numpy(), told["finish_ns"].to_numpy()
        for request in np.flatnonzero(told["arrival_step"].to_numpy() < source.arrival_step):
            before = np.flatnonzero(source.arrival_step < source.arrival_step[request])
            before = before[came[before] <= came[request]]
            assert (ended[before] <= came[request]).all(), seed
            early += 1
    assert early > 20


@pytest.mark.parametrize("seed", [2, 3, 4, 5, 6])
def test_tokens_that_nobody_knows(seed: int, tmp_path: Path) -> None:
    trace = random_run(random_case(seed), tmp_path / "run.kvt", longer=40)
    found = verify(trace)
    assert found["mismatches"] == 0
    skipped = {check["name"] for check in found["checks"] if check["skipped"]}
    assert skipped == ({"longest hit", "simulation"} if trace.preemptions.height else set())
    names = [tuple(ids) for ids in np.split(trace.chains().identities, trace.chains().indptr[1:-1])]
    assert all(len(set(ids)) == len(ids) for ids in names)  # no name of a block is told twice
