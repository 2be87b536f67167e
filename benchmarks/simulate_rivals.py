"""Requests a second of the simulator on a public trace, beside another public trace-replay simulator.

    python benchmarks/simulate_rivals.py mooncake_trace.jsonl [--rival-python RIVAL/bin/python]

The trace is block hashes in the Mooncake format: JSON lines with input_length, output_length and hash_ids, one id per
block of 512 tokens of the prompt. Both sides simulate one vLLM engine (one worker, all requests there from the start,
first come first served, prefix caching, chunked prefill) from the file to the result, in one thread. As a workload for
the simulator a request has its input and output tokens; its chain is the hash ids of the prompt's full blocks, which
are prefix ids already; later blocks are nobody else's. With 16-token blocks each 512-token identity stands for 32. The
simulator runs once with all requests there from the start, and once in time: at the trace's times, with a cost of each
step and latencies. The rival runs in both ways, too, and in a closed loop with as many requests under way as run at
once. Compared is its fastest mode.

The rival is NVIDIA Dynamo's mocker with its offline replay, compiled Rust with vLLM's scheduling and block management
as its model; it also makes timings. In an environment of its own (Python 3.12 or so):

    python -m venv RIVAL && RIVAL/bin/pip install --no-deps ai-dynamo-runtime==1.5.1

1.4 to 1.6 are about equally fast, 1.2 and 1.3 slower. Times are the best of `--repeats`, taken in turns, by the clock
and in CPU time of all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.imported import recorded_import
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1.run import Run, compile_for, simulate_run
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_traces.importers.opened import open_import

PER_ID = 512
MODES = ("all at once", "closed loop", "at its times")
#: What a step takes where requests come at their times: of the order of an 8B model on an A100.
COSTS = StepCosts(9e6, prefill_token=100_000, prefill_pair=4, decode_row=20_000, decode_context=150)
#: Runs in the rival's environment: file, blocks, block size, requests at once, tokens a step, mode.
RIVAL = """
import json, sys, time
from dynamo._core import MockEngineArgs, run_mocker_trace_replay
path, blocks, size, seqs, tokens, mode = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
engine = MockEngineArgs(
    engine_type="vllm", num_gpu_blocks=blocks, block_size=size, max_num_seqs=seqs, max_num_batched_tokens=tokens
)
closed = {"replay_concurrency": seqs} if mode == "closed loop" else {}
def replay():
    return run_mocker_trace_replay(
        [path], extra_engine_args=engine, num_workers=1, replay_mode="offline", trace_block_size=512, **closed
    )
