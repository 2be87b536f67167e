"""How fast the compiled simulator of vLLM's scheduler is, beside the real scheduler and a plain Python twin of it.

    python benchmarks/simulate_speed.py [--sections real,twin,sweep] [--loads decode256,...] [--repeats 15]

real    vLLM's own Scheduler or AsyncScheduler with a made-up model does the same requests at the same settings. Timed
        there is `schedule` + `update_from_output` alone, in CPU time with the garbage collector and vLLM's statistics
        off. A further run, not timed, counts its steps, preemptions and evictions, which must be the simulator's. Needs
        the engine (`make engine`).
twin    the Python twin that the tests compare with; its steps and block events must be the simulator's.
sweep   64 settings over one trace of a simulated run, with one thread and with two; peak memory at 1x and 4x requests.

The simulator's times are the best of `--repeats`: of the compiled loop alone ("loop"), and with its arrays set up
("run"). Compilation is not in them. Block events are allocations, hits, fills, frees and evictions. Ratios are of times
per step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1.run import Run, compile_for, simulate_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from simulation import twin, twin_words
from simulation.cases import Case, identities
from simulation.kernel import as_recorded, as_settings

BLOCK = 16
BUDGET = 8192
LOADS: dict[str, dict[str, int]] = {
    # Long generations of a full batch: what a busy server does most of the time.
    "decode8": {"seqs": 8, "prompts": 8, "prompt": 64, "output": 1000, "num_blocks": 2000},
    "decode64": {"seqs": 64, "prompts": 64, "prompt": 64, "output": 1000, "num_blocks": 4800},
    "decode256": {"seqs": 256, "prompts": 256, "prompt": 64, "output": 1000, "num_blocks": 18000},
    "decode1024": {"seqs": 1024, "prompts": 1024, "prompt": 64, "output": 1000, "num_blocks": 72000},
    # Requests come and go, with shared prefixes: lookups, hits, fills and frees all the time.
    "churn64": {"seqs": 64, "prompts": 1500, "prompt": 400, "output": 40, "num_blocks": 4000},
    # A cache far too small: evictions and preemptions.
    "thrash64": {"seqs": 64, "prompts": 300, "prompt": 200, "output": 120, "num_blocks": 700},
}


def token(request: int, position: int) -> int:
    """Output `position` of a request, as the made-up model generates it."""
    return 3 + (request * 7919 + position * 104_729 + request * position * 31) % 497


def case_of(load: dict[str, int], asynchronous: bool) -> Case:
    """The load's requests, all there from the start, as the twin and the real scheduler take them."""
    rng = random.Random(5)
    half = load["prompt"] // 2
    shared = [[rng.randrange(3, 500) for _ in range(half)] for _ in range(8)]
    tokens = []
    for i in range(load["prompts"]):
        own = [rng.randrange(3, 500) for _ in range(half)]
        # Staggered ends, so that blocks fill in every step.
        prompt = (*shared[i % 8], *own[: half - i % 16])
        tokens.append((prompt, tuple(token(i, p) for p in range(load["output"] - i % 23))))
    chains = identities([prompt + output for prompt, output in tokens], BLOCK)
    requests = [
        twin_words.Request(0, len(prompt), len(output), len(output), chain, arrival_time=float(i), request_id=f"r{i}")
        for i, ((prompt, output), chain) in enumerate(zip(tokens, chains, strict=True))
    ]
    settings = twin_words.Settings(
        num_blocks=load["num_blocks"], block_size=BLOCK, max_num_seqs=load["seqs"], max_num_batched_tokens=BUDGET,
        max_model_len=2048, async_scheduling=asynchronous,
    )  # fmt: skip
    return Case(settings, requests, tokens)


