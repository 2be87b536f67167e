"""The compiled scheduler with a connector on the cases of the twin, its run in the twin's words."""

from __future__ import annotations

from typing import Any

from kvtrace_replay.schedulers.vllm_v1.offload.connectors import Offload as Tier
from kvtrace_replay.schedulers.vllm_v1.offload.layout import TIER_OPS
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun as KernelRun
from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload
from kvtrace_traces.schema import BLOCK_EVENT_KINDS, FINISH_REASONS

from .cases import Case
from .kernel import as_recorded, as_settings, by_arrival
from .twin_offload_words import Offload, OffloadRun

#: What the manager does to several chunks at once is told in no order.
UNORDERED = ("stored", "load", "loaded", "refuse")


def as_tier(offload: Offload) -> Tier:
    return Tier(
        blocks=offload.chunks * offload.blocks_per_chunk,
        policy=offload.policy,
        blocks_per_chunk=offload.blocks_per_chunk,
        store_threshold=offload.store_threshold,
        prompt_only=offload.prompt_only,
        steps=offload.polls,
    )


def kernel_run(case: Case, offload: Offload, events: bool = True, step_ns: int = 1000, **options: Any) -> KernelRun:
    """The kernel's run of a case; `step_ns` as `as_recorded` takes it."""
    source, settings = as_recorded(case, step_ns), as_settings(case.settings)
    return simulate_offload(source, settings, as_tier(offload), events=events, **options)


def in_words(case: Case, run: KernelRun) -> dict[str, Any]:
    """What the kernel did, in the shapes of `twin_in_words`."""
    names = by_arrival(case)
    hashes = as_recorded(case).hashes
    logs = {name: rows.tolist() for name, rows in run.logs.items()}

    def identity(value: int) -> int | None:
        return None if value < 0 else int(hashes[value])

    tier: list[tuple[str, list[Any]]] = []
    for code, value in logs["tier"]:
        if code >= 0:
            tier.append((TIER_OPS[code], []))
        else:
            tier[-1][1].append(identity(value))
    transfers, at = [], 0
    for step, load, request, blocks, tokens, done in run.transfers.tolist():
        moved = [block for (block,) in logs["moved"][at : at + blocks]]
        at += blocks
        whose = None if request < 0 else names[request]  # the simple connector has transfers of nobody's
        transfers.append((step, "load" if load else "store", whose, moved, tokens, None if done < 0 else done))
    rows: dict[int, list[tuple[int, int, int]]] = {}
    for step, request, tokens, before in logs["rows"]:
        rows.setdefault(step, []).append((names[request], tokens, before))
    requests = [
        (first, last, end, cached, preempted, FINISH_REASONS[reason])
        for (first, last, end, cached, reason, _, _), preempted in zip(
            run.requests.tolist(), run.preempted.tolist(), strict=True
        )
    ]
    in_order = sorted(zip(names, requests, strict=True))
    return {
        "tier": [(what, sorted(keys) if what in UNORDERED else keys) for what, keys in tier],
        "transfers": transfers,
        "lookups": [(s, names[r], asked, hit, bool(after)) for s, r, asked, hit, after in logs["lookups"]],
        "preemptions": [(s, names[r], *rest) for s, r, *rest in logs["preemptions"]],
        "steps": [
            (rows[i], free, running, waiting, preempted, empty)
            for i, (_, free, running, waiting, preempted, empty) in enumerate(logs["steps"])
        ],
        "events": [
            (step, BLOCK_EVENT_KINDS[kind], None if request < 0 else names[request], block, identity(held))
            for step, kind, request, block, held in logs["events"]
        ],
        "requests": [tuple(None if n == -1 else n for n in row) for _, row in in_order],
    }


def twin_in_words(run: OffloadRun) -> dict[str, Any]:
    """A twin's run in the same shapes."""
    return {
        "tier": [tuple(row) for row in run.tier],
        "transfers": [tuple(row) for row in run.transfers],
        "lookups": [tuple(row) for row in run.lookups],
        "preemptions": [tuple(row) for row in run.preemptions],
        "steps": [(s[0], s[1], s[2], s[3], len(s[4]), s[5]) for s in run.steps],
        "events": [tuple(row) for row in run.events],
        "requests": [tuple(row) for row in run.requests],
    }


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first difference between two runs in words, or nothing."""
    for name, rows in mine.items():
        others = theirs[name]
        if rows != others:
            at = next((i for i, (a, b) in enumerate(zip(rows, others, strict=False)) if a != b), -1)
            at = min(len(rows), len(others)) if at < 0 else at
            return f"{name}[{at}]: {rows[at : at + 1]} instead of {others[at : at + 1]}"
    return ""
