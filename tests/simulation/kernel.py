"""Runs the compiled scheduler on a twin's case, and tells what it did in the twin's words."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvtrace_replay.schedulers.carried import Start
from kvtrace_replay.schedulers.log import write_run
from kvtrace_replay.schedulers.recorded import Recorded
from kvtrace_replay.schedulers.settings import Settings
from kvtrace_replay.schedulers.vllm_v1.run import simulate_run
from kvtrace_traces import open_trace
from kvtrace_traces.schema import FINISH_REASONS

from . import twin_words

NEVER = -2


def by_arrival(case: Any) -> list[int]:
    """The case's requests in the order in which they arrive, which numbers them in a trace."""
    return sorted(range(len(case.requests)), key=lambda i: case.requests[i].arrival_step)


def as_recorded(case: Any, step_ns: int = 1000, version: str = "0.32.0") -> Recorded:
    """The requests of a case, as if a trace had been recorded at its block size by this `version`, with `step_ns`
    between two steps."""
    order = by_arrival(case)
    requests, size = [case.requests[i] for i in order], case.settings.block_size
    n = len(requests)
    model = case.settings.max_model_len
    chains = [np.array(r.chain, np.int64) for r in requests]
    flat = np.concatenate(chains) if chains else np.zeros(0, np.int64)
    known, dense = np.unique(flat, return_inverse=True)

    def numbers(values: Any, dtype: Any = np.int32) -> Any:
        return np.array(list(values), dtype)

    return Recorded(
        header={
            "source": "vllm", "engine": "vllm", "engine_version": version, "block_size": size, "granule": size,
            "engine_index": 0, "num_blocks": case.settings.num_blocks, "max_model_len": model,
            "scheduler": {"reserve_full_isl": True},
            "clock_wall_ns": 0, "clock_monotonic_ns": 0, "run_id": "case",
        },
        prompt=numbers(r.prompt for r in requests),
        stop=np.minimum(numbers(r.prompt + r.output for r in requests), model).astype(np.int32),
        most=numbers(r.prompt + r.max_tokens for r in requests),
        reason=numbers(_reason(r, model, case.settings.rules) for r in requests),
        no_read=numbers((r.no_read for r in requests), bool),
        priority=numbers(r.priority for r in requests),
        arrival_s=numbers((r.arrival_time for r in requests), np.float64),
        request_id=pl.Series([r.request_id or f"r{i}" for i, r in zip(order, requests, strict=True)]),
        arrival_step=numbers(r.arrival_step for r in requests),
        arrival_late=np.zeros(n, bool),
        abort_step=numbers(NEVER if r.abort_step is None else r.abort_step for r in requests),
        abort_calls=numbers(r.abort_calls for r in requests),
        abort_early=np.zeros(n, bool),
        # Those aborted at one step in the order of their numbers.
        abort_ns=numbers(((r.abort_step or 0) * step_ns + i for i, r in zip(order, requests, strict=True)), np.int64),
        arrival_ns=numbers((r.arrival_step * step_ns for r in requests), np.int64),
        due_ns=numbers((r.arrival_step * step_ns for r in requests), np.int64),
        tenant=np.zeros(n, np.uint64),
        chain=dense.astype(np.int32),
        chain_at=np.concatenate([[0], np.cumsum([len(c) for c in chains])]).astype(np.int64),
        hashes=known.astype(np.uint64),
        steps=0,
        unfinished=0,
        resets=0,
    )  # fmt: skip


def _reason(request: Any, model: int, rules: Any) -> int:
    """What the last token of a request ends it with."""
    at_most = request.output >= request.max_tokens
    if request.prompt + request.output > model:
        return FINISH_REASONS.index("length")
    if not at_most:
        name = "stop"
        if request.prompt + request.output == model and not rules.stop_before_length:
            name = "length"
        return FINISH_REASONS.index(name)
    return FINISH_REASONS.index("length")


def as_start(case: Any, state: Any, source: Recorded) -> Recorded:
    """`source`, the requests of a case, with the `twin_start.State` that its run begins with."""
    order = by_arrival(case)
    new = {number: i for i, number in enumerate(order)}
    told = [state.requests[number] for number in order if state.requests[number]["status"] != "absent"]
    batch, samples = state.under_way[0] if state.under_way else ({}, set())
    held = [(identity, block) for identity, blocks in state.cached.items() for block in blocks]
    known = {int(value): i for i, value in enumerate(source.hashes)}
    extra = sorted({identity for identity, _ in held} - known.keys())
    known |= {identity: len(source.hashes) + i for i, identity in enumerate(extra)}

    def column(make: Any, dtype: Any = np.int32) -> Any:
        return np.array([make(new_number, one) for new_number, one in enumerate(told)], dtype)

    table_at = np.zeros(len(told) + 1, np.int64)
    np.cumsum([len(one["table"]) for one in told], out=table_at[1:])
    start = Start(
        running=np.array([new[n] for n in state.running], np.int32),
        waiting=np.array([new[n] for n in state.waiting], np.int32),
        scheduled=column(lambda i, one: False, bool),
        begun=column(lambda i, one: one["first_step"] is not None, bool),
        computed=column(lambda i, one: one["computed"]),
        tokens=column(lambda i, one: case.requests[order[i]].prompt + one["generated"]),
        under_way=column(lambda i, one: batch.get(order[i], 0)),
        gives=column(lambda i, one: order[i] in samples, bool),
        cached=column(lambda i, one: -1 if one["cached_tokens"] is None else one["cached_tokens"]),
        preemptions=column(lambda i, one: one["preemptions"]),
        lost=column(lambda i, one: 0),
        filled=column(lambda i, one: one["filled"]),
        table=np.array([block for one in told for block in one["table"]], np.int32),
        table_at=table_at,
        blocks=np.array([block for _, block in held], np.int32),
        identities=np.array([known[identity] for identity, _ in held], np.int32),
        parents=np.full(len(held), -1, np.int32),
        queue=np.array(state.free, np.int32),
        num_blocks=case.settings.num_blocks,
        block_size=case.settings.block_size,
        prefix_caching=case.settings.prefix_caching,
        preempted=len(state.preempted),
        empty=state.empty,
        due=len(state.under_way),
        due_ns=0,
    )
    return replace(source, start=start, hashes=np.append(source.hashes, np.array(extra, np.uint64)))


