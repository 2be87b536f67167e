"""Predicts random settings from traces recorded at others, and compares with what vLLM's own scheduler then does there.

    cd tests && python -m simulation.fuzz_real --pairs 1000

Each workload runs once at random settings through the installed vLLM's Scheduler or AsyncScheduler (StubEngine),
recorded by the tracer; from that trace the same requests are simulated at `--per-workload` other random settings, which
vLLM then runs too. Every request, step, lookup, preemption and block event is compared. Prints each mismatch, and at
the end the number of pairs, of mismatches, and of what happened in the real runs. Status 1 if there was a mismatch.
Needs vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine_support import rerun
from engine_support.models import tiny_llama
from engine_support.worker import Worker

from .cases import STOP, Case, random_case
from .twin_words import Settings

BEYOND = "aborted-beyond-record"
CHANGED = (
    "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "prefix_caching", "chunked_prefill",
    "long_prefill_token_threshold", "scheduling_policy", "async_scheduling", "watermark",
)  # fmt: skip


def least_blocks(case: Case, block_size: int) -> int:
    """The smallest pool that serves every request, null block included."""
    longest = max(len(prompt) + len(output) for prompt, output in case.tokens)
    return -(-longest // block_size) + 1


def startable(settings: Settings) -> Settings:
    """The settings nearest to these that vLLM starts with."""
    budget = settings.max_num_batched_tokens
    if not settings.chunked_prefill:
        budget = max(budget, settings.max_model_len)
    return replace(
        settings,
        max_num_batched_tokens=budget,
        max_num_seqs=min(settings.max_num_seqs, budget),
        long_prefill_token_threshold=min(settings.long_prefill_token_threshold, settings.max_model_len),
    )


def another(case: Case, rng: random.Random) -> Settings:
    """Random settings for the requests of `case`; many, but not all, of the recorded ones change."""
    other = random_case(rng.randrange(1 << 30)).settings
    changes = {name: getattr(other, name) for name in CHANGED if rng.random() < 0.6}
    size = changes.get("block_size", case.settings.block_size)
    least = least_blocks(case, size)
    changes["num_blocks"] = rng.choice([least, least + 1, least + rng.randrange(10), 2 * least, 2 * least, 20 * least])
    return startable(replace(case.settings, **changes))


def requests_of(case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Arguments of `StubEngine.add`, in order of arrival, and what arrives and is aborted when."""
    order = sorted(range(len(case.requests)), key=lambda number: case.requests[number].arrival_step)
    rows, events = [], []
    for number, index in enumerate(order):
        request, (prompt, output) = case.requests[index], case.tokens[index]
        most = request.max_tokens
        if request.abort_step is not None:
            # That it would have ended by itself is not in a trace that ends with its abort.
            most, output = len(output), tuple(3 if token == STOP else token for token in output)
        rows.append(
            {
                "prompt": prompt,
                "max_tokens": most,
                "priority": request.priority,
                "output": output,
                "arrival_time": request.arrival_time,
                "name": f"{request.request_id}#",
                "no_read": request.no_read,
            }
        )
        events.append({"due": request.arrival_step, "request": number, "abort": False})
        if request.abort_step is not None:
            due = max(request.abort_step + 1, request.arrival_step)
            events.append({"due": due, "request": number, "abort": True})
    return rows, sorted(events, key=lambda event: (event["due"], event["abort"]))


def plain(settings: Settings) -> dict[str, Any]:
    """Arguments of `StubEngine`."""
    return {name: value for name, value in asdict(settings).items() if name != "rules"}


class Fuzz:
    """The state of a run of this script."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder = worker, folder
        self.model = str(tiny_llama(folder / "model"))
        self.counts: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()

    def workload(self, seed: int, per_workload: int) -> None:
        """One workload, recorded once, predicted `per_workload` times."""
        rng = random.Random(f"settings {seed}")
        case = random_case(seed)
        case = replace(case, settings=startable(case.settings))
        settings = [case.settings, *(another(case, rng) for _ in range(per_workload))]
        # Every block size is a whole number of granules.
        size = math.gcd(*(one.block_size for one in settings))
        rows, events = requests_of(case)
        place = self.folder / str(seed)
        told = self.worker.call(
            rerun.record_all,
            folder=str(place),
            model=self.model,
            requests=rows,
            events=events,
            runs={str(number): plain(one) for number, one in enumerate(settings)},
            granule=size,
            stub=True,
        )
        if told["0"] is None:
            self.counts["workloads that never end, not counted"] += 1
        else:
            for number in range(1, len(settings)):
                wrong = self.pair(place, number, told, settings[number], size)
                self.counts["pairs"] += 1
                self.counts["mismatches"] += bool(wrong)
                if wrong:
                    print(f"workload {seed}, run {number}: {wrong}", flush=True)
        shutil.rmtree(place)

    def pair(self, place: Path, number: int, told: dict[str, Any], settings: Settings, granule: int) -> str:
        """Predict a run and compare; what is wrong with it, or nothing."""
        from engine_support.agreement import drifted, predict
        from kvtrace_traces.errors import UsageError

        changes = {name: getattr(settings, name) for name in CHANGED}
        self.counts["asynchronous" if settings.async_scheduling else "synchronous"] += 1
        try:
            found = predict(place / "0", place / str(number), changes, place / f"{number}.kvt", same_hashes=False)
        except UsageError as error:
            self.counts["never end"] += told[str(number)] is None
            return "" if told[str(number)] is None else f"cannot be simulated: {error}\n  {json.dumps(changes)}"
        if told[str(number)] is None:
            return f"is simulated, but vLLM never ends\n  {json.dumps(changes)}"
        if drifted(told["0"], told[str(number)]):
            return "the tokens are not the same"
        self.happened.update(found.happened)
        if BEYOND in found.why:
            self.counts["with aborted requests that got further than recorded"] += 1
            if found.wrong:  # what it generated there, and may hit again after a preemption, is not known
                self.counts["of these wrong, as said beforehand and not counted"] += 1
                return ""
        return "\n  ".join([*found.wrong, json.dumps(changes)]) if found.wrong else ""


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--per-workload", type=int, default=4)
    parser.add_argument("--start", type=int, default=0, help="number of the first workload")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Worker(env=rerun.COMPARABLE) as worker:
        fuzz = Fuzz(worker, Path(folder))
        seed = arguments.start
        while fuzz.counts["pairs"] < arguments.pairs:
            fuzz.workload(seed, min(arguments.per_workload, arguments.pairs - fuzz.counts["pairs"]))
            seed += 1
    counts = fuzz.counts
    print(f"{counts['pairs']} pairs, {counts['mismatches']} mismatches, {time.monotonic() - begin:.0f} s")
    print(", ".join(f"{counts[name]} {name}" for name in counts if name not in ("pairs", "mismatches")))
    print("in the real runs: " + ", ".join(f"{n} {what}" for what, n in sorted(fuzz.happened.items()) if n))
    sys.exit(counts["mismatches"] > 0)


if __name__ == "__main__":
    assert STOP == 2
    main()
