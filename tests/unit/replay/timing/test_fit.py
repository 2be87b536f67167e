"""The fit finds the costs that made the steps, whatever noise, pauses and warm-up lie over them."""

from __future__ import annotations

import numpy as np
import pytest

from kvtrace_replay.timing import fit
from kvtrace_replay.timing.fit import LEAST_STEPS, cross_validated, errors_of, fit_steps, solve
from kvtrace_replay.timing.work import COLUMNS, F64
from kvtrace_traces.errors import KvtraceError

TRUE = {"call": 5e6, "prefill_token": 6e4, "prefill_pair": 40.0, "decode_row": 2e5, "decode_context": 300.0}
COSTS = np.array([TRUE[name] for name in COLUMNS])
ONE = np.array([0])


def steps(seed: int, count: int = 3000) -> tuple[F64, np.ndarray]:
    """Work of `count` steps of all kinds, and their kinds."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.05, 0.75, 0.2])
    rows = np.where(kind > 0, rng.integers(1, 64, count), 0)
    tokens = np.where(kind != 1, rng.integers(1, 2000, count), 0)
    context = tokens * rng.integers(0, 3000, count) + tokens * (tokens + 1) // 2
    work = np.column_stack([np.ones(count), tokens, context, rows, rows * rng.integers(1, 4000, count)])
    return work.astype(np.float64), kind.astype(np.int8)


def off(found: dict[str, float]) -> float:
    return max(abs(found[name] / TRUE[name] - 1) for name in COLUMNS)


def test_exact_steps_give_exact_costs() -> None:
    work, kind = steps(1)
    found = fit_steps(work, work @ COSTS, kind, ONE)
    assert off(found.costs) < 1e-9
    assert (found.warm_up, found.outliers, found.unidentified) == (0, 0, {})
    assert found.stretch == pytest.approx(1, abs=1e-9)
    assert all(error.median < 1e-9 and error.p95 < 1e-9 and abs(error.bias) < 1e-9 for error in found.errors)
    assert [(error.batch, error.steps) for error in found.errors] == [
        ("all", 3000), *((name, int((kind == i).sum())) for i, name in enumerate(("prefill", "decode", "mixed"))),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_noise_pauses_and_warm_up_do_not_move_it(seed: int) -> None:
    work, kind = steps(seed)
    rng = np.random.default_rng(seed + 100)
    took = work @ COSTS * np.exp(rng.normal(0, 0.05, len(work)))
    paused = rng.random(len(work)) < 0.05
    took[paused] *= rng.uniform(3, 50, paused.sum())
    took[:60] *= np.linspace(8, 2, 60)
    found = fit_steps(work, took, kind, ONE)
    assert off(found.costs) < 0.06
    assert 45 <= found.warm_up <= 75
    assert found.steps == len(work) - found.warm_up
    assert abs(found.outliers - paused.sum()) < 0.05 * len(work)
    assert all(low <= found.costs[name] * 1.05 and high >= found.costs[name] * 0.95
               for name, (low, high) in found.spread.items())  # fmt: skip
    everything = found.errors[0]
    assert 0.02 < everything.median < 0.05  # the median of |N(0, 5%)| is 3.4 %
    assert everything.p95 > 0.09
    assert everything.bias < -0.3  # the pauses, which no step is told to expect
    costs = np.array([found.costs[name] for name in COLUMNS])
    fitted = slice(found.warm_up, None)
    assert found.stretch * (work[fitted] @ costs).sum() == pytest.approx(took[fitted].sum())  # the run's time comes out
    plain = np.linalg.lstsq(work, took, rcond=None)[0]
    assert off(dict(zip(COLUMNS, plain, strict=True))) > 0.5


def test_a_sleep_does_not_stretch_every_step() -> None:
    work, kind = steps(9)
    took = work @ COSTS
    took[1000] = 3.6e12
    found = fit_steps(work, took, kind, ONE)
    usual = (work @ COSTS).sum()
    assert off(found.costs) < 1e-6
    assert found.stretch == pytest.approx(1 + 99 * float(work[1000] @ COSTS) / usual)


def test_short_steps_count_as_much_as_long_ones() -> None:
    """Decode steps of 5 ms beside prefills of half a second: 1 ms that all steps have must not drown."""
    work, kind = steps(7)
    work[kind != 1, 1] += 8000
    rng = np.random.default_rng(7)
    took = work @ COSTS * np.exp(rng.normal(0, 0.1, len(work)))
    assert abs(fit_steps(work, took, kind, ONE).costs["call"] / TRUE["call"] - 1) < 0.03


def test_costs_are_never_negative() -> None:
    work, kind = steps(3)
    took = 5e6 + 1e5 * work[:, 3] - 20 * work[:, 4]
    took = np.maximum(took, 1e5)
    assert min(fit_steps(work, took, kind, ONE).costs.values()) >= 0


def test_each_process_warms_up() -> None:
    work, kind = steps(11)
    took = work @ COSTS
    starts = np.array([0, 1000, 2000])
    for start in starts:
        took[start : start + 20] *= 4
    found = fit_steps(work, took, kind, starts)
    assert found.warm_up == 60
    assert off(found.costs) < 1e-6


def test_a_slow_run_is_no_warm_up() -> None:
    """At most a tenth of the steps: what is slow for longer is how the engine is."""
    work, kind = steps(12)
    took = work @ COSTS
    took[:1500] *= 3
    assert fit_steps(work, took, kind, ONE).warm_up <= 300


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("prefill_pair", 0, "no step has any"), ("decode_row", 8, "it never varies by itself"),
        ("prefill_token", None, "it never varies by itself"),
    ],
)  # fmt: skip
def test_what_never_varies_is_named(column: str, value: int | None, why: str) -> None:
    work, kind = steps(4)
    work[:, COLUMNS.index(column)] = 3 * work[:, 3] if value is None else value
    took = work @ COSTS
    found = fit_steps(work, took, kind, ONE)
    assert found.unidentified == {column: why}
    assert found.costs[column] == 0
    assert found.errors[0].median < 1e-6  # the others take over what it costs


def test_too_few_steps() -> None:
    work, kind = steps(5, LEAST_STEPS)
    took = work @ COSTS
    assert off(fit_steps(work, took, kind, ONE).costs) < 1e-6
    took[3], took[4], took[5] = np.nan, 0, -1
    with pytest.raises(KvtraceError, match=f"{LEAST_STEPS - 3} steps with durations are too few"):
        fit_steps(work, took, kind, ONE)
    with pytest.raises(KvtraceError, match="0 steps"):
        fit_steps(work[:0], took[:0], kind[:0], ONE)


def test_long_runs_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    work, kind = steps(8)
    took = work @ COSTS
    took[1::2] *= 3  # what thinning by two, from the first on, never sees
    monkeypatch.setattr(fit, "MOST_STEPS", 1500)
    found = fit_steps(work, took, kind, ONE)
    assert (found.steps, off(found.costs) < 1e-9) == (1500, True)
    monkeypatch.setattr(fit, "MOST_STEPS", 1499)
    assert fit_steps(work, took, kind, ONE).steps == 1000


def test_folds_are_predicted_by_the_others() -> None:
    """A stretch that the other folds know nothing of is predicted badly, and is seen to be."""
    work, _ = steps(6)
    took = work @ COSTS
    took[1200:1800] *= 2  # the third fold of five
    predicted, folds = cross_validated(work, took, np.arange(3000) * 5 // 3000)
    ratio = predicted / took
    assert np.median(ratio[1200:1800]) == pytest.approx(0.5, rel=0.01)
    assert folds.shape == (5, 5)
    assert np.allclose(folds[2], COSTS)
    assert solve(work[1200:1800], took[1200:1800])[0] == pytest.approx(2 * COSTS)


def test_errors_by_hand() -> None:
    took = np.array([100.0, 100, 100, 200, 50])
    predicted = np.array([110.0, 100, 70, 200, 100])
    rows = {error.batch: error for error in errors_of(predicted, took, np.array([0, 0, 0, 1, 1], np.int8))}
    assert set(rows) == {"all", "prefill", "decode"}
    assert (rows["prefill"].steps, rows["prefill"].median) == (3, pytest.approx(0.1))
    assert rows["prefill"].p95 == pytest.approx(0.1 + 0.9 * 0.2)
    assert rows["decode"].median == pytest.approx(0.5)
    assert rows["decode"].bias == pytest.approx(300 / 250 - 1)
    assert rows["all"].bias == pytest.approx(580 / 550 - 1)


def test_the_robust_fit_is_what_makes_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    work, kind = steps(2)
    took = work @ COSTS
    took[::9] *= 30
    assert off(fit_steps(work, took, kind, ONE).costs) < 0.01
    monkeypatch.setattr(fit, "REACH", 1e9)
    assert off(fit_steps(work, took, kind, ONE).costs) > 0.5
