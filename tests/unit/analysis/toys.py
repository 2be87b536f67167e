"""Small random traces of all kinds: runs of a toy engine with every kind of event, and imports."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "traces"))

import generate
import toy_engine

import kvtrace
from kvtrace_traces import importers


class Engine(toy_engine.Engine):
    """The toy engine on a clock that never stands still, as real ones do not."""

    def stamp(self, name: str) -> None:
        self.clock += 1
        super().stamp(name)


def toy(seed: int, folder: Path, **settings: Any) -> kvtrace.Trace:
    """A run of the toy engine; `settings` replace what the seed would choose."""
    chosen = generate.random_settings(seed)
    for name, value in settings.items():
        setattr(chosen, name, value)
    engine = Engine(chosen)
    engine.run()
    path = folder / f"toy-{seed}.kvt"
    end = {"time_ns": 0, "commits": len(engine.commits), "events": engine.events}
    generate.write_file(
        str(path), generate.header(chosen, bytes_per_block=4096), lambda: iter(engine.commits), lambda: end
    )
    return kvtrace.open(path)


def plain_toy(seed: int, folder: Path, **settings: Any) -> kvtrace.Trace:
    """A run without operations that name blocks, which no engine that can be followed exactly does."""
    return toy(seed, folder, **{"explicit": 0, "ids": 0, **settings})


def imported(seed: int, folder: Path, requests: int = 30) -> kvtrace.Trace:
    """An import of random prefix-sharing requests, with times."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(40) + 100 * k for k in range(6)] for _ in range(4)]
    rows = []
    for i in range(requests):
        ids = rng.choice(prefixes)[: rng.randrange(1, 7)] + [1000 + rng.randrange(20) for _ in range(rng.randrange(4))]
        length = 512 * len(ids) - rng.choice([0, 100, 511])
        rows.append({"timestamp": 10 * i, "input_length": length, "output_length": 5, "hash_ids": ids})
    source = folder / f"import-{seed}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"import-{seed}.kvt"
    importers.run("mooncake", source, out)
    return kvtrace.open(out)
