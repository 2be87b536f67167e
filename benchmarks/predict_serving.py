"""Predicted against measured: a real `vllm serve` under Poisson load, recorded at one setting, predicted at others.

    python benchmarks/predict_serving.py [--rounds 3] [--requests 100] [--rate 2] [--out FOLDER]

Serves SmolLM2-135M on this machine's CPU under `kvtrace record`, with requests that come as a Poisson process, share
prefixes in families, and have fixed lengths. In each round the server is run once at the base setting and once at each
other one. From the round's base run alone come the costs of a step, the arrivals and the chains; `kvtrace simulate
--arrivals time` then predicts every setting. The table has medians over the rounds with their spread, measured and
predicted. (A shared machine is faster in one quarter of an hour than in the next: runs side by side share that.)

Measured figures are the engine's, from each run's own trace: arrival at the front end to the step that gave the token.
The base setting is predicted too: what is off there is the timing model and the machine's noise, not the scheduler.
Needs the engine and the model (`make engine`). Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import kvtrace
from kvtrace.simulation_options import profile_for
from kvtrace.simulations import simulate_trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engine_support.serve import Server

ROOT = Path(__file__).resolve().parents[1]
FAMILIES, PREFIX, VOCABULARY = 6, 160, 40_000
WARMING = 4  # first requests, of which no figure speaks: what the first passes compile is not the engine's speed
#: Rows of the table: name, unit, and the goal for the relative error of a prediction.
FIGURES = (
    ("hit_tokens", "tokens", 0.02), ("output_tokens_per_s", "tokens/s", 0.05), ("ttft_mean_s", "s", 0.10),
    ("ttft_p90_s", "s", None), ("itl_mean_s", "s", 0.10), ("itl_p90_s", "s", None), ("preemptions", "times", None),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a run differs in. `speed`: of the arrivals, against the base."""

    name: str
    num_blocks: int
    max_num_seqs: int
    speed: float = 1.0


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, s; its prompt; how many tokens it wants."""

    at_s: float
    prompt: list[int]
    tokens: int


def asks(many: int, rate: float, seed: int) -> list[Ask]:
    """Requests of a few families that share a prefix each, at Poisson times."""
    r = random.Random(seed)
    prefixes = [[r.randrange(10, VOCABULARY) for _ in range(PREFIX)] for _ in range(FAMILIES)]
    now, made = 0.0, []
    for _ in range(many):
        own = [r.randrange(10, VOCABULARY) for _ in range(r.randrange(20, 160))]
        made.append(Ask(now, prefixes[min(int(r.expovariate(0.6)), FAMILIES - 1)] + own, r.randrange(20, 90)))
        now += r.expovariate(rate)
    return made


def serve(setting: Setting, requests: list[Ask], model: Path, trace: Path) -> None:
    """Run the server at `setting` under `kvtrace record -o TRACE`, with clients in threads."""
    args = [
        "--num-gpu-blocks-override", str(setting.num_blocks), "--max-num-seqs", str(setting.max_num_seqs),
        "--block-size", "32", "--max-model-len", "512", "--max-num-batched-tokens", "512",
    ]  # fmt: skip
    prefix = [str(Path(sys.executable).parent / "kvtrace"), "record", "-o", str(trace), "--"]
    failed: list[BaseException] = []

    def ask(one: Ask) -> None:
        try:
            server.complete(one.prompt, max_tokens=one.tokens)
        except BaseException as error:
            failed.append(error)

    with Server(model, trace.parent / "log", args=args, prefix=prefix) as server:
        for _ in range(WARMING):
            server.complete([7] * 100, max_tokens=8)
        threads, begin = [], time.monotonic() + 0.5
        for one in requests:
            time.sleep(max(begin + one.at_s / setting.speed - time.monotonic(), 0))
            threads.append(threading.Thread(target=ask, args=(one,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        server.stop()
    if failed:
        raise failed[0]


def measured(trace: Path) -> dict[str, float]:
    """FIGURES of a run, from its trace."""
    opened = kvtrace.open(trace)
    wall = int(opened.header["clock_wall_ns"])
    told = opened.sql(f"""
        SELECT output_tokens, arrival_s, arrival_s + e2e AS end_s, ttft AS ttft_s FROM (
          SELECT request, output_tokens, arrival_s, ({wall} + finish_ns) / 1e9 - arrival_s AS e2e,
                 ({wall} + first_token_ns) / 1e9 - arrival_s AS ttft
          FROM requests JOIN latencies USING (request)) WHERE request >= {WARMING}""")
    gaps = (
        opened.sql(f"""
        SELECT (end_ns - lag(end_ns) OVER (PARTITION BY r.request ORDER BY step)) / 1e9 AS s
        FROM step_requests r JOIN steps USING (step) JOIN requests USING (request)
        WHERE r.request >= {WARMING} AND computed_before + r.tokens >= prompt_tokens""")["s"]
        .drop_nulls()
        .to_numpy()
    )
    hits = opened.lookups.filter(pl.col("request") >= WARMING)["tokens_hit"].sum()
    lost = opened.preemptions.height
    return figures(told, float(gaps.mean()), float(np.quantile(gaps, 0.9)), int(hits), lost)


def predicted(base: Path, setting: Setting) -> dict[str, float]:
    """FIGURES of `setting`, from the base run's trace."""
    options: dict[str, Any] = {"num_blocks": [setting.num_blocks], "max_num_seqs": [setting.max_num_seqs]}
    found = simulate_trace(kvtrace.open(base), options, arrivals="time", rate=f"x{setting.speed:g}")
    run, row = found.cells[0][1].run, found.frame().to_dicts()[0]
    if run is None:
        raise SystemExit(row["why"])
    each = found.per_request().filter(pl.col("request") >= WARMING)
    told = each.with_columns(end_s=pl.col("arrival_s") + pl.col("e2e_s"))
    return figures(told, row["itl_mean_s"], row["itl_p90_s"], int(each["hit_tokens"].sum()), run.preemptions)


