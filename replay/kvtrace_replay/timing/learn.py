"""A profile learnt from the steps of a trace."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtrace_replay.timing.fit import fit_steps
from kvtrace_replay.timing.link import LinkCost
from kvtrace_replay.timing.profile import Model, Profile
from kvtrace_replay.timing.work import step_work
from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.trace import Trace

_REMEDY = "name GPU:MODEL (`--timing h100:llama-3.1-8b`, or `kvtrace calibrate --gpu h100 --model llama-3.1-8b`)"
_ALIKE = ("model", "device", "dtype", "layers")


def learn(trace: Trace, link: dict[str, LinkCost] | None = None) -> Profile:
    """Fit a profile to the steps of `trace`; `link`: what moving blocks costs, which a trace does not tell.

    Raises KvtraceError where the trace has no times, too few steps, or engines of several kinds.
    """
    head = trace.header
    if head.get("source") == "import":
        raise KvtraceError(f"{trace.path} is an import: it has requests and no steps to learn from; {_REMEDY}")
    if head.get("clock") == "logical":
        raise KvtraceError(f"{trace.path} was simulated without a clock: its steps have no durations; {_REMEDY}")
    for name in _ALIKE:
        if len(found := {str(engine.get(name)) for engine in trace.engines}) > 1:
            raise KvtraceError(
                f"the engines of {trace.path} differ in {name} ({', '.join(sorted(found))}): calibrate each"
            )
    work = step_work(trace)
    if not np.isfinite(work.duration_ns).any():
        raise KvtraceError(f"{trace.path} has no steps with times to learn from; {_REMEDY}")
    starts = np.flatnonzero(np.diff(work.engine_index, prepend=-1))
    fit = fit_steps(work.work, work.duration_ns, work.kind, starts)
    model = model_of(head)
    facts: dict[str, str | int | float] = {
        "trace": trace.path.name, "engine": f"{head.get('engine')} {head.get('engine_version')}",
        "steps": fit.steps, "warm_up_steps": fit.warm_up, "outlier_steps": fit.outliers,
    }  # fmt: skip
    return Profile(
        f"{model.name}-{head.get('device')}", "trace", str(head.get("device")), model, fit.costs, fit.spread,
        fit.unidentified, link or {}, fit.errors, facts, stretch=fit.stretch,
    )  # fmt: skip


def model_of(header: dict[str, Any]) -> Model:
    """The model that a trace's header tells of."""
    groups = header.get("groups") or []
    latent = any("MLA" in str(group.get("kind")) for group in groups)
    size = header.get("bytes_per_token")
    return Model(
        str(header.get("model")),
        max(int(header.get("layers") or 1), 1),
        1 if latent else 2,
        int(size) if size else None,
    )
