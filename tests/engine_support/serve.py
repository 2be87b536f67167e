"""Start the real `vllm serve`, ask it over HTTP, stop it by a signal of choice. Standard library only.

with Server(folder, log_dir, args=["--num-gpu-blocks-override", "60"], tokenizer=False) as server:
    server.complete([5, 6, 7], max_tokens=8)["choices"][0]["token_ids"]
    server.stop(signal.SIGTERM)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .engine import ENVIRONMENT

# A server runs its engine in a process of its own.
SERVER_ENVIRONMENT = {name: value for name, value in ENVIRONMENT.items() if "MULTIPROCESSING" not in name}


class ServerError(Exception):
    """The server did not start or did not answer; the text carries the end of its output."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`vllm serve MODEL` in a process group of its own, on 127.0.0.1.

    `prefix` stands before the command (["kvtrace", "record", "-o", out, "--"]); `args` come after it; `env`
    is laid over the environment (None removes a name). `log_dir` receives stdout.txt and stderr.txt. Without
    `tokenizer`, prompts and answers are token ids. Constructing starts the process; `wait_ready` (or entering
    the context) waits for it.
    """

    def __init__(
        self,
        model: Path,
        log_dir: Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        prefix: Sequence[str] = (),
        tokenizer: bool = True,
        dummy: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_dir = Path(log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        vllm = Path(sys.executable).parent / "vllm"
        command = [*prefix, str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", "model", "--enforce-eager", "--seed", "0"]
        # Makes `usage.prompt_tokens_details.cached_tokens` part of each answer.
        command.append("--enable-prompt-tokens-details")
        if not tokenizer:
            command.append("--skip-tokenizer-init")
        if dummy:
            command += ["--load-format", "dummy"]
        command += args
        merged = os.environ | SERVER_ENVIRONMENT
        # `kvtrace`, `vllm` and `python` are found beside this interpreter, as in an activated environment.
        merged["PATH"] = os.pathsep.join([str(vllm.parent), merged.get("PATH", "")])
        for name, value in (env or {}).items():
            if value is None:
                merged.pop(name, None)
            else:
                merged[name] = value
        self.started = time.monotonic()
        self.ready_after_s: float | None = None
        with open(self.log_dir / "stdout.txt", "wb") as out, open(self.log_dir / "stderr.txt", "wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=merged, start_new_session=True
            )

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:
            self.kill_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    def wait_ready(self, timeout: float = 180.0) -> float:
        """Wait until /health answers; return the seconds since the start. ServerError if it never does."""
        while time.monotonic() - self.started < timeout:
            if self.process.poll() is not None:
                raise ServerError(f"vllm serve ended with status {self.process.returncode}\n{self.output()[-4000:]}")
            with contextlib.suppress(OSError):
                self._request("GET", "/health", None, 5.0)
                self.ready_after_s = time.monotonic() - self.started
                return self.ready_after_s
            time.sleep(0.2)
        raise ServerError(f"vllm serve is not ready after {timeout:g} s\n{self.output()[-4000:]}")

    def complete(self, prompt: list[int] | str, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """POST /v1/completions (temperature 0, no stop token); the choice carries `token_ids`."""
        body = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return self.post("/v1/completions", body | {"return_token_ids": True} | fields)

    def chat(self, messages: list[dict[str, str]], max_tokens: int = 32, **fields: Any) -> dict[str, Any]:
        """POST /v1/chat/completions (temperature 0)."""
        body = {"model": "model", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return self.post("/v1/chat/completions", body | fields)

    def post(self, path: str, body: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """POST JSON, return JSON; ServerError with the server's words on any other status than 200."""
        return json.loads(self._request("POST", path, json.dumps(body).encode(), timeout))

    def abandon(self, prompt: list[int], max_tokens: int, after: int) -> bool:
        """Ask as `complete` does, with the answer streamed, and hang up after `after` pieces: the server aborts it.

        Returns whether there was anything left to abort.
        """
        body = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        text = json.dumps(body | {"stream": True, "return_token_ids": True})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60.0)
        try:
            connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            pieces = 0
            while pieces < after:
                line = answer.readline()
                if not line or line.startswith(b"data: [DONE]"):
                    return False
                pieces += line.startswith(b"data: ")
            return True
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Return the server's counters and gauges by name, summed over their labels."""
        sums: dict[str, float] = {}
        for line in self._request("GET", "/metrics", None, 10.0).decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                if not name.endswith("_created"):
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        # A proxy of the environment has no business between us and 127.0.0.1.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code} {error.read().decode(errors='replace')[:2000]}") from error

    def members(self) -> list[int]:
        """Return the ids of the living processes of the server's group (API server, engine core, workers)."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                # After the name in brackets: state, parent, process group.
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return sorted(found)

    def engine_pids(self) -> list[int]:
        """Return the ids of the engine-core processes, which vLLM names `VLLM::EngineCore`."""
        found = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def stop(self, how: signal.Signals = signal.SIGINT, timeout: float = 60.0, everyone: bool = False) -> int:
        """Send a signal to the server (`everyone`: to its whole group, as Ctrl-C does); return the exit
        status.

        Waits until no process of the group is left. ServerError if some still live after `timeout` seconds.
        """
        if everyone:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        deadline = time.monotonic() + timeout
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerError(f"still running {timeout:g} s after {how.name}\n{self.output()[-4000:]}") from None
        while self.members():
            if time.monotonic() > deadline:
                raise ServerError(f"{how.name} left processes {self.members()} behind")
            time.sleep(0.05)
        return status

    def kill_all(self) -> None:
        """Kill whatever is left of the server's group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """Return what the server printed: stdout, then stderr."""
        return "".join((self.log_dir / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt"))
