"""What the tracer costs vLLM's scheduler, beside nothing and beside vLLM's own KV-event publisher.

    python benchmarks/tracer_overhead.py [--repeats 12] [--loads decode256,...]

A real scheduler with a made-up model runs a scripted load; every 32 steps it goes over to another of four conditions:
off, traced, off again (the control: what is left of the noise) and vLLM's KV events published over ZMQ. Repetitions
shift the conditions, so that each step is met in each; the load is the same each time, and of a step in a condition the
minimum counts. Timed is `schedule` + `update_from_output`; the first step after a change is left out everywhere.
Between the two, before an engine waits for its workers, it calls `get_grammar_bitmask`, in which the tracer writes out
what it noted: `meanwhile` is what that call takes longer, in microseconds a step. It is hidden where the model runs on
another device.
(Two engines side by side differ by some per cent even if neither is traced: where objects lie in memory matters more.)
Needs the engine (`make engine`).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

SETTINGS: dict[str, dict[str, Any]] = {
    # Long generations of a full batch: what a busy server does most of the time.
    "decode256": {"seqs": 256, "prompts": 256, "prompt": 64, "output": 1000, "num_blocks": 18000},
    "decode64": {"seqs": 64, "prompts": 64, "prompt": 64, "output": 400, "num_blocks": 4000},
    "decode8": {"seqs": 8, "prompts": 8, "prompt": 64, "output": 400, "num_blocks": 2000},
    # Requests come and go, with shared prefixes: lookups, hits, fills and frees all the time.
    "churn64": {"seqs": 64, "prompts": 1500, "prompt": 400, "output": 40, "num_blocks": 4000},
    # A cache far too small: evictions and preemptions in most steps.
    "thrash64": {"seqs": 64, "prompts": 300, "prompt": 200, "output": 120, "num_blocks": 700},
}


CONDITIONS = ("off", "trace", "control", "kv-events")
STRETCH = 32


def build(model: str, load: dict[str, Any], folder: Path) -> Any:
    """A traced scheduler that also can publish KV events, with the load queued."""
    from engine_support.stub import StubEngine

    port = 20000 + random.randrange(20000)
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}"}
    os.environ["KVTRACE_OUT"] = str(folder)
    stub = StubEngine(
        model, num_blocks=load["num_blocks"], block_size=16, max_num_seqs=load["seqs"],
        max_num_batched_tokens=8192, max_model_len=2048, observe=False, kv_events_config=events,
    )  # fmt: skip
    del os.environ["KVTRACE_OUT"]
    rng = random.Random(5)
    shared = [[rng.randrange(3, 500) for _ in range(load["prompt"] // 2)] for _ in range(8)]
    for i in range(load["prompts"]):
        own = [rng.randrange(3, 500) for _ in range(load["prompt"] // 2)]
        # Staggered ends, so that blocks fill in every step.
        stub.add(shared[i % 8] + own[: len(own) - i % 16], load["output"] - i % 23)
    return stub


class Switch:
    """Puts the tracer's hooks on and off one scheduler while it runs.

    The log misses what happens in between, which makes it no trace to keep; what the hooks do in a step is the same.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.hooks = scheduler, scheduler._kvtrace
        self.patches = list(self.hooks._patched)
        self.on = True

    def set(self, on: bool) -> None:
        if on and not self.on:
            self._catch_up()
            for target, name, hook in self.patches:
                setattr(target, name, hook)
        elif self.on and not on:
            for target, name, _ in self.patches:
                delattr(target, name)
        self.on = on

    def _catch_up(self) -> None:
        from kvtrace_tracer.state import OUTSIDE, Entry

        state, manager = self.hooks.state, self.scheduler.kv_cache_manager
        filled = manager.coordinator.single_type_managers[0].num_cached_block
        requests = self.scheduler.requests
        for rid in [rid for rid in state.entries if rid not in requests]:
            del state.entries[rid]
        for rid in requests:
            entry = state.entries.setdefault(rid, Entry(state.requests))
            state.requests = max(state.requests, entry.number + 1)
            entry.filled = filled.get(rid, 0)
            entry.chain = max(entry.chain, entry.filled)
        for pending in (state.gone, state.looked, state.special, state.pending, state.steps):
            pending.clear()
        state.last, state.ids, state.phase = {}, None, OUTSIDE


