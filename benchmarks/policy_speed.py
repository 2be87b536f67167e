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
from replay_speed import as_workload, zipf_stream

from kvtrace_replay import replay

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
    "opt": ("Belady", {}),
}

NEVER = np.iinfo(np.int64).max


def write_oracle_general(ids: np.ndarray, path: str) -> None:
    kind = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    rows = np.zeros(ids.size, kind)
    rows["time"], rows["id"], rows["size"], rows["next"] = np.arange(ids.size), ids, 1, NEVER
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    rows["next"][order[:-1][again]] = order[1:][again] + 1  # references count from 1 there
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
