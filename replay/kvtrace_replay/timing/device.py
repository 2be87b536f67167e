"""A profile measured on the machine at hand, with torch: its link, and a transformer of a named shape."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtrace_replay.timing.architecture import Architecture
from kvtrace_replay.timing.catalogue import find_model
from kvtrace_replay.timing.copies import link_from, measure_ways, points
from kvtrace_replay.timing.fit import cross_validated, errors_of, solve, unidentified
from kvtrace_replay.timing.link import DIRECTIONS, LAYOUTS
from kvtrace_replay.timing.profile import Measured, Model, Profile
from kvtrace_replay.timing.transformer import Transformer, check
from kvtrace_replay.timing.work import COLUMNS
from kvtrace_traces.errors import KvtraceError

DEFAULT_MODELS = {"cuda": "llama-3.1-8b", "cpu": "smollm2-135m"}
_ELEMENT_BYTES = 2  # everything is measured in bfloat16
_SHARE = 0.6  # of the free memory, for weights and one point's keys and values

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: prefills as (tokens, context), decodes as (rows, context); at least `repeats` runs of each and
    as many as `budget_s` has room for, up to `most`."""

    prefills: tuple[tuple[int, int], ...]
    decodes: tuple[tuple[int, int], ...]
    repeats: int
    most: int
    budget_s: float


FULL = Plan(
    tuple((tokens, context) for tokens in (16, 64, 256, 1024, 2048) for context in (0, 1024, 4096)),
    tuple((rows, context) for rows in (1, 4, 16, 64, 256) for context in (64, 512, 2048)),
    7, 100, 0.5,
)  # fmt: skip
QUICK = Plan(
    tuple((tokens, context) for tokens in (16, 64, 256) for context in (0, 256, 512)),
    tuple((rows, context) for rows in (1, 4, 16) for context in (32, 256, 1024)),
    3, 20, 0.05,
)  # fmt: skip


