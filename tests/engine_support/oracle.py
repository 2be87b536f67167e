"""Compares a trace with what the engine itself said of the run: pool states, KV events, statistics, requests.

`Snapshots` is taken while the run goes on; `compare` returns every difference as a line, so that a test shows them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .observe import pool_state

State = tuple[int, dict[str, Any], dict[str, int]]


class Snapshots:
    """States of the engine's block pool after randomly chosen calls of `schedule` that scheduled something.

    `states`: list of (step, state, numbers) with `step` counting such calls from 0 and numbers mapping request ids.
    """

    def __init__(self, scheduler: Any, observer: Any, seed: int, chance: float = 0.1) -> None:
        self.scheduler, self.observer = scheduler, observer
        self.states: list[State] = []
        self._random, self._chance, self._step = random.Random(seed), chance, 0
        inner: Callable[..., Any] = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                if self._random.random() < self._chance:
                    self.take(self._step)
                self._step += 1
            return output

        scheduler.schedule = schedule

    def take(self, step: int) -> None:
        """Keep the present state as that after step `step`; -1 for the end of the run."""
        self.states.append((step, pool_state(self.scheduler), dict(self.observer.numbers)))


def compare(folder: Path, result: dict[str, Any], states: list[State], caching: bool = True) -> list[str]:
    """The differences between the trace in `folder` and the engine's `result` (Engine.result), `states` (Snapshots)."""
    from kvtrace_replay.verify import verify
    from kvtrace_traces import open_trace

    trace = open_trace(folder, recover="strict")
    checks = verify(trace)["checks"]
    wrong = [f"verify: {c['name']}: {c['first']}" for c in checks if c["mismatches"]]
    wrong += [
        f"verify skipped {c['name']}: {c['skipped']}"
        for c in checks
        if c["skipped"] and not (c["name"] == "simulation" and "cache-reset" in c["skipped"])
    ]
    if not trace.complete:
        wrong.append(f"incomplete: {trace.warnings}")
    wrong += _pools(trace, states)
    wrong += _steps(trace, result)
    wrong += _requests(trace, result)
    wrong += _lookups(trace, result, caching)
    wrong += _kv_events(trace, result)
    return wrong


def _pools(trace: Any, states: list[State]) -> list[str]:
    import numpy as np

    from kvtrace_replay import pool

    times, starts = trace.block_events["time_ns"].to_numpy(), trace.steps["start_ns"].to_numpy()
    hashes = trace.chains().hashes
    meaning: dict[bytes, int] = {}  # the engine's hash -> our 64-bit identity; must be one to one over the whole run
    wrong = []
    for step, state, numbers in states:
        upto = len(times) if step < 0 else int(np.searchsorted(times, starts[step], side="right"))
        mine = pool.follow(trace, upto=upto).state
        name = f"pool after step {step}"
        if mine.references[1:].tolist() != state["ref_cnt"][1:]:
            wrong.append(f"{name}: reference counts")
        if mine.free.tolist() != state["free_queue"]:
            wrong.append(f"{name}: free queue")
        tables = {numbers[key]: groups[0] for key, groups in state["tables"].items() if groups[0]}
        if mine.tables != tables:
            wrong.append(f"{name}: block tables")
        for block, engine_hash in enumerate(state["block_hash"]):
            identity = int(mine.identities[block])
            if (identity < 0) != (engine_hash is None):
                wrong.append(f"{name}: block {block} identity {identity}, engine {engine_hash!r}")
                break
            if engine_hash is not None and meaning.setdefault(engine_hash, int(hashes[identity])) != int(
                hashes[identity]
            ):
                wrong.append(f"{name}: block {block} has another identity than its equals")
                break
    if len(set(meaning.values())) != len(meaning):
        wrong.append("one identity for different engine hashes")
    return wrong


