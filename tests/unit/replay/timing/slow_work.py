"""The work and durations of steps the slow way: row by row, request by request."""

from __future__ import annotations

import math

from kvtrace_traces import Trace

Row = tuple[list[float], float, bool]


def slow_steps(trace: Trace) -> dict[tuple[int, int], Row]:
    """By engine and step: its work in the order call, prefill tokens, pairs, decode rows, context; its duration, NaN
    where unknown; and whether the engine had waited."""
    found: dict[tuple[int, int], Row] = {}
    prompts = {(r["engine_index"], r["request"]): r["prompt_tokens"] for r in trace.requests.iter_rows(named=True)}
    for step in trace.steps.iter_rows(named=True):
        found[step["engine_index"], step["step"]] = ([1, 0, 0, 0, 0], math.nan, False)
    for row in trace.step_requests.iter_rows(named=True):
        work = found[row["engine_index"], row["step"]][0]
        before, tokens = row["computed_before"], row["tokens"]
        if tokens == 1 and before >= prompts[row["engine_index"], row["request"]]:
            work[3] += 1
            work[4] += before + 1
        else:
            work[1] += tokens
            work[2] += sum(position + 1 for position in range(before, before + tokens))
    for engine in sorted({key[0] for key in found}):
        _times(trace, engine, found)
    return found


def _times(trace: Trace, engine: int, found: dict[tuple[int, int], Row]) -> None:
    requests = [r for r in trace.requests.iter_rows(named=True) if r["engine_index"] == engine]
    last_end, last_step = None, -1
    for step in trace.steps.sort("step").iter_rows(named=True):
        if step["engine_index"] != engine:
            continue
        busy = False
        for request in requests:
            arrived = request["arrival_step"] <= last_step
            gone = request["finish_step"] is not None and request["finish_step"] <= last_step
            busy = busy or (arrived and not gone)
        waited = not busy or step["empty_calls"] > 0
        duration = math.nan
        if step["end_ns"] is not None:
            begin = step["start_ns"]
            if last_end is not None and (not waited or begin <= last_end):
                begin = last_end
            duration = float(step["end_ns"] - begin)
            last_end = step["end_ns"] if last_end is None else max(last_end, step["end_ns"])
        found[engine, step["step"]] = (found[engine, step["step"]][0], duration, waited)
        last_step = step["step"]
