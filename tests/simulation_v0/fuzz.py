"""Compares the simulation with vLLM 0.4.2's own scheduler and block manager on random cases, and counts.

    cd tests && python -m simulation_v0.fuzz --seeds 500

Runs every seed with each way to preempt (`recompute`, `swap`, `hybrid`), through the real code, the twin and the
compiled scheduler. Every call is compared: its kind, requests and tokens, preemptions of each kind, blocks moved,
requests dropped, free blocks of both pools, the lengths of the queues; and every request's end. Prints each mismatch,
and at the end how many runs there were, how many mismatches, what happened in the real runs, and what a call took.
Status 1 if there was a mismatch.
The first run fetches vLLM 0.4.2's Python files into `.engines`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from kvtrace_replay.schedulers.vllm_v0.run import compile_v0

from .cases import Case, random_case
from .judge import Judge, unpack
from .kernel import difference, kernel_run, simulated
from .twin import Run, Twin

SOURCES = Path(__file__).resolve().parents[2] / ".engines"
IN_VLLM, IN_KERNEL = "ns in vLLM", "ns in the kernel"
MODES = ("recompute", "swap", "hybrid")


def tell(run: Run, case: Case) -> Counter[str]:
    """What happened in a run."""
    said = Counter({"calls": len(run.steps), "requests": len(run.requests), f"ended: {run.ended}": 1})
    said["runs with preemption"] += any(row[2] or row[3] for row in run.requests)
    said["runs that leak"] += run.leaked > 0
    said["runs with mended defects"] += bool(case.settings.mend)
    for step in run.steps:
        said["recomputed"] += len(step[2])
        said["swapped out"] += len(step[3])
        said["blocks swapped out"] += sum(blocks for _, blocks in step[3])
        said["calls with several victims"] += len(step[2]) + len(step[3]) > 1
        said["calls with victims of both kinds"] += bool(step[2]) and bool(step[3])
    for row in run.requests:
        said[row[8]] += 1
    return said


def wrong(case: Case, judge: Judge, said: Counter[str]) -> list[str]:
    """What twin and kernel do otherwise than vLLM, of at most two lines."""
    begin = time.perf_counter()
    theirs = judge.run(case)
    said[IN_VLLM] += round(1e9 * (time.perf_counter() - begin))
    said[IN_KERNEL] += round(1e9 * simulated(case, detail=False).seconds)
    said.update(tell(theirs, case))
    found = {"twin": difference(Twin(case).run(), theirs), "kernel": difference(kernel_run(case), theirs)}
    return [f"{who}: {what}" for who, what in found.items() if what]


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    begin, counts = time.monotonic(), dict.fromkeys(arguments.modes, 0)
    said: dict[str, Counter[str]] = {mode: Counter() for mode in arguments.modes}
    compile_v0()
    with Judge(unpack(SOURCES)) as judge:
        for seed in range(arguments.start, arguments.start + arguments.seeds):
            for mode in arguments.modes:
                found = wrong(random_case(seed, mode), judge, said[mode])
                counts[mode] += bool(found)
                if found:
                    print(f"seed {seed}, {mode}: " + "; ".join(found), flush=True)
    for mode in arguments.modes:
        print(f"{mode}: {arguments.seeds} runs, {counts[mode]} mismatches")
        theirs, mine = (said[mode].pop(name) / said[mode]["calls"] / 1e3 for name in (IN_VLLM, IN_KERNEL))
        print(f"  a call takes vLLM {theirs:.1f} us, and the simulation {mine:.3f} us")
        print("  " + ", ".join(f"{n} {what}" for what, n in sorted(said[mode].items()) if n))
    print(f"{time.monotonic() - begin:.0f} s")
    sys.exit(any(counts.values()))


if __name__ == "__main__":
    main()