def measure(
    device: str,
    model: str | None = None,
    *,
    layers: int | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Measure the device `cuda` or `cpu` with a model of the catalogue or a config.json.

    `layers`: how many of the model's layers are run, the others being scaled; None for as many as fit. On the device
    `cpu` the copies run between two buffers of the same memory. `progress(done, total, what)` is told of each point.
    Raises KvtraceError where torch or the device is missing, or for a model that cannot be run.
    """
    torch = _torch(device)
    chosen = find_model(model or DEFAULT_MODELS[device])
    check(chosen)
    plan = QUICK if quick else FULL
    timer = _Timer(torch, device, plan)
    bench = _Bench(torch, device, chosen, layers, timer)
    memories = ("pinned", "pageable") if device == "cuda" else ("pageable",)
    ways = len(points(quick)) * len(memories) * len(DIRECTIONS) * len(LAYOUTS)
    total = ways + len(plan.prefills) + len(plan.decodes)
    found: list[Measured] = []
    with torch.inference_mode():
        bench.warm_up()
        for part in (measure_ways(torch, device, memories, quick, timer), bench.points(plan)):
            for point in part:
                found.append(point)
                if progress is not None:
                    progress(len(found), total, point.what)
    return _profile(device, _name(torch, device), bench, found, str(torch.__version__), torch.get_num_threads())


def _torch(device: str) -> Any:
    try:
        import torch
        import torch.nn.attention.bias
    except ImportError:
        raise KvtraceError(
            "--device measures with torch, which is not installed: pip install 'kvtrace[calibrate]'"
        ) from None
    if device == "cuda" and not torch.cuda.is_available():
        raise KvtraceError(
            "torch sees no GPU here: --device cpu measures this machine's processor, --gpu NAME computes"
        )
    return torch


def _name(torch: Any, device: str) -> str:
    return str(torch.cuda.get_device_name()) if device == "cuda" else f"cpu ({platform.machine()})"


class _Timer:
    """Runs an action until it is known how long it takes."""

    def __init__(self, torch: Any, device: str, plan: Plan) -> None:
        self.wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.plan = plan

    def __call__(self, action: Callable[[], None]) -> tuple[float, float, float]:
        """Median and quartiles, ns, from the call to the device's last work. Two runs do not count; one, and three
        that count, are enough where a run alone takes longer than the plan's time for them all."""
        first = self.once(action)
        slow = first > self.plan.budget_s * 1e9
        if not slow:
            self.once(action)
        taken: list[int] = []
        end = time.perf_counter() + self.plan.budget_s
        while len(taken) < (3 if slow else self.plan.repeats) or (
            len(taken) < self.plan.most and time.perf_counter() < end
        ):
            taken.append(self.once(action))
        low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
        return float(middle), float(low), float(high)

    def once(self, action: Callable[[], None]) -> int:
        """ns of one run."""
        begin = time.perf_counter_ns()
        action()
        self.wait()
        return time.perf_counter_ns() - begin


class _Bench:
    """The transformer, as many of its layers as fit, and what its steps take, scaled to all of them."""

    def __init__(self, torch: Any, device: str, model: Architecture, layers: int | None, timer: _Timer) -> None:
        self.model, self.timer = model, timer
        self.memory_bytes = _SHARE * _free_bytes(torch, device)
        layer_bytes = _ELEMENT_BYTES * model.token_matmul / model.layers
        fit = int((0.7 * self.memory_bytes - _ELEMENT_BYTES * model.head_matmul) / layer_bytes)
        if fit < 1:
            raise KvtraceError(f"not one layer of {model.name} fits into the free memory of this {device}")
        self.layers = min(layers or model.layers, model.layers, fit)
        self.net = Transformer(torch, model, self.layers, device, torch.bfloat16)
        self.room_bytes = self.memory_bytes - self.layers * layer_bytes - _ELEMENT_BYTES * model.head_matmul
        self.left_out: list[str] = []

    def warm_up(self) -> None:
        """A small pass of each kind: the first ever loads libraries and kernels."""
        self.net.fill(1, 32)
        self.timer.once(lambda: self.net.prefill(16, 16, self.layers))
        self.net.fill(16, 17)
        self.timer.once(lambda: self.net.decode(16, 16, self.layers))

    def points(self, plan: Plan) -> Iterator[Measured]:
        """Every prefill and decode that fits."""
        for what, cases in (("prefill", plan.prefills), ("decode", plan.decodes)):
            run = self.net.prefill if what == "prefill" else self.net.decode
            for size, context in cases:
                rows, tokens = (1, size) if what == "prefill" else (size, 1)
                kv_bytes = self.model.kv_bytes_per_token(_ELEMENT_BYTES) / self.model.layers * self.layers
                if rows * (context + tokens) * kv_bytes > self.room_bytes:
                    self.left_out.append(f"{what} {size} after {context}")
                    continue
                self.net.fill(rows, context + tokens)
                quartiles = self.timer(lambda go=run, n=size, c=context: go(n, c, self.layers))  # type: ignore[misc]
                if self.layers < self.model.layers:
                    bare, _, _ = self.timer(lambda go=run, n=size, c=context: go(n, c, 0))  # type: ignore[misc]
                    share = self.model.layers / self.layers
                    middle, low, high = (bare + max(ns - bare, 0.0) * share for ns in quartiles)
                    quartiles = (middle, low, high)
                yield Measured(what, size, context, *quartiles)
        self.net.caches = []


def _free_bytes(torch: Any, device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _profile(device: str, name: str, bench: _Bench, found: list[Measured], version: str, threads: int) -> Profile:
    model = bench.model
    steps = [point for point in found if point.what in ("prefill", "decode")]
    work = np.array([_work(point) for point in steps])
    kind = np.array([point.what == "decode" for point in steps]).astype(np.int8)
    took, low, high = (np.array([getattr(p, f"{q}_ns") for p in steps]) for q in ("median", "q1", "q3"))
    costs, _ = solve(work, took)
    ends = [solve(work, quartile)[0] for quartile in (low, high)]
    # Points are few and unlike each other: each is predicted by a fit on all others.
    predicted, _ = cross_validated(work, took, np.arange(len(steps)))
    facts: dict[str, str | int | float] = {
        "torch": version, "dtype": "bfloat16", "layers_measured": bench.layers, "points": len(found),
        "threads": threads,
    }  # fmt: skip
    if bench.layers < model.layers:
        facts["scaled"] = (
            f"{bench.layers} of {model.layers} layers were run; the time of the others is scaled from them"
        )
    if device == "cpu":
        facts["pinned"] = "pinned memory is not measured on the cpu, and host and device are one memory here"
    if bench.left_out:
        facts["left_out"] = f"too large for the free memory, left out: {', '.join(bench.left_out)}"
    shape = Model(model.name, model.layers, model.kv_tensors, model.kv_bytes_per_token(_ELEMENT_BYTES))
    return Profile(
        f"{device}-{model.name}", "device", name, shape, dict(zip(COLUMNS, map(float, costs), strict=True)),
        {n: (float(min(a, b)), float(max(a, b))) for n, a, b in zip(COLUMNS, *ends, strict=True)},
        unidentified(work), link_from([point for point in found if point.what not in ("prefill", "decode")]),
        errors_of(predicted, took, kind), facts, tuple(found),
    )  # fmt: skip


def _work(point: Measured) -> list[float]:
    """The work of a measured step, as `work.COLUMNS`."""
    if point.what == "decode":
        return [1, 0, 0, point.size, point.size * (point.context + 1)]
    return [1, point.size, point.size * point.context + point.size * (point.size + 1) / 2, 0, 0]
