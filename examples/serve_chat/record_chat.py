"""Record a real chat server: SmolLM2-135M-Instruct under `vllm serve`, a crowd of clients, a cache too small
for them.

    python record_chat.py --out chat-trace          (about a minute on two cores)
    kvtrace info chat-trace

Starts `kvtrace record -o OUT -- vllm serve ...`, lets `--clients` threads hold `--chats` conversations of a
few turns with a handful of shared system prompts, and stops the server with SIGINT. The cache is small on
purpose: histories are evicted between turns and running requests are preempted, which is what one wants to
see in a trace.

What is asked, and by whom, follows from `--seed`, and answers are greedy; *when* requests meet in the server
does not, so two recordings differ in detail. Prints the folder of the trace on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent

RULES = """Answer briefly and in plain words. Say so when you do not know. Never invent sources. Use metric
units. Be friendly, but do not flatter. When a question has several readings, take the most likely
one and name it. Give one example where it helps. Do not repeat the question. Do not use lists
unless you are asked for steps. When numbers are involved, show how you got them in one line. Do
not give medical or legal advice; tell people whom to ask instead."""

SYSTEM_PROMPTS = [
    f"You are the helpful assistant of a public library. You know its hours and its rooms. {RULES}",
    f"You are a patient science teacher who talks to curious twelve-year-olds after school. {RULES}",
    f"You are a cook who helps people to make dinner from what is at home. {RULES} Again: {RULES}",
    f"You are a travel guide for small towns and long walks, on foot and by train. {RULES}",
]

OPENINGS = [
    "Hello! I have a few questions and not much time. Can you help me?",
    "I am new here and do not know where to start. What should I ask you first?",
    "My friend told me that you are good at explaining things. Is that so?",
    "Let us talk about water. Why is it wet, and why does it freeze from the top?",
    "I have three potatoes, an onion and a can of beans. What can I do with them?",
    "Which way would you go if you had two free days and good shoes?",
]

FOLLOW_UPS = [
    "Can you say that again in one short sentence?",
    "Why is that so? Please give me the reason and not only the rule.",
    "And what would you do if it rained the whole day?",
    "I do not quite believe you. What speaks against it?",
    "Thank you. What else should I know before I start?",
    "Could you give me an example from everyday life?",
    "How long does that take, and what does it cost?",
    "Please explain the same thing to my grandmother, who does not like technology.",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trace")
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2, unpacked when first needed)")
    parser.add_argument("--clients", type=int, default=8, help="conversations at a time")
    parser.add_argument("--chats", type=int, default=24, help="conversations in all")
    parser.add_argument("--turns", type=int, default=4, help="most turns of a conversation")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--num-blocks", type=int, default=56, help="blocks of the cache")
    parser.add_argument("--block-size", type=int, default=32, help="tokens a block (a multiple of 32 on the CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", help="what to run the server under (default: kvtrace record -o OUT --); may be ''")
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def unpacked_model() -> str:
    script = HERE.parent / "engine_setup" / "smollm2.py"
    return subprocess.run([sys.executable, script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def server_command(options: argparse.Namespace, port: int) -> list[str]:
    if options.prefix is None:
        prefix = [str(BIN / "kvtrace"), "record", "-o", str(options.out), "--"]
    else:
        prefix = shlex.split(options.prefix)
    model = str(options.model or unpacked_model())
    settings = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": "chat",
        "--num-gpu-blocks-override": options.num_blocks,
        "--block-size": options.block_size,
        # The cache must be able to hold one request of full length.
        "--max-model-len": min(2048, (options.num_blocks - 1) * options.block_size),
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 512,
    }
    flat = [str(part) for pair in settings.items() for part in pair]
    return [*prefix, str(BIN / "vllm"), "serve", model, *flat, "--enforce-eager"]


class Server:
    """The server's process group, and a client for it."""

    def __init__(self, options: argparse.Namespace, log: IO[bytes]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        # No proxy between us and our own machine.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        self.process = subprocess.Popen(
            server_command(options, port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | quiet | {"PATH": path},
            start_new_session=True,
        )

    def wait(self, seconds: float = 240.0) -> None:
        """Wait until the server is healthy; exit with the end of its log if it does not get there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.opener.open(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)
        self.kill()
        self.log.seek(0)
        say(self.log.read().decode(errors="replace")[-4000:])
        raise SystemExit("the server did not start; its last words are above")

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """Ask for the next message of a conversation, greedily."""
        body = {"model": "chat", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self.opener.open(request, timeout=300) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    def stop(self) -> None:
        """Interrupt the server as Ctrl-C would, and wait for it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            say("the server did not stop within a minute: killed")
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def hold_chat(server: Server, number: int, options: argparse.Namespace) -> int:
    """Hold one conversation; return its number of turns."""
    rng = random.Random(options.seed * 1_000_003 + number)
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    turns = rng.randrange(2, options.turns + 1) if options.turns > 1 else 1
    for turn in range(turns):
        messages.append({"role": "user", "content": rng.choice(OPENINGS if turn == 0 else FOLLOW_UPS)})
        answer = server.answer(messages, options.max_tokens - rng.randrange(options.max_tokens // 2))
        messages.append({"role": "assistant", "content": answer})
        time.sleep(rng.uniform(0.0, 0.4))
    return turns


def run_clients(server: Server, options: argparse.Namespace) -> int:
    """Hold all conversations, `--clients` at a time; return the requests made. The first error ends it."""
    chats: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(options.chats):
        chats.put(number)
    done: list[int] = []
    errors: list[BaseException] = []

    def client() -> None:
        with contextlib.suppress(queue.Empty):
            while not errors:
                number = chats.get_nowait()
                try:
                    done.append(hold_chat(server, number, options))
                except Exception as error:
                    errors.append(error)
                    return
                say(f"chat {len(done)} of {options.chats} done")

    threads = [threading.Thread(target=client) for _ in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(done)


def main() -> None:
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(options.out / "server.log", "w+b") as log:
        say("starting vllm serve (half a minute)")
        server = Server(options, log)
        try:
            server.wait()
            say(f"ready after {time.monotonic() - started:.0f} s; {options.clients} clients start talking")
            requests = run_clients(server, options)
            server.stop()
        finally:
            if server.process.poll() is None:
                server.kill()
    say(f"{requests} requests in {options.chats} chats, {time.monotonic() - started:.0f} s in all")
    print(options.out)


if __name__ == "__main__":
    main()
