"""A toy engine with a block pool, a prefix cache, preemptions and late outputs, which appends what it does to a log.

It shares no code with the tracer or the reader.
"""

from __future__ import annotations

import random
import struct
from array import array
from collections import deque
from dataclasses import dataclass, field

from kvtrace_traces.schema import EXT_OPS, FINISH_REASONS, INEXACT, OPS

CODE = {name: op.code for name, op in OPS.items()}
UNKNOWN = 0xFFFFFFFF
COUNTS, WIDE, FULL, BIG = 1, 2, 4, 8


@dataclass
class Settings:
    """What the toy engine does; probabilities are per step."""

    seed: int = 0
    steps: int = 60
    blocks: int = 24  # of the pool; as many again are for operations that name their blocks
    block_size: int = 4
    granules: int = 1  # a block
    budget: int = 12  # tokens a step
    most_running: int = 5
    outputs_behind: int = 0
    priority: bool = False
    full_sets: float = 0.0
    big: float = 0.0
    wide: float = 0.0
    explicit: float = 0.0
    rare: float = 0.0
    empty: float = 0.1
    arrivals: float = 0.5
    frame_commits: int = 7
    ids: int = 0  # finished requests of an import, in front
    unknown: float = 0.0  # operations of a newer minor version


@dataclass
class Request:
    number: int
    tokens: list[int]
    prompt: int
    most: int
    priority: int
    computed: int = 0
    table: list[int] = field(default_factory=list)
    filled: int = 0
    logged: int = 0  # identities
    alive: bool = True
    turn: int = 0  # admissions

    @property
    def output(self) -> int:
        return len(self.tokens) - self.prompt


