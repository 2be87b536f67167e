"""Costs from steps: a non-negative fit of durations to work, and how far it is off on steps it has not seen.

A duration is modelled as a sum over the work of a step (`costs.WORK`). What keeps the fit honest:

- *Relative errors count.* A step's weight is 1 / (what the last round predicted)^2, so that a decode step of 1 ms says
  as much as a prefill of 300 ms. The prediction, not the measurement, is in the denominator: dividing by the
  measurement would reward predicting too little.
- *Outliers* (a pause of the interpreter, a neighbour on the machine) get Huber's weights: beyond REACH robust standard
  deviations a step pulls as if it lay there (Huber, Robust Estimation of a Location Parameter, 1964). Pauses only ever
  lengthen a step, so the less they count, the more of the run's whole time is missing: `bias` tells how much.
- *A run's time must come out.* So beside the costs there is `stretch`, the time of all fitted steps over what the costs
  say of them. It is a factor, since a pause is the likelier to fall into a step the longer the step is. Of a step that
  took over MOST_TIMES its costs only that much counts: a machine that slept for an hour is not to be foretold.
- *Warm-up.* The first steps of a process run slower. They are left out up to the first step from which on the median of
  WINDOW steps lies within REACH robust standard deviations of the fit; at most a tenth of the steps.
- *Long runs* are thinned: of more than MOST_STEPS steps every second, third, ... is taken.
- *Cross-validation in blocks.* Neighbouring steps resemble each other, so a fold is a stretch of time, not a random
  draw; each is predicted by a fit on all the others. Outliers stay in what is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtrace_replay.timing.work import COLUMNS, F64, KINDS
from kvtrace_traces.errors import KvtraceError

FOLDS = 5
LEAST_STEPS = 40
MOST_STEPS = 100_000
WINDOW = 16
WARM_UP_SHARE = 0.1
REACH = 3.0
MOST_TIMES = 100.0
_ROUNDS = 60
_SETTLED = 1e-7
_ALIKE = 1e-6  # of a column's length: what is left of it beside the columns before must be more
# Which of two columns that cannot be told apart keeps its cost: the earlier one.
_PREFERENCE = ("call", "decode_row", "prefill_token", "decode_context", "prefill_pair")

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FitError:
    """How far predictions of unseen steps are off. `batch`: all, prefill, decode or mixed; `steps`: how many;
    `median` and `p95` of |predicted / measured - 1|; `bias`: predicted over measured time of all of them, - 1."""

    batch: str
    steps: int
    median: float
    p95: float
    bias: float


@dataclass(frozen=True)
class Fit:
    """A fitted sum of costs.

    `costs`: ns by column of COLUMNS; `spread`: by column the lowest and the highest of the folds' fits; `unidentified`:
    by column why its cost is 0 without being known; `errors`: cross-validated; `steps`: how many were fitted;
    `warm_up`: how many first steps were left out; `outliers`: how many had less than full weight; `stretch`: what the
    steps took in all, over their costs.
    """

    costs: dict[str, float]
    spread: dict[str, tuple[float, float]]
    unidentified: dict[str, str]
    errors: tuple[FitError, ...]
    steps: int
    warm_up: int
    outliers: int
    stretch: float


def fit_steps(work: F64, duration_ns: F64, kind: npt.NDArray[np.int8], starts: npt.NDArray[np.int64]) -> Fit:
    """Fit costs to steps.

    `work`: float64[n, 5], columns COLUMNS; `duration_ns`: float64[n], steps without a positive duration are left out;
    `kind`: int8[n], index into KINDS; `starts`: int64, positions at which a process began (0 among them).
    Raises KvtraceError where fewer than LEAST_STEPS steps have durations.
    """
    timed = np.flatnonzero(np.isfinite(duration_ns) & (duration_ns > 0))
    timed = timed[:: -(-len(timed) // MOST_STEPS) or 1]
    began = np.zeros(len(duration_ns), np.int64)
    began[starts[starts < len(duration_ns)]] = 1
    engine = began.cumsum()[timed]
    work, took, kind = work[timed], duration_ns[timed], kind[timed]
    if len(took) < LEAST_STEPS:
        raise KvtraceError(
            f"{len(took)} steps with durations are too few to learn from ({LEAST_STEPS} at least): record more, "
            "or name --gpu and --model"
        )
    costs, _ = solve(work, took)
    warm = _warm_up(work @ costs, took, engine)
    work, took, kind = work[~warm], took[~warm], kind[~warm]
    costs, weights = solve(work, took)
    predicted, folds = cross_validated(work, took, np.arange(len(took)) * FOLDS // len(took))
    return Fit(
        dict(zip(COLUMNS, map(float, costs), strict=True)),
        {name: (float(folds[:, i].min()), float(folds[:, i].max())) for i, name in enumerate(COLUMNS)},
        unidentified(work),
        errors_of(predicted, took, kind),
        len(took),
        int(warm.sum()),
        int((weights < 1).sum()),
        stretch_of(work @ costs, took),
    )


def cross_validated(work: F64, took: F64, fold: npt.NDArray[np.int64]) -> tuple[F64, F64]:
    """What each step takes by a fit on the other folds, float64[n], and those fits' costs, float64[folds, 5]; `fold`:
    int64[n], which fold a step is in, from 0 on without gaps."""
    count = int(fold.max()) + 1
    predicted, folds = np.empty(len(took)), np.empty((count, len(COLUMNS)))
    for n in range(count):
        folds[n], _ = solve(work[fold != n], took[fold != n])
        predicted[fold == n] = work[fold == n] @ folds[n]
    return predicted, folds


def solve(work: F64, took: F64) -> tuple[F64, F64]:
    """The costs, float64[5], and Huber's weight of each step, float64[n] up to 1. Columns that cannot be told from the
    ones before them cost 0."""
    chosen = [i for i, name in enumerate(COLUMNS) if name not in unidentified(work)]
    table = work[:, chosen]
    guess = np.full(len(took), float(np.median(took)))
    weights, found = np.ones(len(took)), np.zeros(len(chosen))
    for _ in range(_ROUNDS):
        floor = np.maximum(guess, 1e-3 * float(np.median(guess)))
        last, found = found, _nnls(table, took, np.sqrt(weights) / floor)
        guess = table @ found
        off = (took - guess) / np.maximum(guess, 1e-3 * float(np.median(took)))
        reach = REACH * _scale(off)
        size = np.abs(off)
        weights = np.where(size > reach, reach / np.maximum(size, 1e-300), 1.0)
        if np.allclose(found, last, rtol=_SETTLED, atol=0):
            break
    costs = np.zeros(len(COLUMNS))
    costs[chosen] = found
    return costs, weights


def stretch_of(predicted: F64, took: F64) -> float:
    """What steps took in all, over what was `predicted` of them, both float64[n] ns; see MOST_TIMES."""
    whole = float(predicted.sum())
    return float(np.minimum(took, MOST_TIMES * predicted).sum()) / whole if whole > 0 else 1.0


def relative_nnls(table: F64, took: F64) -> F64:
    """The non-negative factors of the columns of `table`, float64[n, m], that predict `took` with the least relative
    errors, float64[m]."""
    guess = took
    for _ in range(_ROUNDS):
        found = _nnls(table, took, 1 / guess)
        guess = np.maximum(table @ found, 1e-3 * took)
    return found


def errors_of(predicted: F64, took: F64, kind: npt.NDArray[np.int8]) -> tuple[FitError, ...]:
    """The table of errors: a row for all steps and one for each kind of batch that there is."""
    rows = [("all", np.ones(len(took), bool)), *((name, kind == i) for i, name in enumerate(KINDS))]
    return tuple(_error(name, predicted[mine], took[mine]) for name, mine in rows if mine.any())


def _error(batch: str, predicted: F64, took: F64) -> FitError:
    off = np.abs(predicted / took - 1)
    middle, most = np.quantile(off, [0.5, 0.95])
    return FitError(batch, len(took), float(middle), float(most), float(predicted.sum() / took.sum() - 1))


def _nnls(table: F64, took: F64, weight: F64) -> F64:
    """argmin over x >= 0 of |weight * (table x - took)|; solved on the triangle that the table reduces to."""
    from scipy.optimize import nnls

    unit = np.sqrt(((table * weight[:, None]) ** 2).sum(axis=0))
    scaled = np.column_stack([table * weight[:, None] / unit, took * weight])
    triangle: F64 = np.asarray(np.linalg.qr(scaled, mode="r"))
    found: F64 = nnls(triangle[:, :-1], triangle[:, -1])[0] / unit
    return found


def _scale(off: F64) -> float:
    """A robust standard deviation of relative errors around 0."""
    return max(1.4826 * float(np.median(np.abs(off))), 1e-9)


def unidentified(work: F64) -> dict[str, str]:
    """Columns whose cost the steps cannot tell, and why."""
    found: dict[str, str] = {}
    basis: list[F64] = []
    for name in _PREFERENCE:
        column = work[:, COLUMNS.index(name)]
        length = float(np.linalg.norm(column))
        if length == 0:
            found[name] = "no step has any"
            continue
        rest = column / length
        for _ in range(2):  # once more for what rounding left
            for unit in basis:
                rest = rest - unit * float(unit @ rest)
        left = float(np.linalg.norm(rest))
        if left < _ALIKE:
            found[name] = "it never varies by itself"
        else:
            basis.append(rest / left)
    return {name: found[name] for name in COLUMNS if name in found}


def _warm_up(predicted: F64, took: F64, engine: npt.NDArray[np.int64]) -> Bools:
    """bool[n]: the first steps of each process that the fit says are slower than the others."""
    off = took / np.maximum(predicted, 1e-300) - 1
    middle = float(np.median(off))
    reach = middle + REACH * 1.4826 * float(np.median(np.abs(off - middle)))
    warm = np.zeros(len(took), bool)
    for number in np.unique(engine):
        mine = np.flatnonzero(engine == number)
        most = int(WARM_UP_SHARE * len(mine))
        n = 0
        while n < most and float(np.median(off[mine[n : n + WINDOW]])) > reach:
            n += 1
        # The window that is quiet may still begin with a slow step or two.
        while 0 < n < most and off[mine[n]] > reach:
            n += 1
        warm[mine[:n]] = True
    return warm
