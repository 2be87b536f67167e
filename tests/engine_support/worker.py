"""Run functions in another Python process: many in one (`Worker`), or one (`run_in_subprocess`).

    def scenario(model: str, blocks: int) -> dict: ...          # a plain function of a module or test file

    with Worker() as worker:
        worker.call(scenario, model=str(folder), blocks=60)
    run_in_subprocess(scenario, model=str(folder), blocks=60, timeout=120)

Arguments and results cross as JSON; bytes become hexadecimal strings, mappings' keys become strings.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from .engine import ENVIRONMENT

TESTS = Path(__file__).resolve().parents[1]


class WorkerError(Exception):
    """The function raised, or the process died or took too long; carries its traceback or last output."""


class Worker:
    """A Python process that runs functions one after the other; what they import stays imported.

    `env` is laid over this process's environment (a value of None removes a name). What the process prints
    goes to `log` (a temporary file unless given).
    """

    def __init__(self, env: Mapping[str, str | None] | None = None, log: Path | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else open(log, "w+b")  # noqa: SIM115
        # Set before anything is imported there: OpenMP, for one, reads its number of threads only once.
        merged = (
            os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
        )
        for name, value in (env or {}).items():
            if value is None:
                merged.pop(name, None)
            else:
                merged[name] = value
        answers, write_end = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine_support.worker", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
            env=merged,
            start_new_session=True,
        )
        os.close(write_end)
        self._answers = answers
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def call(self, function: Callable[..., Any], /, timeout: float = 300.0, **arguments: Any) -> Any:
        """Run `function(**arguments)` there; return its result after a way through JSON.

        Raises WorkerError if it raises, or if the process dies or is not done after `timeout` seconds (it is
        killed).
        """
        order = {"target": target_of(function), "arguments": arguments}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order, default=plain).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"the process is gone\n{self.output()[-4000:]}") from None
        answer = json.loads(self._read_line(time.monotonic() + timeout, timeout))
        if "error" in answer:
            raise WorkerError(f"{answer['error']}\n{self.output()[-2000:]}")
        return answer["result"]

    def _read_line(self, deadline: float, timeout: float) -> bytes:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._answers, 1 << 20) if ready else None
            if chunk:
                self._buffer += chunk
                continue
            self.kill()
            why = f"not done after {timeout:g} s" if chunk is None else f"died (status {self._process.returncode})"
            raise WorkerError(f"{why}\n{self.output()[-4000:]}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def output(self) -> str:
        """Return what the process printed so far."""
        size = self._log.seek(0, os.SEEK_END)
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def kill(self) -> None:
        """Kill the process and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Let the process end by itself (so that its exit handlers run); kill it after 30 seconds."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        os.close(self._answers)
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_in_subprocess(
    function: Callable[..., Any],
    /,
    timeout: float = 300.0,
    env: Mapping[str, str | None] | None = None,
    **arguments: Any,
) -> Any:
    """Run `function(**arguments)` in a fresh process; see Worker.call."""
    with Worker(env) as worker:
        return worker.call(function, timeout=timeout, **arguments)


def target_of(function: Callable[..., Any]) -> str:
    """Return "module:name", or "file.py:name" for test files, which pytest imports under made-up names."""
    module, name = function.__module__, function.__qualname__
    if "<" in name:
        raise ValueError(f"{name} is local: a worker can only run functions at the top of a module")
    if module.split(".")[0] == "engine_support":
        return f"{module}:{name}"
    return f"{Path(function.__code__.co_filename).resolve()}:{name}"


def plain(value: Any) -> Any:
    """Make JSON of what it does not know: bytes, sets, paths."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} does not cross to or from a worker")


def _resolve(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    alias = "worker_target_" + place.replace(os.sep, "_").removesuffix(".py")
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[alias], name)


def _serve(answers: int) -> None:
    with os.fdopen(answers, "w") as channel:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = {"result": _resolve(order["target"])(**order["arguments"])}
                text = json.dumps(answer, default=plain)
            except Exception:
                text = json.dumps({"error": traceback.format_exc()})
            channel.write(text + "\n")
            channel.flush()


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    _serve(int(sys.argv[1]))
