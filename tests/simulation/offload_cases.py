"""Random workloads and settings for the twin with a connector and vLLM's own, chosen so that every rule matters."""

from __future__ import annotations

import random
from dataclasses import replace

from .cases import Case, identities, random_case
from .twin_offload_words import Offload
from .twin_simple import Simple
from .twin_words import Request, Settings


def offload_case(seed: int, asynchronous: bool | None = False) -> tuple[Case, Offload]:
    """Case number `seed`; every third is one of `random_case`, which knows more kinds of requests and less reuse."""
    r = random.Random(f"offload {seed}")
    if asynchronous is None:
        asynchronous = r.random() < 0.5
    offload = Offload(
        chunks=r.choice([1, 2, 4, 8, 16, 16, 40, 40, 200]),
        policy=r.choice(["lru", "arc"]),
        blocks_per_chunk=r.choice([1, 1, 1, 2, 3]),
        store_threshold=r.choice([0, 0, 0, 2, 3]),
        prompt_only=r.random() < 0.4,
        polls=r.choice([0, 0, 0, 1, 1, 2, 4]),
    )
    if seed % 3 == 0:
        return random_case(seed, asynchronous=asynchronous), offload
    return _reuse(r, bool(asynchronous)), offload


def _reuse(r: random.Random, asynchronous: bool) -> Case:
    """Few prefixes and conversations that come back, in a cache too small to keep them."""
    fresh = iter(range(10, 10_000_000))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(next(fresh) for _ in range(count))

    size = r.choice([1, 2, 4, 4, 8, 16])
    prefixes = [tokens(r.randint(2, 7) * size + r.choice([0, 0, 1, size - 1])) for _ in range(r.randint(1, 5))]
    bodies: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for _ in range(r.choice([8, 12, 20, 30])):
        kind = r.random()
        if kind < 0.25 and bodies:
            earlier = r.choice(bodies)
            prompt = (earlier[0] + earlier[1])[: 12 * size] + tokens(r.randint(0, size))
        elif kind < 0.45 and bodies:
            prompt = r.choice(bodies)[0]
        else:
            prompt = r.choice(prefixes) + tokens(r.randint(0, 2 * size))
        if r.random() < 0.2:
            prompt = prompt[: max(len(prompt) // size, 1) * size]
        bodies.append((prompt, tokens(r.randint(1, r.choice([2, 6, 3 * size])))))
    longest = max(len(p) + len(o) for p, o in bodies)
    need = -(-longest // size) + 1
    chunked = r.random() < 0.85
    model = longest + r.choice([0, 1, size, 500])
    budget = r.choice([size, 2 * size, 4 * size, longest, 512]) if chunked else model
    settings = Settings(
        num_blocks=need + r.choice([0, 1, 2, r.randint(0, need), 2 * need]),
        block_size=size,
        max_num_seqs=min(r.choice([2, 3, 4, 8, 64]), budget),
        max_num_batched_tokens=budget,
        max_model_len=model,
        prefix_caching=r.random() < 0.9,
        chunked_prefill=chunked,
        long_prefill_token_threshold=min(r.choice([0, 0, 0, 1, size, 2 * size]), model),
        scheduling_policy=r.choice(["fcfs", "fcfs", "priority"]),
        async_scheduling=asynchronous,
        watermark=r.choice([0.0, 0.0, 0.0, 0.05, 0.2]),
    )
    spread, aborts = r.choice([0, 10, 40, 80]), r.choice([0.0, 0.0, 0.2, 0.4])
    chains = identities([p + o for p, o in bodies], size)
    requests = []
    for number, (prompt, output) in enumerate(bodies):
        arrival = r.randint(0, spread)
        requests.append(
            Request(
                arrival_step=arrival,
                prompt=len(prompt),
                output=len(output),
                max_tokens=len(output),
                chain=chains[number],
                priority=r.randrange(3),
                arrival_time=float(10 + number),
                request_id=f"r{number}",
                abort_step=arrival + r.randint(0, 12) if r.random() < aborts else None,
                no_read=r.random() < 0.05,
            )
        )
    return Case(replace(settings), requests, bodies)


def simple_case(seed: int, lazy: bool) -> Simple:
    """The simple connector's settings for case number `seed`."""
    r = random.Random(f"simple {seed}")
    return Simple(
        chunks=r.choice([1, 2, 4, 8, 16, 16, 40, 40, 200]),
        lazy=lazy,
        polls=r.choice([0, 0, 0, 1, 1, 2, 4]),
        runner=1 + seed % 2,
    )