def run_once(model: str, load: dict[str, Any], folder: Path, shift: int) -> list[tuple[str, int, int]]:
    """Condition and nanoseconds of each step, in the scheduler and in the call while the model runs; "" for the
    condition of a step that does not count."""
    stub = build(model, load, folder)
    scheduler = stub.scheduler
    pool, switch = scheduler.kv_cache_manager.block_pool, Switch(scheduler)
    times: list[tuple[str, int, int]] = []
    clock = time.perf_counter_ns
    gc.collect()
    gc.freeze()
    gc.disable()
    while scheduler.has_requests():
        step = len(times)
        condition = CONDITIONS[(step // STRETCH + shift) % len(CONDITIONS)]
        if step % STRETCH == 0:
            switch.set(condition == "trace")
            pool.enable_kv_cache_events = condition == "kv-events"
        begin = clock()
        scheduled = scheduler.schedule()
        middle = clock()
        scheduler.get_grammar_bitmask(scheduled)
        waiting = clock()
        output = stub._execute(scheduled)
        resumed = clock()
        scheduler.update_from_output(scheduled, output)
        end = clock()
        times.append(("" if step % STRETCH == 0 else condition, end - resumed + middle - begin, waiting - middle))
    gc.enable()
    gc.unfreeze()
    stub.close()
    return times


def whole_log(model: str, load: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`info` of a trace of the whole load, with the size of its block events and identities as Parquet."""
    from kvtrace_traces import exporters, open_trace

    stub = build(model, load, folder)
    stub.scheduler.kv_cache_manager.block_pool.enable_kv_cache_events = False
    stub.run()
    stub.close()
    trace = open_trace(folder)
    exported = exporters.run("parquet", trace, folder / "parquet")
    return {**trace.info, "parquet": exported["bytes_per_block_event"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="a multiple of 4")
    parser.add_argument("--loads", default=",".join(SETTINGS))
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from engine_support.models import tiny_llama

    # Armed once; from then on a scheduler is traced if KVTRACE_OUT is set when it is made.
    os.environ["KVTRACE_OUT"] = "armed"
    import kvtrace_tracer

    kvtrace_tracer.register()
    del os.environ["KVTRACE_OUT"]
    print(f"{'load':<11}{'steps':>6}{'off, us/step':>14}{'control':>10}{'kvtrace':>10}{'kv events':>11}"
          f"{'meanwhile':>11}{'B/event':>9}{'parquet':>9}{'B/step':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model = str(tiny_llama(Path(place) / "model"))
        for name in arguments.loads.split(","):
            load = SETTINGS[name]
            best: dict[str, dict[int, int]] = {condition: {} for condition in CONDITIONS}
            beside: dict[str, dict[int, int]] = {condition: {} for condition in CONDITIONS}
            for repeat in range(arguments.repeats):
                folder = Path(place) / f"{name}-{repeat}"
                for step, (condition, took, waited) in enumerate(run_once(model, load, folder, repeat)):
                    if condition:
                        best[condition][step] = min(took, best[condition].get(step, took))
                        beside[condition][step] = min(waited, beside[condition].get(step, waited))
                shutil.rmtree(folder)
            steps = set.intersection(*(set(found) for found in best.values()))
            total = {condition: sum(found[step] for step in steps) for condition, found in best.items()}
            meanwhile = sum(beside["trace"][step] - beside["off"][step] for step in steps) / len(steps) / 1000
            info = whole_log(model, load, Path(place) / name)
            print(
                f"{name:<11}{len(steps):>6}{total['off'] / len(steps) / 1000:>14.1f}"
                + "".join(f"{(total[c] / total['off'] - 1) * 100:>+{w}.2f}%" for c, w in
                          (("control", 9), ("trace", 9), ("kv-events", 10)))
                + f"{meanwhile:>+11.1f}"
                + f"{info['bytes_per_block_event']:>9.2f}{info['parquet']:>9.2f}{info['bytes'] / info['steps']:>8.0f}",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
