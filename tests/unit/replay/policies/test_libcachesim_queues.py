"""`object` semantics against libCacheSim 0.3.5, reference by reference (a development-only dependency)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtrace_replay import replay_requests
from unit.replay.twins import make_workload

libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")

RIVALS: dict[str, tuple[str, dict[str, Any]]] = {
    "clock": ("Clock", {}),
    "clock2": ("Clock", {"n_bit_counter": 2}),
    "sieve": ("Sieve", {}),
    "s3fifo": ("S3FIFO", {}),
    "s3fifo:small=0.25,ghost=0.5,threshold=1": (
        "S3FIFO",
        {"small_size_ratio": 0.25, "ghost_size_ratio": 0.5, "move_to_main_threshold": 1},
    ),
    "2q": ("TwoQ", {}),
    "2q:a_in=0.5,a_out=1": ("TwoQ", {"a_in_size_ratio": 0.5, "a_out_size_ratio": 1.0}),
    "slru": ("SLRU", {}),
    "arc": ("ARC", {}),
    "lfu": ("LFU", {}),
}
CAPACITIES = [1, 2, 3, 4, 5, 7, 10, 13, 20, 31, 50, 101, 200, 450]


def stream(kind: str) -> np.ndarray:
    """int32[n] dense ids in order of first use."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    weight = np.arange(1, 801) ** -1.0
    zipf = rng.choice(800, 6000, p=weight / weight.sum())
    if kind == "uniform":
        drawn = rng.integers(0, 600, 6000)
    elif kind == "zipf":
        drawn = zipf
    elif kind == "scan and loop":
        drawn = np.concatenate([zipf[:2000], 1000 + np.arange(1000), np.arange(2000) % 150, zipf[2000:3000]])
    else:  # two phases
        drawn = np.concatenate([zipf[:3000], 799 - zipf[3000:]])
    _, first, inverse = np.unique(drawn, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int32)
    rank[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return rank[inverse]


@pytest.mark.parametrize("policy", sorted(RIVALS))
@pytest.mark.parametrize("kind", ["uniform", "zipf", "scan and loop", "two phases"])
def test_every_reference_hits_or_misses_as_there(policy: str, kind: str) -> None:
    refs = stream(kind)
    workload = make_workload([[key] for key in refs.tolist()])
    name, settings = RIVALS[policy]
    request = libcachesim.Request()
    request.obj_size = 1
    for capacity in CAPACITIES:
        if name == "S3FIFO" and capacity < 10:
            continue  # it ends the process there
        cache = getattr(libcachesim, name)(cache_size=capacity, hashpower=12, **settings)
        theirs = []
        for at, key in enumerate(refs.tolist()):
            request.obj_id, request.clock_time = key, at
            theirs.append(int(cache.get(request)))
        assert replay_requests(workload, policy, capacity, "object").tolist() == theirs, capacity
