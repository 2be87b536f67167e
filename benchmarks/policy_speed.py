"""Speed of the classic policies beside libCacheSim: `python benchmarks/policy_speed.py [--policy sieve,lru]`.

A Zipf stream in `object` semantics, one thread. Both sides run in turn, `--repeat` times, in one process; the best of
each counts. Ours is the driver alone on a workload in memory, `--per-request` references to a request; libCacheSim's
is `process_trace` on a binary file (oracleGeneral) in memory, with a hash table of 2^20 buckets. Where it is not
installed only our own speed is printed; LFUDA has another rule there, which may not end.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import numpy as np

from kvtrace_replay import Workload, replay

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "lru": ("LRU", {}),
    "fifo": ("FIFO", {}),
    "clock": ("Clock", {}),
    "clock2": ("Clock", {"n_bit_counter": 2}),
    "sieve": ("Sieve", {}),
    "s3fifo": ("S3FIFO", {}),
    "slru": ("SLRU", {}),
    "2q": ("TwoQ", {}),
    "arc": ("ARC", {}),
    "lfu": ("LFU", {}),
}


def zipf_stream(n_refs: int, n_objects: int, alpha: float, seed: int = 0) -> np.ndarray:
    """int32[n_refs] ids, dense in order of first use, drawn with probability proportional to rank^-alpha."""
    weight = np.cumsum(np.arange(1, n_objects + 1, dtype=np.float64) ** -alpha)
    drawn = np.searchsorted(weight / weight[-1], np.random.default_rng(seed).random(n_refs))
    _, first, inverse = np.unique(drawn, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int32)
    rank[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return rank[inverse]


def as_workload(ids: np.ndarray, per_request: int = 1) -> Workload:
    """Requests of `per_request` blocks each; the last takes the rest."""
    indptr = np.append(np.arange(0, ids.size, per_request, dtype=np.int64), ids.size)
    blocks = np.diff(indptr).astype(np.int32)
    return Workload(
        identities=ids,
        indptr=indptr,
        prompt_blocks=blocks,
        hit_cap=blocks,
        prompt_tokens=blocks.astype(np.int64) * 16,
        last_tokens=np.full(blocks.size, 16, np.int32),
        schedule=None,
        raw=None,
        block_size=16,
        n_identities=int(ids.max()) + 1,
        source="import",
    )


def write_oracle_general(ids: np.ndarray, path: str) -> None:
    kind = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    rows = np.zeros(ids.size, kind)
    rows["time"], rows["id"], rows["size"], rows["next"] = np.arange(ids.size), ids, 1, -1
    rows.tofile(path)


def rival_run(library: Any, policy: str, capacity: int, path: str) -> tuple[float, float]:
    """(seconds, miss ratio) of libCacheSim."""
    name, settings = RIVALS[policy]
    reader = library.TraceReader(trace=path, trace_type=library.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(library, name)(cache_size=capacity, hashpower=20, **settings)
    begin = time.perf_counter()
    ratio, _ = cache.process_trace(reader)
    return time.perf_counter() - begin, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=10_000_000)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--capacity", type=int, default=100_000)
    parser.add_argument("--per-request", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--policy", default=",".join([*RIVALS, "lfuda"]))
    options = parser.parse_args()
    try:
        import libcachesim as library
    except ImportError:
        library = None
    ids = zipf_stream(options.refs, options.objects, options.alpha)
    workload = as_workload(ids, options.per_request)
    print(f"{ids.size} references, {int(ids.max()) + 1} objects, capacity {options.capacity}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = os.path.join(folder, "zipf.oracleGeneral.bin")
        write_oracle_general(ids, path)
        for policy in options.policy.split(","):
            ours, theirs, rivals_ratio = [], [], float("nan")
            for _ in range(options.repeat):
                (row,) = replay(workload, policy, options.capacity, "object")
                ours.append(row["seconds"])
                if library is not None and policy in RIVALS:
                    seconds, rivals_ratio = rival_run(library, policy, options.capacity, path)
                    theirs.append(seconds)
            speed = ids.size / min(ours) / 1e6
            line = f"{policy:8} {speed:7.1f} M/s  hit ratio {row['block_hit_ratio']:.6f}"
            if theirs:
                other = ids.size / min(theirs) / 1e6
                line += (
                    f"   libCacheSim {other:6.1f} M/s  hit ratio {1 - rivals_ratio:.6f}   ratio {speed / other:4.1f}"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
