"""vLLM 0.4.2's own scheduler and block manager as the judge of the simulation.

    with Judge(unpack(cache)) as judge:
        run = judge.run(case)

`run` is a `twin.Run`, to be compared with `==`.
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

from .cases import Case
from .twin import Run

VERSION = "0.4.2"
FETCH_SECONDS = 600
#: The wheel for the only platform that has one. Only its Python files are used, so any platform will do.
WHEEL = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux1_x86_64")


class JudgeError(Exception):
    """The engine raised, or the process died."""


class Unavailable(Exception):
    """The wheel could not be fetched."""


def unpack(cache: Path) -> Path:
    """Return a folder with the Python files of `vllm==0.4.2`, from `cache` or fetched into it with pip (68 MB).

    Raises Unavailable, with pip's last words, where the wheel cannot be had. Several processes may ask at once.
    """
    folder = Path(cache) / VERSION
    if (folder / "vllm").is_dir():
        return folder
    Path(cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *WHEEL]
        command += [f"vllm=={VERSION}", "-d", place]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"vllm {VERSION}: pip took more than {FETCH_SECONDS} s") from None
        if done.returncode:
            raise Unavailable(f"vllm {VERSION}: {done.stderr.strip()[-500:]}")
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            archive.extractall(Path(place) / "sources", names)
        with contextlib.suppress(OSError):  # another process was faster
            (Path(place) / "sources").rename(folder)
    return folder


class Judge:
    """A process with vLLM 0.4.2; `sources` is the folder from `unpack`."""

    def __init__(self, sources: Path) -> None:
        answers, write_end = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        program = Path(__file__).with_name("judge_engine.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(write_end), str(sources)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, pass_fds=[write_end],
            env={key: value for key, value in os.environ.items() if not key.startswith("VLLM_")},
        )  # fmt: skip
        os.close(write_end)
        self._answers = os.fdopen(answers, "rb")

    def run(self, case: Case) -> Run:
        """Run `case`. Raises JudgeError if the engine raised anything but for the lack of swap space."""
        assert self._process.stdin is not None
        try:
            pickle.dump(asdict(case), self._process.stdin)
            self._process.stdin.flush()
            result = pickle.load(self._answers)
        except (BrokenPipeError, EOFError):
            self._log.seek(0)
            raise JudgeError(self._log.read().decode(errors="replace")[-4000:]) from None
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

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