def as_settings(settings: twin_words.Settings) -> Settings:
    return Settings(
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        prefix_caching=settings.prefix_caching,
        chunked_prefill=settings.chunked_prefill,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        scheduling_policy=settings.scheduling_policy,
        async_scheduling=settings.async_scheduling,
        watermark=settings.watermark,
        max_num_scheduled_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold_adaptive=False,
        max_num_active_seqs=None,
        reserve_full_isl=True,
        max_model_len=settings.max_model_len,
        rules=settings.rules,
    )


def kernel_run(case: Any, fast: bool = True, source: Recorded | None = None, **more: Any) -> dict[str, Any]:
    """The compiled scheduler's run of a case, as lists in the shapes of `twin_words.Run`; `source`: what reaches it, if
    not the case's requests alone; `more`: further settings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvt"
        source = source or as_recorded(case)
        write_run(path, source, replace(as_settings(case.settings), **more), fast=fast)
        trace = open_trace(path)
        assert trace.complete, trace.info
        assert not trace.lossy, trace.info
        return in_words(trace, by_arrival(case))


def totals(case: Any, source: Recorded | None = None, **options: Any) -> dict[str, Any]:
    """What the compiled scheduler says of its run of a case without writing a log; `source` as of `kernel_run`."""
    run = simulate_run(source or as_recorded(case), as_settings(case.settings), **options)
    names = [
        "steps", "preemptions", "evictions", "allocations", "fills", "hit_tokens", "lookup_tokens",
        "hit_tokens_after", "lookup_tokens_after", "finished", "guessed",
    ]  # fmt: skip
    return {
        **{name: getattr(run, name) for name in names},
        "requests": run.requests.tolist(),
        "preempted": run.preempted.tolist(),
        "tokens": run.tokens.tolist(),
        "rows": run.rows.tolist(),
    }


def in_words(trace: Any, names: list[int]) -> dict[str, Any]:
    """What a trace tells of a run, in the shapes of `twin_words.Run`; identities are their hashes, requests are
    `names`."""
    hashes = trace.chains().hashes
    events = [
        (
            step,
            kind,
            None if request is None else names[request],
            block,
            None if identity is None else int(hashes[identity]),
        )
        for step, kind, request, block, identity in trace.block_events.select(
            "step", "kind", "request", "block", "identity"
        ).rows()
    ]
    scheduled: dict[int, list[tuple[int, int, int]]] = {}
    for step, request, tokens, before in trace.step_requests.select(
        "step", "request", "tokens", "computed_before"
    ).rows():
        scheduled.setdefault(step, []).append((names[request], tokens, before))
    steps = [
        (sorted(scheduled[row["step"]]), row["free_blocks"], row["running"], row["waiting"], row["empty_calls"])
        for row in trace.steps.rows(named=True)
    ]
    requests = trace.requests.select(
        "first_step", "last_step", "finish_step", "cached_tokens", "preemptions", "finish_reason"
    ).rows()
    return {
        "events": events,
        "steps": steps,
        "lookups": [
            (step, names[request], *rest)
            for step, request, *rest in trace.lookups.select(
                "step", "request", "tokens_asked", "tokens_hit", "after_preemption"
            ).rows()
        ],
        "preemptions": [
            (step, names[request], *rest)
            for step, request, *rest in trace.preemptions.select("step", "request", "blocks_lost", "tokens_lost").rows()
        ],
        "requests": [row for _, row in sorted(zip(names, requests, strict=True))],
    }


def twin_in_words(run: Any) -> dict[str, Any]:
    """A twin's run in the same shapes."""
    return {
        "events": [tuple(event) for event in run.events],
        "steps": [(sorted(map(tuple, s[0])), s[1], s[2], s[3], s[5]) for s in run.steps],
        "lookups": [tuple(row) for row in run.lookups],
        "preemptions": [tuple(row) for row in run.preemptions],
        "requests": [tuple(row) for row in run.requests],
    }


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first difference between two runs in words; None if there is none."""
    for name in ("steps", "lookups", "preemptions", "requests", "events"):
        a, b = mine[name], theirs[name]
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return f"{name}[{i}]: {x} instead of {y}"
        if len(a) != len(b):
            return f"{name}: {len(a)} rows instead of {len(b)}"
    return None
