"""Workloads and the settings at which each is predicted from one recorded run, for integration/test_simulation.py.

Two tables: REAL runs in the whole engine, which on a CPU wants blocks of a multiple of 32 tokens and a cache that holds
`max_model_len`, and STUB in vLLM's own schedulers with a made-up model, where asynchronous scheduling and any block
size can be had. Every run generates scripted tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import workloads
from .workloads import Arrival

Settings = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """`base`: the settings recorded; `others`: name to what is changed, each one a pair. `promises`: what must happen
    in the runs together, in words of `agreement.happened`. `granule`: None for the base's block size."""

    arrivals: Callable[[], list[Arrival]]
    base: Settings
    others: dict[str, Settings]
    promises: tuple[str, ...]
    granule: int | None = 16
    stub: bool = False
    runs: dict[str, Settings] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", {"base": self.base} | {k: self.base | v for k, v in self.others.items()})


def staggered(seed: int, arrivals: list[Arrival], aborts: float = 0.0, **more: Any) -> list[Arrival]:
    return workloads.scripted(seed, workloads.staggered(seed, arrivals, abort_share=aborts, **more), 0.15)


def small_talk(seed: int) -> list[Arrival]:
    """Many short requests, some of which share a beginning."""
    return workloads.scripted(seed, workloads.shared_prefixes(seed, requests=30, prefixes=2, length=40), 0.2)


def copies(seed: int) -> list[Arrival]:
    """Duplicates that also generate the same, so that generated blocks are shared."""
    found: list[Arrival] = []
    first: dict[tuple[int, ...], list[int]] = {}
    for arrival in workloads.scripted(seed, workloads.duplicates(seed, distinct=5, copies=6)):
        assert arrival.output is not None
        output = first.setdefault(tuple(arrival.prompt), arrival.output * 6)
        found.append(Arrival(arrival.prompt, len(output), step=arrival.step, output=list(output)))
    return found


def mixed(seed: int, block_size: int, aborts: float = 0.15, priorities: int = 1) -> list[Arrival]:
    arrivals = workloads.mixed(seed, block_size)
    return staggered(seed, arrivals, aborts, spread=150, priorities=priorities)


