"""Working sets against sets of Python's own."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload
from kvtrace_replay.curves.working_set import parse_window, working_sets
from kvtrace_traces.errors import UsageError
from unit.replay.test_against_twins import random_workload
from unit.replay.twins import make_workload, tokens_of


def twin(workload: Workload, of_request: list[int], windows: int, semantics: str) -> list[dict[str, int]]:
    refs = workload.raw if semantics == "object" and workload.raw is not None else workload.identities
    rows = []
    for window in range(windows):
        filled: dict[int, int] = {}
        row = {"requests": 0, "block_lookups": 0}
        for r in range(workload.n_requests):
            if of_request[r] != window:
                continue
            row["requests"] += 1
            for p in range(workload.indptr[r], workload.indptr[r + 1]):
                row["block_lookups"] += 1
                block = int(refs[p])
                filled[block] = max(filled.get(block, 0), tokens_of(workload, r, p))
        rows.append({**row, "distinct_blocks": len(filled), "distinct_tokens": sum(filled.values())})
    return rows


def columns(frame: Any) -> list[dict[str, int]]:
    found: list[dict[str, int]] = frame.select(
        "requests", "block_lookups", "distinct_blocks", "distinct_tokens"
    ).to_dicts()
    return found


@pytest.mark.parametrize("semantics", ["object", "prefix"])
def test_random_workloads(semantics: str) -> None:
    rng = random.Random(semantics)
    for _ in range(400):
        workload, _ = random_workload(rng)
        n = workload.n_requests
        gaps = [rng.choice([0, 1, 10**9, 7 * 10**9]) for _ in range(n)]
        times = np.cumsum(gaps) + rng.choice([0, 12_345])
        if rng.random() < 0.3:
            rng.shuffle(times)
        timed = replace(workload, arrival_ns=np.array(times, np.int64))
        length = rng.choice([1, 2, 10])
        start = int(times.min())
        numbers = [(int(t) - start) // (length * 10**9) for t in times]
        frame = working_sets(timed, f"{length}s", semantics)
        assert columns(frame) == twin(timed, numbers, max(numbers) + 1, semantics)
        assert frame["window_start_s"].to_list() == [(start + i * length * 10**9) / 1e9 for i in range(frame.height)]
        assert set(frame["window_s"]) == {float(length)}
        assert frame["first_request"].null_count() == frame.height
        # Windows of requests, in order of arrival.
        many = rng.randint(1, n + 1)
        order = np.argsort(np.array(times), kind="stable")
        numbers = [0] * n
        for place, r in enumerate(order):
            numbers[r] = place // many
        frame = working_sets(timed, many, semantics)
        assert columns(frame) == twin(timed, numbers, max(numbers) + 1, semantics)
        assert frame["first_request"].to_list() == [i * many for i in range(frame.height)]
        assert frame["window_start_s"].null_count() == frame.height


def test_bytes_where_they_are_known() -> None:
    workload = make_workload([[0, 1], [0]], bytes_per_block=1000)
    assert working_sets(workload, "1")["distinct_bytes"].to_list() == [2000, 1000]
    assert working_sets(make_workload([[0]]), 1)["distinct_bytes"].to_list() == [None]


def test_no_requests() -> None:
    workload = replace(make_workload([]), arrival_ns=np.zeros(0, np.int64))
    assert working_sets(workload, "1s").height == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60s", (60 * 10**9, None)), ("500ms", (5 * 10**8, None)), ("1.5min", (90 * 10**9, None)),
     ("1h", (3600 * 10**9, None)), ("2m", (120 * 10**9, None)), ("1000", (None, 1000)), (7, (None, 7)),
     (" 3 s ", (3 * 10**9, None))],
)  # fmt: skip
def test_windows(text: str | int, expected: tuple[int | None, int | None]) -> None:
    assert parse_window(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1.5", "nan", "inf", "5 weeks", "1e30", "99999999999h", True])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(UsageError, match="is no window"):
        parse_window(text)


def test_times_must_be_known_and_windows_not_too_many() -> None:
    workload = make_workload([[0], [1]])
    with pytest.raises(UsageError, match="knows no arrival times: write a number of requests"):
        working_sets(workload, "1s")
    far = replace(workload, arrival_ns=np.array([0, 10**15], np.int64))
    with pytest.raises(UsageError, match="take longer ones"):
        working_sets(far, "1ms")
