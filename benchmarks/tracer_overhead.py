"""What the tracer costs vLLM's scheduler, beside nothing and beside vLLM's own KV-event publisher.

    python benchmarks/tracer_overhead.py [--repeats 5] [--loads decode256,...]

Several real schedulers with a made-up model run the same scripted load in one process, in lockstep: step k of each does
the same work, and the order within a step rotates. Timed is `schedule` + `update_from_output`. Of each step the minimum
over the repetitions counts, which drops what the machine does meanwhile; `control` is a second scheduler without a
tracer and shows what is left of the noise. Needs the engine (`make test` installs it).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

SETTINGS: dict[str, dict[str, Any]] = {
    # Long generations of a full batch: what a busy server does most of the time.
    "decode256": {"seqs": 256, "prompts": 256, "prompt": 64, "output": 400, "num_blocks": 12000},
    "decode64": {"seqs": 64, "prompts": 64, "prompt": 64, "output": 400, "num_blocks": 4000},
    "decode8": {"seqs": 8, "prompts": 8, "prompt": 64, "output": 400, "num_blocks": 2000},
    # Requests come and go, with shared prefixes: lookups, hits, fills and frees all the time.
    "churn64": {"seqs": 64, "prompts": 1500, "prompt": 400, "output": 40, "num_blocks": 4000},
    # A cache far too small: evictions and preemptions in most steps.
    "thrash64": {"seqs": 64, "prompts": 300, "prompt": 200, "output": 120, "num_blocks": 700},
}


def build(model: str, kind: str, load: dict[str, Any], folder: Path) -> Any:
    """A scheduler of ``kind`` off, control, trace or kv-events, with the load queued."""
    from engine_support.stub import StubEngine

    extra: dict[str, Any] = {}
    if kind == "kv-events":
        port = 20000 + random.randrange(20000)
        extra["kv_events_config"] = {
            "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}",
        }  # fmt: skip
    if kind == "trace":
        os.environ["KVTRACE_OUT"] = str(folder)
    stub = StubEngine(
        model, num_blocks=load["num_blocks"], block_size=16, max_num_seqs=load["seqs"],
        max_num_batched_tokens=8192, max_model_len=2048, observe=False, **extra,
    )  # fmt: skip
    os.environ.pop("KVTRACE_OUT", None)
    rng = random.Random(5)
    shared = [[rng.randrange(3, 500) for _ in range(load["prompt"] // 2)] for _ in range(8)]
    for i in range(load["prompts"]):
        own = [rng.randrange(3, 500) for _ in range(load["prompt"] // 2)]
        # Staggered ends, so that blocks fill in every step.
        stub.add(shared[i % 8] + own[: len(own) - i % 16], load["output"] - i % 23)
    return stub


def run_once(model: str, kinds: list[str], load: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Nanoseconds of each step, by kind."""
    engines = {kind: build(model, kind, load, folder) for kind in kinds}
    times: dict[str, list[int]] = {kind: [] for kind in kinds}
    clock = time.perf_counter_ns
    gc.collect()
    gc.freeze()
    gc.disable()
    step = 0
    while any(engine.scheduler.has_requests() for engine in engines.values()):
        order = kinds[step % len(kinds) :] + kinds[: step % len(kinds)]
        for kind in order:
            engine = engines[kind]
            begin = clock()
            scheduled = engine.scheduler.schedule()
            middle = clock()
            output = engine._execute(scheduled)
            resumed = clock()
            engine.scheduler.update_from_output(scheduled, output)
            times[kind].append(clock() - resumed + middle - begin)
        step += 1
        if step % 256 == 0:
            gc.collect(0)
    gc.enable()
    gc.unfreeze()
    for engine in engines.values():
        engine.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loads", default=",".join(SETTINGS))
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from engine_support.models import tiny_llama

    # Armed once; from then on a scheduler is traced if KVTRACE_OUT is set when it is made.
    os.environ["KVTRACE_OUT"] = "armed"
    import kvtrace_tracer

    kvtrace_tracer.register()
    del os.environ["KVTRACE_OUT"]
    kinds = ["off", "control", "trace", "kv-events"]
    print(f"{'load':<11}{'steps':>7}{'off us/step':>13}{'control':>9}{'kvtrace':>9}{'kv events':>11}"
          f"{'us/event':>10}{'B/event':>9}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model = str(tiny_llama(Path(place) / "model"))
        for name in arguments.loads.split(","):
            best: dict[str, list[int]] = {}
            for repeat in range(arguments.repeats):
                folder = Path(place) / f"{name}-{repeat}"
                rotated = kinds[repeat % 4 :] + kinds[: repeat % 4]
                for kind, times in run_once(model, rotated, SETTINGS[name], folder).items():
                    old = best.setdefault(kind, times)
                    best[kind] = [min(a, b) for a, b in zip(old, times, strict=True)]
                if repeat < arguments.repeats - 1:
                    shutil.rmtree(folder)
            from kvtrace_traces import open_trace

            info = open_trace(folder).info
            base = sum(best["off"])
            rows = info["logged_events"]
            print(
                f"{name:<11}{len(best['off']):>7}{base / len(best['off']) / 1000:>13.1f}"
                + "".join(
                    f"{(sum(best[k]) / base - 1) * 100:>+{w}.2f}%"
                    for k, w in (("control", 8), ("trace", 8), ("kv-events", 10))
                )
                + f"{(sum(best['trace']) - base) / rows / 1000:>10.2f}{info['bytes_per_block_event']:>9.2f}"
                + f"   median step {statistics.median(best['off']) / 1000:.1f} -> {statistics.median(best['trace']) / 1000:.1f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