replay()
begin, before = time.perf_counter(), time.process_time()
told = replay()
seconds, cpu = time.perf_counter() - begin, time.process_time() - before
told = getattr(told, "summary", told)
print("RESULT", json.dumps({
    "seconds": seconds, "cpu": cpu, "requests": told["completed_requests"], "tokens": told["total_output_tokens"],
    "hits": told["prefix_cache_reused_ratio"], "replay": told["wall_time_ms"] / 1e3,
}))
"""


@njit(cache=False)
def split(chain: Any, at: Any, finer: Any, finer_at: Any, parts: int) -> None:
    """Write to `finer` the identities of `parts` blocks for each of `chain` (CSR, `at` and `finer_at`)."""
    for request in range(at.size - 1):
        place = finer_at[request]
        for i in range(at[request], at[request + 1]):
            for part in range(parts):
                finer[place] = chain[i] * parts + part
                place += 1


def workload(path: Path, block_size: int) -> Recorded:
    """The file as what reached one engine: as `kvtrace simulate` takes an import of it, in finer blocks where asked."""
    opened = open_import(path)
    whole = recorded_import(opened, opened.header, timed=True)
    parts = PER_ID // block_size
    if parts == 1:
        return whole
    at = whole.chain_at * parts
    chain = np.empty(at[-1], np.int32)
    split(whole.chain, whole.chain_at, chain, at, parts)
    return replace(
        whole,
        header={**whole.header, "block_size": block_size, "granule": block_size},
        chain=chain,
        chain_at=at,
        hashes=np.broadcast_to(np.uint64(0), whole.hashes.size * parts),  # no log is written
    )


def settings_of(options: Any, block_size: int, asynchronous: bool, longest: int) -> Settings:
    return Settings(
        num_blocks=options.tokens // block_size + 1, block_size=block_size, max_num_seqs=options.seqs,
        max_num_batched_tokens=options.budget, prefix_caching=True, chunked_prefill=True,
        long_prefill_token_threshold=0, scheduling_policy="fcfs", async_scheduling=asynchronous, watermark=0.0,
        max_num_scheduled_tokens=options.budget, long_prefill_token_threshold_adaptive=False, max_num_active_seqs=None,
        reserve_full_isl=True, max_model_len=longest + 1, rules=NEWEST,
    )  # fmt: skip


class Mine:
    """Our side at one block size: the best times in seconds of the loop, the run and everything from the file on (of
    these also in CPU time)."""

    def __init__(self, options: Any, block_size: int, asynchronous: bool, timed: bool = False) -> None:
        self.timing: dict[str, Any] = {"arrivals": "time", "costs": COSTS} if timed else {}
        self.path, self.block_size = Path(options.trace), block_size
        recorded = workload(self.path, block_size)
        self.settings = settings_of(options, block_size, asynchronous, int(recorded.stop.max()))
        compile_for(recorded, self.settings)
        self.loop = self.run = self.all = self.cpu = float("inf")
        self.result: Run = self.once()

    def once(self) -> Run:
        begin, before = time.perf_counter(), time.process_time()
        recorded = workload(self.path, self.block_size)
        ready = time.perf_counter()
        run = simulate_run(recorded, self.settings, **self.timing)
        end = time.perf_counter()
        assert run.finished == recorded.n_requests
        self.loop, self.run = min(self.loop, run.seconds), min(self.run, end - ready)
        self.all, self.cpu = min(self.all, end - begin), min(self.cpu, time.process_time() - before)
        return run


def rival_once(options: Any, path: str, block_size: int, mode: str) -> dict[str, Any] | str:
    """What the rival told, or why it did not run."""
    numbers = (options.tokens // block_size, block_size, options.seqs, options.budget)
    command = [options.rival_python, "-c", RIVAL, path, *map(str, numbers), mode]
    environment = {**os.environ, "DYN_LOG": "error"}
    for name in ("PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            told: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return told
    return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def all_at_once(path: str, folder: str) -> str:
    """A copy of the trace in which every request comes at the start."""
    copy = Path(folder) / "at-once.jsonl"
    with open(path) as lines, open(copy, "w") as out:
        out.writelines(json.dumps({**json.loads(line), "timestamp": 0}) + "\n" for line in lines if line.strip())
    return str(copy)


def compare(options: Any, block_size: int, folder: str) -> None:
    mine = {
        "sync": Mine(options, block_size, False),
        "async": Mine(options, block_size, True),
        "in time": Mine(options, block_size, False, timed=True),
    }
    copy = all_at_once(options.trace, folder)
    best: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for _ in range(options.repeats):
        for one in mine.values():
            for _ in range(5):
                one.once()
        for mode in MODES if options.rival_python else ():
            told = rival_once(options, copy if mode == "all at once" else options.trace, block_size, mode)
            if isinstance(told, str):
                failed[mode] = told
            elif mode in best:
                for key in ("seconds", "cpu", "replay"):
                    best[mode][key] = min(best[mode][key], told[key])
            else:
                best[mode] = told
    n = mine["sync"].result.requests.shape[0]
    for name, one in mine.items():
        run = one.result
        row(
            f"kvtrace, {name}",
            block_size,
            one.all,
            one.cpu,
            n,
            run.hit_tokens / run.lookup_tokens,
        )
        print(f"{'':<26}run alone {n / one.run:,.0f} requests/s, loop alone {n / one.loop:,.0f}; {run.steps} steps, "
              f"{run.preemptions} preemptions, {run.evictions} evictions")  # fmt: skip
    for mode, told in best.items():
        assert told["requests"] == n, told
        row(f"rival, {mode}", block_size, told["seconds"], told["cpu"], n, told["hits"])
        print(f"{'':<26}replay alone, as it says itself: {n / told['replay']:,.0f} requests/s")
    for mode, why in failed.items():
        print(f"rival, {mode}: {why}")
    if best:
        fastest, cpu, replay = (min(told[key] for told in best.values()) for key in ("seconds", "cpu", "replay"))
        for name in ("sync", "in time"):
            one = mine[name]
            print(
                f"ratio of {name} to its fastest mode: from the file on {fastest / one.all:.1f}x by the clock, "
                f"{cpu / one.cpu:.1f}x in CPU time; without reading the file {replay / one.run:.1f}x with our run, "
                f"{replay / one.loop:.1f}x with our loop alone"
            )


def row(what: str, block_size: int, seconds: float, cpu: float, n: int, hits: float) -> None:
    print(
        f"{what:<26}{block_size:>6}{seconds * 1e3:>10.1f}{cpu * 1e3:>10.1f}{n / seconds:>13,.0f}{hits:>10.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--rival-python", help="the interpreter of the environment that the rival is installed in")
    parser.add_argument("--tokens", type=int, default=20_000 * PER_ID, help="in the cache")
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--budget", type=int, default=8192, help="tokens a step")
    parser.add_argument("--block-sizes", default="512,16")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not options.rival_python:
        print("no --rival-python: our own figures alone", file=sys.stderr)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<26}{'block':>6}{'ms':>10}{'CPU ms':>10}{'requests/s':>13}{'hits':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, options.block_sizes.split(",")):
            compare(options, size, folder)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
