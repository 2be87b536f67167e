"""Against the public package `kvcache-simulator` (0.1.3): token-weighted hits over the last half of the requests.

Its `lru` is `lru` in `radix` semantics, its `fifo` is `fifo` in `prefix` semantics, hit for hit.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from kvtrace_replay import Workload, replay
from kvtrace_replay.cache.paths import as_paths

simulator = pytest.importorskip("kvcache_sim")
trace = pytest.importorskip("kvcache_sim.trace")

BLOCK = 16
MODEL = "qwen2.5-72b"  # decides the bytes of a block, and with them how a capacity is asked for
Request = tuple[list[int], int]  # content ids of the blocks, input tokens


def random_requests(rng: random.Random) -> list[Request]:
    """Conversations that share beginnings, grow, branch off and end in partial blocks; content ids, so that one id
    stands under several parents."""
    chats: list[list[int]] = [[]]
    requests = []
    contents = rng.choice([3, 10, 400])
    for _ in range(rng.randint(20, 160)):
        chat = rng.choice(chats[-rng.choice([1, 5, 30]) :])
        chat = chat[: rng.randint(0, len(chat))] if rng.random() < 0.3 else chat
        chat = ([] if len(chat) > 25 else chat) + [rng.randrange(contents) for _ in range(rng.randint(1, 6))]
        chats.append(chat)
        requests.append((chat, len(chat) * BLOCK - rng.randrange(BLOCK)))
    return requests


def as_workload(requests: list[Request]) -> Workload:
    lengths = np.array([len(ids) for ids, _ in requests], np.int32)
    tokens = np.array([tokens for _, tokens in requests], np.int64)
    contents = np.array([block for ids, _ in requests for block in ids], np.int32)
    indptr = np.array([0, *accumulate(lengths)], np.int64)
    identities, n_identities, _ = as_paths(contents, indptr, int(contents.max()) + 1)
    return Workload(
        identities=identities,
        indptr=indptr,
        prompt_blocks=lengths,
        hit_cap=lengths.copy(),
        prompt_tokens=tokens,
        last_tokens=(tokens - (lengths - 1) * BLOCK).astype(np.int32),
        schedule=None,
        raw=contents,
        block_size=BLOCK,
        n_identities=n_identities,
        source="import",
    )


def theirs(requests: list[Request], capacities: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(capacity in blocks, results by policy), without the capacities that their cache had not filled at half time."""
    lines = [json.dumps({"hash_ids": ids, "input_length": n, "block_size": BLOCK}) for ids, n in requests]
    parsed = trace.parse_trace_lines(lines)
    models = simulator.load_models_data()
    of = {"model_id": MODEL, "backend": "python", "models_data": models}
    bytes_per_block = simulator.run_sweep(parsed, budgets_gib=[1e-9], **of)["metadata"]["bytesPerBlock"]
    # Half a block more, so that no rounding takes one away.
    budgets = [(capacity + 0.5) * bytes_per_block / simulator.BYTES_PER_GIB for capacity in capacities]
    for point in simulator.run_sweep(parsed, budgets_gib=budgets, policies=["lru", "fifo"], **of)["points"]:
        yield point["cacheBlocks"], point["results"]


def plain_fifo(workload: Workload, capacity: int) -> int:
    """Token hits over the last half."""
    queue: dict[int, None] = {}
    hits = 0
    for r in range(workload.n_requests):
        chain = workload.identities[workload.indptr[r] : workload.indptr[r + 1]].tolist()
        n = next((i for i, block in enumerate(chain) if block not in queue), len(chain))
        if r >= workload.n_requests // 2:
            hits += min(n * BLOCK, int(workload.prompt_tokens[r]))
        for block in chain:
            if block not in queue:
                if len(queue) == capacity:
                    del queue[next(iter(queue))]
                queue[block] = None
    return hits


def test_lru_of_a_tree_and_both_fifos() -> None:
    rng = random.Random(0)
    points = 0
    for _ in range(60):
        requests = random_requests(rng)
        workload = as_workload(requests)
        largest = max(len(ids) for ids, _ in requests)
        wanted = sorted({largest, largest + rng.randint(1, 10), 2 * largest, 4 * largest})
        for capacity, results in theirs(requests, wanted):
            assert results["lru"]["measurementMode"] == "fixed_window"
            (lru,) = replay(workload, "lru", capacity, "radix", warmup=0.5)
            assert lru["token_lookups"] == results["lru"]["totalTokens"]
            assert lru["token_hits"] == results["lru"]["hitTokens"]
            assert math.isclose(lru["token_hit_ratio"], results["lru"]["hitRate"])

            (fifo,) = replay(workload, "fifo", capacity, "prefix", warmup=0.5)
            assert fifo["token_hits"] == plain_fifo(workload, capacity)
            assert fifo["token_hits"] == results["fifo"]["hitTokens"]
            points += 1
    assert points > 100