def block_events(run: Run) -> int:
    """Of a run to the end, in which all that was allocated or hit is freed."""
    return 2 * (run.allocations + run.hit_tokens // run.settings.block_size) + run.fills + run.evictions


@dataclass
class Simulated:
    """A run of the simulator, with the best times in microseconds a step of the loop and of the whole run."""

    run: Run
    loop: float
    whole: float


def simulated(case: Case, repeats: int) -> Simulated:
    recorded, settings = as_recorded(case), as_settings(case.settings)
    compile_for(recorded, settings)
    loops, wholes = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        run = simulate_run(recorded, settings)
        wholes.append(time.perf_counter() - begin)
        loops.append(run.seconds)
    return Simulated(run, min(loops) / run.steps * 1e6, min(wholes) / run.steps * 1e6)


# -------------------------------------------------------------------------------------------------- the real scheduler


def queued(model: str, case: Case) -> Any:
    """The real scheduler with the case's requests waiting."""
    from engine_support.stub import StubEngine

    settings = case.settings
    stub = StubEngine(
        model, num_blocks=settings.num_blocks, block_size=BLOCK, max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=BUDGET, max_model_len=settings.max_model_len, watermark=settings.watermark,
        async_scheduling=settings.async_scheduling, log_stats=False, observe=False, token=token,
    )  # fmt: skip
    for prompt, output in case.tokens:
        stub.add(list(prompt), len(output))
    return stub


def counted(model: str, case: Case) -> tuple[int, int, int]:
    """Steps, preemptions and evictions of the real scheduler."""
    stub = queued(model, case)
    scheduler = stub.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    schedule, preempt, evict = scheduler.schedule, scheduler._preempt_request, pool._maybe_evict_cached_block
    counts = [0, 0, 0]

    def count_schedule() -> Any:
        scheduled = schedule()
        counts[0] += scheduled.total_num_scheduled_tokens > 0
        return scheduled

    def count_preemption(*arguments: Any, **named: Any) -> Any:
        counts[1] += 1
        return preempt(*arguments, **named)

    def count_eviction(block: Any) -> bool:
        evicted: bool = evict(block)
        counts[2] += evicted
        return evicted

    scheduler.schedule, scheduler._preempt_request = count_schedule, count_preemption
    pool._maybe_evict_cached_block = count_eviction
    stub.run()
    stub.close()
    return counts[0], counts[1], counts[2]


def timed(model: str, case: Case) -> float:
    """CPU seconds of the real scheduler's calls over a whole run."""
    stub = queued(model, case)
    scheduler, clock = stub.scheduler, time.thread_time_ns
    schedule, update = scheduler.schedule, scheduler.update_from_output
    spent = 0

    def timed_schedule() -> Any:
        nonlocal spent
        begin = clock()
        scheduled = schedule()
        spent += clock() - begin
        return scheduled

    def timed_update(*arguments: Any) -> Any:
        nonlocal spent
        begin = clock()
        outputs = update(*arguments)
        spent += clock() - begin
        return outputs

    scheduler.schedule, scheduler.update_from_output = timed_schedule, timed_update
    gc.collect()
    gc.freeze()
    gc.disable()
    stub.run()
    gc.enable()
    gc.unfreeze()
    stub.close()
    return spent / 1e9


def real_section(names: list[str], repeats: int, real_repeats: int) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from engine_support.models import tiny_llama

    print(f"the real scheduler, {BLOCK}-token blocks, best of {repeats} simulated and {real_repeats} real runs")
    print(f"{'load':<12}{'':<6}{'steps':>6}{'preempt':>8}{'evict':>7}{'k steps/s':>11}{'M events/s':>11}"
          f"{'loop us':>9}{'run us':>8}{'real us':>9}{'loop ratio':>11}{'run ratio':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model = str(tiny_llama(Path(place) / "model"))
        for name in names:
            for asynchronous in (False, True):
                case = case_of(LOADS[name], asynchronous)
                mine = simulated(case, repeats)
                run = mine.run
                theirs = counted(model, case)
                assert theirs == (run.steps, run.preemptions, run.evictions), (name, theirs, run)
                real = min(timed(model, case) for _ in range(real_repeats)) / run.steps * 1e6
                mine = min(mine, simulated(case, repeats), key=lambda one: one.loop)
                print(
                    f"{name:<12}{'async' if asynchronous else 'sync':<6}{run.steps:>6}{run.preemptions:>8}"
                    f"{run.evictions:>7}{1000 / mine.loop:>11.0f}"
                    f"{block_events(run) / run.steps / mine.loop:>11.1f}{mine.loop:>9.3f}{mine.whole:>8.3f}"
                    f"{real:>9.1f}{real / mine.loop:>10.0f}x{real / mine.whole:>9.0f}x  {load_now()}",
                    flush=True,
                )


# --------------------------------------------------------------------------------------------------- the Python twin


def twin_section(names: list[str], repeats: int) -> None:
    print(f"the Python twin, best of {repeats} simulated runs and one of the twin")
    print(f"{'load':<12}{'':<6}{'steps':>6}{'events':>9}{'loop us':>9}{'run us':>8}{'twin us':>9}"
          f"{'loop ratio':>11}{'run ratio':>10}")  # fmt: skip
    for name in names:
        for asynchronous in (False, True):
            case = case_of(LOADS[name], asynchronous)
            mine = simulated(case, repeats)
            begin = time.process_time()
            theirs = twin.simulate(case.requests, case.settings)
            seconds = time.process_time() - begin
            assert len(theirs.steps) == mine.run.steps, name
            assert len(theirs.events) == block_events(mine.run), name
            slow = seconds / mine.run.steps * 1e6
            print(
                f"{name:<12}{'async' if asynchronous else 'sync':<6}{mine.run.steps:>6}{len(theirs.events):>9}"
                f"{mine.loop:>9.3f}{mine.whole:>8.3f}{slow:>9.1f}{slow / mine.loop:>10.0f}x{slow / mine.whole:>9.0f}x"
                f"  {load_now()}",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------- a sweep


GRID: dict[str, list[Any]] = {
    "num_blocks": [4000, 8000, 16000, 32000],
    "max_num_seqs": [32, 64, 128, 256],
    "max_num_batched_tokens": [2048, 8192],
    "async_scheduling": [False, True],
}


def long_recording(n: int) -> tuple[Recorded, Settings]:
    """`n` requests with prompts of 256 to 767 tokens, half of each shared in 200 groups, and outputs of 32 to 351."""
    rng = random.Random(7)
    fresh = itertools.count(200 * 64)
    requests = []
    for i in range(n):
        prompt, output, group = rng.randrange(256, 768), rng.randrange(32, 352), rng.randrange(200)
        shared = range(group * 64, group * 64 + prompt // 2 // BLOCK)
        chain = (*shared, *itertools.islice(fresh, (prompt + output) // BLOCK - len(shared)))
        requests.append(twin_words.Request(0, prompt, output, output, chain, arrival_time=float(i), request_id=f"r{i}"))
    settings = twin_words.Settings(num_blocks=8000, block_size=BLOCK, max_num_seqs=128, max_num_batched_tokens=BUDGET)
    case = Case(settings, requests, [])
    return as_recorded(case), as_settings(settings)


def sweep_once(path: str, threads: int) -> None:
    """In a process of its own: opens a trace and runs the grid over it; prints a line of JSON."""
    from kvtrace_replay.schedulers.sweep import simulate
    from kvtrace_traces import open_trace

    simulate(open_trace(path), threads=1)  # compiles, or loads what is compiled
    base = peak()
    begin = time.perf_counter()
    cells = simulate(open_trace(path), GRID, threads=threads)
    wall = time.perf_counter() - begin
    runs = [cell.run for cell in cells if cell.run is not None]
    assert len(runs) == len(cells)
    print(json.dumps({
        "cells": len(cells), "wall": wall, "loops": sum(run.seconds for run in runs), "base": base, "peak": peak(),
        "steps": sum(run.steps for run in runs), "events": sum(map(block_events, runs)),
        "preemptions": sum(run.preemptions for run in runs),
    }))  # fmt: skip


def sweep_section(requests: int) -> None:
    from kvtrace_replay.schedulers.log import write_run

    print("64 settings over one trace: everything from opening it on, but compilation; memory before: after one run")
    print(f"{'requests':>9}{'trace MB':>9}{'threads':>8}{'wall s':>8}{'M steps':>9}{'k preempt':>10}{'M events/s':>11}"
          f"{'RSS before, MB':>15}{'peak RSS, MB':>13}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for n in (requests, 4 * requests):
            path = Path(place) / f"{n}.kvt"
            write_run(path, *long_recording(n))
            for threads in (1, 2):
                command = [sys.executable, __file__, "--sweep-once", str(path), str(threads)]
                told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                assert told["cells"] == 64
                print(
                    f"{n:>9}{path.stat().st_size / 1e6:>9.0f}{threads:>8}{told['wall']:>8.2f}"
                    f"{told['steps'] / 1e6:>9.2f}{told['preemptions'] / 1e3:>10.1f}"
                    f"{told['events'] / told['wall'] / 1e6:>11.1f}{told['base']:>15.0f}{told['peak']:>13.0f}"
                    f"  {load_now()}",
                    flush=True,
                )


def peak() -> float:
    """The most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def load_now() -> str:
    return f"(load {os.getloadavg()[0]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="real,twin,sweep")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--repeats", type=int, default=15, help="of the simulator")
    parser.add_argument("--real-repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20_000, help="of the trace that is swept")
    parser.add_argument("--sweep-once", nargs=2, metavar=("TRACE", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sweep_once:
        sweep_once(options.sweep_once[0], int(options.sweep_once[1]))
        return
    names = options.loads.split(",")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    for section in options.sections.split(","):
        if section == "real":
            real_section(names, options.repeats, options.real_repeats)
        elif section == "twin":
            twin_section(names, options.repeats)
        elif section == "sweep":
            sweep_section(options.requests)
        else:
            parser.error(f"no section is called {section}")
        print()


if __name__ == "__main__":
    main()
