"""Random workloads and settings for the twin, the kernel and vLLM's schedulers, chosen so that every rule matters."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from kvtrace_replay.schedulers.families import NEWEST, Rules

from .twin_words import Request, Settings

STOP = 2

#: Seeds of `random_case(seed, rules, policy="priority")`, rules from 0.24 on, for what random cases show once in a
#: thousand: a victim's tokens that return to the budget, and a victim before the present request, not scheduled itself.
RARE = (100046, 100842, 101366, 101684, 102336, 102561, 102696, 102902, 102911, 103852, 105998, 109373, 109970)


@dataclass(frozen=True)
class Case:
    """Settings, requests, and for each request its prompt and output tokens."""

    settings: Settings
    requests: list[Request]
    tokens: list[tuple[tuple[int, ...], tuple[int, ...]]]

    def with_settings(self, **changes: object) -> Case:
        """The same requests at other settings; a new block size gives new identities."""
        settings = replace(self.settings, **changes)  # type: ignore[arg-type]
        chains = identities([p + o for p, o in self.tokens], settings.block_size)
        return Case(settings, [replace(r, chain=c) for r, c in zip(self.requests, chains, strict=True)], self.tokens)


def identities(sequences: list[tuple[int, ...]], block_size: int) -> list[tuple[int, ...]]:
    """Number the blocks of token sequences so that two have one number if and only if all up to their ends is equal."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    chains = []
    for tokens in sequences:
        chain: list[int] = []
        for start in range(0, len(tokens) - block_size + 1, block_size):
            key = (chain[-1] if chain else -1, tokens[start : start + block_size])
            chain.append(known.setdefault(key, len(known)))
        chains.append(tuple(chain))
    return chains


def _abort(r: random.Random, arrival: int, chance: float, moments: list[int]) -> int | None:
    if r.random() >= chance:
        return None
    return r.choice(moments) if moments else arrival + r.randint(-1, 40)


