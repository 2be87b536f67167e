"""The shapes that the published study shows, each as a question to the data: does it hold, and by how much?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from experiments import AS_IS, MENDED

F64 = npt.NDArray[np.float64]
FLAT = 0.05  # flat: the largest is at most this much above the smallest
VISIBLE = 0.005  # a minimum counts where the next point is at least this much higher
MIRRORED = -0.5  # correlation from which on one course mirrors the other
SHUFFLES = 500
LEAST_PERIOD_S = 3.0
NAMES = {"recompute": "recompute", "swap": "swap", "swap-pageable": "pageable swap"}


@dataclass(frozen=True)
class Answer:
    """`holds`: whether the data have the shape; `measured`: what they have; `since`: from where on, if that is asked;
    0 is for all."""

    holds: bool
    measured: str
    since: float | None = None


@dataclass(frozen=True)
class Shape:
    """One published shape. `total`: in the overhead, or the only answer; `part`: in the part of it that overflows
    themselves take, where there is one."""

    figure: str
    engine: str
    claim: str
    total: Answer
    part: Answer | None = None


def told(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"


def slope_per_doubling(x: F64, y: F64) -> float:
    """Of the least-squares line through y against log2 x."""
    return float(np.polyfit(np.log2(x), y, 1)[0])


def flat(x: F64, y: F64) -> Answer:
    times = float(y.max() / y.min())
    return Answer(times <= 1 + FLAT, f"{told(y.min())} to {told(y.max())} s, {times:.2f} times")


def falls(x: F64, y: F64) -> Answer:
    text = f"{told(y[0])} to {told(y[-1])} s, {slope_per_doubling(x, y):+.3f} a doubling"
    return Answer(bool((np.diff(y) < 0).all()), text)


def rises(x: F64, y: F64) -> Answer:
    text = f"{told(y[0])} to {told(y[-1])} s, {slope_per_doubling(x, y):+.2f} a doubling"
    return Answer(bool((np.diff(y) > 0).all()), text)


def crossing(x: F64, above: F64) -> float | None:
    """Where `above` last turns negative, interpolated over log x; None where it does not, 0 where it always is."""
    if above[-1] >= 0:
        return None
    if (above < 0).all():
        return 0.0
    at = int(np.flatnonzero(above >= 0)[-1])
    share = above[at] / (above[at] - above[at + 1])
    return float(2 ** (np.log2(x[at]) + share * (np.log2(x[at + 1]) - np.log2(x[at]))))


def wins_at_last(x: F64, ours: F64, theirs: F64) -> Answer:
    at = crossing(x, ours - theirs)
    since = "" if at is None else f"; from {round(at, -2):,.0f} on" if at else "; at all"
    return Answer(bool(ours[-1] < theirs[-1]), f"{told(ours[-1])} against {told(theirs[-1])} s{since}", at)


def falls_to(x: F64, y: F64, end: float) -> Answer:
    kept = x <= end
    line = float(np.polyfit(x[kept], y[kept], 1)[0]) / 10
    return Answer(line < 0 and y[kept][-1] < y[0], f"{told(y[0])} to {told(y[kept][-1])} s, {line:+.2f} a tenth")


def has_minima(x: F64, y: F64) -> Answer:
    """Inner points lower than the one before, after which it goes up visibly before it goes lower."""
    found, low = [], 0
    for at in range(1, len(y)):
        if y[at] < y[low]:
            low = at
        elif y[at] > y[low] * (1 + VISIBLE) and low > 0 and low not in found:
            found.append(low)
        if low in found and y[at] < y[at - 1]:
            low = at
    return Answer(bool(found), "at " + ", ".join(f"{x[at]:.0%}" for at in found) if found else "none")


def lowest_at(x: F64, y: F64, published: tuple[float, ...]) -> Answer:
    at = float(x[int(np.argmin(y))])
    tenths = [(float(y[i]), float(x[i])) for i in range(len(x)) if abs(x[i] * 10 - round(x[i] * 10)) < 1e-6]
    text = f"{told(y.min())} s at {at:.0%} (of whole tenths: {min(tenths)[1]:.0%})"
    return Answer(any(abs(at - one) < 0.005 for one in published), text)


def autocorrelation(y: F64) -> F64:
    """float64[n // 2]: at lags 0, 1, ..."""
    centred = y - y.mean()
    full = np.correlate(centred, centred, "full")[len(y) - 1 :]
    return full[: len(y) // 2] / full[0]


def periodic(y: F64, bin_s: float) -> Answer:
    """Whether the largest autocorrelation is beyond what 99 of 100 shuffles of the same values reach anywhere."""
    least = int(LEAST_PERIOD_S / bin_s)
    found = autocorrelation(y)[least:]
    lag = int(np.argmax(found))
    random = np.random.default_rng(0)
    chance = np.quantile([autocorrelation(random.permutation(y))[least:].max() for _ in range(SHUFFLES)], 0.99)
    text = f"r = {found[lag]:.2f} at {(lag + least) * bin_s:.0f} s (chance: {chance:.2f})"
    return Answer(bool(found[lag] > chance), text)


def sawtooth(gpu_share: F64) -> Answer:
    """Long climbs of small rises, and drops at once that are at least ten times as large."""
    change = np.diff(gpu_share)
    up, down = change[change > 0], -change[change < 0]
    if not len(down) or not len(up):
        return Answer(False, "no drops")
    ratio = float(np.median(down) / np.median(up))
    text = f"{len(down)} drops, {len(up) / len(down):.0f} rises to each, of {ratio:.0f} times their size"
    return Answer(len(down) >= 5 and len(up) >= 5 * len(down) and ratio >= 10, text)


def mirrored(gpu: F64, cpu: F64, what: str) -> Answer:
    r = float(np.corrcoef(gpu, cpu)[0, 1]) if cpu.std() > 0 and gpu.std() > 0 else 0.0
    return Answer(r <= MIRRORED, f"{what}: r = {r:.2f}")


# ------------------------------------------------------------------ the four figures


def _both(ask: Callable[[str], Answer]) -> tuple[Answer, Answer]:
    return ask("overhead_s"), ask("overflow_s")


def _lines(data: pl.DataFrame, x: str, column: str) -> tuple[F64, dict[str, F64]]:
    data = data.sort(x)
    lines = {way: data.filter(pl.col("way") == way)[column].to_numpy() for way in NAMES}
    return data.filter(pl.col("way") == "recompute")[x].cast(pl.Float64).to_numpy(), lines


def _upto(most: float, lines: tuple[F64, dict[str, F64]]) -> tuple[F64, F64]:
    x, of = lines
    return x[x <= most], of["recompute"][x <= most]


def of_block_size(data: pl.DataFrame) -> list[Shape]:
    found = []
    for engine in (AS_IS, MENDED):
        part = data.filter(pl.col("engine") == engine)

        def lines(column: str, part: pl.DataFrame = part) -> tuple[F64, dict[str, F64]]:
            return _lines(part, "block_size", column)

        def best(column: str, lines: Callable[[str], tuple[F64, dict[str, F64]]] = lines) -> Answer:
            last = {way: y[-1] for way, y in lines(column)[1].items()}
            said = ", ".join(f"{NAMES[way]} {told(value)}" for way, value in last.items())
            return Answer(min(last, key=lambda way: last[way]) == "swap", f"{said} s")

        for claim, ask in (
            ("recompute flat at 8, 16 and 32", lambda c, lines=lines: flat(*_upto(32, lines(c)))),
            ("recompute flat", lambda c, lines=lines: flat(lines(c)[0], lines(c)[1]["recompute"])),
            ("swap falls", lambda c, lines=lines: falls(lines(c)[0], lines(c)[1]["swap"])),
            ("pageable swap falls", lambda c, lines=lines: falls(lines(c)[0], lines(c)[1]["swap-pageable"])),
            ("pinned swap best at the largest blocks", best),
        ):
            found.append(Shape("2a", engine, claim, *_both(ask)))
    return found


def _rise_and_cross(figure: str, engine: str, data: pl.DataFrame, when: str) -> list[Shape]:
    found = []
    for way, name in NAMES.items():

        def up(column: str, way: str = way) -> Answer:
            x, lines = _lines(data, "tokens", column)
            return rises(x, lines[way])

        found.append(Shape(figure, engine, f"{name} rises", *_both(up)))
    for way in ("swap", "swap-pageable"):

        def wins(column: str, way: str = way) -> Answer:
            x, lines = _lines(data, "tokens", column)
            return wins_at_last(x, lines[way], lines["recompute"])

        found.append(Shape(figure, engine, f"{NAMES[way]} below recompute {when}", *_both(wins)))
    return found


def of_evicted(data: pl.DataFrame) -> list[Shape]:
    return [
        shape
        for engine in (AS_IS, MENDED)
        for shape in _rise_and_cross("2b", engine, data.filter(pl.col("engine") == engine), "for many tokens")
    ]


def of_length(data: pl.DataFrame) -> list[Shape]:
    """Of the lengths at which memory is short."""
    short = data.filter((pl.col("preemptions") > 0).all().over("tokens"))
    return _rise_and_cross("3a", AS_IS, short, "for long sequences")


def of_memory(data: pl.DataFrame) -> list[Shape]:
    found = []
    for way, name in NAMES.items():

        def fall(column: str, way: str = way) -> Answer:
            x, lines = _lines(data, "memory_share", column)
            return falls_to(x, lines[way], 0.4)

        def minima(column: str, way: str = way) -> Answer:
            x, lines = _lines(data, "memory_share", column)
            return has_minima(x, lines[way])

        def lowest(column: str, way: str = way) -> Answer:
            x, lines = _lines(data, "memory_share", column)
            return lowest_at(x, lines[way], (0.3, 0.5))

        found += [
            Shape("3b", AS_IS, f"{name} falls to 40 %", *_both(fall)),
            Shape("3b", AS_IS, f"{name} has minima between", *_both(minima)),
            Shape("3b", AS_IS, f"{name} lowest at 30 % or 50 %", *_both(lowest)),
        ]
    return found


def of_time(calls: pl.DataFrame, bins: pl.DataFrame, bin_s: float) -> list[Shape]:
    found = []
    for way in ("recompute", "swap"):
        mine, binned = calls.filter(pl.col("way") == way), bins.filter(pl.col("way") == way)
        gpu = mine["gpu_share"].to_numpy()
        found += [
            Shape("4", AS_IS, f"{way}: throughput spikes periodic", periodic(binned["tokens_per_s"].to_numpy(), bin_s)),
            Shape("4", AS_IS, f"{way}: GPU occupancy a saw-tooth", sawtooth(gpu)),
        ]
    cpu = mine["cpu_blocks"].to_numpy().astype(float)
    moved = np.flatnonzero(np.diff(cpu))
    away = binned["cpu_blocks"].to_numpy()
    full = binned["gpu_share"].to_numpy()
    means = f"GPU {full[away > 0].mean():.0%} full with requests on the CPU, {full[away == 0].mean():.0%} without"
    level = mirrored(full, away, f"{means}; levels")
    steps = mirrored(np.diff(gpu)[moved], np.diff(cpu)[moved], f"{len(moved)} changes")
    found += [
        Shape("4", AS_IS, "swap: CPU occupancy mirrors the GPU's", level),
        Shape("4", AS_IS, "swap: CPU changes mirror the GPU's", steps),
    ]
    return found
