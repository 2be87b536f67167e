"""`object` semantics against libCacheSim, the field's own simulator (a development-only dependency)."""

from __future__ import annotations

import numpy as np
import pytest

from kvtrace_replay import replay
from unit.replay.twins import make_workload

libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed")

NAMES = {"lru": "LRU", "fifo": "FIFO", "opt": "Belady"}


def oracle_misses(policy: str, refs: np.ndarray, capacity: int) -> int:
    """Requests one by one, each of size 1, told when their object comes next (Belady asks)."""
    upcoming: dict[int, int] = {}
    following = [0] * refs.size
    for i in range(refs.size - 1, -1, -1):
        following[i] = upcoming.get(int(refs[i]), 2**62)
        upcoming[int(refs[i])] = i
    cache = getattr(libcachesim, NAMES[policy])(cache_size=capacity)
    misses = 0
    for i, key in enumerate(refs.tolist()):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = key, 1, i
        request.next_access_vtime = following[i]
        misses += not cache.get(request)
    return misses


@pytest.mark.parametrize("policy", sorted(NAMES))
@pytest.mark.parametrize("seed", range(4))
def test_equal_misses(policy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = np.arange(1, 2001) ** -rng.choice([0.6, 1.0, 1.3])
    drawn = rng.choice(2000, 20_000, p=weight / weight.sum())
    drawn[5000:6000] = np.arange(1000) + 5000  # a scan
    refs = np.unique(drawn, return_inverse=True)[1].astype(np.int32)
    workload = make_workload(refs.reshape(-1, 10).tolist())
    sizes = [1, 7, 50, 300, 1000]
    rows = replay(workload, policy, sizes, "object")
    ours = [row["block_lookups"] - row["block_hits"] for row in rows]
    assert ours == [oracle_misses(policy, refs, size) for size in sizes]
