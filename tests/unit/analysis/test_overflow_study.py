"""The overflow study: its README is true, its shapes can fail, its bound is one, and its files say what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import polars as pl
import pytest

from kvtrace_replay.schedulers.vllm_v0.run import simulate_v0

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "overflow_study"
STUDY = FOLDER / "study.py"
pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="too slow uncompiled")
MODULES = ("experiments", "shapes", "reasons", "bound", "figures", "report", "study")


@pytest.fixture(scope="module")
def own() -> Iterator[SimpleNamespace]:
    """The modules of the study, which import each other by their bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STUDY), "-o", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that a study of reduced size writes, and what it prints."""
    out = tmp_path_factory.mktemp("study") / "new" / "study"
    done = run(out, "--small")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def found(own: SimpleNamespace) -> SimpleNamespace:
    """The data of a study of reduced size, and the answers."""
    return own.study.measure(own.experiments.SMALL, own.experiments.profile())


def test_the_readme_shows_what_is_printed(tmp_path: Path) -> None:
    done = run(tmp_path / "study")
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"^```console\n\$ .*?\n(.*?)^```", (FOLDER / "README.md").read_text(), re.S | re.M)
    assert done.stdout == shown, "regenerate with: python examples/overflow_study/study.py --write-readme"


# ------------------------------------------------------------------ shapes


def test_which_shapes_hold(found: SimpleNamespace, own: SimpleNamespace) -> None:
    held = {(s.figure, s.engine == own.experiments.AS_IS, s.claim): s.total.holds for s in found.shapes}
    fails = {
        ("2a", True, "recompute flat"), ("2a", True, "swap falls"), ("2a", True, "pageable swap falls"),
        ("2b", True, "pageable swap below recompute for many tokens"),
        ("2b", False, "pageable swap below recompute for many tokens"),
        ("3a", True, "pageable swap below recompute for long sequences"),
        ("4", True, "swap: CPU occupancy mirrors the GPU's"),
    }  # fmt: skip
    assert {key for key, holds in held.items() if not holds} == fails
    assert len(held) == 34 + 6
    part = {(s.figure, s.engine == own.experiments.AS_IS, s.claim): s.part.holds for s in found.shapes if s.part}
    for claim in ("recompute flat", "swap falls", "pageable swap falls", "pinned swap best at the largest blocks"):
        assert part["2a", False, claim], claim
    assert part["2a", True, "swap falls"]


def test_every_disagreement_has_its_reason(found: SimpleNamespace, own: SimpleNamespace) -> None:
    told = own.reasons.disagreements(found.shapes)
    assert "Not known." not in told
    assert own.reasons.CHANCE not in told
    assert sum(map(len, told.values())) == sum(
        not answer.holds for shape in found.shapes for answer in (shape.total, shape.part) if answer is not None
    )


def test_a_shape_can_fail(own: SimpleNamespace) -> None:
    s, x = own.shapes, np.array([1.0, 2, 4, 8])
    up, down, level = np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1]), np.array([1.0, 1.02, 1, 1.01])
    assert s.rises(x, up).holds
    assert not s.rises(x, down).holds
    assert not s.rises(x, np.array([1.0, 3, 2, 4])).holds
    assert s.falls(x, down).holds
    assert not s.falls(x, up).holds
    assert "-1.000 a doubling" in s.falls(x, down).measured
    assert s.flat(x, level).holds
    assert not s.flat(x, up).holds
    assert s.falls_to(x, down, 8).holds
    assert not s.falls_to(x, up, 8).holds
    wins = s.wins_at_last(x, np.array([2.0, 2, 2, 2]), up)
    assert wins.holds
    assert wins.since == pytest.approx(2.0)
    assert s.wins_at_last(x, np.array([0.0, 0, 0, 0]), up).since == 0
    lost = s.wins_at_last(x, np.array([0.0, 0, 0, 5]), up)
    assert (lost.holds, lost.since) == (False, None)
    shares = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert s.has_minima(shares, np.array([5.0, 3, 4, 2, 1])).measured == "at 20%"
    assert s.has_minima(shares, np.array([5.0, 3, 4, 2, 3])).measured == "at 20%, 40%"
    assert not s.has_minima(shares, np.array([5.0, 4, 3, 2, 1])).holds
    assert not s.has_minima(shares, np.array([5.0, 4, 4.01, 2, 1])).holds
    assert s.lowest_at(shares, np.array([5.0, 4, 1, 2, 2]), (0.3, 0.5)).holds
    assert not s.lowest_at(shares, np.array([5.0, 4, 3, 1, 2]), (0.3, 0.5)).holds


def test_a_course_can_fail(own: SimpleNamespace) -> None:
    s, random = own.shapes, np.random.default_rng(1)
    beat = np.where(np.arange(130) % 13 == 0, 9.0, 0) + random.random(130)
    answer = s.periodic(beat, 1.0)
    assert answer.holds
    assert re.search(r"at (13|26|39|52) s", answer.measured)
    assert not s.periodic(random.permutation(beat), 1.0).holds
    teeth = np.tile(np.linspace(0.5, 1, 100), 8)
    assert s.sawtooth(teeth).holds
    assert not s.sawtooth(teeth[::-1]).holds
    assert not s.sawtooth(np.sin(np.arange(800) / 20)).holds
    assert not s.sawtooth(np.linspace(0, 1, 50)).holds
    assert s.mirrored(beat, -beat, "").holds
    assert not s.mirrored(beat, beat, "").holds
    assert not s.mirrored(beat, np.zeros(130), "").holds


# ------------------------------------------------------------------ what is measured


def test_waiting_is_further_calls(own: SimpleNamespace) -> None:
    """The rest of the overhead, priced on its own: calls, and what decoding differs by."""
    e = own.experiments
    timing = e.profile()
    for way in e.WAYS:
        for case in (e.at_share(0.2, timing), e.Case.alike(2, 112, 32, 256)):
            ideal, taken = e.never(case, timing), e.serve(case, way, timing)
            told = e.overhead(taken, ideal, case, way, timing)
            assert ideal.recomputes + ideal.swaps == 0
            assert told.preemptions > 0
            costs = timing.step_costs(16, pinned=way != "swap-pageable")
            firsts = set(taken.told[:, 0].tolist())
            again = sum(1 for call, row in enumerate(taken.rows) if row[0] == 1 and call not in firsts)
            more = taken.work.sum(axis=0) - ideal.work.sum(axis=0)
            waiting = costs.call * (taken.calls - ideal.calls - again)
            waiting += costs.decode_row * more[2] + costs.decode_context * more[3]
            # Each call's nanoseconds are cut to whole ones.
            assert told.waiting_s == pytest.approx(waiting / 1e9, abs=2e-9 * taken.calls)
            assert told.overhead_s == pytest.approx(told.waiting_s + told.overflow_s)
            if way.startswith("swap"):
                moved = told.evicted_tokens // 16 * timing.swap_ns(1, 16, pinned=way == "swap")
                assert told.overflow_s == pytest.approx(moved / 1e9)
            if way == "recompute":
                assert more[0] == taken.recomputed_tokens + taken.recomputes  # and the last token of each


def test_what_the_reasons_say(own: SimpleNamespace) -> None:
    e = own.experiments
    timing = e.profile()
    long = e.length(e.FULL, timing).filter(pl.col("way") == "swap")
    victims = dict(long.select("tokens", "preemptions").iter_rows())
    assert (victims[6144], victims[8192], victims[10240]) == (9, 6, 8)
    shares = e.memory(e.FULL, timing)
    for way in e.WAYS:
        upper = shares.filter((pl.col("way") == way) & (pl.col("memory_share") > 0.455))["overhead_s"]
        assert upper.max() / upper.min() < 1.03
    assert e.tokens_in(0.09, timing) // (94 * 16) == 4
    assert e.tokens_in(0.12, timing) == 9155
    sizes = e.block_size(e.FULL, timing)
    thrash = sizes.filter((pl.col("way") == "recompute") & (pl.col("engine") == e.AS_IS) & (pl.col("block_size") > 32))
    assert thrash["preemptions"].to_list() == thrash["block_size"].to_list() == [64, 128, 256]
    assert sizes.filter(pl.col("way").str.starts_with("swap"))["preemptions"].unique().to_list() == [1]
    swapped = timing.swap_ns(1, 16, pinned=False) / 16
    at = (swapped - timing.costs["prefill_token"]) / (timing.costs["prefill_pair"] / 2)
    assert swapped == pytest.approx(153e3, rel=0.01)
    assert at == pytest.approx(40_000, rel=0.01)
    calm = pl.concat([shares, long, sizes, e.evicted(e.FULL, timing)], how="diagonal")
    calm = calm.filter((pl.col("overhead_s") > 0) & ~((pl.col("way") == "recompute") & (pl.col("engine") == e.AS_IS)))
    assert (calm["waiting_s"] / calm["overhead_s"]).min() > 0.79


def test_bins_keep_tokens(found: SimpleNamespace) -> None:
    calls, bins = found.tables["4-calls"], found.tables["4-seconds"]
    for way in ("recompute", "swap"):
        mine, binned = calls.filter(pl.col("way") == way), bins.filter(pl.col("way") == way)
        last = binned["second"].max() + 1
        inside = mine.filter(pl.col("end_s") <= last)["tokens"].sum()
        beyond = mine.filter(pl.col("start_s") < last)["tokens"].sum()
        assert inside - 1e-6 <= binned["tokens_per_s"].sum() <= beyond + 1e-6
        assert binned["gpu_share"].is_between(0, 1).all()
    assert found.tables["4-calls"].filter(pl.col("way") == "recompute")["cpu_blocks"].sum() == 0


# ------------------------------------------------------------------ the bound


def test_forced_choices_reach_both_pure_ways(own: SimpleNamespace) -> None:
    b, e = own.bound, own.experiments
    timing = e.profile()
    for seed in range(3):
        case = b.small_case(seed)
        none, every = (np.full(b.curve_size(case), value) for value in (False, True))
        for way, swapped in (("recompute", none), ("swap", every)):
            forced = e.serve(case, "hybrid", timing, **b.forced(case, swapped))
            pure = e.serve(case, way, timing)
            assert (forced.recomputes, forced.swaps, forced.duration_ns) == (
                pure.recomputes, pure.swaps, pure.duration_ns
            )  # fmt: skip


def test_the_best_assignment_by_brute_force(own: SimpleNamespace) -> None:
    """Every set of numbers of tokens at which victims are swapped, of those that any victim ever had."""
    b, e = own.bound, own.experiments
    timing = e.profile()
    costs = timing.step_costs(16)
    for seed in (1, 6):
        case = b.small_case(seed)
        best, runs, complete = b.best_assignment(case, timing)
        assert complete
        seen: set[int] = set()
        tried: dict[tuple[int, ...], int] = {}
        while True:
            # Victims that only appear in some runs add their numbers, until no run shows a new one.
            before = len(seen)
            assert before <= 11
            for count in range(before + 1):
                for chosen in combinations(sorted(seen), count):
                    if chosen not in tried:
                        swapped = np.zeros(b.curve_size(case), bool)
                        swapped[list(chosen)] = True
                        settings = case.settings(case.memory_tokens, preemption="hybrid", **b.forced(case, swapped))
                        taken = simulate_v0(case.requests, settings, costs=costs, detail=True)
                        tried[chosen] = taken.duration_ns or 0
                        seen |= set(b.victims(taken, case))
            if len(seen) == before:
                break
        assert best.duration_ns == min(tried.values())
        assert runs <= len(tried)


def test_no_random_choices_beat_the_best(own: SimpleNamespace) -> None:
    b, e = own.bound, own.experiments
    timing = e.profile()
    random = np.random.default_rng(0)
    for seed, reached in ((0, True), (3, False), (4, True)):
        case = b.small_case(seed)
        best, _, complete = b.best_assignment(case, timing)
        assert complete
        ends = [
            e.serve(case, "hybrid", timing, **b.forced(case, random.random(b.curve_size(case)) < 0.5)).duration_ns
            for _ in range(150)
        ]
        assert min(ends) >= best.duration_ns
        assert len(set(ends)) > 10
        assert (min(ends) == best.duration_ns) or not reached


def test_nothing_beats_the_best(own: SimpleNamespace) -> None:
    rows = own.bound.small(own.experiments.FULL, own.experiments.profile())
    for name in ("recompute_s", "swap_s", "hybrid_s", "best_of_three_s", "best_cut_s"):
        assert (rows["best_assignment_s"] <= rows[name] + 1e-9).all(), name
    assert (rows["best_cut_s"] <= pl.min_horizontal("recompute_s", "swap_s").pipe(rows.select).to_series() + 1e-9).all()
    assert (rows["best_assignment_s"] < rows["best_of_three_s"] - 0.01).any()


# ------------------------------------------------------------------ files


def test_figures_show_the_data(small: tuple[Path, str], own: SimpleNamespace) -> None:
    out, _ = small
    for name, (x, title, log) in own.study.X_TITLES.items():
        data = pl.read_csv(out / f"{name}.csv")
        assert set(data["way"]) == set(own.experiments.WAYS)
        parts = data["overflow_s"] + data["waiting_s"]
        assert np.abs((data["overhead_s"] - parts).to_numpy()).max() < 1e-5
        lines = own.figures.overheads(data, x, title, log)["data"]
        shown = sorted(y for line in lines if line["yaxis"] in ("y", "y4") for y in line["y"])
        assert shown == pytest.approx(sorted(data["overhead_s"]), abs=1e-5)
        drawn = (out / f"{name}.html").read_text()
        numbers = np.array([float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", drawn)])
        for value in data["overhead_s"].filter(data["overhead_s"] > 0):
            assert np.abs(numbers - value).min() < 1e-5


def test_pages_need_no_net(small: tuple[Path, str]) -> None:
    out, _ = small
    names = {path.name for path in out.iterdir()}
    figures = {"2a-block-size", "2b-tokens-evicted", "3a-sequence-length", "3b-memory", "4-over-time", "5-choices"}
    assert {f"{name}.html" for name in figures} | {"study.html", "plotly.min.js", "study.txt"} <= names
    tables = (figures - {"4-over-time", "5-choices"}) | {
        "4-calls",
        "4-seconds",
        "5-choices-small",
        "5-choices-large",
        "shapes",
    }
    assert {f"{name}.csv" for name in tables} == {name for name in names if name.endswith(".csv")}
    for name in figures:
        page = (out / f"{name}.html").read_text()
        assert re.findall(r'<script[^>]* src="([^"]+)"', page) == ["plotly.min.js"]
        assert f'id="figure-{name}"' in page
    whole = (out / "study.html").read_text()
    assert not re.findall(r"<script[^>]* src=|<link[^>]* href=", whole)
    for name in figures:
        assert f'id="figure-{name}"' in whole


def test_the_text_is_in_the_page(small: tuple[Path, str]) -> None:
    out, printed = small
    assert (out / "study.txt").read_text() == printed
    whole = (out / "study.html").read_text()
    assert "recompute flat at 8, 16 and 32" in whole
    assert "where it disagrees, and why" in whole
    rows = pl.read_csv(out / "shapes.csv", schema_overrides={"figure": pl.String})
    assert len(rows) == 40
    for row in rows.iter_rows(named=True):
        assert re.search(rf"  {re.escape(row['shape'])} +{'yes' if row['overhead_holds'] else 'NO'} ", printed)
        assert row["overhead"] in printed
        assert (row["why_not"] is None) == row["overhead_holds"]
    assert printed.count("  NO ") + printed.count(" yes ") > 60


def test_the_folder_must_be_one(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text(json.dumps({}))
    done = run(taken, "--small")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
