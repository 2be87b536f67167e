"""From a Mooncake JSONL file to a table of hit ratios, beside the public `kvcache-simulator` (its C++ backend):

    python benchmarks/mooncake_table.py TRACE.jsonl [--copies 10] [--rival-python PYTHON]

Both read the same file in fresh processes and replay FIFO, LRU and the clairvoyant rule at the same capacities, and
count the last half of the requests: `kvtrace replay TRACE.jsonl` on one side, `kvcache-simulator run` on the other,
each for as long as its table takes. What either compiles is compiled beforehand, and nothing is kept of the file from
one run to the next; a further line says what a table takes where it was kept. `--copies` makes the trace longer, each
copy with ids of its own. Prints the best time of each side out of `--rounds`, alternating, by the clock and in CPU time
of the process, and what a Python takes to start that imports NumPy, Polars and Numba, which is as fast as any table of
kvtrace can be. Then the time from file to table within a Python that has made one before, as in a notebook or a script
that goes through many files: `kvtrace.replay(TRACE)` beside `parse_trace_file` and `run_sweep`. And the hit ratios of
both; FIFO and LRU must be equal, its clairvoyant rule may leave blocks out and is another one.
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

BLOCK_TOKENS = 512
RIVAL_POLICIES = {"fifo": "fifo", "lru": "lru", "opt": "optimal"}


def lengthen(source: Path, out: Path, copies: int) -> int:
    """Write `copies` of the trace one after the other, with a block size in each line; returns the lines."""
    rows = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    stride = 1 + max(max(row["hash_ids"], default=0) for row in rows)
    span = 1 + max(row["timestamp"] for row in rows)
    with out.open("w") as file:
        for copy in range(copies):
            for row in rows:
                ids = [value + copy * stride for value in row["hash_ids"]]
                file.write(
                    json.dumps(
                        {
                            **row,
                            "timestamp": row["timestamp"] + copy * span,
                            "hash_ids": ids,
                            "block_size": BLOCK_TOKENS,
                        }
                    )
                    + "\n"
                )
    return copies * len(rows)


class Best:
    """The least seconds that a command took, by the clock and of CPU time, and its last output."""

    def __init__(self, *command: str, keep: bool = False) -> None:
        self.command = command
        self.environment = {**os.environ, "KVTRACE_WORKLOADS": "on" if keep else "off"}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled, as the rival is
        self.wall = self.cpu = float("inf")
        self.output = ""

    def run(self) -> str:
        begin, before = time.perf_counter(), os.times()
        done = subprocess.run(self.command, check=True, capture_output=True, text=True, env=self.environment)
        wall, after = time.perf_counter() - begin, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        self.wall, self.cpu, self.output = min(self.wall, wall), min(self.cpu, cpu), done.stdout
        return self.output


THEIRS = """
import sys, time
from kvcache_sim.simulator import run_sweep
from kvcache_sim.trace import parse_trace_file
trace, model, *budgets = sys.argv[1:]
for _ in sys.stdin:
    begin = time.perf_counter()
    run_sweep(parse_trace_file(trace), model_id=model, budgets_gib=[float(budget) for budget in budgets])
    print(time.perf_counter() - begin, flush=True)
"""
OURS = """
import sys, time
import kvtrace
trace, policies, *capacities = sys.argv[1:]
for _ in sys.stdin:
    begin = time.perf_counter()
    table = kvtrace.replay(trace, policy=policies.split(","), capacity=[int(n) for n in capacities], warmup=0.5)
    assert len(table) == len(capacities) * len(policies.split(","))
    print(time.perf_counter() - begin, flush=True)
"""


class Within:
    """The least seconds of a table within a Python that runs `script` and has made one before."""

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        environment = {**os.environ, "KVTRACE_WORKLOADS": "off"}
        self.process = subprocess.Popen(
            [python, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=environment,
        )  # fmt: skip
        self.best = float("inf")
        self._ask()

    def _ask(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        return float(self.process.stdout.readline())

    def run(self) -> None:
        self.best = min(self.best, self._ask())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--model", default="llama-3.3-70b", help="the rival's name of the model that sizes a block")
    parser.add_argument("--budgets-gib", default="64,128,256,512,1024,2048,4096,8192")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        requests = lengthen(options.trace, trace, options.copies)
        rival = Best(
            options.rival_python, "-m", "kvcache_sim", "run", "--trace", str(trace), "--model", options.model,
            "--budgets-gib", options.budgets_gib, "--no-progress", "--format", "json",
        )  # fmt: skip
        theirs: dict[str, Any] = json.loads(rival.run())
        capacities = ",".join(str(point["cacheBlocks"]) for point in theirs["points"])
        table = [
            sys.executable, "-m", "kvtrace", "replay", str(trace), "--policy", ",".join(RIVAL_POLICIES), "--capacity",
            capacities, "--warmup", "0.5", "--json",
        ]  # fmt: skip
        ours, again = Best(*table), Best(*table, keep=True)
        bare = Best(sys.executable, "-c", "import numpy, polars, numba")
        sides = {"kvcache-simulator": rival, "kvtrace": ours, "kvtrace, asked again": again, "imports alone": bare}
        for best in sides.values():  # compiles, and keeps
            best.run()
            best.wall = best.cpu = float("inf")
        for _ in range(options.rounds):
            for best in sides.values():
                best.run()
        rows = json.loads(ours.output)
        within = [
            Within(options.rival_python, THEIRS, str(trace), options.model, *options.budgets_gib.split(",")),
            Within(sys.executable, OURS, str(trace), ",".join(RIVAL_POLICIES), *capacities.split(",")),
        ]
        for _ in range(options.rounds):
            for one in within:
                one.run()
        for one in within:
            one.close()
    print(f"{requests:,} requests, {theirs['metadata']['eventCount']:,} blocks, {len(rows)} cells; "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    for name, best in sides.items():
        print(
            f"{name:22} {best.wall:7.2f} s, {best.cpu:7.2f} s of CPU time; "
            f"{rival.wall / best.wall:5.1f} and {rival.cpu / best.cpu:5.1f} times as fast as kvcache-simulator"
        )
    told, made = (one.best for one in within)
    print(f"within a Python, kvcache-simulator {told:.3f} s, kvtrace {made:.3f} s: {told / made:.1f} times as fast")
    for row in rows:
        point = next(p for p in theirs["points"] if p["cacheBlocks"] == row["capacity_blocks"])
        ratio = point["results"][RIVAL_POLICIES[row["policy"]]]["hitRate"]
        cell = f"{row['policy']:5} {row['capacity_blocks']:>9,} blocks"
        print(f"{cell}: tokens hit {row['token_hit_ratio']:.6f}, there {ratio:.6f}")


if __name__ == "__main__":
    main()
