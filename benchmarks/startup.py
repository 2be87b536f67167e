"""How long the first answer takes: `python benchmarks/startup.py [--rounds 15]`.

Every round starts each of the processes below once, one after the other; the best of all rounds counts, and ratios are
to a Python that does nothing, started in the same rounds. `import click` is what any command line made with click pays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

SAMPLE = str(Path(__file__).parents[1] / "traces" / "samples" / "thrash.kvt")
CASES = {
    "python -c pass": ["-c", "pass"],
    "import click": ["-c", "import click"],
    "import kvtrace": ["-c", "import kvtrace"],
    "kvtrace --help": ["-m", "kvtrace", "--help"],
    "kvtrace info SAMPLE": ["-m", "kvtrace", "info", SAMPLE],
    "kvtrace replay SAMPLE": ["-m", "kvtrace", "replay", SAMPLE, "--policy", "lru", "--capacity", "100,inf"],
    "kvtrace simulate SAMPLE": ["-m", "kvtrace", "simulate", SAMPLE, "--num-blocks", "150"],
}


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for arguments in CASES.values():
        seconds(arguments)  # compiles what is not compiled yet
    best = dict.fromkeys(CASES, float("inf"))
    for _ in range(options.rounds):
        for name, arguments in CASES.items():
            best[name] = min(best[name], seconds(arguments))
    bare = best["python -c pass"]
    for name, taken in best.items():
        print(f"{name:26} {taken * 1e3:7.0f} ms  {taken / bare:5.1f} x a bare interpreter")


if __name__ == "__main__":
    main()
