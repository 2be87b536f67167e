"""Requests a second of the simulator on a public trace, beside another public trace-replay simulator.

    python benchmarks/simulate_rivals.py mooncake_trace.jsonl [--rival-python RIVAL/bin/python]

The trace is block hashes in the Mooncake format: JSON lines with input_length, output_length and hash_ids, one id per
block of 512 tokens of the prompt. Both sides simulate one vLLM engine (one worker, all requests there from the start,
first come first served, prefix caching, chunked prefill) from the file to the result, in one thread. As a workload for
the simulator a request has its input and output tokens; its chain is the hash ids of the prompt's full blocks, which
are prefix ids already, and one identity of its own for each later block. With 16-token blocks each 512-token identity
stands for 32. The simulator runs once with all requests there from the start, and once in time: at the trace's times,
with a cost of each step and latencies. The rival runs in both ways, too, and in a closed loop with as many requests
under way as run at once. Compared is its fastest mode.

The rival is NVIDIA Dynamo's mocker with its offline replay, compiled Rust with vLLM's scheduling and block management
as its model; it also makes timings. In an environment of its own (Python 3.12 or so):

    python -m venv RIVAL && RIVAL/bin/pip install --no-deps ai-dynamo-runtime==1.5.1

1.4 to 1.6 are about equally fast, 1.2 and 1.3 slower. Times are the best of `--repeats`, taken in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numba import njit

from kvtrace_replay.schedulers.families import NEWEST
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1.run import Run, compile_for, simulate_run
from kvtrace_replay.timing.costs import StepCosts
from kvtrace_traces.schema import FINISH_REASONS

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
begin = time.perf_counter()
told = replay()
seconds = time.perf_counter() - begin
told = getattr(told, "summary", told)
print("RESULT", json.dumps({
    "seconds": seconds, "requests": told["completed_requests"], "tokens": told["total_output_tokens"],
    "hits": told["prefix_cache_reused_ratio"], "replay": told["wall_time_ms"] / 1e3,
}))
"""


