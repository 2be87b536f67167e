"""Runs the compiled scheduler on a `Case`, and tells it as the twin and the judge do: as a `twin.Run`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvtrace_replay.schedulers.vllm_v0.layout import ENDS, KINDS, MOVES
from kvtrace_replay.schedulers.vllm_v0.requests import RequestsV0
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, simulate_v0
from kvtrace_replay.schedulers.vllm_v0.settings import SettingsV0
from kvtrace_replay.timing.costs import StepCosts

from .cases import Case
from .twin import Run


def requests(case: Case) -> RequestsV0:
    def column(name: str) -> Any:
        return [getattr(request, name) for request in case.requests]

    return RequestsV0(
        prompt=np.array(column("prompt"), np.int64),
        output=np.array(column("output"), np.int64),
        arrival=np.array(column("arrival"), np.int64),
        arrival_time=np.array(column("arrival_time"), np.float64),
        abort=np.array([-1 if at is None else at for at in column("abort")], np.int64),
    )


def settings(case: Case) -> SettingsV0:
    given = dict(vars(case.settings))
    given["recompute_cost"] = given.pop("recompute_cost_per_token")
    given["swap_cost"] = given.pop("swap_cost_per_block")
    return SettingsV0(**given)


def simulated(case: Case, *, detail: bool = True) -> RunV0:
    costs = None if case.costs is None else StepCosts(*case.costs)
    return simulate_v0(requests(case), settings(case), costs=costs, by_time=costs is not None, detail=detail)


def kernel_run(case: Case) -> Run:
    run = simulated(case)
    moved: list[dict[str, list[Any]]] = [{name: [] for name in MOVES} for _ in range(run.calls)]
    for call, kind, request, amount in run.moves.tolist():
        name = MOVES[kind]
        moved[call][name].append((request, amount) if name.startswith("swapped") else request)
    steps, begin = [], 0
    for row, moves in zip(run.rows.tolist(), moved, strict=True):
        scheduled = [tuple(pair) for pair in run.scheduled[begin : begin + row[1]].tolist()]
        begin += row[1]
        assert row[2:6] == [len(moves[name]) for name in MOVES]
        assert row[17:] == [sum(blocks for _, blocks in moves[name]) for name in ("swapped_in", "swapped_out")]
        steps.append((KINDS[row[0]], scheduled, *moves.values(), *row[6:11], *row[13:17]))
    assert begin == len(run.scheduled)
    names = list(ENDS)
    rows = [(*told[:7], tokens, names[told[-1]]) for told, tokens in zip(run.told.tolist(), run.tokens, strict=True)]
    return Run(steps, rows, run.ended, run.leaked_blocks)


def difference(mine: Run, theirs: Run) -> str:
    """The first thing that is not equal, or nothing."""
    for what in ("steps", "requests"):
        for at, (one, other) in enumerate(zip(getattr(mine, what), getattr(theirs, what), strict=False)):
            if one != other:
                return f"{what}[{at}]: {one} is not {other}"
        if len(getattr(mine, what)) != len(getattr(theirs, what)):
            return f"{len(getattr(mine, what))} {what}, not {len(getattr(theirs, what))}"
    if (mine.ended, mine.leaked) != (theirs.ended, theirs.leaked):
        return f"{mine.ended}, {mine.leaked} leaked, not {theirs.ended}, {theirs.leaked}"
    return ""
