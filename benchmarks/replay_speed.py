"""Speed of the open-loop drivers on a Zipf stream: `python benchmarks/replay_speed.py [--refs 10000000]`.

Prints one line a run: references a second in the driver alone, best of three, one thread. In `prefix`
semantics the stream is cut into requests of 16 references.
"""

from __future__ import annotations

import argparse
import math
import os

import numpy as np

from kvtrace_replay import Workload, replay
from kvtrace_replay.policies import policies


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=10_000_000)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--cache", type=float, default=0.1, help="share of the distinct objects seen")
    options = parser.parse_args()
    ids = zipf_stream(options.refs, options.objects, options.alpha)
    capacity = math.floor(options.cache * (int(ids.max()) + 1))
    print(f"{ids.size} references, {int(ids.max()) + 1} objects, {capacity} blocks, {os.cpu_count()} cores")
    for semantics, per_request in (("object", 1), ("object", 16), ("prefix", 16)):
        workload = as_workload(ids, per_request)
        for policy in policies():
            if semantics not in policy.semantics or policy.open_loop:
                continue
            rows = [replay(workload, policy.name, capacity, semantics)[0] for _ in range(3)]
            speed = ids.size / min(row["seconds"] for row in rows) / 1e6
            ratio = rows[0]["block_hit_ratio"]
            what = f"{policy.name:8} {semantics:7} {per_request:3} a request"
            print(f"{what}: {speed:7.1f} M/s  hit ratio {ratio:.4f}")


if __name__ == "__main__":
    main()