@njit(cache=False)
def fill_chains(chain, at, ids, given, prompt, own, per_id):
    """Write each request's identities to `chain`, those of no hash id from `own` on; returns how many there are."""
    start = 0
    for request in range(prompt.size):
        begin, end = at[request], at[request + 1]
        known = min(prompt[request] // PER_ID, given[request]) * per_id  # the last id may be of a partial block
        for nth in range(end - begin):
            if nth < known:
                chain[begin + nth] = ids[start + nth // per_id] * per_id + nth % per_id
            else:
                chain[begin + nth] = own
                own += 1
        start += given[request]
    return own


def workload(path: Path, block_size: int) -> Recorded:
    """The file as what reached one engine."""
    lines = pl.read_ndjson(path, schema={"timestamp": pl.Float64, "input_length": pl.Int32, "output_length": pl.Int32,
                                         "hash_ids": pl.List(pl.Int32)})  # fmt: skip
    due = (lines["timestamp"].to_numpy() * 1e6).astype(np.int64)
    n = lines.height
    prompt = np.ascontiguousarray(lines["input_length"].to_numpy())
    stop = prompt + np.maximum(lines["output_length"].to_numpy(), 1)
    ids = lines["hash_ids"].explode().to_numpy()
    given = lines["hash_ids"].list.len().to_numpy().astype(np.int64)
    at = np.zeros(n + 1, np.int64)
    np.cumsum(stop // block_size, out=at[1:])
    first_own = (int(ids.max(initial=0)) + 1) * (PER_ID // block_size)
    chain = np.empty(at[-1], np.int32)
    identities = fill_chains(chain, at, ids, given, prompt, first_own, PER_ID // block_size)
    zeros = np.zeros(n, np.int32)
    no, never = np.zeros(n, bool), np.zeros(n, np.int64)
    return Recorded(
        header={"block_size": block_size, "granule": block_size, "scheduler": {}}, prompt=prompt, stop=stop, most=stop,
        reason=np.full(n, FINISH_REASONS.index("length"), np.int32), no_read=no, priority=zeros,
        arrival_s=np.arange(n, dtype=np.float64), request_id=pl.Series(["r"]).new_from_index(0, n), arrival_step=zeros,
        arrival_late=no, abort_step=zeros - 2, abort_early=no, abort_ns=never, arrival_ns=never,
        due_ns=due - due.min(initial=0),
        tenant=np.zeros(n, np.uint64), chain=chain, chain_at=at,
        hashes=np.arange(identities, dtype=np.uint64), steps=0, unfinished=0, resets=0,
    )  # fmt: skip


def settings_of(options: Any, block_size: int, asynchronous: bool, longest: int) -> Settings:
    return Settings(
        num_blocks=options.tokens // block_size + 1, block_size=block_size, max_num_seqs=options.seqs,
        max_num_batched_tokens=options.budget, prefix_caching=True, chunked_prefill=True,
        long_prefill_token_threshold=0, scheduling_policy="fcfs", async_scheduling=asynchronous, watermark=0.0,
        max_num_scheduled_tokens=options.budget, long_prefill_token_threshold_adaptive=False, max_num_active_seqs=None,
        reserve_full_isl=True, max_model_len=longest + 1, rules=NEWEST,
    )  # fmt: skip


class Mine:
    """Our side at one block size: the best times in seconds of the loop, the run and everything from the file on."""

    def __init__(self, options: Any, block_size: int, asynchronous: bool, timed: bool = False) -> None:
        self.timing: dict[str, Any] = {"arrivals": "time", "costs": COSTS} if timed else {}
        self.path, self.block_size = Path(options.trace), block_size
        recorded = workload(self.path, block_size)
        self.settings = settings_of(options, block_size, asynchronous, int(recorded.stop.max()))
        compile_for(recorded, self.settings)
        self.loop = self.run = self.all = float("inf")
        self.result: Run = self.once()

    def once(self) -> Run:
        begin = time.perf_counter()
        recorded = workload(self.path, self.block_size)
        ready = time.perf_counter()
        run = simulate_run(recorded, self.settings, **self.timing)
        end = time.perf_counter()
        assert run.finished == recorded.n_requests
        self.loop, self.run = min(self.loop, run.seconds), min(self.run, end - ready)
        self.all = min(self.all, end - begin)
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
                best[mode]["seconds"] = min(best[mode]["seconds"], told["seconds"])
                best[mode]["replay"] = min(best[mode]["replay"], told["replay"])
            else:
                best[mode] = told
    n = mine["sync"].result.requests.shape[0]
    for name, one in mine.items():
        run = one.result
        row(
            f"kvtrace, {name}",
            block_size,
            one.all,
            n,
            run.hit_tokens / run.lookup_tokens,
        )
        print(f"{'':<26}run alone {n / one.run:,.0f} requests/s, loop alone {n / one.loop:,.0f}; {run.steps} steps, "
              f"{run.preemptions} preemptions, {run.evictions} evictions")  # fmt: skip
    for mode, told in best.items():
        assert told["requests"] == n, told
        row(f"rival, {mode}", block_size, told["seconds"], n, told["hits"])
        print(f"{'':<26}replay alone, as it says itself: {n / told['replay']:,.0f} requests/s")
    for mode, why in failed.items():
        print(f"rival, {mode}: {why}")
    if best:
        fastest, replay = (min(told[key] for told in best.values()) for key in ("seconds", "replay"))
        for name in ("sync", "in time"):
            one = mine[name]
            print(
                f"ratio of {name} to its fastest mode: from the file on {fastest / one.all:.1f}x; without reading the "
                f"file {replay / one.run:.1f}x with our run, {replay / one.loop:.1f}x with our loop alone"
            )


def row(what: str, block_size: int, seconds: float, n: int, hits: float) -> None:
    print(f"{what:<26}{block_size:>6}{seconds * 1e3:>10.1f}{n / seconds:>13,.0f}{hits:>10.4f}", flush=True)


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
    print(f"{'':<26}{'block':>6}{'ms':>10}{'requests/s':>13}{'hits':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, options.block_sizes.split(",")):
            compare(options, size, folder)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
