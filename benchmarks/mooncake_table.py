"""From a Mooncake JSONL file to a table of hit ratios, beside the public `kvcache-simulator` (its C++ backend):

    python benchmarks/mooncake_table.py TRACE.jsonl [--copies 10] [--rival-python PYTHON]

Both read the same file in fresh processes and replay FIFO, LRU and the clairvoyant rule at the same capacities, and
count the last half of the requests: `kvtrace import` and `kvtrace replay` on one side, `kvcache-simulator run` on the
other, each for as long as its table takes. What either compiles is compiled beforehand. `--copies` makes the trace
longer, each copy with ids of its own. Prints the best time of each side out of `--rounds`, alternating, and the hit
ratios of both; FIFO and LRU must be equal, its clairvoyant rule may leave blocks out and is another one.
"""

from __future__ import annotations

import argparse
import json
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


def timed(*commands: list[str]) -> tuple[float, str]:
    """Seconds for all commands, one after the other, and the last one's output."""
    begin, output = time.perf_counter(), ""
    for command in commands:
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - begin, output


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
        trace, log = Path(folder) / "trace.jsonl", str(Path(folder) / "trace.kvt")
        requests = lengthen(options.trace, trace, options.copies)
        rival = [
            options.rival_python, "-m", "kvcache_sim", "run", "--trace", str(trace), "--model", options.model,
            "--budgets-gib", options.budgets_gib, "--no-progress", "--format", "json",
        ]  # fmt: skip
        theirs: dict[str, Any] = json.loads(timed(rival)[1])
        capacities = ",".join(str(point["cacheBlocks"]) for point in theirs["points"])
        kvtrace = [sys.executable, "-m", "kvtrace"]
        ours = [
            [*kvtrace, "import", "mooncake", str(trace), "-o", log, "--force"],
            [
                *kvtrace,
                "replay",
                log,
                "--policy",
                ",".join(RIVAL_POLICIES),
                "--capacity",
                capacities,
                "--warmup",
                "0.5",
                "--json",
            ],
        ]
        rows = json.loads(timed(*ours)[1])
        best_rival = best_ours = float("inf")
        for _ in range(options.rounds):
            best_rival = min(best_rival, timed(rival)[0])
            best_ours = min(best_ours, timed(*ours)[0])
    print(f"{requests:,} requests, {theirs['metadata']['eventCount']:,} blocks, {len(rows)} cells")
    print(f"kvcache-simulator {best_rival:7.2f} s")
    print(f"kvtrace           {best_ours:7.2f} s   {best_rival / best_ours:.1f} times faster")
    for row in rows:
        point = next(p for p in theirs["points"] if p["cacheBlocks"] == row["capacity_blocks"])
        ratio = point["results"][RIVAL_POLICIES[row["policy"]]]["hitRate"]
        cell = f"{row['policy']:5} {row['capacity_blocks']:>9,} blocks"
        print(f"{cell}: tokens hit {row['token_hit_ratio']:.6f}, there {ratio:.6f}")


if __name__ == "__main__":
    main()
