"""A reader of `.kvt` logs written from docs/format.md alone: plain Python, one operation at a time, nothing clever.

It is the twin that the compiled reader is compared with. `read` takes the bytes of an engine's segments, in order, and
returns a list of dicts per table.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

from slow_commits import Commit, Words, commits_of, operations, owners_ahead

FINISH_REASONS = ["stop", "length", "abort", "error", "ignored", "repetition", "other"]
UNKNOWN = 0xFFFFFFFF
Row = dict[str, Any]


@dataclass
class Request:
    """What a reader keeps of a request."""

    row: Row | None = None
    chain: list[int] = field(default_factory=list)
    chain_broken: bool = False
    table: list[int] | None = None  # None: not known whole
    filled: int = 0
    lookup: tuple[int, int, int] | None = None  # call, tokens asked, word
    cached: int | None = None
    preemptions: int = 0


def read(files: list[bytes], recover: str = "tail") -> dict[str, list[Row]]:
    """The tables of one engine's log."""
    reader = Reader(json.loads(commits_of(files[0])[0].body))
    ops, gap = [], False
    for data in files:
        commits = commits_of(data)
        for commit in commits:
            gap = gap or commit.gap
            if commit.kind == 2:
                ops.append((commit, gap))
                gap = False
        gap = gap or commits[-1].kind != 5
    reader.chains(ops, recover)
    live = False
    for commit, gap in ops:
        if gap:
            if recover == "tail":
                break
            live = False
        if commit.flags & 1:
            reader.resumed = reader.resumed or gap or not live
            live = True
        if live:
            reader.play(commit.body)
    return reader.tables()