def _steps(trace: Any, result: dict[str, Any]) -> list[str]:
    engine = [step for step in result["steps"] if step["total"]]
    if len(engine) != trace.steps.height:
        return [f"{trace.steps.height} steps, engine {len(engine)}"]
    wrong = []
    per_step: list[dict[int, tuple[int, int]]] = [{} for _ in engine]
    for row in trace.step_requests.iter_rows(named=True):
        per_step[row["step"]][row["request"]] = (row["tokens"], row["computed_before"])
    for number, (mine, step) in enumerate(zip(trace.steps.iter_rows(named=True), engine, strict=True)):
        scheduled = {int(k): v for k, v in step["scheduled"].items()}
        computed = {int(k): v for k, v in step["computed_before"].items()}
        if per_step[number] != {r: (n, computed[r]) for r, n in scheduled.items()}:
            wrong.append(f"step {number}: scheduled {per_step[number]}, engine {scheduled} {computed}")
        for ours, theirs in (("running", "running"), ("waiting", "waiting"), ("free_blocks", "free_blocks")):
            if mine[ours] != step[theirs]:
                wrong.append(f"step {number}: {ours} {mine[ours]}, engine {step[theirs]}")
        if mine["preempted"] != len(step["preempted"]):
            wrong.append(f"step {number}: preempted {mine['preempted']}, engine {step['preempted']}")
    return wrong[:5]


_REASONS = {"FINISHED_LENGTH_CAPPED": "length", "FINISHED_STOPPED": "stop", "FINISHED_ABORTED": "abort"}


def _requests(trace: Any, result: dict[str, Any]) -> list[str]:
    mine = trace.requests.to_dicts()
    if len(mine) != len(result["requests"]):
        return [f"{len(mine)} requests, engine {len(result['requests'])}"]
    wrong = []
    for ours, theirs in zip(mine, result["requests"], strict=True):
        pairs = {
            "prompt_tokens": len(theirs["prompt"]),
            "preemptions": theirs["preemptions"],
            "output_tokens": len(theirs["output"]),
            "request_id": theirs["request_id"],
            "finish_reason": _REASONS[theirs["status"]],
        }
        if ours["cached_tokens"] is not None and theirs["num_cached_tokens"] is not None:
            pairs["cached_tokens"] = theirs["num_cached_tokens"]
        for key, value in pairs.items():
            if ours[key] != value:
                wrong.append(f"request {ours['request']}: {key} {ours[key]}, engine {value}")
    lost = [(row["request"], row["blocks_lost"], row["tokens_lost"]) for row in trace.preemptions.iter_rows(named=True)]
    if lost != [(row["request"], row["blocks"], row["computed"]) for row in result["preemptions"]]:
        wrong.append("preemptions differ")
    return wrong[:5]


def _lookups(trace: Any, result: dict[str, Any], caching: bool) -> list[str]:
    rows = trace.lookups
    mine = [
        (r["request"], r["tokens_asked"], r["tokens_hit"], r["after_preemption"]) for r in rows.iter_rows(named=True)
    ]
    engine = [(r["request"], r["tokens_asked"], r["tokens_hit"], r["after_preemption"]) for r in result["lookups"]]
    if not caching:
        return [] if not mine else ["lookups without prefix caching"]
    wrong = [] if mine == engine else ["lookups differ"]
    stats = result["cache_stats"]
    first, again = rows.filter(~rows["after_preemption"]), rows.filter(rows["after_preemption"])
    for name, part in (("", first), ("preempted_", again)):
        told = tuple(stats.get(name + key, 0) for key in ("requests", "queries", "hits"))
        ours = (part.height, part["tokens_asked"].sum(), part["tokens_hit"].sum())
        if told != ours:
            wrong.append(f"{name}cache statistics {ours}, vLLM's own {told}")
    return wrong


def _kv_events(trace: Any, result: dict[str, Any]) -> list[str]:
    """vLLM's own stored and removed blocks, in order, against fills and evictions (by identity, one to one)."""
    engine: list[tuple[str, str | None]] = []
    for event in result["kv_events"]:
        kind = {"BlockStored": "fill", "BlockRemoved": "evict", "AllBlocksCleared": "reset"}[event["kind"]]
        engine += [(kind, h) for h in event["block_hashes"]] if kind != "reset" else [(kind, None)]
    if not engine:
        return []  # vLLM was not asked for them
    events = trace.block_events
    events = events.filter(events["kind"].is_in(["fill", "evict", "reset"]))
    mine = list(zip(events["kind"].to_list(), events["identity"].to_list(), strict=True))
    if [kind for kind, _ in mine] != [kind for kind, _ in engine]:
        return [f"{len(mine)} fills and evictions, vLLM's KV events say {len(engine)} (or another order)"]
    pairs: dict[Any, int] = {}
    for (kind, identity), (_, engine_hash) in zip(mine, engine, strict=True):
        if kind != "reset" and pairs.setdefault(engine_hash, identity) != identity:
            return ["KV events name another block content"]
    return [] if len(set(pairs.values())) == len(pairs) else ["one identity for several KV event hashes"]
