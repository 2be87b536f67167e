"""A trace larger than memory should hold: `python benchmarks/billion.py [--refs 1000000000] [--folder DIR]`.

Generates a workload of Zipf-like references (log-uniform ranks over `--objects`, requests of 100 blocks) in a file,
maps it, and replays it with LRU and makes its LRU curve, in `object` and `prefix` semantics, each in a process of its
own. Prints references a second in the driver, the whole time from opening the file, and the most memory that the
process held at once, mapped pages of the file included. Needs 4 bytes of disk a reference.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from kvtrace_replay.workload import Workload, store

PER_REQUEST = 100
CHUNK = 10_000_000


def generate(path: Path, n_refs: int, n_objects: int) -> None:
    """Write the workload; ids are ranks, which for the kernels is as good as the order of first use."""
    scratch = path.with_suffix(".ids")
    ids = np.memmap(scratch, np.int32, "w+", shape=(n_refs,))
    rng = np.random.default_rng(0)
    for start in range(0, n_refs, CHUNK):
        part = ids[start : start + CHUNK]
        part[:] = np.exp(rng.random(part.size) * np.log(n_objects)).astype(np.int32) - 1
    n_requests = -(-n_refs // PER_REQUEST)
    blocks = np.full(n_requests, PER_REQUEST, np.int32)
    blocks[-1] = n_refs - PER_REQUEST * (n_requests - 1)
    workload = Workload(
        identities=ids,
        indptr=np.append(0, np.cumsum(blocks, dtype=np.int64)),
        prompt_blocks=blocks,
        hit_cap=blocks,
        prompt_tokens=blocks.astype(np.int64) * 16,
        last_tokens=np.full(n_requests, 16, np.int32),
        schedule=None,
        raw=None,
        block_size=16,
        n_identities=n_objects,
        source="import",
    )
    store.save(workload, path)
    scratch.unlink()


def measure(
    path: Path, what: str, semantics: str, capacity: int, results: multiprocessing.Queue[tuple[float, float, float]]
) -> None:
    from kvtrace_replay import replay
    from kvtrace_replay.curves.lru import lru_curve

    begin = time.perf_counter()
    workload = store.load(path)
    assert workload is not None
    if what == "curve":
        seconds = lru_curve(workload, semantics).seconds
    else:
        seconds = replay(workload, "lru", capacity, semantics)[0]["seconds"]
    whole = time.perf_counter() - begin
    results.put((seconds, whole, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=1_000_000_000)
    parser.add_argument("--objects", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "billion.workload"
        generate(path, options.refs, options.objects)
        spawn = multiprocessing.get_context("spawn")
        for what, semantics in itertools.product(("replay", "curve"), ("object", "prefix")):
            results: multiprocessing.Queue[tuple[float, float, float]] = spawn.Queue()
            process = spawn.Process(target=measure, args=(path, what, semantics, options.objects // 10, results))
            process.start()
            driver, whole, memory = results.get()
            process.join()
            print(
                f"lru {what} {semantics:6} {options.refs:,} references: "
                f"{options.refs / driver / 1e6:6.1f} M/s in the driver, "
                f"{options.refs / whole / 1e6:6.1f} M/s from opening the file, {memory:.1f} GiB at most"
            )


if __name__ == "__main__":
    main()
