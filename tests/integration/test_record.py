"""`kvtrace record` as a user runs it: offline scripts, servers, signals, bounds and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine_support import offline
from engine_support.engine import ENVIRONMENT
from engine_support.serve import Server
from kvtrace_replay.verify import verify
from kvtrace_traces import open_trace

pytestmark = pytest.mark.engine

KVTRACE = str(Path(sys.executable).parent / "kvtrace")
IN_PROCESS, SEPARATE = "0", "1"  # VLLM_ENABLE_V1_MULTIPROCESSING


def script(model: Path, *more: str, record: list[str] | None = None, env: dict[str, str] | None = None) -> list[Any]:
    """Command and environment of the offline script."""
    command = [sys.executable, offline.__file__, str(model), *more]
    if record is not None:
        command = [KVTRACE, "record", *record, "--", *command]
    return [command, {**os.environ, **ENVIRONMENT, **(env or {})}]


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def result(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def mismatches(folder: Path) -> int:
    return int(verify(open_trace(folder))["mismatches"])


@pytest.mark.parametrize("mode", [IN_PROCESS, SEPARATE], ids=["in process", "engine-core process"])
def test_an_offline_run(mode: str, weighted_model: Path, tmp_path: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": mode}
    bare = run(*script(weighted_model, "--status", "7", env=env))
    done = run(*script(weighted_model, "--status", "7", record=["-o", str(tmp_path / "t")], env=env))
    assert bare.returncode == done.returncode == 7
    assert result(done) == result(bare)
    trace = open_trace(tmp_path / "t")
    assert trace.requests["cached_tokens"].to_list() == [row["cached"] for row in result(done)]
    assert trace.requests["output_tokens"].to_list() == [len(row["tokens"]) for row in result(done)]
    assert trace.info["inexact"] == []
    assert not trace.lossy
    assert mismatches(tmp_path / "t") == 0
    if mode == IN_PROCESS:  # the engine-core process is ended by vLLM without a chance to say goodbye
        assert trace.complete
    assert "kvtrace info" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_offline_run_ended_by_a_signal(how: signal.Signals, weighted_model: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    command, env = script(weighted_model, "--requests", "400", "--output", "200", "--announce", str(flag))
    env |= {"KVTRACE_OUT": str(tmp_path / "t"), "VLLM_ENABLE_V1_MULTIPROCESSING": IN_PROCESS}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not flag.exists():
        assert process.poll() is None, "the script ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(60) != 0
    trace = open_trace(tmp_path / "t")
    assert trace.steps.height > 10
    assert not trace.lossy
    assert mismatches(tmp_path / "t") == 0
    if how == signal.SIGINT:  # Python unwinds and runs its exit hooks
        assert trace.complete
    if how == signal.SIGKILL:
        assert not trace.complete
        assert "no end record" in trace.warnings[0]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server(how: signal.Signals, weighted_model: Path, tmp_path: Path) -> None:
    """HTTP clients at the same time; what the server answers of cached tokens is what the trace says."""
    out = tmp_path / "t"
    args = ["--num-gpu-blocks-override", "40", "--max-model-len", "1024", "--block-size", "32", "--max-num-seqs", "8"]
    with Server(
        weighted_model, tmp_path / "log", args=args, tokenizer=False, prefix=[KVTRACE, "record", "-o", str(out), "--"]
    ) as server:
        prompts = [[5 + i % 3] * 70 + [7 + i] * 60 for i in range(24)]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, 40), prompts))
        server.stop(how, everyone=how == signal.SIGKILL)
    trace = open_trace(out)
    assert trace.requests.height == 24
    assert not trace.lossy
    assert mismatches(out) == 0
    told = sorted((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0 for answer in answers)
    assert sorted(trace.requests["cached_tokens"].to_list()) == told
    assert sum(told) > 0
    assert trace.requests["output_tokens"].to_list() == [40] * 24
    if how != signal.SIGKILL:  # `record` cut off what the engine had allocated ahead
        assert sum(file.stat().st_size for file in out.glob("*.kvt")) == trace.info["bytes"]


def test_an_allow_list_of_plugins(weighted_model: Path, tmp_path: Path) -> None:
    done = run(
        *script(weighted_model, "--requests", "2", record=["-o", str(tmp_path)], env={"VLLM_PLUGINS": "some_other"})
    )
    assert result(done)
    assert "plugins some_other,kvtrace" in done.stderr
    assert open_trace(tmp_path).requests.height == 2


def test_two_engines_at_once(weighted_model: Path, tmp_path: Path) -> None:
    """Two processes record to one folder; their rows stay apart."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [script(weighted_model, "--requests", str(n), record=["-o", str(tmp_path)]) for n in (5, 9)]
        for done in pool.map(lambda job: run(*job), jobs):
            assert done.returncode == 0, done.stderr[-2000:]
    trace = open_trace(tmp_path)
    assert trace.info["engines"] == 2
    counts = dict(trace.requests["engine_index"].value_counts().iter_rows())
    assert sorted(counts.values()) == [5, 9]
    assert sorted(counts) == [0, 1]
    assert mismatches(tmp_path) == 0


def test_a_bound_on_the_log(weighted_model: Path, tmp_path: Path) -> None:
    done = run(*script(weighted_model, record=["-o", str(tmp_path), "--max-bytes", "12000"]))
    assert len(result(done)) == 30  # serving went on
    assert sum(file.stat().st_size for file in tmp_path.glob("*.kvt")) <= 12000
    trace = open_trace(tmp_path)
    assert trace.lossy
    assert trace.losses["reason"].to_list() == ["max-bytes"]
    assert trace.steps.height > 0
    assert verify(trace, allow_lossy=True)["mismatches"] == 0
    told = subprocess.run([KVTRACE, "info", str(tmp_path), "--json"], capture_output=True, text=True)
    assert told.returncode == 3, told.stderr
    assert json.loads(told.stdout)["complete"] is False


def test_a_bug_in_the_tracer_is_no_bug_in_the_server(weighted_model: Path, tmp_path: Path) -> None:
    """Every hook that can fail does, one run each; the tokens are those of a run without a tracer."""
    env = {"VLLM_LOGGING_LEVEL": "ERROR"}
    bare = result(run(*script(weighted_model, "--requests", "12", env=env)))
    patches = {
        "identity.EngineChain.entries": "kvtrace_tracer.identity.EngineChain.entries = boom",
        "notes.Notes._sched": "kvtrace_tracer.notes.Notes._sched = boom",
        "notes.Notes._lookup": "kvtrace_tracer.notes.Notes._lookup = boom",
        "log.Log.commit": "kvtrace_tracer.log.Log.commit = boom",
        "attach": "kvtrace_tracer.attach.attach = boom",
    }
    for name, patch in patches.items():
        # sitecustomize runs before anything else in every process that Python starts.
        site = tmp_path / name
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import kvtrace_tracer.identity, kvtrace_tracer.notes, kvtrace_tracer.log, kvtrace_tracer.attach\n"
            "def boom(*args, **kwargs):\n    raise RuntimeError('on purpose')\n" + patch + "\n"
        )
        done = run(
            *script(
                weighted_model,
                "--requests",
                "12",
                record=["-o", str(site / "out")],
                env={**env, "PYTHONPATH": str(site)},
            )
        )
        assert result(done) == bare, name
        said = done.stdout + done.stderr  # vLLM logs to stdout
        assert said.count("on purpose") == 1, f"{name}: {said[-3000:]}"
