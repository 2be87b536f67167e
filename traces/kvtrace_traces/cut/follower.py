"""A log followed up to a place: the arrays of ``follow``, which grow as needed, and the state as operations."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces import survey
from kvtrace_traces.cut import blocks
from kvtrace_traces.cut import follow as f
from kvtrace_traces.cut.identities import chains_of
from kvtrace_traces.cut.identities import rekey as rekey_all
from kvtrace_traces.cut.operations import extended, kept_words, live_words, queue_words, words_of
from kvtrace_traces.played import (
    C_BEGUN,
    C_DUE,
    C_EMPTY,
    C_PREEMPTED,
    C_REQUESTS,
    C_RUNNING,
    C_STEP,
    C_TIME,
    C_WAITING,
    NODE_BLOCK,
    NODE_PREVIOUS,
)  # fmt: skip
from kvtrace_traces.schema import OPS
from kvtrace_traces.snapshot import Live

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
NOBODY: I64 = np.empty(0, np.int64)
NO_CALLS = np.empty(0, np.uint8)
PROMPT_WORD = 5  # of REQ: the length of the prompt


class Log(NamedTuple):
    """The operations of one engine: words, where each commit starts and stops in them, and whether it starts a frame.

    ``owners``: most owners that one commit names.
    """

    words: U32
    starts: I64
    stops: I64
    keys: NDArray[np.bool_]
    owners: int
    num_blocks: int
    per_block: int


class Follower:
    """Follows a log from its begin. ``front``: whether freed blocks without identity go to the front of the queue."""

    def __init__(self, log: Log, front: bool, chosen: I64 = NOBODY) -> None:
        self._log, self._front, self._chosen = log, front, chosen
        self.state = np.zeros(blocks.FOLLOW_SCALARS, np.int64)
        self.state[blocks.F_NODES] = 1
        self.state[blocks.F_FRONT] = -1
        self.state[blocks.F_FREED_BY] = -1
        first = log.words[log.starts[0] :] if len(log.starts) else log.words[:0]
        claimed = int(first[4]) if len(first) > 4 and first[0] & 15 == survey.KEY else 0
        self.first_step = int(first[3]) if claimed or len(first) > 4 else 0
        size = claimed + self._longest() + 1024
        self._small = np.zeros((f.WINDOW32, size), np.int32)
        self._large = np.zeros((f.WINDOW64, size), np.int64)
        self._large[f.W_REQ] = -1
        self._members, self._special = np.empty(size, np.int64), np.empty(size, np.int64)
        self._nodes = np.zeros((3, self._longest() + 1024), np.int32)
        self._pool = np.zeros((blocks.BLOCK_ROWS, log.num_blocks), np.int64)
        self._pool[blocks.H_REQUEST] = blocks.NOTHING
        blocks.start_queue(self._pool)
        self._owners = np.empty(log.owners + 1, np.uint32)

    def _longest(self) -> int:
        return int((self._log.stops - self._log.starts).max()) if len(self._log.starts) else 0

    @property
    def step(self) -> int:
        """Number of the next step."""
        return int(self.state[C_STEP])

    @property
    def begun(self) -> int:
        """When the last scheduler call began, in ns."""
        return int(self.state[C_BEGUN])

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands: the commit, and the word in it (0: its first)."""
        return int(self.state[blocks.F_COMMIT]), int(self.state[blocks.F_AT])

    def run(
        self,
        step: int | None = None,
        time_ns: int | None = None,
        commits: int | None = None,
        made: NDArray[np.uint8] = NO_CALLS,
    ) -> int:
        """Go on as :func:`follow.follow` says, whose ending this returns; at most to the end of the log."""
        log = self._log
        self.state[blocks.F_SCHEDS] = 0
        while True:
            ending = f.follow(
                log.words, log.starts, log.stops, self.state, self._small, self._large, self._pool, self._nodes,
                self._members, self._special, self._owners, log.per_block, self._front,
                f.NO_LIMIT if step is None else step, f.NO_LIMIT if time_ns is None else time_ns,
                len(log.starts) if commits is None else commits, self._chosen, made,
            )  # fmt: skip
            if ending != f.MORE_ROOM:
                return int(ending)
            self._make_room()

    def _make_room(self) -> None:
        """Let go of requests that have ended, oldest first; double what is still too small."""
        state, commit = self.state, int(self.state[blocks.F_COMMIT])
        size = int(self._log.stops[commit] - self._log.starts[commit])
        used = int(state[C_REQUESTS] - state[blocks.F_BASE])
        gone = self._small[f.W_STATUS, :used] == f.GONE
        gone &= (self._small[f.W_PLACE, :used] == 0) & (self._small[f.W_TAIL, :used] == 0)
        ended = int(np.argmin(gone)) if not gone.all() else used
        state[blocks.F_BASE] += ended
        kept, room = used - ended, self._small.shape[1]
        wanted = max(room, 2 * (kept + size))
        small, large = np.zeros((f.WINDOW32, wanted), np.int32), np.zeros((f.WINDOW64, wanted), np.int64)
        small[:, :kept], large[:, :kept] = self._small[:, ended:used], self._large[:, ended:used]
        large[f.W_REQ, kept:] = -1
        self._small, self._large = small, large
        if wanted > room:
            self._members, self._special = (
                np.concatenate([array, np.empty(wanted - room, np.int64)]) for array in (self._members, self._special)
            )
        if state[blocks.F_NODES] + size > self._nodes.shape[1]:
            more = np.zeros((3, self._nodes.shape[1] + size), np.int32)
            self._nodes = np.concatenate([self._nodes, more], axis=1)

    # ---------------------------------------------------------------- the state, as operations

    def live(self) -> I64:
        """The requests that are under way, ascending."""
        used = int(self.state[C_REQUESTS] - self.state[blocks.F_BASE])
        status = self._small[f.W_STATUS, :used]
        alive = (status == f.WAITING) | (status == f.RUNNING)
        alive |= (self._small[f.W_PLACE, :used] > 0) | (self._small[f.W_TAIL, :used] > 0)
        return np.flatnonzero(alive) + self.state[blocks.F_BASE]

    def arrivals(self, live: I64) -> I64:
        """Where the arrival of each stands in the words, -1 where it was not read: these are the first ones."""
        found: I64 = self._large[f.W_REQ, live - self.state[blocks.F_BASE]]
        return found

    def key(self, requests: int) -> U32:
        """The KEY of a log that begins here, after ``requests`` requests whose arrival is not in it."""
        state, time = self.state, int(self.state[C_TIME])
        return words_of(
            OPS["KEY"].code, time & 0xFFFFFFFF, time >> 32, 0, requests, 0, 0, state[C_RUNNING], state[C_WAITING],
            state[C_DUE], 0,
        )  # fmt: skip

    def snapshot(self, live: I64, key: U64 | None) -> tuple[dict[int, U32], list[U32]]:
        """CHAIN by live request, and START, LIVE, KNOWN, KEPT and QUEUE; identities rekeyed with ``key``."""
        pool, log = self._pool, self._log
        kept = np.flatnonzero(pool[blocks.H_REQUEST] != blocks.NOTHING)
        kept = kept[np.argsort(pool[blocks.H_FILLED, kept])]
        holders = pool[blocks.H_REQUEST, kept]
        wanted = np.union1d(live, holders[holders >= 0]).astype(np.int64)
        indptr, found = chains_of(log.words, log.starts, log.stops, wanted)
        known, identities, parents = self._held(kept, wanted, indptr, found)
        if key is not None:
            rekey_all(key, found, False)
            rekey_all(key, identities, False)
            rekey_all(key, parents, True)
        chains = {}
        lengths = self._large[f.W_CHAIN, live - self.state[blocks.F_BASE]]
        for new, (request, many) in enumerate(zip(live.tolist(), lengths.tolist(), strict=True)):
            begin = int(indptr[np.searchsorted(wanted, request)])
            if many:
                head = words_of(new << 4 | OPS["CHAIN"].code, many)
                chains[request] = np.concatenate([head, found[begin : begin + many].view(np.uint32)])
        return chains, [
            extended("START", words_of(self.state[C_PREEMPTED], self.state[C_EMPTY])),
            *live_words(self._live(live)),
            *kept_words(kept[known], identities[known], parents[known]),
            *queue_words(self._queue()),
        ]

    def _held(self, kept: I64, wanted: I64, indptr: I64, found: U64) -> tuple[NDArray[np.bool_], U64, U64]:
        """Whether the log tells what each of the blocks holds, the identity, and that of the one before, 0 for none."""
        pool, per_block = self._pool, self._log.per_block
        identities, parents = (
            pool[blocks.H_AT, kept].view(np.uint64).copy(),
            pool[blocks.H_PARENT, kept].view(np.uint64).copy(),
        )
        of_chain = np.flatnonzero(pool[blocks.H_REQUEST, kept] >= 0)
        holder, at = pool[blocks.H_REQUEST, kept[of_chain]], pool[blocks.H_AT, kept[of_chain]]
        begin, end = (indptr[np.searchsorted(wanted, holder) + i] for i in (0, 1))
        known = np.ones(len(kept), np.bool_)
        for values, place in ((identities, begin + at), (parents, begin + at - per_block)):
            there = (place >= begin) & (place < end)
            values[of_chain] = 0
            values[of_chain[there]] = found[place[there]]
            if values is identities:
                known[of_chain] = there
        return known, identities, parents

    def _queue(self) -> list[int]:
        queue, block = [], int(self._pool[blocks.H_NEXT, 0])
        while block:
            queue.append(block)
            block = int(self._pool[blocks.H_NEXT, block])
        return queue

    def _live(self, live: I64) -> list[Live]:
        """Each of them, running ones first, both in the order of their queue."""
        at = live - self.state[blocks.F_BASE]
        small, large = self._small[:, at], self._large[:, at]
        running = small[f.W_STATUS] == f.RUNNING
        found = []
        for new in np.lexsort((large[f.W_ORDER], ~running)).tolist():
            row, wide = small[:, new], large[:, new]
            scheduled = bool(row[f.W_PLACE] > 0)
            computed = int(wide[f.W_COMPUTED])
            if scheduled:
                computed += int(self.state[C_STEP] - wide[f.W_START]) * int(row[f.W_TOKENS])
            table, node = [], int(row[f.W_TAIL])
            while node:
                table.append(int(self._nodes[NODE_BLOCK, node]))
                node = int(self._nodes[NODE_PREVIOUS, node])
            found.append(
                Live(
                    new, bool(running[new]), scheduled, bool(row[f.W_BEGUN]), computed,
                    int(row[f.W_CACHED]) - 1 if row[f.W_CACHED] else None, int(row[f.W_PREEMPTIONS]),
                    int(row[f.W_FILLED]), table[::-1] if row[f.W_KNOWN] else None,
                    *self._tokens(row, wide, bool(running[new]), scheduled, computed), int(wide[f.W_MOST_LOST]),
                )
            )  # fmt: skip
        return found

    def _tokens(self, row: Any, wide: Any, running: bool, scheduled: bool, computed: int) -> tuple[int, int, bool]:
        """Tokens known of prompt and output, those under way, and whether the last call gives a token.

        A call gives a request a token where it computes all that are known, outputs to come included (vLLM,
        `Scheduler._update_after_schedule`): so these are one more than were ever computed, or the prompt.
        """
        prompt = int(self._log.words[int(wide[f.W_REQ]) + PROMPT_WORD]) if wide[f.W_REQ] >= 0 else 0
        known = max(prompt, int(wide[f.W_MOST]) + 1, 0 if scheduled else computed + 1)
        if not scheduled or not running:
            return known, 0, False
        known = max(known, computed - int(row[f.W_TOKENS]) + 1)
        gives = computed >= known
        if self.state[C_DUE]:
            return known, int(row[f.W_TOKENS]), gives
        return known + gives, 0, gives
