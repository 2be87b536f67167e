"""How far a figure would move with other requests of the same kind: a bootstrap over stretches of the trace.

Requests that follow one another are alike (turns of a conversation, a burst), so not they are drawn again but stretches
of them (moving from Efron's bootstrap to that of Künsch, Annals of Statistics 17(3), 1989, with stretches that do not
overlap).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

STRETCHES = 20
LEAST = 5  # in a stretch, as far as the trace has them
DRAWS = 4000
SAID = "95 % interval of a bootstrap over {} stretches of the trace"

F64 = npt.NDArray[np.float64]


def stretches(n: int) -> int:
    """How many stretches `n` requests or steps are cut into."""
    return max(2, min(STRETCHES, n // LEAST))


def interval(over: npt.NDArray[Any], below: npt.NDArray[Any] | None = None) -> tuple[float, float]:
    """The 95 % interval of the sum of `over`, in the order of the trace, or of its ratio to the sum of `below`.

    Always the same for the same numbers: the seed is fixed.
    """
    parts = stretches(over.size)
    top = _sums(over, parts)
    chosen = np.random.default_rng(0).integers(0, parts, (DRAWS, parts))
    drawn = top[chosen].sum(axis=1)
    if below is not None:
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = drawn / _sums(below, parts)[chosen].sum(axis=1)
        drawn = drawn[np.isfinite(drawn)]
        if not drawn.size:
            return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _sums(values: npt.NDArray[Any], parts: int) -> F64:
    bounds = np.arange(parts) * values.size // parts
    return np.add.reduceat(values.astype(np.float64), bounds) if values.size else np.zeros(parts)


def slope_interval(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[float, float]:
    """The 95 % interval of the slope of `y` over `x` by least squares, drawn as in `interval`."""
    parts = stretches(x.size)
    x, y = x.astype(np.float64), y.astype(np.float64)
    chosen = np.random.default_rng(0).integers(0, parts, (DRAWS, parts))
    n, sx, sy, sxx, sxy = (_sums(values, parts)[chosen].sum(axis=1) for values in (np.ones_like(x), x, y, x * x, x * y))
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (n * sxy - sx * sy) / (n * sxx - sx * sx)
    slopes = slopes[np.isfinite(slopes)]
    if not slopes.size:
        return float("nan"), float("nan")
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(high)
