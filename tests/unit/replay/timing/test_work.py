"""The work and durations of steps, against their slow twin and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import kvtrace_traces
from kvtrace_replay.timing.work import COLUMNS, KINDS, step_work
from kvtrace_traces import Trace
from kvtrace_traces.trace import open_trace
from unit.analysis import toys
from unit.replay.timing.slow_work import slow_steps

SAMPLES = Path(__file__).parents[4] / "traces" / "samples"


def agree(trace: Trace) -> set[str]:
    """Compare with the twin; gives what the trace had."""
    found, wanted = step_work(trace), slow_steps(trace)
    assert list(zip(found.engine_index.tolist(), found.step.tolist(), strict=True)) == sorted(wanted)
    seen = set()
    for i, key in enumerate(sorted(wanted)):
        work, duration, waited = wanted[key]
        assert found.work[i].tolist() == work, f"{trace.path} {key}"
        assert found.duration_ns[i] == duration or (math.isnan(found.duration_ns[i]) and math.isnan(duration)), key
        assert bool(found.waited[i]) == waited, key
        kind = "mixed" if work[1] and work[3] else "decode" if work[3] else "prefill"
        assert KINDS[found.kind[i]] == kind
        seen |= {kind, "waited" if waited else "busy", "untimed" if math.isnan(duration) else "timed"}
    return seen


def test_random_runs_equal_their_twin(tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in range(5000, 5060):
        seen |= agree(toys.plain_toy(seed, tmp_path).reader)
    for seed in range(5060, 5080):  # sequences computed again after preemptions, in several steps
        trace = toys.plain_toy(seed, tmp_path, blocks=8, budget=3, steps=90, most_running=6, block_size=2, arrivals=0.9)
        seen |= agree(trace.reader)
        if trace.preemptions.height:
            seen.add("preempted")
    assert seen == {"prefill", "decode", "mixed", "waited", "busy", "untimed", "timed", "preempted"}


@pytest.mark.parametrize("name", ["thrash", "chat"])
def test_the_samples_equal_their_twin(name: str) -> None:
    agree(open_trace(SAMPLES / f"{name}.kvt"))


def test_engines_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    for seed, index in ((5001, 0), (5004, 1)):
        toys.plain_toy(seed, tmp_path)
        data = (tmp_path / f"toy-{seed}.kvt").read_bytes()
        (folder / f"e{index}.kvt").write_bytes(data)
    trace = open_trace(folder)
    agree(trace)
    found = step_work(trace)
    assert set(found.engine_index.tolist()) == {0, 1}
    for index, seed in ((0, 5001), (1, 5004)):
        alone = step_work(open_trace(tmp_path / f"toy-{seed}.kvt"))
        mine = found.engine_index == index
        assert np.array_equal(found.work[mine], alone.work)
        assert np.array_equal(found.duration_ns[mine], alone.duration_ns, equal_nan=True)


def test_the_first_steps_of_thrash() -> None:
    """Read off the sample: 342 + 387 + 128 + 167 tokens from nothing; then three decode rows among the prefill."""
    found = step_work(open_trace(SAMPLES / "thrash.kvt"))
    pairs = sum(n * (n + 1) // 2 for n in (342, 387, 128, 167))
    assert dict(zip(COLUMNS, found.work[0].tolist(), strict=True)) == {
        "call": 1, "prefill_token": 1024, "prefill_pair": pairs, "decode_row": 0, "decode_context": 0,
    }  # fmt: skip
    assert found.work[1].tolist() == [1, 1021, 199179, 3, 343 + 388 + 129]
    assert found.duration_ns[0] == 460854540 - 450006400  # its own begin: nobody was before it
    assert found.duration_ns[1] == 466923551 - 460854540  # from output to output
    assert [int(n) for n in np.flatnonzero(found.waited)] == [0, 265, 682]  # between the turns of its conversations


def test_imports_have_no_steps(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}) + "\n")
    from kvtrace_traces import importers

    importers.run("mooncake", source, tmp_path / "a.kvt")
    assert len(step_work(kvtrace_traces.open_trace(tmp_path / "a.kvt"))) == 0
