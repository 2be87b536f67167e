"""What holds of every run, whatever the rules: blocks are neither lost nor owned twice, tokens add up, requests end.
Extreme or wrong inputs give a right answer or a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvtrace_replay.schedulers.vllm_v0.layout import MOVES
from kvtrace_replay.schedulers.vllm_v0.requests import RequestsV0
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import (
    DEFECTS,
    SettingsV0,
    settings_of,
    swap_space_blocks,
)
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_traces.errors import UsageError


def lengths(prompt: list[int], output: list[int], **more: Any) -> RequestsV0:
    return RequestsV0(np.array(prompt, np.int64), np.array(output, np.int64), **more)


@st.composite
def any_run(draw: Any) -> tuple[RequestsV0, SettingsV0]:
    n = draw(st.integers(1, 12))

    def each(least: int, most: int) -> Any:
        return np.array(draw(st.lists(st.integers(least, most), min_size=n, max_size=n)), np.int64)

    requests = RequestsV0(
        each(1, 40), each(1, 40), each(0, 20), each(0, 5).astype(float), each(-1, 30) if draw(st.booleans()) else None
    )
    settings = SettingsV0(
        num_gpu_blocks=draw(st.integers(1, 40)),
        num_cpu_blocks=draw(st.integers(0, 80)),
        block_size=draw(st.sampled_from([1, 3, 4, 16])),
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(80, 200)),
        max_model_len=draw(st.integers(20, 80)),
        watermark=draw(st.sampled_from([0.0, 0.01, 0.1, 0.4])),
        preemption=draw(st.sampled_from(["recompute", "swap", "hybrid"])),
        victim=draw(st.sampled_from(["last", "most-blocks", "fewest-blocks"])),
        mend=frozenset(draw(st.sets(st.sampled_from(sorted(DEFECTS))))),
        recompute_cost=1.0,
        swap_cost=draw(st.sampled_from([1.0, 4.0, 20.0])),
    )
    return requests, settings


class Ledger:
    """Who holds which blocks, kept from the records of a run alone."""

    def __init__(self, requests: RequestsV0, settings: SettingsV0) -> None:
        self.settings = settings
        self.known = requests.prompt.tolist()
        self.gpu = [0] * len(self.known)
        self.cpu = [0] * len(self.known)
        self.leaked = 0

    def call(self, kind: str, scheduled: list[tuple[int, int]], moves: list[tuple[str, int, int]]) -> None:
        size = self.settings.block_size
        for what, request, amount in moves:
            if what == "recomputed":
                assert self.gpu[request] == amount > 0
                self.gpu[request] = 0
            elif what == "swapped_out":
                assert self.gpu[request] == amount > 0
                assert self.cpu[request] == 0
                self.gpu[request], self.cpu[request] = 0, amount
            elif what == "swapped_in":
                assert self.cpu[request] == amount > 0
                assert self.gpu[request] == 0
                self.gpu[request], self.cpu[request] = amount, 0
            elif self.cpu[request]:
                self.leaked += 0 if "leak" in self.settings.mend else self.cpu[request]
                self.cpu[request] = 0
        for request, tokens in scheduled:
            assert tokens == (self.known[request] if kind == "prefill" else 1)
            needed = -(-self.known[request] // size)
            assert self.cpu[request] == 0
            assert needed - self.gpu[request] in ((needed,) if kind == "prefill" else (0, 1))
            self.gpu[request] = needed

    def sampled(self, scheduled: list[tuple[int, int]], ends: list[str], tokens: list[int]) -> None:
        for request, _ in scheduled:
            self.known[request] += 1
            if self.known[request] == tokens[request] and ends[request] in ("finished", "model-length"):
                self.gpu[request] = 0


def check_ledger(run: RunV0, requests: RequestsV0, settings: SettingsV0) -> None:
    ledger, begin = Ledger(requests, settings), 0
    told = run.request_columns()
    moves: list[list[tuple[str, int, int]]] = [[] for _ in range(run.calls)]
    for call, kind, request, amount in run.moves.tolist():
        moves[call].append((MOVES[kind], request, amount))
    columns = run.step_columns()
    for call in range(run.calls):
        count = int(columns["requests"][call])
        scheduled = [(request, tokens) for request, tokens in run.scheduled[begin : begin + count].tolist()]
        assert len(dict(scheduled)) == count
        begin += count
        for request, end in enumerate(told["end"]):
            if end == "aborted" and told["last_step"][request] < call:
                ledger.gpu[request] = ledger.cpu[request] = 0
        kind = columns["kind"][call]
        ledger.call(kind, scheduled, moves[call])
        assert columns["free_gpu_blocks"][call] + sum(ledger.gpu) == settings.num_gpu_blocks
        assert columns["free_cpu_blocks"][call] + sum(ledger.cpu) + ledger.leaked == settings.num_cpu_blocks
        assert columns["running"][call] <= settings.max_num_seqs
        if kind == "prefill":
            assert sum(tokens for _, tokens in scheduled) <= settings.max_num_batched_tokens
        ledger.sampled(scheduled, told["end"], told["tokens"].tolist())
    assert run.leaked_blocks == ledger.leaked
    assert ledger.known == told["tokens"].tolist()


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
@given(any_run())
def test_conservation(drawn: tuple[RequestsV0, SettingsV0]) -> None:
    requests, settings = drawn
    run = simulate_v0(requests, settings, detail=True)
    told = run.request_columns()
    check_ledger(run, requests, settings)
    # Every request ends, unless the run stood still or died.
    assert ("unfinished" in told["end"]) == (run.ended != "done")
    assert "swap-space" not in settings.mend or run.ended != "swap-space"
    assert "livelock" not in settings.mend or run.ended != "livelock"
    # Blocks that moved out came back, or lie there still.
    moved = told["blocks_swapped_out"] - told["blocks_swapped_in"]
    back = np.isin(told["end"], ["finished", "model-length", "dropped-recomputed"])
    assert (moved[back] == 0).all()
    assert (moved >= 0).all()
    # Tokens: those asked for, or up to one past the model's length; computed once but for the last, or again.
    for request, end in enumerate(told["end"]):
        asked = requests.prompt[request] + requests.output[request]
        wanted = {"finished": asked, "model-length": settings.max_model_len + 1}.get(end)
        assert wanted in (None, told["tokens"][request])
        assert told["tokens"][request] <= asked
    ran = told["first_step"] >= 0
    computed = run.prefill_tokens + run.decode_tokens
    assert computed == int((told["tokens"][ran] - 1).sum()) + run.recomputed_tokens
    assert run.steps <= run.calls <= 2 * computed + len(told["end"]) + 1


PLAIN = SettingsV0(100, 100, 16, 8, 4096, 4096)


def test_a_request_longer_than_the_pool() -> None:
    """It is told of, and the others are served."""
    run = simulate_v0(lengths([1700, 10], [5, 5]), PLAIN)
    assert run.request_columns()["end"] == ["never-fits", "finished"]
    assert run.request_columns()["finish_reason"] == ["length", "length"]
    assert (run.finished, run.dropped) == (1, 1)
    # Its prompt fits, its output does not.
    run = simulate_v0(lengths([1500, 10], [500, 5]), PLAIN)
    assert run.request_columns()["end"] == ["dropped-recomputed", "finished"]


def test_a_prompt_longer_than_the_model() -> None:
    run = simulate_v0(lengths([5000, 10, 4096], [5, 5, 9]), PLAIN.changed_to(num_gpu_blocks=1000))
    assert run.request_columns()["end"] == ["prompt-too-long", "finished", "model-length"]
    assert run.tokens.tolist() == [5000, 15, 4097]


def test_no_swap_space() -> None:
    tight = PLAIN.changed_to(num_gpu_blocks=10, num_cpu_blocks=0, preemption="swap")
    requests = lengths([40, 40, 40], [60, 60, 60])
    assert simulate_v0(requests, tight).ended == "swap-space"
    mended = simulate_v0(requests, tight.changed_to(mend=frozenset({"swap-space"})))
    recomputed = simulate_v0(requests, tight.changed_to(preemption="recompute"))
    assert mended.ended == "done"
    assert (mended.told == recomputed.told).all()
    # One that need not be swapped is served without.
    assert simulate_v0(lengths([40], [60]), tight).finished == 1


def test_arrivals_in_any_order() -> None:
    prompt, output, arrival = [10, 20, 30, 40], [9, 8, 7, 6], [30, 0, 20, 0]
    run = simulate_v0(lengths(prompt, output, arrival=np.array(arrival)), PLAIN)
    order = [1, 3, 2, 0]
    sorted_run = simulate_v0(
        lengths([prompt[n] for n in order], [output[n] for n in order], arrival=np.array([0, 0, 20, 30])), PLAIN
    )
    assert (run.told[order] == sorted_run.told).all()
    # 1 and 3 take 8 calls, then nobody is there: 2 comes at once, and the clock goes on from its arrival.
    assert run.request_columns()["first_step"].tolist() == [15, 0, 8, 0]


def test_nobody_comes() -> None:
    run = simulate_v0(lengths([], []), PLAIN, detail=True)
    assert (run.ended, run.calls, len(run.rows)) == ("done", 0, 0)


def test_aborted_before_it_comes() -> None:
    run = simulate_v0(lengths([5, 5], [5, 5], arrival=np.array([3, 3]), abort=np.array([1, -1])), PLAIN)
    told = run.request_columns()
    assert (told["end"], told["first_step"].tolist()) == (["aborted", "finished"], [-1, 0])


def test_hybrid_is_one_or_the_other_at_its_ends() -> None:
    requests = lengths([40] * 9, [60] * 9)
    tight = PLAIN.changed_to(num_gpu_blocks=20, num_cpu_blocks=1000)

    def run(**changes: Any) -> RunV0:
        return simulate_v0(requests, tight.changed_to(**changes))

    swaps, recomputes = run(preemption="swap"), run(preemption="recompute")
    assert swaps.swaps > 0 < recomputes.recomputes
    dear, free = run(preemption="hybrid", recompute_cost=1e9, swap_cost=1.0), run(
        preemption="hybrid", recompute_cost=1.0, swap_cost=1e9
    )  # fmt: skip
    assert (dear.told == swaps.told).all()
    assert (free.told == recomputes.told).all()
    # A curve in place of a factor: swapping pays from four blocks on.
    curve = run(preemption="hybrid", recompute_cost=np.ones(400), swap_cost=np.where(np.arange(30) < 4, 2.0, 0.5))
    assert curve.swaps > 0 < curve.recomputes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [0]}, "request 0 has prompt 0"),
        ({"output": [0]}, "request 0 has output 0"),
        ({"arrival": np.array([-1])}, "request 0 has arrival -1"),
        ({"output": [1, 2]}, "output has 2 entries for 1 requests"),
        ({"prompt": [2**31], "output": [1]}, "more than 2147483647 tokens"),
        ({"arrival_time": np.array([np.nan])}, "request 0 has no arrival_time"),
        ({"arrival": np.array([2**62])}, "request 0 has an arrival beyond"),
        ({"abort": np.array([0.5])}, "abort must be a one-dimensional array of whole numbers"),
    ],
)
def test_requests_that_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"prompt": [5], "output": [5]} | changes
    with pytest.raises(UsageError, match=message) as caught:
        simulate_v0(lengths(given.pop("prompt"), given.pop("output"), **given), PLAIN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpu_blocks": 0}, "--num-gpu-blocks 0 must be"),
        ({"num_cpu_blocks": -1}, "--num-cpu-blocks -1 must be"),
        ({"block_size": 2.5}, "--block-size 2.5 must be"),
        ({"max_num_seqs": True}, "--max-num-seqs True must be"),
        ({"watermark": 1.0}, "--watermark 1.0 must be"),
        ({"watermark": float("nan")}, "--watermark nan must be"),
        ({"preemption": "offload"}, "--preemption offload is none of"),
        ({"victim": "first"}, "--victim first is none of"),
        ({"mend": frozenset({"leaks"})}, "no defect is called leaks"),
        ({"mend": "leak"}, "no defect is called"),
        ({"max_num_seqs": 5000}, "vLLM 0.4.2 does not start so"),
        ({"max_model_len": 5000}, "does not start so without chunked prefill"),
        ({"preemption": "hybrid"}, "--preemption hybrid needs"),
        ({"preemption": "hybrid", "swap_cost": 1.0, "recompute_cost": -1.0}, "recompute_cost must be"),
        ({"preemption": "hybrid", "swap_cost": np.ones(1), "recompute_cost": 1.0}, "swap_cost must be"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        simulate_v0(lengths([50], [5]), PLAIN.changed_to(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("costs", [StepCosts(0), StepCosts(1, block_in=-1), StepCosts(1, decode_row=float("nan"))])
def test_costs_that_are_refused(costs: StepCosts) -> None:
    with pytest.raises(UsageError, match="costs of a step"):
        simulate_v0(lengths([5], [5]), PLAIN, costs=costs)


def test_swap_space_in_blocks() -> None:
    assert swap_space_blocks(4, 8 << 20) == 512
    assert swap_space_blocks(0.001, 8 << 20) == 0
    assert swap_space_blocks(0, None) == 0
    for gib, per_block in ((-1, 1), (float("inf"), 1), (1, None)):
        with pytest.raises(UsageError, match="--swap-space"):
            swap_space_blocks(gib, per_block)


HEADER = {
    "block_size": 32, "num_blocks": 200, "bytes_per_block": 16384, "max_model_len": 2048,
    "scheduler": {"max_num_seqs": 32, "max_num_batched_tokens": 1024},
}  # fmt: skip


def test_settings_of_a_recorded_engine() -> None:
    own = settings_of(HEADER)
    assert (own.num_gpu_blocks, own.num_cpu_blocks, own.block_size) == (200, 4 * 2**30 // 16384, 32)
    assert (own.max_num_seqs, own.max_num_batched_tokens, own.max_model_len) == (32, 2048, 2048)
    own.check()
    # The same bytes in smaller blocks.
    halved = settings_of(HEADER, 1.0, block_size=16, preemption="swap", watermark=0.0)
    assert (halved.num_gpu_blocks, halved.num_cpu_blocks, halved.watermark) == (400, 2**30 // 8192, 0.0)
    assert settings_of(HEADER | {"max_model_len": 9000}).max_num_batched_tokens == 9000
    with pytest.raises(UsageError, match="--max-model-len"):
        settings_of(HEADER | {"max_model_len": None})
    with pytest.raises(UsageError, match="--swap-space"):
        settings_of(HEADER | {"bytes_per_block": None}, preemption="swap")
    assert settings_of(HEADER | {"bytes_per_block": None}).num_cpu_blocks == 0