class Reader:
    def __init__(self, header: Row) -> None:
        self.granules = max(1, header["block_size"] // header["granule"])
        self.requests: list[Request] = []
        self.steps: list[Row] = []
        self.lookups: list[Row] = []
        self.preemptions: list[Row] = []
        self.events: list[Row] = []
        self.offloads: list[Row] = []
        self.moves: dict[int, Row] = {}
        self.set: dict[int, tuple[int, int]] = {}  # request -> tokens in the last step, computed before it
        self.step_requests: list[Row] = []
        self.holds: dict[int, int] = {}  # block -> identity
        self.names: dict[int, int] = {}  # hash -> dense identity
        self.time = self.step = self.call = self.running = self.waiting = 0
        self.inside = False
        self.context: int | None = None
        self.owners: list[int] = []
        self.due = 0  # outputs of steps before the gap that are still to come
        self.without_output: list[Row] = []
        self.preempted = self.empty = self.begun = 0
        self.resumed = True
        self.types: dict[int, str] = {}
        self.about: dict[int, tuple[int, int, int]] = {}

    # ---- chains are read first: a later part of the log tells what is in a block

    def chains(self, ops: list[tuple[Commit, bool]], recover: str) -> None:
        names = self.names
        requests: list[Request] = []
        live, resumed = False, True
        for commit, gap in ops:
            if gap and recover == "tail":
                break
            live = (live and not gap) or bool(commit.flags & 1)
            resumed = resumed or gap
            if not live:
                continue
            for op, operand, w in operations(commit.body):
                if op == 1:
                    w.many(3)
                    count = w.one()
                    requests += [Request() for _ in range(count - len(requests))]
                    w.many(5)
                    m = w.one()
                    w.many(3 * operand)
                    for _ in range(m):
                        r, _, _, length = w.many(4)
                        request = requests[r]
                        if resumed and (request.row is None or len(request.chain) != length):
                            request.chain_broken = True
                    resumed = False
                elif op in (3, 8):
                    n = w.one() if op == 3 else 1
                    grown = [w.long() for _ in range(n)]
                    request = requests[operand]
                    if request.row is not None and not request.chain_broken:
                        request.chain += [names.setdefault(value, len(names)) for value in grown]
                elif op == 15 and operand & 255 == 2:
                    requests.append(Request(row={}))
                elif op == 15 and operand & 255 == 10:
                    w.many(2)
                    for _ in range(((operand >> 8) - 2) // 3):
                        w.one()
                        value = w.long()
                        names.setdefault(value, len(names))
                elif op == 15 and operand & 255 == 12:
                    for _ in range((operand >> 8) // 2):
                        value = w.long()
                        requests.append(Request(row={}, chain=[names.setdefault(value, len(names))]))
        self.known_chains = [request.chain for request in requests]

    # ---- playing the operations

    def request(self, number: int) -> Request:
        return self.requests[number]

    def arrive(self, row: Row) -> None:
        number = len(self.requests)
        blank = {"request_id": "", "arrival_ns": -1, "arrival_s": None, "max_tokens": -1, "priority": -1, "tenant": 0,
                 "no_cache_read": False, "output_tokens": None, "finish_step": None, "finish_empty_calls": None,
                 "finish_ns": None, "finish_reason": None, "first_step": None, "last_step": None}  # fmt: skip
        full = {"request": number, **blank, "arrival_step": self.step, **row}
        self.requests.append(Request(row=full, chain=self.known_chains[number]))

    def now(self) -> int:
        return max(0, self.step if self.inside else self.step - 1)

    def event(
        self, kind: str, request: int | None, block: int | None, identity: int | None, group: int | None = 0
    ) -> None:
        self.events.append(
            {"step": self.now(), "time_ns": self.time, "request": request, "kind": kind, "block": block,
             "identity": identity, "group": group}
        )  # fmt: skip

    def play(self, body: bytes) -> None:
        for op, operand, w in operations(body):
            getattr(self, f"op{op}")(operand, w)

    def op1(self, n: int, w: Words) -> None:  # KEY
        time, step, requests, _ = w.long(), w.one(), w.one(), w.long()
        running, waiting, due, m = w.many(4)
        scheduled = [w.many(3) for _ in range(n)]
        w.many(4 * m)
        while len(self.requests) < requests:
            number = len(self.requests)
            self.requests.append(Request(chain=self.known_chains[number]))
        if not self.resumed:
            return
        self.resumed = False
        self.time, self.step, self.running, self.waiting, self.due = time, step, running, waiting, due
        self.set = {r: (tokens, computed) for r, tokens, computed in scheduled if r != UNKNOWN}
        self.without_output = []
        self.holds = {}
        for request in self.requests:
            request.table, request.lookup = None, None
        self.inside, self.context, self.owners = False, None, []
        self.preempted = self.empty = 0

    def op2(self, delta: int, w: Words) -> None:  # OUTPUT
        self.time += delta
        if self.due:
            self.due -= 1
        elif self.without_output:
            self.without_output.pop(0)["end_ns"] = self.time

    def op3(self, request: int, w: Words) -> None:  # CHAIN: read before
        w.many(2 * w.one())

    def op4(self, number: int, w: Words) -> None:  # LOOKUP
        self.context = number
        request = self.request(number)
        request.table, request.filled = [], 0
        request.lookup = (self.call, w.one(), w.one())

    def op5(self, n: int, w: Words) -> None:  # HIT
        request = self.request(self.context)  # type: ignore[arg-type]
        for i, block in enumerate(w.many(n)):
            identity = self.identity(request, i)
            if identity is not None:
                self.holds[block] = identity
            request.table.append(block)  # type: ignore[union-attr]
            self.event("hit", self.context, block, identity)
        request.filled = n

    def op6(self, block: int, w: Words) -> None:  # ALLOC
        self.allocate([block])

    def op7(self, n: int, w: Words) -> None:  # ALLOCN
        self.allocate(w.many(n))

    def allocate(self, blocks: list[int]) -> None:
        owner = self.context
        if owner is None and self.inside and self.owners:
            owner = self.owners.pop(0)
            owner = None if owner >= len(self.requests) else owner
        for block in blocks:
            if block in self.holds:
                self.event("evict", owner, block, self.holds.pop(block))
            self.event("allocate", owner, block, None)
            if owner is not None and self.request(owner).table is not None:
                self.request(owner).table.append(block)  # type: ignore[union-attr]

    def op8(self, number: int, w: Words) -> None:  # FILL1
        w.long()
        self.fill(number, 1)

    def op9(self, number: int, w: Words) -> None:  # FILL
        self.fill(number, w.one())

    def fill(self, number: int, n: int) -> None:
        request = self.request(number)
        for _ in range(n):
            if request.table is None or request.filled >= len(request.table):
                return  # lost
            block, identity = request.table[request.filled], self.identity(request, request.filled)
            request.filled += 1
            if identity is not None:
                self.holds[block] = identity
            self.event("fill", number, block, identity)

    def identity(self, request: Request, block: int) -> int | None:
        at = (block + 1) * self.granules - 1
        return request.chain[at] if at < len(request.chain) else None

    def op10(self, number: int, w: Words) -> None:  # FREE
        w.one()
        self.free(number)

    def free(self, number: int) -> None:
        request = self.request(number)
        for block in reversed(request.table or []):
            self.event("free", number, block, self.holds.get(block))
        if request.table is not None:
            request.table = []
        request.filled = 0

    def op11(self, number: int, w: Words) -> None:  # PREEMPT
        self.preempt(number, w.one(), w.one())
        self.free(number)

    def preempt(self, number: int, tokens: int, blocks: int) -> None:
        self.preemptions.append(
            {"step": self.now(), "time_ns": self.time, "request": number, "blocks_lost": blocks, "tokens_lost": tokens}
        )
        self.request(number).preemptions += 1
        self.preempted += 1
        self.set.pop(number, None)

    def op12(self, number: int, w: Words) -> None:  # FINISH
        reason, output = w.many(2)
        self.set.pop(number, None)
        row = self.request(number).row
        if row is not None:
            row["finish_reason"] = FINISH_REASONS[min(reason, 6)]
            row["output_tokens"] = output
            row["finish_step"], row["finish_ns"] = self.now(), self.time
            row["finish_empty_calls"] = 0 if self.inside else self.empty

    def op13(self, delta: int, w: Words) -> None:  # BEGIN
        self.time += delta
        self.begun, self.inside, self.context = self.time, True, None
        self.owners = owners_ahead(w)

    def op14(self, operand: int, w: Words) -> None:  # SCHED
        flags, n, k = operand & 15, operand >> 4 & 0xFFF, operand >> 16
        if flags & 8:
            n, k = w.one(), w.one()
        free = w.one()
        if flags & 1:
            self.running, self.waiting = w.one(), w.one()
        entries = {r: (tokens, computed) for r, tokens, computed in (w.many(3) for _ in range(n))}
        if k:
            w.many(k if flags & 2 else 1 + (k + 1) // 2)
        before = set(self.set)
        expected = {} if flags & 4 else {r: (1, computed + tokens) for r, (tokens, computed) in self.set.items()}
        self.set = expected | entries
        for r in entries:
            request = self.request(r)
            if r not in before and request.lookup is not None and request.lookup[0] == self.call:
                self.looked_up(r, request)
        self.call += 1
        if self.set:
            tokens = sum(tokens for tokens, _ in self.set.values())
            row = {"step": self.step, "start_ns": self.begun, "end_ns": None, "requests": len(self.set),
                   "tokens": tokens, "running": self.running, "waiting": self.waiting, "free_blocks": free,
                   "preempted": self.preempted, "empty_calls": self.empty}  # fmt: skip
            self.steps.append(row)
            self.without_output.append(row)
            for r, (tokens, computed) in sorted(self.set.items()):
                self.step_requests.append(
                    {"step": self.step, "request": r, "tokens": tokens, "computed_before": computed}
                )
                mine = self.request(r).row
                if mine is not None:
                    mine["first_step"] = self.step if mine["first_step"] is None else mine["first_step"]
                    mine["last_step"] = self.step
            self.step += 1
            self.preempted = self.empty = 0
        else:
            self.empty += 1
        self.inside, self.context = False, None

    def looked_up(self, number: int, request: Request, loaded: int = 0) -> None:
        _, asked, word = request.lookup  # type: ignore[misc]
        hit = max(0, word - 1)
        request.cached = hit + loaded if request.cached is None else request.cached
        if word:
            self.lookups.append({"step": self.step, "request": number, "tokens_asked": asked, "tokens_hit": hit,
                                 "after_preemption": request.preemptions > 0})  # fmt: skip

    def op15(self, operand: int, w: Words) -> None:  # EXT
        code, words = operand & 255, Words(struct.pack(f"<{operand >> 8}I", *w.many(operand >> 8)))
        rare = getattr(self, f"ext{code}", None)
        if rare is not None:
            rare(words)

    def ext1(self, w: Words) -> None:  # TIME
        self.time = w.long()

    def ext2(self, w: Words) -> None:  # REQ
        arrival_ns, arrival_bits = w.long(), w.long()
        prompt, most, priority, flags = w.many(4)
        tenant, output, size = w.long(), w.one(), w.one()
        name = struct.pack(f"<{len(w.words) - w.at}I", *w.words[w.at :])[:size]
        self.arrive({
            "arrival_ns": arrival_ns, "arrival_s": struct.unpack("<d", struct.pack("<Q", arrival_bits))[0],
            "prompt_tokens": prompt, "max_tokens": most, "priority": priority - (priority >> 31 << 32),
            "tenant": tenant, "no_cache_read": bool(flags & 1), "output_tokens": output if flags & 2 else None,
            "request_id": name.decode("utf-8", "replace"),
        })  # fmt: skip

    def ext4(self, w: Words) -> None:  # RESET
        self.event("reset", None, None, None)
        self.holds = {}

    def ext5(self, w: Words) -> None:  # EVICT
        for block in w.words:
            self.event("evict", None, block, self.holds.pop(block, None))

    def ext6(self, w: Words) -> None:  # SKIP
        for _ in range(w.one()):
            if self.due:
                self.due -= 1
            elif self.without_output:
                self.without_output.pop(0)

    def whose(self, w: Words) -> tuple[int | None, int | None]:
        request, group = w.many(2)
        return request if request < len(self.requests) else None, group if group < 32768 else None

    def ext8(self, w: Words) -> None:  # ALLOCX
        request, group = self.whose(w)
        for block in w.words[w.at :]:
            if block in self.holds:
                self.event("evict", request, block, self.holds.pop(block), group)
            self.event("allocate", request, block, None, group)

    def ext9(self, w: Words) -> None:  # HITX
        request, group = self.whose(w)
        for block in w.words[w.at :]:
            self.event("hit", request, block, self.holds.get(block), group)

    def ext10(self, w: Words) -> None:  # FILLX
        request, group = self.whose(w)
        while w:
            block, value = w.one(), w.long()
            self.holds[block] = self.names[value]
            self.event("fill", request, block, self.names[value], group)

    def ext11(self, w: Words) -> None:  # FREEX
        request, group = self.whose(w)
        for block in w.words[w.at :]:
            self.event("free", request, block, self.holds.get(block), group)

    def ext12(self, w: Words) -> None:  # IDS
        for _ in range(len(w.words) // 2):
            self.arrive({"prompt_tokens": 1, "output_tokens": 0, "arrival_step": 0})

    def ext13(self, w: Words, kind: str = "store") -> None:  # STORE
        request, tier = self.whose(w)
        size, done = w.long(), w.long()
        row = self.begin_move(kind, request, tier, len(w.words) - w.at, size)
        row["done_ns"] = done or None
        for block in w.words[w.at :]:
            self.event(kind, request, block, self.holds.get(block))

    def ext14(self, w: Words) -> None:  # LOAD
        self.ext13(w, "load")

    def begin_move(self, kind: str, request: int | None, tier: int, blocks: int, size: int) -> Row:
        now = self.step if self.inside else max(self.step - 1, 0)
        self.offloads.append({
            "step": now, "time_ns": self.time, "request": request, "kind": kind, "tier": tier, "blocks": blocks,
            "bytes": size, "tokens": None, "done_step": None, "done_ns": None, "copy_ns": None,
        })  # fmt: skip
        return self.offloads[-1]

    def ext19(self, w: Words) -> None:  # MOVE
        number, r, what, tokens, first = w.many(5)
        size = w.long()
        request = r if r < len(self.requests) else None
        kind = "load" if what & 255 == 1 else "store"
        blocks = w.words[w.at :]
        for i, block in enumerate(blocks):
            identity = self.holds.get(block)
            if first != UNKNOWN and request is not None:
                at = (first + i + 1) * self.granules - 1
                chain = self.requests[request].chain
                identity = chain[at] if at < len(chain) else None
            self.event(kind, request, block, identity)
        self.moves[number] = row = self.begin_move(kind, request, what >> 8, len(blocks), size)
        if kind == "load":
            row["tokens"] = tokens
            if request is not None and (looked := self.requests[request].lookup) and looked[0] == self.call:
                self.looked_up(request, self.requests[request], tokens)
                self.requests[request].lookup = None

    def ext20(self, w: Words) -> None:  # MOVED
        row = self.moves.get(w.one())
        if row is not None:
            done, size, took = w.long(), w.long(), w.long()
            row["done_step"], row["done_ns"] = self.step if self.inside else max(self.step - 1, 0), done
            row["bytes"] = row["bytes"] if size == 2**64 - 1 else size
            row["copy_ns"] = None if took == 2**64 - 1 else took

    def ext15(self, w: Words) -> None:  # LOST
        number, tokens, blocks = w.many(3)
        self.preempt(number, tokens, blocks)

    def ext16(self, w: Words) -> None:  # TYPE
        number, size = w.many(2)
        self.types[number] = struct.pack(f"<{len(w.words) - w.at}I", *w.words[w.at :])[:size].decode()

    def ext17(self, w: Words) -> None:  # ABOUT
        number = w.one()
        kind, turn, parent = (-1 if word == UNKNOWN else word for word in w.many(3))
        self.about[number] = kind, turn, parent

    def ext18(self, w: Words) -> None:  # WHEN
        number = w.one()
        while w:
            n, time = w.one(), w.long()
            for row in (self.request(r).row for r in range(number, number + n)):
                if row is not None:
                    row["arrival_ns"], row["arrival_s"] = time, time / 1e9
            number += n

    def known_of(self, number: int) -> Row:
        """type, turn and parent of a request, in traces that tell of any."""
        if not any(value >= 0 for told in self.about.values() for value in told):
            return {}
        kind, turn, parent = self.about.get(number, (-1, -1, -1))
        return {
            "type": self.types.get(kind), "turn": None if turn < 0 else turn, "parent": None if parent < 0 else parent
        }  # fmt: skip

    def tables(self) -> dict[str, list[Row]]:
        rows = [
            {**request.row, "cached_tokens": request.cached, "preemptions": request.preemptions,
             "chain_granules": len(request.chain), **self.known_of(number)}
            for number, request in enumerate(self.requests)
            if request.row is not None
        ]  # fmt: skip
        return {
            "requests": rows, "steps": self.steps, "step_requests": self.step_requests, "lookups": self.lookups,
            "preemptions": self.preemptions, "block_events": self.events, "offloads": self.offloads,
        }  # fmt: skip