def random_case(
    seed: int, rules: Rules = NEWEST, asynchronous: bool | None = None, policy: str | None = None, ties: bool = True
) -> Case:
    """Case number `seed`; `ties` allows equal priorities with equal arrival times."""
    r = random.Random(seed)
    asynchronous = r.random() < 0.5 if asynchronous is None else asynchronous
    policy = r.choice(["fcfs", "priority"]) if policy is None else policy
    size = r.choice([1, 2, 3, 4, 4, 8, 8, 16, 16, 16, 32, 64])
    unit = r.choice([max(size // 2, 1), size, size, 2 * size, 3 * size])
    fresh = iter(range(10, 10_000_000))
    thrash = r.random() < 0.5  # many running requests in a small cache

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(next(fresh) for _ in range(count))

    crowded = thrash and r.random() < 0.5  # besides: tight budgets, requests that end often, arrivals in disorder
    pressed = crowded and r.random() < 0.5  # besides: several long prompts in chunks beside each other
    if crowded:
        size = r.choice([1, 2, 3, 4, 8])
        unit = r.choice([size, 3 * size, 6 * size])
    count = r.choice([4, 8, 12, 20, 30] if thrash else [1, 2, 3, 5, 8, 12, 20, 30])
    prefixes = [tokens(r.randint(1, 6) * unit + r.choice([0, 0, 1, size - 1])) for _ in range(r.randint(1, 3))]
    if pressed:
        size, unit, count = r.choice([1, 2, 3, 4]), 8, r.randint(6, 14)
    longest_output = r.choice(
        [2, 4, 8] if pressed else [3, 6, 12] if crowded else [10, 20, 40, 60] if thrash else [1, 2, 5, 10, 20, 40]
    )
    bodies: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    stops: list[int] = []
    style = r.choice(["mixed", "mixed", "shared", "turns", "copies", "apart"])
    for _ in range(count):
        kind = r.choice(["shared", "turns", "copies", "apart", "aligned"]) if style == "mixed" else style
        if kind == "turns" and bodies:
            earlier = r.choice(bodies)
            prompt = earlier[0] + earlier[1] + tokens(r.randint(0, unit))
        elif kind == "copies" and bodies:
            prompt = r.choice(bodies)[0]
        elif kind == "shared":
            prefix = r.choice(prefixes)
            prompt = prefix[: r.choice([len(prefix), r.randint(1, len(prefix))])] + tokens(r.randint(0, 2 * unit))
        elif kind == "aligned":
            prefix = r.choice(prefixes)
            whole = max(len(prefix) // size, 1) * size
            prompt = (prefix + tokens(size))[: whole if r.random() < 0.5 else whole + size]
        else:
            prompt = tokens(r.randint(1, 6 * unit))
        output = r.randint(longest_output // 2 if thrash else 1, longest_output)
        # A copy may also generate what its model request generated, so that generated blocks are shared.
        same = [o for p, o in bodies if p == prompt]
        generated = r.choice(same)[:output] if same and r.random() < 0.4 else ()
        generated = tuple(t for t in generated if t != STOP)
        generated += tokens(output - len(generated))
        if r.random() < 0.3:
            stops.append(r.randint(1, 20))
            generated = (*generated[:-1], STOP)
        else:
            stops.append(0)
        bodies.append((prompt[:1200], generated))

    longest = max(len(p) + len(o) for p, o in bodies)
    need = -(-longest // size) + 1  # the smallest pool that serves, null block included
    total = sum(-(-(len(p) + len(o)) // size) for p, o in bodies)
    blocks = r.choice([need, need + 1, need + r.randint(0, 6), need + r.randint(0, max(total // 3, 1)), total + need])
    if thrash:
        blocks = need + r.randint(0, max(need, 4))
    chunked = r.random() < 0.85
    longest_prompt = max(len(p) for p, _ in bodies)
    budget = r.choice([1, 2, size, size + 1, 2 * size, 4 * size, longest, 2 * longest, 512, 2048])
    if thrash and r.random() < 0.6:
        budget = r.choice([4 * size, longest, 2 * longest, 512])
    if crowded:
        budget = r.choice([4, 6, 8, 12, 16, 24])
    model = longest + r.choice([0, 0, 1, 2, size, 500])
    if r.random() < 0.15:
        model = max(longest_prompt + r.randint(1, 5), 2)
    if not chunked:  # as vLLM demands
        budget = model + r.choice([0, 1, size, longest])
    threshold = r.choice([0, 0, 0, 1, size, r.randint(1, 3 * size)])
    if crowded:
        threshold = r.choice([2, 3, 4, 6] if pressed else [0, 1, 2, max(budget // 3, 1), max(budget // 2, 1)])
    seqs = r.choice([3, 4, 8, 64] if thrash else [1, 2, 3, 4, 8, 64])
    settings = Settings(
        num_blocks=blocks,
        block_size=size,
        max_num_seqs=min(seqs, budget),
        max_num_batched_tokens=budget,
        max_model_len=model,
        prefix_caching=r.random() < 0.88,
        chunked_prefill=chunked,
        long_prefill_token_threshold=min(threshold, model),
        scheduling_policy=policy,
        async_scheduling=asynchronous,
        watermark=r.choice([0.0, 0.0, 0.0, 0.01, 0.05, 0.1, 0.25]) if rules.watermark else 0.0,
        rules=rules,
    )
    spread = r.choice([10, 30] if crowded else [0, 3, 10, 40] if thrash else [0, 0, 3, 10, 40, 200])
    aborts = r.choice([0.0, 0.0, 0.1, 0.3])
    together = r.random() < 0.4  # aborts at one of two steps
    moments = [r.randint(0, 30), r.randint(0, 60)]
    priorities = r.choice([10, 20] if crowded else [1, 2, 3, 10])
    requests = []
    chains = identities([p + o for p, o in bodies], size)
    for number, ((prompt, output), extra) in enumerate(zip(bodies, stops, strict=True)):
        arrival = r.randint(0, spread)
        requests.append(
            Request(
                arrival_step=arrival,
                prompt=len(prompt),
                output=len(output),
                max_tokens=len(output) + extra,
                chain=chains[number],
                priority=r.randrange(priorities),
                arrival_time=float(r.randrange(4)) if ties and r.random() < 0.5 else float(10 + number),
                request_id=f"{r.choice('abc')}{r.randrange(10)}-{number}",
                abort_step=_abort(r, arrival, aborts, moments if together else []),
                no_read=r.random() < 0.06,
            )
        )
    return Case(settings, requests, bodies)


def aborted_after_empty_calls(case: Case, seed: int) -> Case:
    """The case with a third of its requests aborted, most of these after calls without tokens."""
    r = random.Random(seed)
    requests = [
        replace(one, abort_step=one.arrival_step + r.randint(0, 20), abort_calls=r.choice([0, 1, 1, 2, 3]))
        if r.random() < 0.35
        else one
        for one in case.requests
    ]
    return replace(case, requests=requests)
