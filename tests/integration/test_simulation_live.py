"""Predictions where vLLM decides for itself: tokens from a model, arrivals by the clock, clients that hang up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine_support import models, offline, rerun, workloads
from engine_support.agreement import drifted, predict
from engine_support.engine import ENVIRONMENT
from engine_support.pairs import B512, LEAST
from engine_support.serve import Server
from engine_support.worker import Worker
from engine_support.workloads import tokens

pytestmark = pytest.mark.engine

KVTRACE = str(Path(sys.executable).parent / "kvtrace")
SAMPLES = models.ROOT / "traces" / "samples"
RUNS = {
    "base": {**B512, "num_blocks": 60},
    "least cache": {**B512, "num_blocks": LEAST},
    "64 tokens a step": {**B512, "num_blocks": 60, "max_num_batched_tokens": 64},
    "4 at a time": {**B512, "num_blocks": 40, "max_num_seqs": 4},
    "blocks of 64": {**B512, "num_blocks": 16, "block_size": 64},
    "no caching": {**B512, "num_blocks": 60, "prefix_caching": False},
}


@pytest.fixture(scope="module")
def live_worker() -> Iterator[Worker]:
    with Worker(env=rerun.COMPARABLE) as process:
        yield process


def test_tokens_of_a_model(
    live_worker: Worker, weighted_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another batch shape rounds otherwise: a run whose tokens drifted apart is counted, and shown, but not judged."""
    requests = workloads.shared_prefixes(11, 16) + workloads.duplicates(12, 3, 4) + workloads.thrashing(13, 40)
    told = live_worker.call(
        rerun.record_all,
        folder=str(tmp_path),
        model=str(weighted_model),
        **rerun.as_orders(sorted(requests, key=lambda arrival: arrival.step)),
        runs=RUNS,
        granule=16,
        scripted=False,
    )
    equal, apart = [], {}
    for name, settings in RUNS.items():
        other = drifted(told["base"], told[name])
        if other:
            apart[name] = len(other)
            continue
        changes = {key: value for key, value in settings.items() if key != "max_model_len"}
        found = predict(tmp_path / "base", tmp_path / name, changes, tmp_path / f"{name}.kvt")
        assert not found.wrong, "\n".join([name, *found.wrong])
        equal.append(name)
    with capsys.disabled():
        print(
            f"\n{len(equal)} of {len(RUNS)} real runs with the model's own tokens are predicted exactly; "
            f"the tokens drifted apart in {len(apart)}: "
            + (", ".join(f"{name} ({n} of {len(requests)} requests)" for name, n in apart.items()) or "none")
        )
    assert len(equal) >= 2, "nothing but the recorded run was judged"


def test_drift_is_seen() -> None:
    """A request that was aborted earlier has not drifted; one with another token has."""
    assert drifted([[1, 2, 3], [4, 5], [6]], [[1, 2], [4, 7], [6, 8]]) == [1]


def test_an_engine_in_its_own_process(weighted_model: Path, tmp_path: Path) -> None:
    """`LLM.generate` hands requests to a busy engine; their recorded steps give the run again."""
    command = [KVTRACE, "record", "-o", str(tmp_path / "t"), "--", sys.executable, offline.__file__]
    done = subprocess.run(
        [*command, str(weighted_model), "--requests", "40", "--output", "110"],
        env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = predict(tmp_path / "t", tmp_path / "t", {}, tmp_path / "simulated.kvt")
    assert not found.wrong, "\n".join(found.wrong)
    assert found.happened["preemptions"]
    assert found.happened["hit"]
    assert found.happened["evict"]


def test_a_server_with_clients_that_hang_up(weighted_model: Path, tmp_path: Path) -> None:
    """Arrivals and aborts by the clock, some while a step is under way."""
    rng = random.Random(1)
    shared = [tokens(rng, 90) for _ in range(3)]
    args = ["--num-gpu-blocks-override", "33", "--max-model-len", "1024", "--block-size", "32", "--max-num-seqs", "12"]
    args += ["--max-num-batched-tokens", "128"]
    out = tmp_path / "t"
    with Server(
        weighted_model, tmp_path / "log", args=args, tokenizer=False, prefix=[KVTRACE, "record", "-o", str(out), "--"]
    ) as server:

        def one(number: int) -> bool:
            dice = random.Random(number)
            prompt = dice.choice(shared) + tokens(dice, dice.randrange(1, 150))
            if dice.random() < 0.4:
                # Long enough that a server on a busy machine hears of it before the last token.
                return server.abandon(prompt, 600, dice.randrange(1, 60))
            server.complete(prompt, dice.randrange(5, 150))
            return False

        with ThreadPoolExecutor(16) as pool:
            hung_up = sum(pool.map(one, range(150)))
        server.complete(shared[0], 4)
        server.stop(signal.SIGINT)
    found = predict(out, out, {}, tmp_path / "simulated.kvt")
    assert not found.wrong, "\n".join(found.wrong)
    for what in ("preemptions", "hit", "evict", "chunks", "late", "aborted"):
        assert found.happened[what], dict(found.happened)
    assert found.happened["aborted"] > hung_up / 4  # the others had ended when the server heard of it


@pytest.mark.parametrize("sample", ["chat.kvt", "thrash.kvt"])
def test_a_bundled_trace(sample: str, tmp_path: Path) -> None:
    found = predict(SAMPLES / sample, SAMPLES / sample, {}, tmp_path / "simulated.kvt")
    assert not found.wrong, "\n".join(found.wrong)
