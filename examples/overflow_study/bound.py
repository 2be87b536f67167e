"""How much better could one choose, per victim, between recomputing and swapping?

The simulated engine takes its choice from two curves of prices. Curves that only say yes or no force it: with every
swap priced 1, a victim that knows t tokens is swapped if its recomputation is priced 2, and recomputed if it is priced
0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from experiments import Case, Size, at_share, never, overhead, serve

from kvtrace_replay.schedulers.vllm_v0.layout import M_CALL, M_KIND, M_REQUEST, MOVED_OUT, MOVED_RECOMPUTE, S_REQUESTS
from kvtrace_replay.schedulers.vllm_v0.run import RunV0, simulate_v0
from kvtrace_replay.timing.profile import Profile
from kvtrace_traces.errors import KvtraceError

MOST_RUNS = 5000
SHARES = (0.08, 0.12, 0.2, 0.3, 0.4, 0.5)
F64 = npt.NDArray[np.float64]


def forced(case: Case, swapped: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Prices by which a victim that knows t tokens is swapped where `swapped[t]`, and else recomputed."""
    return {"recompute_cost": np.where(swapped, 2.0, 0.0), "swap_cost": np.ones(swapped.size)}


def curve_size(case: Case) -> int:
    return int((case.prompt + case.output).max()) + 3


def victims(run: RunV0, case: Case) -> list[int]:
    """Known tokens of each victim, in the order in which they fell. The run must have been told in detail."""
    call_of = np.repeat(np.arange(run.calls), run.rows[:, S_REQUESTS])
    moves = run.moves[np.isin(run.moves[:, M_KIND], (MOVED_RECOMPUTE, MOVED_OUT))]
    found = []
    for move in moves:
        before = np.searchsorted(call_of, move[M_CALL])
        # Whoever is scheduled has one token more after the call.
        had = int(np.count_nonzero(run.scheduled[:before, 0] == move[M_REQUEST]))
        found.append(int(case.prompt[move[M_REQUEST]]) + had)
    return found


def best_assignment(case: Case, timing: Profile) -> tuple[RunV0, int, bool]:
    """The quickest run over every way to choose for every victim: the run, how many runs there are, and whether the
    search was complete.

    One choice changes who falls later, so the choices are a tree, and each run is a leaf of it. A choice is by the
    victim's number of tokens: it is complete where no two victims of a run have the same number.
    Raises KvtraceError beyond MOST_RUNS runs.
    """
    costs = timing.step_costs(case.block_size)
    best: RunV0 | None = None
    runs, complete = 0, True
    open_choices: list[list[bool]] = [[]]
    tokens_of: list[list[int]] = [[]]
    while open_choices:
        prefix, known = open_choices.pop(), tokens_of.pop()
        swapped = np.zeros(curve_size(case), bool)
        swapped[[t for t, chosen in zip(known, prefix, strict=True) if chosen]] = True
        settings = case.settings(case.memory_tokens, preemption="hybrid", **forced(case, swapped))
        run = simulate_v0(case.requests, settings, costs=costs, detail=True)
        runs += 1
        if runs > MOST_RUNS:
            raise KvtraceError(f"more than {MOST_RUNS} ways to choose: take fewer requests")
        fell = victims(run, case)
        complete &= len(set(fell)) == len(fell)
        assert fell[: len(known)] == known, "choices so far lead to the same victims so far"
        if run.ended == "done" and run.finished == case.prompt.size and _quicker(run, best):
            best = run
        for at in range(len(prefix), len(fell)):
            if fell[at] not in fell[:at]:
                open_choices.append([*prefix, *[False] * (at - len(prefix)), True])
                tokens_of.append(fell[: at + 1])
    assert best is not None
    return best, runs, complete


def best_cut(case: Case, timing: Profile) -> RunV0:
    """The quickest run over all rules with one cut: victims of at least so many tokens are swapped, or of less. Both
    pure ways are among them."""
    sizes = np.arange(curve_size(case))
    found: RunV0 | None = None
    cuts = np.unique(np.linspace(0, sizes.size, 33).astype(int))
    for swapped in [rule for cut in cuts for rule in (sizes >= cut, sizes < cut)]:
        run = serve(case, "hybrid", timing, **forced(case, swapped))
        if _quicker(run, found):
            found = run
    assert found is not None
    return found


def _quicker(run: RunV0, than: RunV0 | None) -> bool:
    assert run.duration_ns is not None
    return than is None or than.duration_ns is None or run.duration_ns < than.duration_ns


def small_case(seed: int) -> Case:
    """Seven requests, prompts of all lengths from 64 to 2,048 tokens, in two fifths of the memory that they need."""
    random = np.random.default_rng(seed)
    prompt = np.exp(random.uniform(np.log(64), np.log(2048), 7)).astype(np.int64)
    output = random.integers(512, 1025, prompt.size)
    need = int((prompt + output).sum())
    most = int((prompt + output).max())
    return Case(prompt, output, max(need * 2 // 5, most * 11 // 10))


def small(size: Size, timing: Profile) -> pl.DataFrame:
    """Seeded small cases: overhead, s, of each way and of the best of all assignments."""
    return pl.DataFrame(
        [_row({"case": f"small {seed}"}, small_case(seed), timing, True) for seed in range(size.small_cases)]
    )


def large(timing: Profile) -> pl.DataFrame:
    """The same of the runs of (3b), where assignments are too many to try; with the best single cut."""
    return pl.DataFrame(
        [_row({"case": f"{share:.0%} of memory"}, at_share(share, timing), timing, False) for share in SHARES]
    )


def _row(named: dict[str, Any], case: Case, timing: Profile, exhaustive: bool) -> dict[str, Any]:
    ideal = never(case, timing)

    def beyond(run: RunV0) -> float:
        return overhead(run, ideal, case, "hybrid", timing).overhead_s

    runs = {way: serve(case, way, timing) for way in ("recompute", "swap", "hybrid")}
    row: dict[str, Any] = {**named, "victims": runs["recompute"].recomputes}
    row |= {f"{way}_s": beyond(run) for way, run in runs.items()}
    row["best_of_three_s"] = min(row[f"{way}_s"] for way in runs)
    row["best_cut_s"] = beyond(best_cut(case, timing))
    row["best_assignment_s"], row["assignments"] = None, None
    if exhaustive:
        best, tried, complete = best_assignment(case, timing)
        row["best_assignment_s"], row["assignments"] = beyond(best), tried
        row["complete"] = complete
    return row