def figures(told: pl.DataFrame, itl_mean_s: float, itl_p90_s: float, hits: int, preemptions: int) -> dict[str, float]:
    """FIGURES of requests with `arrival_s`, `end_s`, `ttft_s` and `output_tokens`."""
    ttft = told["ttft_s"].to_numpy()
    lasted = float(told["end_s"].to_numpy().max() - told["arrival_s"].to_numpy().min())
    return {
        "hit_tokens": float(hits),
        "output_tokens_per_s": float(told["output_tokens"].sum()) / lasted,
        "ttft_mean_s": float(ttft.mean()),
        "ttft_p90_s": float(np.quantile(ttft, 0.9)),
        "itl_mean_s": itl_mean_s,
        "itl_p90_s": itl_p90_s,
        "preemptions": float(preemptions),
        "seconds": lasted,
    }


def line(setting: str, name: str, unit: str, goal: float | None, guesses: list[float], real: list[float]) -> str:
    """One row of the table, in Markdown."""
    middle, guess = statistics.median(real), statistics.median(guesses)
    off = f"{guess / middle - 1:+.1%}" if middle else "-"
    aim = "" if goal is None else f"{goal:.0%}"
    return f"| {setting} | {name} ({unit}) | {spread(real)} | {spread(guesses)} | {off} | {aim} |"


def spread(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.4g}" if low == high else f"{middle:,.4g} ({low:,.4g} to {high:,.4g})"


Round = dict[str, tuple[dict[str, float], dict[str, float]]]


def one_round(settings: list[Setting], requests: list[Ask], model: Path, folder: Path) -> Round:
    """By setting, its figures measured and predicted from the run at the first setting."""
    made: Round = {}
    for setting in settings:
        print(f"{folder.name}, {setting.name}", file=sys.stderr, flush=True)
        trace = trace_of(setting, folder)
        serve(setting, requests, model, trace)
        made[setting.name] = measured(trace), predicted(trace_of(settings[0], folder), setting)
    timing = profile_for(kvtrace.open(trace_of(settings[0], folder)), None, "time")
    for error in timing.errors if timing else ():
        told = f"off by {error.median:.1%} (median), {error.p95:.1%} (95th percentile)"
        print(f"{folder.name}, steps of the first run, {error.batch}: {told}", flush=True)
    return made


def trace_of(setting: Setting, folder: Path) -> Path:
    return folder / setting.name.split(":")[0] / "trace"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, help="where to keep the traces (default: nowhere)")
    options = parser.parse_args()
    settings = [
        Setting("base: 120 blocks, 16 sequences", 120, 16),
        Setting("60 blocks", 60, 16),
        Setting("6 sequences", 120, 6),
        Setting("1.5 times the rate", 120, 16, 1.5),
    ]
    requests = asks(options.requests, options.rate, options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        rounds = [
            one_round(settings, requests, options.model, (options.out or Path(scratch)) / f"round {nth + 1}")
            for nth in range(options.rounds)
        ]
        print("| setting | figure | measured, median (spread) | predicted, median (spread) | off | goal |")
        print("|---|---|---|---|---|---|")
        for setting in settings:
            real, guesses = ([made[setting.name][i] for made in rounds] for i in (0, 1))
            for name, unit, goal in FIGURES:
                print(line(setting.name, name, unit, goal, [g[name] for g in guesses], [r[name] for r in real]))
        base = trace_of(settings[0], (options.out or Path(scratch)) / "round 1")
        took = rounds[0][settings[0].name][0]["seconds"]
        begin = time.perf_counter()
        kernel = simulate_trace(kvtrace.open(base), {}, arrivals="time").frame()["seconds"][0]
        whole = time.perf_counter() - begin
        print(f"a run of {took:.1f} s: simulated in {kernel * 1e3:.2f} ms ({took / kernel:,.0f} times faster), with "
              f"reading the trace and learning its costs in {whole:.2f} s ({took / whole:,.0f} times)")  # fmt: skip


if __name__ == "__main__":
    main()
