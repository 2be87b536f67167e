"""Speed of the one-pass LRU curve on a Zipf stream: `python benchmarks/curve_speed.py [--refs 10000000]`.

Prints one line a kind of workload: references a second in the kernel, best of five, one thread (in `object` semantics
one for each core where `--refs` is large). `object`: a reference a request, and 16. `prefix`: requests of 16
references; and conversations, whose prompts are the ones before and 16 blocks more, as served chats have them.
`--fenwick` adds a Fenwick tree over the same stream.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace

import numpy as np
from replay_speed import zipf_stream

from kvtrace_replay import Workload
from kvtrace_replay.curves.lru import lru_curve
from kvtrace_traces.compile import njit


def requests_of(ids: np.ndarray, lengths: np.ndarray) -> Workload:
    """The references `ids` as requests of `lengths` blocks."""
    blocks = lengths.astype(np.int32)
    return Workload(
        identities=ids,
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
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


def conversations(n_refs: int, concurrent: int = 500, turns: int = 20, growth: int = 16, seed: int = 0) -> Workload:
    """Requests of conversations that take turns at random; each turn sends all blocks so far and `growth` more."""
    rng = np.random.default_rng(seed)
    turn = np.zeros(concurrent, np.int64)
    first = np.arange(concurrent, dtype=np.int64) * turns * growth
    unused = concurrent * turns * growth
    chains, total = [], 0
    while total < n_refs:
        one = rng.integers(concurrent)
        if turn[one] == turns:
            turn[one], first[one] = 0, unused
            unused += turns * growth
        turn[one] += 1
        chains.append(np.arange(first[one], first[one] + turn[one] * growth))
        total += chains[-1].size
    ids = np.concatenate(chains)
    _, at, inverse = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(at.size, np.int32)
    rank[np.argsort(at)] = np.arange(at.size, dtype=np.int32)
    return requests_of(rank[inverse], np.array([chain.size for chain in chains]))


def overlapping(workload: Workload, running: int = 50) -> Workload:
    """The same requests as a recorded trace: `running` of them at a time."""
    n = workload.n_requests
    events = np.empty(2 * n, np.int64)
    order = np.argsort(np.concatenate([np.arange(n) * 2, (np.arange(n) + running) * 2 - 1]), kind="stable")
    events[:] = np.concatenate([np.arange(1, n + 1), -np.arange(1, n + 1)])[order]
    return replace(workload, schedule=events, source="recorded")


@njit
def fenwick(refs: np.ndarray, n_identities: int) -> int:
    """The usual way, renumbering time when it has run twice the distinct blocks; returns a check sum of the depths."""
    size = 2 * n_identities + 2
    tree = np.zeros(size + 1, np.int32)
    last = np.zeros(n_identities, np.int64)
    owner = np.full(size + 1, -1, np.int32)
    live, now, total = 0, 0, 0
    for i in range(refs.size):
        key = refs[i]
        if last[key] > 0:
            before, at = 0, last[key] - 1
            while at > 0:
                before += tree[at]
                at -= at & -at
            total += live - before
            at = last[key]
            owner[at] = -1
            while at <= size:
                tree[at] -= 1
                at += at & -at
        else:
            live += 1
        if now == size:
            now = 0
            for slot in range(1, size + 1):
                if owner[slot] >= 0:
                    now += 1
                    other = owner[slot]
                    owner[slot] = -1
                    owner[now] = other
                    last[other] = now
            tree[:] = 0
            for slot in range(1, size + 1):
                tree[slot] += owner[slot] >= 0
                above = slot + (slot & -slot)
                if above <= size:
                    tree[above] += tree[slot]
        now += 1
        owner[now] = key
        last[key] = now
        at = now
        while at <= size:
            tree[at] += 1
            at += at & -at
    return total


def report_fenwick(ids: np.ndarray) -> None:
    n = int(ids.max()) + 1
    fenwick(ids[:1000], n)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        total = fenwick(ids, n)
        times.append(time.perf_counter() - begin)
    curve = lru_curve(requests_of(ids, np.ones(ids.size, np.int64)), "object")
    assert total == int((np.diff(curve.hits) * np.arange(1, n + 1)).sum())
    print(f"{'a Fenwick tree':36}: {ids.size / min(times) / 1e6:7.1f} M/s")


def report(name: str, workload: Workload, semantics: str) -> None:
    curves = [lru_curve(workload, semantics) for _ in range(5)]
    speed = workload.n_refs / min(curve.seconds for curve in curves) / 1e6
    print(f"{name:36}: {speed:7.1f} M/s  {curves[0].distinct_blocks} blocks, {curves[0].block_hits(1000)} hits at 1000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=10_000_000)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--fenwick", action="store_true", help="time a Fenwick tree, too")
    options = parser.parse_args()
    ids = zipf_stream(options.refs, options.objects, options.alpha)
    print(f"{ids.size} references, {int(ids.max()) + 1} objects, {os.cpu_count()} cores")
    if options.fenwick:
        report_fenwick(ids)
    report("object, 1 a request", requests_of(ids, np.ones(ids.size, np.int64)), "object")
    by_16 = requests_of(ids, np.full(ids.size // 16, 16))
    report("object, 16 a request", by_16, "object")
    report("prefix, 16 a request", by_16, "prefix")
    report("prefix, 16 a request, 50 at a time", overlapping(by_16), "prefix")
    chats = conversations(options.refs)
    report("prefix, conversations", chats, "prefix")
    report("prefix, conversations, 50 at a time", overlapping(chats), "prefix")


if __name__ == "__main__":
    main()
