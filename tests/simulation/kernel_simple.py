"""The compiled scheduler with the simple connector on the cases of its twin, its run in the twin's words."""

from __future__ import annotations

from typing import Any

from kvtrace_replay.schedulers.vllm_v1.offload.connectors import SimpleOffload
from kvtrace_replay.schedulers.vllm_v1.offload.layout import HOST_OPS
from kvtrace_replay.schedulers.vllm_v1.offload.run import OffloadRun as KernelRun
from kvtrace_replay.schedulers.vllm_v1.offload.run import simulate_offload

from .cases import Case
from .kernel import as_recorded, as_settings
from .kernel_offload import in_words as offload_in_words
from .kernel_offload import twin_in_words as offload_twin_in_words
from .twin_simple import Simple, SimpleRun


def as_tier(simple: Simple) -> SimpleOffload:
    return SimpleOffload(
        blocks=simple.chunks + 1,
        store="eviction" if simple.lazy else "fill",
        steps=simple.polls,
        runner=simple.runner,
    )


def kernel_run(case: Case, simple: Simple, events: bool = True, step_ns: int = 1000, **options: Any) -> KernelRun:
    """The kernel's run of a case; `step_ns` as `as_recorded` takes it."""
    source, settings = as_recorded(case, step_ns), as_settings(case.settings)
    return simulate_offload(source, settings, as_tier(simple), events=events, **options)


def in_words(case: Case, run: KernelRun) -> dict[str, Any]:
    """What the kernel did, in the shapes of `twin_in_words`."""
    hashes, host = as_recorded(case).hashes, []
    for op, block, identity in run.logs["host"].tolist():
        host.append((HOST_OPS[op], block, int(hashes[identity])) if identity >= 0 else (HOST_OPS[op], block))
    return {**offload_in_words(case, run), "host": host}


def twin_in_words(run: SimpleRun) -> dict[str, Any]:
    """A twin's run in the same shapes."""
    told = offload_twin_in_words(run)
    told["events"] = [(s, k, None if r < 0 else r, *rest) for s, k, r, *rest in told["events"]]
    return {**told, "host": run.host}
