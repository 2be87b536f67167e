"""Seeded workloads of token ids, and the driver that feeds them to an engine step by step.

Token ids lie in 3..vocab-1 (0 to 2 are special in the tiny model). A workload is a list of `Arrival`; `drive`
adds each at its step, aborts those with an abort step, and steps until nothing is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

VOCAB = 512
STOP = 2  # ends a request whose script has it


@dataclass(frozen=True)
class Arrival:
    """One request: added before step `step`; aborted before step `abort_step` if given.

    `output` are the tokens that a scripted engine generates for it (rerun.py); STOP among them ends it.
    """

    prompt: list[int]
    max_tokens: int = 8
    step: int = 0
    abort_step: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    output: list[int] | None = None


class Steppable(Protocol):
    """What `drive` needs: engine.Engine and stub.StubEngine both have it."""

    def add(self, prompt: list[int], max_tokens: int, *, priority: int, cache_salt: str | None) -> int: ...
    def abort(self, request: int) -> None: ...
    def step(self) -> None: ...
    @property
    def busy(self) -> bool: ...


def drive(engine: Steppable, arrivals: Iterable[Arrival], after_step: Callable[[int], None] | None = None) -> list[int]:
    """Run `arrivals` to their end; return the engine's request number of each, in the order given.

    Step `s` is the s-th pass of this loop. While the engine is idle, steps up to the next arrival are
    skipped. `after_step(s)` is called after each pass. Raises RuntimeError after 200,000 passes (an engine
    that stands still).
    """
    todo = sorted(enumerate(arrivals), key=lambda item: item[1].step)
    numbers = [-1] * len(todo)
    aborts: dict[int, list[int]] = {}
    step = position = 0
    while position < len(todo) or engine.busy:
        if not engine.busy:
            step = max(step, todo[position][1].step)
        while position < len(todo) and todo[position][1].step <= step:
            index, arrival = todo[position]
            position += 1
            number = numbers[index] = engine.add(
                arrival.prompt, arrival.max_tokens, priority=arrival.priority, cache_salt=arrival.cache_salt
            )
            if arrival.abort_step is not None:
                aborts.setdefault(max(arrival.abort_step, step), []).append(number)
        for due in [at for at in aborts if at <= step]:
            for number in aborts.pop(due):
                engine.abort(number)
        engine.step()
        if after_step is not None:
            after_step(step)
        step += 1
        if step > 200_000:
            raise RuntimeError("the engine stands still: 200,000 steps and requests are left")
    return numbers


def tokens(rng: random.Random, count: int, vocab: int = VOCAB) -> list[int]:
    """Return `count` random token ids."""
    return [rng.randrange(3, vocab) for _ in range(count)]


def shared_prefixes(seed: int, requests: int = 24, prefixes: int = 3, length: int = 100) -> list[Arrival]:
    """Requests that share one of a few system prompts and go on differently."""
    rng = random.Random(seed)
    heads = [tokens(rng, length + rng.randrange(40)) for _ in range(prefixes)]
    return [
        Arrival(rng.choice(heads) + tokens(rng, rng.randrange(1, 80)), rng.randrange(4, 24)) for _ in range(requests)
    ]


def multi_turn(seed: int, chats: int = 4, turns: int = 4, gap: int = 40) -> list[Arrival]:
    """Chats whose turn t repeats everything before it (with invented answers) and adds a question."""
    rng = random.Random(seed)
    system = tokens(rng, 70)
    found = []
    for chat in range(chats):
        history = system + tokens(rng, 20)
        for turn in range(turns):
            found.append(Arrival(list(history), 12, step=turn * gap + chat * 3))
            history += tokens(rng, rng.randrange(20, 60))
    return sorted(found, key=lambda arrival: arrival.step)


def duplicates(seed: int, distinct: int = 4, copies: int = 4, length: int = 130) -> list[Arrival]:
    """The same prompt several times, some at once (then two blocks get one identity) and some later."""
    rng = random.Random(seed)
    prompts = [tokens(rng, length + rng.randrange(30)) for _ in range(distinct)]
    found = [Arrival(prompt, 8, step=15 * (copy // 2)) for copy in range(copies) for prompt in prompts]
    return sorted(found, key=lambda arrival: arrival.step)


def block_aligned(seed: int, block_size: int, requests: int = 12) -> list[Arrival]:
    """Prompts of exactly k blocks, and of one token less and more: the `num_tokens - 1` cap shows here."""
    rng = random.Random(seed)
    head = tokens(rng, 4 * block_size + 1)
    found = []
    for index in range(requests):
        length = max(1, rng.randrange(1, 5) * block_size + rng.choice((-1, 0, 0, 1)))
        found.append(Arrival(head[:length], rng.choice((1, block_size, 5)), step=index * 6))
    return found


def thrashing(seed: int, requests: int = 40, prompt: int = 60, output: int = 120) -> list[Arrival]:
    """Many distinct prompts with long outputs: in a small cache requests preempt one another."""
    rng = random.Random(seed)
    head = tokens(rng, 40)
    return [
        Arrival(
            (head if rng.random() < 0.3 else []) + tokens(rng, prompt + rng.randrange(60)),
            output - rng.randrange(40),
        )
        for _ in range(requests)
    ]


def long_prompts(seed: int, requests: int = 8, length: int = 700) -> list[Arrival]:
    """Prompts longer than the token budget of a step: they are computed in chunks."""
    rng = random.Random(seed)
    return [Arrival(tokens(rng, length + rng.randrange(200)), 6, step=index) for index in range(requests)]


def staggered(
    seed: int, arrivals: Iterable[Arrival], spread: int = 60, abort_share: float = 0.15, priorities: int = 1
) -> list[Arrival]:
    """The same requests at random steps, a share of them aborted after some steps, with random priorities."""
    rng = random.Random(seed)
    found = []
    for arrival in arrivals:
        step = rng.randrange(spread)
        abort = step + rng.randrange(1, 40) if rng.random() < abort_share else None
        found.append(replace(arrival, step=step, abort_step=abort, priority=rng.randrange(priorities)))
    return sorted(found, key=lambda arrival: arrival.step)


def mixed(seed: int, block_size: int) -> list[Arrival]:
    """All of the above, at staggered steps: each kind catches mistakes that the others let pass."""
    parts = [
        *shared_prefixes(seed, 12),
        *multi_turn(seed + 1, 3, 3),
        *duplicates(seed + 2, 3, 3),
        *block_aligned(seed + 3, block_size, 8),
        *thrashing(seed + 4, 12),
        *long_prompts(seed + 5, 3, 300),
    ]
    return staggered(seed + 6, parts, spread=150)


def scripted(seed: int, arrivals: Iterable[Arrival], stop_share: float = 0.0) -> list[Arrival]:
    """The same requests in order of arrival, each with tokens to generate; a share of them ends early, by a stop token.

    There are `max_tokens` of them, so that nothing is missing whatever the engine does. What has a script keeps it.
    """
    rng = random.Random(seed)
    found = []
    for arrival in sorted(arrivals, key=lambda arrival: arrival.step):
        output = arrival.output or tokens(rng, arrival.max_tokens)
        if arrival.max_tokens > 2 and rng.random() < stop_share:
            output[rng.randrange(1, arrival.max_tokens - 1)] = STOP
        found.append(replace(arrival, output=output))
    return found


def conversations(seed: int, chats: int = 4, turns: int = 4, gap: int = 40) -> list[Arrival]:
    """Chats whose turn t repeats everything before it, the (scripted) answers too, and adds a question."""
    rng = random.Random(seed)
    system = tokens(rng, 70)
    found = []
    for chat in range(chats):
        history = system + tokens(rng, 20)
        for turn in range(turns):
            output = tokens(rng, rng.randrange(20, 50))
            found.append(Arrival(list(history), len(output), step=turn * gap + chat * 3, output=output))
            history += output + tokens(rng, rng.randrange(10, 40))
    return sorted(found, key=lambda arrival: arrival.step)


def as_json(arrivals: Iterable[Arrival]) -> list[dict[str, Any]]:
    """Return plain dicts, for arguments that cross a process; `Arrival(**d)` is the way back."""
    return [vars(arrival) for arrival in arrivals]
