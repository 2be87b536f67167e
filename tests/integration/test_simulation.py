"""Predictions against the real vLLM: one run recorded, others predicted from it and then run, compared row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_support import rerun
from engine_support.agreement import Verdict, drifted, predict
from engine_support.pairs import PAIRS, WORKLOADS
from engine_support.worker import Worker
from kvtrace_replay.schedulers.sweep import simulate
from kvtrace_traces import open_trace
from kvtrace_traces.errors import UsageError

pytestmark = pytest.mark.engine

Runs = tuple[Path, dict[str, Any]]


class Recorder:
    """Records all runs of a workload when one of them is first asked for."""

    def __init__(self, worker: Worker, model: Path, folder: Path) -> None:
        self._worker, self._model, self._folder = worker, model, folder
        self._done: dict[str, Runs] = {}

    def runs(self, name: str) -> Runs:
        """The folder of a workload's traces, one in each folder named after a run, and the tokens of each run."""
        if name not in self._done:
            workload = WORKLOADS[name]
            folder = self._folder / name
            folder.mkdir()
            told = self._worker.call(
                rerun.record_all,
                folder=str(folder),
                model=str(self._model),
                **rerun.as_orders(workload.arrivals()),
                runs=workload.runs,
                granule=workload.granule,
                stub=workload.stub,
            )
            self._done[name] = (folder, told)
        return self._done[name]

    def verdict(self, name: str, run: str, place: Path) -> Verdict:
        """Predict `run` from the base run."""
        folder, _ = self.runs(name)
        workload = WORKLOADS[name]
        changes = {key: value for key, value in workload.runs[run].items() if key != "max_model_len"}
        return predict(folder / "base", folder / run, changes, place)


@pytest.fixture(scope="module")
def recorder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """One process for all engines; it never imports what compiles, after which vLLM starts no engine."""
    with Worker(env=rerun.COMPARABLE) as worker:
        yield Recorder(worker, tiny_model, tmp_path_factory.mktemp("runs"))


happened: dict[str, Counter[str]] = {}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_recorded_run_again(workload: str, recorder: Recorder, tmp_path: Path) -> None:
    """At its own settings, from its own trace."""
    found = recorder.verdict(workload, "base", tmp_path / "simulated.kvt")
    assert not found.wrong, "\n".join(found.wrong)
    happened.setdefault(workload, Counter()).update(found.happened)


@pytest.mark.parametrize(("workload", "setting"), PAIRS, ids=lambda value: value.replace(" ", "-"))
def test_another_setting(workload: str, setting: str, recorder: Recorder, tmp_path: Path) -> None:
    """Given equal tokens, which the scripts see to, all that the engine does is predicted."""
    _, told = recorder.runs(workload)
    assert drifted(told["base"], told[setting]) == []
    found = recorder.verdict(workload, setting, tmp_path / "simulated.kvt")
    assert not found.wrong, "\n".join(found.wrong)
    happened.setdefault(workload, Counter()).update(found.happened)


@pytest.mark.parametrize("workload", ["mixed", "asynchronous", "asynchronous thrashing"])
def test_the_least_cache_is_the_least(workload: str, recorder: Recorder) -> None:
    """With one block less the longest request can never end, and the prediction says so."""
    folder, _ = recorder.runs(workload)
    (least,) = [
        one["num_blocks"] for name, one in WORKLOADS[workload].runs.items() if "least" in name and "48" not in name
    ]
    with pytest.raises(UsageError, match=f"must be at least {least}"):
        simulate(open_trace(folder / "base"), {"num_blocks": least - 1})


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_workload_has_teeth(workload: str) -> None:
    """What it promises did happen in one of its runs."""
    if workload not in happened:
        pytest.skip("its runs were not selected")
    missing = [what for what in WORKLOADS[workload].promises if not happened[workload][what]]
    assert not missing, dict(happened[workload])


def test_there_are_enough_pairs() -> None:
    assert len(PAIRS) >= 60
    assert sum(not WORKLOADS[workload].stub for workload, _ in PAIRS) >= 45