B512: Settings = {"block_size": 32, "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 512}
B1024: Settings = B512 | {"max_model_len": 1024}
LEAST = 17  # blocks of 32 that hold 512 tokens, and the null block
LEAST_LONG = 33

REAL = {
    "shared prefixes": Workload(
        lambda: workloads.scripted(1, workloads.shared_prefixes(1, requests=30)),
        {**B512, "num_blocks": 200},
        {
            "least cache": {"num_blocks": LEAST},
            "small cache": {"num_blocks": 26},
            "4 at a time": {"max_num_seqs": 4},
            "64 tokens a step": {"max_num_batched_tokens": 64},
            "no caching": {"prefix_caching": False, "num_blocks": 26},
            "blocks of 64": {"block_size": 64, "num_blocks": 14},
            "watermark": {"watermark": 0.2, "num_blocks": 26},
        },
        ("hit", "evict", "preemptions"),
    ),
    "multi-turn": Workload(
        lambda: workloads.conversations(2, chats=6),
        {**B512, "num_blocks": 120},
        {
            "least cache": {"num_blocks": LEAST},
            "small cache": {"num_blocks": 30},
            "blocks of 64": {"block_size": 64, "num_blocks": 16},
            "blocks of 128": {"block_size": 128, "num_blocks": 8},
            "48 tokens a step": {"max_num_batched_tokens": 48, "max_num_seqs": 3},
        },
        ("hit", "evict", "late"),
    ),
    "duplicates": Workload(
        lambda: copies(3),
        {**B512, "num_blocks": 60},
        {
            "least cache": {"num_blocks": LEAST},
            "ample cache": {"num_blocks": 400},
            "96 tokens a step": {"max_num_batched_tokens": 96, "num_blocks": 30},
            "3 at a time": {"max_num_seqs": 3, "num_blocks": 24},
            "watermark": {"watermark": 0.1, "num_blocks": 30},
        },
        ("hit", "evict", "twins", "preemptions"),
        granule=None,
    ),
    "block-aligned prompts": Workload(
        lambda: workloads.scripted(4, workloads.block_aligned(4, 64, requests=24)),
        {**B512, "block_size": 64, "num_blocks": 40},
        {
            "blocks of 32": {"block_size": 32, "num_blocks": 22},
            "blocks of 96": {"block_size": 96, "num_blocks": 8},
            "least cache": {"num_blocks": 9},
            "65 tokens a step": {"max_num_batched_tokens": 65},
        },
        ("hit", "cut hits", "chunks"),
    ),
    "thrashing": Workload(
        lambda: workloads.scripted(5, workloads.thrashing(5)),
        {**B512, "num_blocks": 40},
        {
            "least cache": {"num_blocks": LEAST},
            "ample cache": {"num_blocks": 400},
            "watermark": {"watermark": 0.15},
            "4 at a time": {"max_num_seqs": 4},
            "no caching": {"prefix_caching": False, "num_blocks": 24},
            "blocks of 64": {"block_size": 64, "num_blocks": 12},
        },
        ("preemptions", "evict", "hit again"),
    ),
    "tiny token budgets": Workload(
        lambda: small_talk(6),
        {**B512, "num_blocks": 60},
        {
            "8 tokens a step": {"max_num_batched_tokens": 8, "max_num_seqs": 8},
            "17 tokens a step": {"max_num_batched_tokens": 17, "num_blocks": 20},
            "33 tokens a step": {"max_num_batched_tokens": 33, "num_blocks": LEAST},
        },
        ("chunks", "stopped", "evict"),
    ),
    "long prompts in chunks": Workload(
        lambda: workloads.scripted(7, workloads.long_prompts(7, requests=12)),
        {**B1024, "num_blocks": 120, "max_num_batched_tokens": 256},
        {
            "not chunked": {"chunked_prefill": False, "max_num_batched_tokens": 1024, "num_blocks": 60},
            "long-prefill threshold": {"long_prefill_token_threshold": 70, "num_blocks": 80},
            "threshold in the least cache": {"long_prefill_token_threshold": 40, "num_blocks": LEAST_LONG},
            "100 tokens a step": {"max_num_batched_tokens": 100, "num_blocks": LEAST_LONG + 3},
            "2 at a time": {"max_num_seqs": 2},
            "watermark in the least cache": {"watermark": 0.3, "num_blocks": LEAST_LONG},
        },
        ("chunks", "late", "evict"),
    ),
    "priorities": Workload(
        lambda: staggered(8, workloads.thrashing(8), aborts=0.1, priorities=3),
        {**B512, "num_blocks": 50},
        {
            "by priority": {"scheduling_policy": "priority"},
            "by priority in the least cache": {"scheduling_policy": "priority", "num_blocks": LEAST},
            "by priority, 4 at a time": {"scheduling_policy": "priority", "max_num_seqs": 4},
            "by priority, watermark": {"scheduling_policy": "priority", "watermark": 0.1, "num_blocks": 30},
            "by priority, chunks": {"scheduling_policy": "priority", "max_num_batched_tokens": 24, "num_blocks": 24},
        },
        ("overtaken", "preemptions", "stopped", "late"),
    ),
    "aborts": Workload(
        lambda: mixed(9, 32, aborts=0.35),
        {**B512, "num_blocks": 40, "scheduling_policy": "priority"},
        {
            "first come, first served": {"scheduling_policy": "fcfs"},
            "least cache": {"num_blocks": LEAST},
            "5 at a time": {"max_num_seqs": 5},
            "64 tokens a step": {"max_num_batched_tokens": 64, "num_blocks": 24},
            "blocks of 64": {"block_size": 64, "num_blocks": 16},
        },
        ("aborted", "preemptions", "hit", "evict", "chunks", "late"),
    ),
}

S16: Settings = {
    "block_size": 16, "num_blocks": 150, "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512,
}  # fmt: skip

STUB = {
    "mixed": Workload(
        lambda: mixed(20, 16),
        S16,
        {
            "asynchronous": {"async_scheduling": True},
            "asynchronous, small cache": {"async_scheduling": True, "num_blocks": 40},
            "asynchronous, least cache": {"async_scheduling": True, "num_blocks": 31},
            "asynchronous, blocks of 48": {"async_scheduling": True, "block_size": 48, "num_blocks": 20},
            "asynchronous, watermark": {"async_scheduling": True, "watermark": 0.1, "num_blocks": 50},
            "asynchronous, no caching": {"async_scheduling": True, "prefix_caching": False, "num_blocks": 50},
            "asynchronous, 40 tokens a step": {"async_scheduling": True, "max_num_batched_tokens": 40},
            "blocks of 8": {"block_size": 8, "num_blocks": 80},
            "blocks of 48, least cache": {"block_size": 48, "num_blocks": 11},
        },
        ("preemptions", "evict", "hit", "aborted", "stopped", "chunks", "late", "hit again"),
        granule=4,
        stub=True,
    ),
    "asynchronous": Workload(
        lambda: mixed(21, 16, priorities=3),
        S16 | {"async_scheduling": True, "num_blocks": 60},
        {
            "synchronous": {"async_scheduling": False},
            "by priority": {"scheduling_policy": "priority"},
            "by priority, least cache": {"scheduling_policy": "priority", "num_blocks": 32},
            "synchronous, by priority": {"async_scheduling": False, "scheduling_policy": "priority"},
            "not chunked": {"chunked_prefill": False, "max_num_batched_tokens": 1024, "num_blocks": 50},
            "long-prefill threshold": {"long_prefill_token_threshold": 20},
            "3 at a time": {"max_num_seqs": 3},
            "ample cache": {"num_blocks": 1000},
        },
        ("preemptions", "evict", "hit", "aborted", "stopped", "chunks", "overtaken", "late"),
        granule=4,
        stub=True,
    ),
    "asynchronous thrashing": Workload(
        lambda: workloads.scripted(22, workloads.thrashing(22), 0.3),
        S16 | {"async_scheduling": True, "num_blocks": 1000},
        {
            "small cache": {"num_blocks": 60},
            "least cache": {"num_blocks": 17, "max_num_seqs": 64},
            "watermark": {"num_blocks": 60, "watermark": 0.25},
            "synchronous, small cache": {"num_blocks": 60, "async_scheduling": False},
        },
        ("preemptions", "evict", "hit again", "stopped"),
        granule=None,
        stub=True,
    ),
}
WORKLOADS = REAL | STUB
PAIRS = [(workload, setting) for workload, one in WORKLOADS.items() for setting in one.others]