class Engine:
    def __init__(self, settings: Settings) -> None:
        self.s = settings
        self.rng = random.Random(settings.seed)
        self.words = array("I")
        self.commits: list[tuple[int, bytes]] = []
        self.events = self.requests = self.step = self.time = self.clock = 0
        self.free = deque(range(1, settings.blocks))
        self.named = set(range(settings.blocks, 2 * settings.blocks))
        self.identity: dict[int, tuple[int, ...]] = {}  # block -> the tokens up to its end
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.last: dict[int, tuple[Request, int]] = {}
        self.gone: set[int] = set()
        self.outputs: deque[dict[int, tuple[Request, int, int]]] = deque()
        self.moves = 0  # number of the next transfer
        self.counts = (0, 0)
        self.owners: list[int] = []
        self.hashes: dict[tuple[int, ...], int] = {}
        self.prefixes = [[self.rng.randrange(50) for _ in range(20)] for _ in range(3)]
        self.since_frame = 0

    # ---- appending operations

    def op(self, name: str, operand: int, *words: int) -> None:
        assert 0 <= operand < 1 << 28, (name, operand)
        self.words.append(operand << 4 | CODE[name])
        self.words.extend(words)

    def ext(self, name: str | int, *words: int) -> None:
        code = name if isinstance(name, int) else EXT_OPS[name].code
        self.op("EXT", code | len(words) << 8, *words)

    def hash(self, tokens: tuple[int, ...]) -> tuple[int, int]:
        value = self.hashes.setdefault(tokens, self.rng.getrandbits(64))
        return value & 0xFFFFFFFF, value >> 32

    def stamp(self, name: str) -> None:
        self.clock += self.rng.choice([0, 5, 1000, 1 << 27, 1 << 29])
        delta = self.clock - self.time
        if delta >= 1 << 28:
            self.set_time()
            delta = 0
        self.time = self.clock
        self.op(name, delta)

    def set_time(self) -> None:
        self.ext("TIME", self.clock & 0xFFFFFFFF, self.clock >> 32)
        self.time = self.clock

    def commit(self) -> None:
        if self.words:
            self.commits.append((int(self.since_frame == 0), self.words.tobytes()))
            self.since_frame += 1
        del self.words[:]
        if self.since_frame >= self.s.frame_commits:
            self.frame()

    def frame(self) -> None:
        self.since_frame = 0
        live = [r for r in self.running + self.waiting if r.table or r.logged != r.prompt // self.granule]
        scheduled = []
        for number, (request, tokens) in self.last.items():
            shown = number if request.alive else UNKNOWN
            if number not in self.gone or not request.alive:
                scheduled += [shown, tokens, max(0, request.computed - tokens)]
        held = [w for r in live for w in (r.number, len(r.table), r.filled, r.logged)]
        self.op(
            "KEY", len(scheduled) // 3, self.time & 0xFFFFFFFF, self.time >> 32, self.step, self.requests,
            self.events & 0xFFFFFFFF, self.events >> 32, *self.counts, len(self.outputs), len(held) // 4,
            *scheduled, *held,
        )  # fmt: skip

    @property
    def granule(self) -> int:
        return self.s.block_size // self.s.granules

    # ---- the engine

    def run(self) -> None:
        self.frame()
        if self.s.ids:
            self.ext("IDS", *[self.rng.getrandbits(32) for _ in range(2 * self.s.ids)])
            self.tell(self.requests, self.s.ids)
            self.requests += self.s.ids
        for _ in range(self.s.steps):
            self.outside()
            self.schedule(empty=self.rng.random() < self.s.empty)
            while len(self.outputs) > self.s.outputs_behind:
                self.update()
                self.commit()
            if self.rng.random() < 0.5:
                self.commit()
        self.commit()

    def tell(self, first: int, many: int) -> None:
        """What an import knows: types by name, when its requests came, and their conversations."""
        rng = self.rng
        for number in rng.sample(range(5), 2):
            name = rng.choice(["text", "größe", ""]).encode()
            padded = name + b"\0" * (-len(name) % 4)
            self.ext("TYPE", number, len(name), *struct.unpack(f"<{len(padded) // 4}I", padded))
        runs = [w for _ in range(rng.randrange(3)) for w in (1, rng.getrandbits(32), rng.choice([0, 9]))]
        self.ext("WHEN", first + rng.randrange(many - 1), *runs)
        for r in rng.sample(range(first, first + many), rng.randrange(many)):
            self.ext("ABOUT", r, rng.choice([UNKNOWN, *range(5)]), rng.choice([UNKNOWN, 3]), rng.choice([UNKNOWN, 0]))

    def outside(self) -> None:
        rng = self.rng
        while rng.random() < self.s.arrivals and len(self.waiting) < 6:
            self.arrive()
        if rng.random() < self.s.rare and (self.running or self.waiting):
            self.clock += 10
            self.set_time()
            request = rng.choice(self.running + self.waiting)
            self.finish(request, "abort")
        if rng.random() < self.s.rare:
            self.ext("RESET")
            self.events += 1
            self.identity.clear()
        if rng.random() < self.s.rare and self.identity:
            blocks = rng.sample(sorted(self.identity), min(3, len(self.identity)))
            self.ext("EVICT", *blocks)
            self.events += len(blocks)
            for block in blocks:
                del self.identity[block]
        if rng.random() < self.s.rare:
            self.ext("INEXACT", rng.randrange(len(INEXACT)))
        if rng.random() < self.s.unknown:
            self.ext(rng.choice([99, 200]), *[rng.getrandbits(32) for _ in range(rng.randrange(4))])
        if rng.random() < self.s.explicit:
            self.explicit()

    def arrive(self) -> None:
        rng = self.rng
        prefix = rng.choice(self.prefixes)[: rng.randrange(1, 20)]
        tokens = prefix + [rng.randrange(50) for _ in range(rng.randrange(8))]
        request = Request(self.requests, tokens, len(tokens), rng.randrange(1, 12), rng.randrange(-2, 3))
        self.requests += 1
        self.waiting.append(request)
        name = f"r{request.number}-é".encode() * rng.randrange(3)
        fixed = struct.pack(
            "<qdIIiIQII", self.clock, self.clock / 7, request.prompt, request.most, request.priority,
            rng.randrange(2), rng.choice([0, 7 << 60]), 0, len(name),
        )  # fmt: skip
        data = fixed + name + b"\0" * (-len(name) % 4)
        self.ext("REQ", *struct.unpack(f"<{len(data) // 4}I", data))
        self.grow(request, request.prompt // self.granule)

    def grow(self, request: Request, stop: int) -> None:
        if stop > request.logged:
            words = [w for i in range(request.logged, stop) for w in self.granule_hash(request, i)]
            self.op("CHAIN", request.number, stop - request.logged, *words)
            request.logged = stop

    def granule_hash(self, request: Request, i: int) -> tuple[int, int]:
        return self.hash(tuple(request.tokens[: (i + 1) * self.granule]))

    def explicit(self) -> None:
        rng = self.rng
        blocks = rng.sample(sorted(self.named), rng.randrange(1, 4))
        whose = (rng.choice([UNKNOWN, rng.randrange(self.requests + 1)]), rng.choice([0, 1, UNKNOWN]))
        kind = rng.choice(["ALLOCX", "HITX", "FILLX", "FREEX", "STORE", "LOAD", "MOVE", "LOST"])
        self.events += len(blocks)
        if self.moves and rng.random() < 0.5:
            told = [w for n in (3 << 40, 4096, 77) for w in rng.choice([(n & UNKNOWN, n >> 32), (UNKNOWN, UNKNOWN)])]
            self.ext("MOVED", rng.randrange(self.moves + 2), 5, 1, *told[2:])
        if kind == "FILLX":
            self.ext(kind, *whose, *[w for b in blocks for w in (b, *self.hash((-1, rng.randrange(9))))])
        elif kind in ("STORE", "LOAD"):
            self.ext(kind, whose[0], 1, 4096 * len(blocks), 0, rng.choice([0, 5]), 0, *blocks)
        elif kind == "MOVE":
            self.move(whose[0], blocks)
        elif kind != "LOST":
            self.ext(kind, *whose, *blocks)
        elif self.running:
            self.events -= len(blocks)
            request = self.running.pop()
            held = len(request.table)
            self.ext("LOST", request.number, request.computed, held)
            self.ext("FREEX", request.number, 0, *reversed(request.table))
            self.events += held
            self.give_up(request)
            self.back(request)
        else:
            self.events -= len(blocks)

    def move(self, request: int, blocks: list[int]) -> None:
        rng = self.rng
        what, first = rng.choice([0, 1]) | rng.choice([0, 1, 5]) << 8, rng.choice([0, 1, 7, UNKNOWN])
        self.ext("MOVE", self.moves, request, what, rng.randrange(99), first, 4096 * len(blocks), 0, *blocks)
        self.moves += rng.choice([1, 1, 2])

    def allocate(self, request: Request, n: int, admitting: bool) -> None:
        if n <= 0:
            return
        blocks = [self.free.popleft() for _ in range(n)]
        for block in blocks:
            self.identity.pop(block, None)
        if n == 1:
            self.op("ALLOC", blocks[0])
        else:
            self.op("ALLOCN", n, *blocks)
        self.events += n
        if not admitting:
            self.owners.append(request.number)
        request.table += blocks

    def advance(self, request: Request, tokens: int) -> None:
        request.computed += tokens
        full = min(request.computed, len(request.tokens)) // self.s.block_size
        new = full - request.filled
        if new <= 0:
            return
        for i in range(request.filled, full):
            self.identity[request.table[i]] = tuple(request.tokens[: (i + 1) * self.s.block_size])
        if new == 1 and self.s.granules == 1 and request.logged == request.filled:
            self.op("FILL1", request.number, *self.granule_hash(request, request.filled))
            request.logged += 1
        else:
            self.grow(request, full * self.s.granules)
            self.op("FILL", request.number, new)
        request.filled = full
        self.events += new

    def give_up(self, request: Request) -> None:
        for block in reversed(request.table):
            if not any(block in r.table for r in self.running + self.waiting if r is not request):
                self.free.append(block)
        request.table, request.filled = [], 0

    def back(self, request: Request) -> None:
        self.gone.add(request.number)
        request.computed = 0
        request.turn += 1
        self.waiting.insert(0, request)

    def preempt(self, request: Request) -> None:
        if self.owners and (self.s.priority or self.rng.random() < 0.3):
            self.ext("OWN", *self.owners)
            self.owners.clear()
        self.running.remove(request)
        self.op("PREEMPT", request.number, request.computed, len(request.table))
        self.events += len(request.table)
        self.give_up(request)
        self.back(request)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.s.block_size)

    def schedule(self, empty: bool) -> None:
        self.stamp("BEGIN")
        scheduled: dict[int, tuple[Request, int]] = {}
        budget = 0 if empty else self.s.budget
        preempted = False
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            tokens = min(budget, len(request.tokens) - request.computed)
            if tokens <= 0:
                continue
            need = self.blocks_for(request.computed + tokens) - len(request.table)
            while need > len(self.free) and request in self.running:
                rest = [r for r in self.running if r.number not in scheduled or self.s.priority]
                victim = max(rest, key=lambda r: (r.priority, r.number)) if self.s.priority else self.running[-1]
                if victim.number in scheduled:
                    budget += scheduled.pop(victim.number)[1]
                self.preempt(victim)
                preempted = True
            if request not in self.running:
                continue
            self.allocate(request, need, admitting=False)
            self.advance(request, tokens)
            scheduled[request.number] = (request, tokens)
            budget -= tokens
        looked: list[int] = []
        while self.waiting and budget and not preempted and len(self.running) < self.s.most_running:
            first = self.waiting[0]
            admitted = self.admit(first, budget, scheduled, looked)
            if self.rng.random() < self.s.explicit:
                self.move(first.number, [1, 2])
                self.events += 2
            if not admitted:
                break
            budget = self.s.budget - sum(tokens for _, tokens in scheduled.values())
        self.end_call(scheduled, looked)
        for request, _ in scheduled.values():  # what the model makes of it is known to the toy at once
            if request.computed == len(request.tokens) and request.output < request.most:
                request.tokens.append(self.rng.randrange(50))
        if scheduled:
            self.outputs.append({n: (r, t, r.turn) for n, (r, t) in scheduled.items()})
            self.step += 1

    def admit(
        self, request: Request, budget: int, scheduled: dict[int, tuple[Request, int]], looked: list[int]
    ) -> bool:
        holders: dict[tuple[int, ...], int] = {}
        for block, tokens in self.identity.items():
            holders.setdefault(tokens, block)
        hit: list[int] = []
        size = self.s.block_size
        while (len(hit) + 1) * size < len(request.tokens):
            block = holders.get(tuple(request.tokens[: (len(hit) + 1) * size]))
            if block is None:
                break
            hit.append(block)
        counted = self.rng.random() < 0.9
        self.op("LOOKUP", request.number, len(request.tokens), len(hit) * size + 1 if counted else 0)
        looked.append(request.number)
        computed = len(hit) * size
        tokens = min(budget, len(request.tokens) - computed)
        need = self.blocks_for(computed + tokens) - len(hit)
        if need > len([b for b in self.free if b not in hit]):
            return False
        if hit:
            self.op("HIT", len(hit), *hit)
            self.events += len(hit)
            for block in hit:
                if block in self.free:
                    self.free.remove(block)
        request.table, request.filled, request.computed = hit, len(hit), computed
        self.allocate(request, need, admitting=True)
        self.waiting.remove(request)
        self.running.append(request)
        self.advance(request, tokens)
        scheduled[request.number] = (request, tokens)
        return True

    def end_call(self, scheduled: dict[int, tuple[Request, int]], looked: list[int]) -> None:
        rng = self.rng
        expected = {n: 1 for n in self.last if n not in self.gone}
        named = [n for n in expected if self.last[n][1] != 1 and n in scheduled]
        named += [n for n in scheduled if n in looked and n not in expected]
        if {**expected, **{n: scheduled[n][1] for n in named}} != {
            n: t for n, (_, t) in scheduled.items()
        } or rng.random() < self.s.full_sets:
            named, flags = list(scheduled), FULL
        else:
            flags = 0
        counts = (len(self.running), len(self.waiting))
        if counts != self.counts or rng.random() < 0.1:
            flags |= COUNTS
        self.counts = counts
        owners = self.owners
        base = min(owners, default=0)
        if owners and (rng.random() < self.s.wide or max(owners) - base > 0xFFFF):
            flags |= WIDE
        if rng.random() < self.s.big:
            self.op("SCHED", flags | BIG, len(named), len(owners))
        else:
            self.op("SCHED", flags | len(named) << 4 | len(owners) << 16)
        self.words.append(len(self.free))
        if flags & COUNTS:
            self.words.extend(counts)
        for n in named:
            request, tokens = scheduled[n]
            self.words.extend((n, tokens, request.computed - tokens))
        if flags & WIDE:
            self.words.extend(owners)
        elif owners:
            halves = [owner - base for owner in owners] + [0] * (len(owners) % 2)
            self.words.append(base)
            self.words.extend([low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)])
        self.owners = []
        self.last = scheduled
        self.gone = set()

    def update(self) -> None:
        if len(self.outputs) > 1 and self.rng.random() < self.s.rare:
            self.ext("SKIP", 1)
            skipped = self.outputs.popleft()
        else:
            skipped = {}
        self.stamp("OUTPUT")
        for request, _, turn in [*skipped.values(), *self.outputs.popleft().values()]:
            done = request.output >= request.most and request.computed >= len(request.tokens) - 1
            if request.alive and request.turn == turn and request in self.running and done:
                self.finish(request, self.rng.choice(["stop", "length", "repetition"]))

    def finish(self, request: Request, reason: str) -> None:
        self.grow(request, len(request.tokens) // self.granule)
        self.op("FINISH", request.number, FINISH_REASONS.index(reason), request.output)
        if request.table:
            self.op("FREE", request.number, len(request.table))
            self.events += len(request.table)
        request.alive = False
        self.gone.add(request.number)
        (self.running if request in self.running else self.waiting).remove(request)
        self.give_up(request)
