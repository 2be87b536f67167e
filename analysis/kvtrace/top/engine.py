"""What one engine is doing, kept up commit by commit from its log. The rules are those of docs/format.md.

It is the third reader of a log, and the only one that goes on where it stopped: it keeps what is under way and adds up
the rest, so that its memory does not grow with the log. Where a part of the log is missing, it believes nothing of the
blocks until it sees them again.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from typing import Any

from kvtrace.top.blocks import Blocks
from kvtrace.top.kept import Request, Totals
from kvtrace.top.operations import owners_from, sched_parts
from kvtrace.top.prefixes import Prefixes, places
from kvtrace.top.running_curve import RunningCurve
from kvtrace_traces import wire
from kvtrace_traces.follow import Followed
from kvtrace_traces.schema import EXT_OPS, MOVE_LOAD, NO_REQUEST, OPS, REQUEST_NO_READ, SCHED_COUNTS, SCHED_FULL
from kvtrace_traces.walk import size_at, words_of

MOST_SAMPLES = 1 << 16
_KEY, _OUTPUT, _CHAIN, _LOOKUP, _HIT = (OPS[n].code for n in ("KEY", "OUTPUT", "CHAIN", "LOOKUP", "HIT"))
_ALLOC, _ALLOCN, _FILL1, _FILL = (OPS[n].code for n in ("ALLOC", "ALLOCN", "FILL1", "FILL"))
_FREE, _PREEMPT, _FINISH, _BEGIN, _SCHED = (OPS[n].code for n in ("FREE", "PREEMPT", "FINISH", "BEGIN", "SCHED"))
_TIME, _REQ, _RESET, _EVICT = (EXT_OPS[n].code for n in ("TIME", "REQ", "RESET", "EVICT"))
_ALLOCX, _HITX, _FILLX, _FREEX = (EXT_OPS[n].code for n in ("ALLOCX", "HITX", "FILLX", "FREEX"))
_IDS, _LOST, _MOVE = (EXT_OPS[n].code for n in ("IDS", "LOST", "MOVE"))


class Engine:
    """The state of one engine.

    `totals`: sums from the start of the log; `samples`: what they were after each of the last steps; `blocks`,
    `prefixes`, `curve`; `arrived`, `finished` count; `running`, `waiting`, `free_blocks`, `idle_blocks` are as
    the last scheduler call left them. `joined`: the step that the log was read from, where that was not its
    beginning. `losses`: what is known to be missing, in words.
    """

    def __init__(self, header: dict[str, Any], window_s: float = 10.0) -> None:
        self.header = header
        self.block_size = int(header["block_size"])
        self.capacity = max(0, int(header["num_blocks"]) - 1)
        self._stride = max(1, self.block_size // int(header["granule"]))
        self._window_ns = int(window_s * 1e9)
        self.totals = Totals()
        self.samples: deque[Totals] = deque(maxlen=MOST_SAMPLES)
        self.blocks = Blocks()
        self.prefixes = Prefixes()
        sizes = [max(1, self.capacity // 2), max(1, self.capacity), max(1, 2 * self.capacity)]
        self.curve = RunningCurve(sizes if self.capacity else [], self.block_size)
        self.arrived = self.finished = 0
        self.running = self.waiting = self.free_blocks = self.idle_blocks = 0
        self._held = 0  # blocks, by our own count, at that call
        self._came = self._went = 0  # to the queue and to those who run, since that call
        self.first_ns: int | None = None
        self.joined: int | None = None
        self.losses: list[str] = []
        self.ended = False
        self._requests: dict[int, Request] = {}
        self._members: set[int] = set()
        self._prefilling: dict[int, tuple[int, int]] = {}  # tokens, computed before: in the last step
        self._next_request = 0
        self._context: int | None = None
        self._inside = False
        self._call = 0
        self._order = 0
        self._ended_now: list[tuple[int, int, int]] = []  # time, number, output tokens
        self._orders: dict[int, int] = {}
        self._new: list[int] = []
        self._rate = 1.0
        self._live, self._resumed = False, True

    # ---------------------------------------------------------------- commits

    def take(self, commit: Followed) -> None:
        """Go on by one commit. What does not make sense is passed over, up to the next frame."""
        if commit.gap:
            self._live, self._resumed = False, True
            self.losses.append("a part of the log is missing")
        if commit.kind == wire.OPS:
            self._live = self._live or bool(commit.flags & wire.KEY)
            if self._live:
                try:
                    self._play(commit.body)
                except (ValueError, IndexError, KeyError, TypeError, OverflowError):
                    self._live, self._resumed = False, True
                    self.losses.append("a record that makes no sense")
        elif commit.kind == wire.LOSS:
            self.losses.append(_reason(commit.body))
        self.ended = self.ended or commit.kind == wire.END

    def _play(self, body: bytes) -> None:
        words = words_of(body)
        at, end = 0, len(words)
        blocks = self.blocks
        requests = self._requests
        owners: list[int] | None = None
        while at < end:
            word = words[at]
            op, operand = word & 15, word >> 4
            n = size_at(words, at)
            if n < 1 or at + n > end:
                raise ValueError(f"no operation at word {at}")
            if op in (_ALLOC, _ALLOCN):
                owner = self._context
                if owner is None and self._inside:
                    if owners is None:
                        owners = owners_from(words, at)
                    owner = owners.pop() if owners else None
                given = [operand] if op == _ALLOC else words[at + 1 : at + n].tolist()
                blocks.allocate(given)
                request = requests.get(owner) if owner is not None else None
                if request is not None:
                    request.blocks += given
            elif op in (_FILL, _FILL1):
                request = requests.get(operand)
                many = 1 if op == _FILL1 else words[at + 1]
                if request is not None:
                    if op == _FILL1:
                        self._grow(request, body[4 * at + 4 : 4 * at + 12])
                    filled = request.blocks[request.filled : request.filled + many]
                    request.filled += len(filled)
                    blocks.fill(filled)
            elif op == _BEGIN:
                self._settle()  # before this call admits others
                self.totals.time_ns += operand
                self._inside, self._context, owners = True, None, None
            elif op == _OUTPUT:
                self.totals.time_ns += operand
            elif op == _SCHED:
                self._scheduled(words, at)
                owners = None
            elif op == _LOOKUP:
                self._context = operand
                request = requests.get(operand)
                if request is not None:
                    request.blocks, request.filled, request.call = [], 0, self._call
                    request.asked, request.found = words[at + 1], words[at + 2]
            elif op == _HIT:
                given = words[at + 1 : at + n].tolist()
                blocks.hit(given)
                request = requests.get(self._context) if self._context is not None else None
                if request is not None:
                    request.blocks += given
                    request.filled = operand
            elif op in (_FREE, _PREEMPT):
                if op == _PREEMPT:
                    self._preempted(operand)
                self._free(operand)
            elif op == _FINISH:
                self._finish(operand, words[at + 2])
            elif op == _CHAIN:
                request = requests.get(operand)
                if request is not None:
                    self._grow(request, body[4 * at + 8 : 4 * (at + n)])
            elif op == _KEY:
                self._key(words, at)
            elif op == 15:
                self._extended(operand & 255, words, at + 1, at + n)
            at += n
        self.totals.evictions = blocks.evictions
        self._settle()

    def queues(self) -> tuple[int, int]:
        """Requests that run, and that wait, by what was logged after the last scheduler call too."""
        return max(0, self.running + self._went), max(0, self.waiting + self._came)

    def occupancy(self) -> tuple[int, int, int]:
        """Blocks now: held by requests; cached and idle; free. They add up to the capacity."""
        used = self.capacity - self.free_blocks + self.blocks.held - self._held
        used = min(max(0, used), self.capacity)
        idle = min(self.blocks.idle, self.capacity - used)
        return used, idle, self.capacity - used - idle

    def recent(self) -> Totals:
        """What happened in the last seconds before the last step: sums, and in `time_ns` the time they are over."""
        made = Totals()
        if self.samples:
            first, last = self.samples[0], self.samples[-1]
            for name in Totals.__slots__:
                setattr(made, name, getattr(last, name) - getattr(first, name))
        return made

    # ---------------------------------------------------------------- requests

    def _grow(self, request: Request, identities: bytes) -> None:
        grown = array("Q", identities)
        first = -(request.granules + 1) % self._stride  # the granule that ends the block under way
        request.granules += len(grown)
        request.chain.extend(grown[first :: self._stride])

    def _finish(self, number: int, output: int) -> None:
        self.finished += 1
        request = self._requests.get(number)
        if request is not None and request.queued:
            self._came -= 1
        else:
            self._went -= 1
        self._members.discard(number)
        self._prefilling.pop(number, None)
        if request is not None:
            self._ended_now.append((self.totals.time_ns, number, output))

    def _preempted(self, number: int) -> None:
        self.totals.preemptions += 1
        self._went -= 1
        self._came += 1
        self._members.discard(number)
        self._prefilling.pop(number, None)
        if number in self._requests:
            self._requests[number].preempted = self._requests[number].queued = True

    def _free(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None:
            self.blocks.free(reversed(request.blocks))
            request.blocks, request.filled = [], 0
            if request.ended:
                del self._requests[number]

    def _settle(self) -> None:
        """At the end of a commit, and before a call: tell the curve of requests that have ended, and forget them, and
        chains that nobody asks for again."""
        if self._ended_now:
            self._ended_now.sort(key=lambda ended: (ended[0], self._orders.get(ended[1], 0)))
            for _, number, output in self._ended_now:
                self._tell_end(number, output)
            self._ended_now.clear()
        if self.curve.rate < 1:
            new = self._new if self.curve.rate == self._rate else list(self._requests)
            for number in new:
                request = self._requests.get(number)
                if request is not None and not request.admitted:
                    self._shorten(request)
            self._rate = self.curve.rate
        self._new.clear()

    def _tell_end(self, number: int, output: int) -> None:
        request = self._requests.get(number)
        if request is None:
            return
        if request.admitted:
            computed = request.prompt + output - (output > 0)  # the last token is sampled, and never computed
            self.curve.finish(number, request.chain[: computed // self.block_size])
        self._orders.pop(number, None)
        request.ended = True
        if not request.blocks:
            del self._requests[number]

    def _shorten(self, request: Request) -> None:
        """Forget the chain of a waiting request, but for what tells whether it is followed, unless it is."""
        chain = request.chain
        if request.marks is not None or self.curve.follows(chain[: request.prompt // self.block_size]):
            return
        self._mark(request)
        request.chain = chain[: min(self.curve.in_trunk(chain) + 1, request.prompt_blocks)]

    def _mark(self, request: Request) -> None:
        request.prompt_blocks = min(request.prompt // self.block_size, len(request.chain))
        request.marks = array("Q", [request.chain[place - 1] for place in places(request.prompt_blocks)])

    # ---------------------------------------------------------------- scheduler calls

    def _scheduled(self, words: array[int], at: int) -> None:
        flags, entries, free, first = sched_parts(words, at)
        if flags & SCHED_COUNTS:
            self.running, self.waiting = words[free + 1], words[free + 2]
        listed = [tuple(words[first + 3 * i : first + 3 * i + 3]) for i in range(entries)]
        before = self._members
        if not listed and not flags & SCHED_FULL and not self._prefilling:  # a token for each, as most steps are
            self._end_call(words[free], 0, len(before))
            return
        after = {r for r, _, _ in listed} if flags & SCHED_FULL else before | {r for r, _, _ in listed}
        admitted = [r for r, _, _ in listed if r not in before]
        given = {r: (tokens, computed) for r, tokens, computed in listed}
        prefilling = {r: (1, computed + tokens) for r, (tokens, computed) in self._prefilling.items() if r in after}
        prefilling |= given
        prefill, still = 0, {}
        for r, (tokens, computed) in prefilling.items():
            request = self._requests.get(r)
            prompt = request.prompt if request is not None else computed + tokens * (tokens > 1)
            if computed < prompt:
                prefill += min(tokens, prompt - computed)
                still[r] = tokens, computed
        self._prefilling, self._members = still, after
        for r in admitted:
            self._looked_up(r)
        self._admit(admitted)
        self._end_call(words[free], prefill, len(after) + sum(tokens - 1 for tokens, _ in given.values()))

    def _end_call(self, free_blocks: int, prefill: int, tokens: int) -> None:
        self._came = self._went = 0
        self._call += 1
        self._inside, self._context = False, None
        if not self._members:
            return
        self.totals.prefill += prefill
        self.totals.decode += max(0, tokens - prefill)
        self.free_blocks, self.idle_blocks = free_blocks, min(self.blocks.idle, free_blocks)
        self._held = self.blocks.held
        self.totals.steps += 1
        self._sample()

    def _looked_up(self, number: int) -> None:
        request = self._requests.get(number)
        if request is not None:
            request.queued = False
            self._count(request)

    def _count(self, request: Request) -> None:
        """Count the lookup with which a request is admitted, unless it had been preempted before."""
        if request.call == self._call and request.found and not request.preempted:
            self.totals.asked += request.asked
            self.totals.hit += request.found - 1

    def _admit(self, numbers: list[int]) -> None:
        """Tell curve and prefixes of requests admitted for the first time: in order of their lookups, others last."""
        known = ((r, self._requests[r]) for r in numbers if r in self._requests)
        looked: list[tuple[int, Request]] = []
        others: list[tuple[int, Request]] = []
        for r, request in known:
            if not request.admitted:
                (looked if request.call == self._call and request.found else others).append((r, request))
        for r, request in looked + sorted(others, key=lambda other: other[0]):
            request.admitted = True
            if request.marks is None:
                self._mark(request)
            assert request.marks is not None
            hit_blocks = max(0, request.found - 1) // self.block_size if request.call == self._call else 0
            self.prefixes.add(request.marks, request.prompt_blocks, hit_blocks)
            cap = 0 if request.no_read else max(0, request.prompt - 1) // self.block_size
            self._orders[r] = self._order
            self._order += 1
            if not self.curve.admit(r, request.chain, request.prompt_blocks, cap, request.prompt):
                request.chain = array("Q")
            request.marks = array("Q")

    def _sample(self) -> None:
        now = self.totals.time_ns
        if not self.samples:
            self.samples.append(Totals.at(now))
            self.first_ns = now
        self.totals.evictions = self.blocks.evictions
        self.samples.append(self.totals.copy())
        while len(self.samples) > 2 and self.samples[1].time_ns <= now - self._window_ns:
            self.samples.popleft()

    # ---------------------------------------------------------------- frames and rarer operations

    def _key(self, words: array[int], at: int) -> None:
        """KEY: after a gap the state starts from what the frame says."""
        requests = words[at + 4]
        if not self._resumed:
            return
        self._resumed = False
        if not self._next_request and not self.losses and words[at + 3]:
            self.joined = words[at + 3]
        self._next_request = requests
        self.totals.time_ns = words[at + 1] | words[at + 2] << 32
        self.running, self.waiting = words[at + 7], words[at + 8]
        self._call += 1
        self._inside, self._context = False, None
        scheduled = [tuple(words[at + 11 + 3 * i : at + 14 + 3 * i]) for i in range(words[at] >> 4)]
        self._members = {r for r, _, _ in scheduled if r != NO_REQUEST}
        self._prefilling = {r: (tokens, computed) for r, tokens, computed in scheduled if r != NO_REQUEST}
        self._ended_now.clear()
        self.blocks.forget()
        self._held = 0
        self._came = self._went = 0
        self.curve.give_up()
        # Those who ran may have ended in the gap; those who waited may still come.
        for r in [r for r, known in self._requests.items() if known.admitted and r not in self._members]:
            del self._requests[r]
        self._orders.clear()
        for request in self._requests.values():
            request.blocks, request.filled = [], 0

    def _extended(self, code: int, words: array[int], at: int, end: int) -> None:
        blocks = self.blocks
        if code == _REQ:
            self._requests[self._next_request] = Request(words[at + 4], bool(words[at + 7] & REQUEST_NO_READ))
            self._new.append(self._next_request)
            self._next_request += 1
            self._came += 1
            self.arrived += 1
        elif code == _IDS:
            self._next_request += (end - at) // 2
            self.arrived += (end - at) // 2
        elif code == _TIME:
            self.totals.time_ns = words[at] | words[at + 1] << 32
        elif code == _RESET:
            blocks.reset()
        elif code == _EVICT:
            blocks.evict(words[at:end])
        elif code == _ALLOCX:
            blocks.allocate(words[at + 2 : end])
        elif code == _HITX:
            blocks.hold(words[at + 2 : end])
        elif code == _FREEX:
            blocks.free(words[at + 2 : end])
        elif code == _FILLX:
            blocks.fill(words[at + 2 : end : 3])
        elif code == _MOVE and words[at + 2] & 255 == MOVE_LOAD:
            # A load from a slower tier admits its request, though nothing of it is scheduled yet.
            request = self._requests.get(words[at + 1])
            if request is not None:
                self._count(request)
                request.call = -1
        elif code == _LOST:
            self._preempted(words[at])


def _reason(body: bytes) -> str:
    try:
        loss = json.loads(body)
        return f"{loss['reason']}: {loss['detail']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a record of a loss that does not read"
