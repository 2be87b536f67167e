"""What the hooks note in the midst of a call of the scheduler, and how it is written out.

From one hook to the next the engine drives from the processor's caches all that ours had fetched, and what a hook pays
is mostly the fetching. So the hooks inside a call only *note* what they see, and the notes of a call are encoded
together: those of `schedule` while the model runs, which costs the engine nothing where that is on another device,
those of `update_from_output` as it ends; both before anything else is logged. The log says the same as if each had been
written as it came.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.identity import EngineChain, as_number
from kvtrace_traces.schema import FINISH_REASONS, NO_REQUEST, OPS, SCHED_BIG, SCHED_COUNTS, SCHED_FULL, SCHED_WIDE

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

ALLOC, ALLOCN, HIT, LOOKUP = OPS["ALLOC"].code, OPS["ALLOCN"].code, OPS["HIT"].code, OPS["LOOKUP"].code
BEGIN, SCHED, FILL, FILL1 = OPS["BEGIN"].code, OPS["SCHED"].code, OPS["FILL"].code, OPS["FILL1"].code
FINISH, FREE, PREEMPT = OPS["FINISH"].code, OPS["FREE"].code, OPS["PREEMPT"].code

_REASONS = {name: code for code, name in enumerate(FINISH_REASONS)}
_FILL1 = struct.Struct("<Iq")


class Notes:
    """The notes of one recorder, oldest first (``kept``): a list of blocks that the engine handed out; a number, the
    time at which a scheduler call began; or a tuple, one of the functions below and what to call it with.

    - ``fill(request, start, stop)``: blocks ``start`` to ``stop`` of a request became cached.
    - ``lookup(request, asked, hit)``: a request was looked up; ``hit`` is tokens + 1, or 0 where it did not look.
    - ``hit(blocks)``: the request looked up took references to these blocks (numbers).
    - ``end(output, free, running, waiting)``: the call returned ``output``; free blocks, lengths of the queues.
    - ``finish(request, now)``: a request ended; at ``now`` if that was between calls, else 0.
    - ``free(request_id, held)``: a request that ended gave up the blocks it held, so many.
    - ``preempt(request_id, computed, held)``: a request was preempted, with so many tokens computed.

    :meth:`settle` encodes them. What is logged otherwise comes after it.
    """

    def __init__(self, hooks: Hooks) -> None:
        self.kept: list[Any] = []
        self._log, self._state = hooks.log, hooks.state
        self._requests: dict[str, Any] = hooks.scheduler.requests
        self._tables, self._inexact, self._full_sets = hooks.tables, hooks.inexact, hooks.full_sets
        self._stamp, self._tell_time, self._grow = hooks.stamp, hooks.tell_time, hooks.grow
        self._block_size, self._granule = hooks.block_size, hooks.chain.granule
        self._reason: tuple[Any, int] = (None, _REASONS["other"])  # the last one met, with its code
        self._number = as_number(hooks.keyed)
        # Identities are then the engine's hashes, one a block.
        self._plain = (
            isinstance(hooks.chain, EngineChain)
            and self._granule == getattr(hooks.manager.block_pool, "hash_block_size", None) == self._block_size
        )
        # Bound once: a bound method made for each note would be another object to touch.
        self.fill, self.lookup, self.hit, self.end, self.finish, self.free, self.preempt = (
            self._fill(), self._lookup, self._hit, self._end, self._finish, self._free, self._preempt,
        )  # fmt: skip
        self.settle = self._settle()

    def forget(self) -> int:
        """Drop the notes; returns the block events among them, which are lost."""
        lost = sum(map(self._events, self.kept))
        self.kept.clear()
        return lost

    def _events(self, note: Any) -> int:
        if isinstance(note, list):
            return len(note)
        if isinstance(note, int):
            return 0
        what = note[0]
        if what is self.fill:
            return max(0, int(note[3] - note[2]))
        if what is self.free or what is self.preempt:
            return int(note[-1])
        return len(note[1]) if what is self.hit else 0

    def _settle(self) -> Callable[[], None]:
        log, state, kept, stamp = self._log, self._state, self.kept, self._stamp
        pending, append, fromlist = state.pending, log.words.append, log.words.fromlist

        def hand_out(blocks: list[Any]) -> None:
            count = len(blocks)
            block = blocks[0].block_id
            if state.admitted is None:  # whose they are will be told with the call's end; the first counts then
                pending.append(block)
                log.events -= 1
            if count == 1:  # nearly all of decoding
                append(block << 4 | ALLOC)
            else:
                append(count << 4 | ALLOCN)
                fromlist([b.block_id for b in blocks])
            log.events += count

        def settle() -> None:
            """Encode the notes. After an error all of them count as emitted, and what is not committed as lost."""
            before = log.events + len(pending)
            rest = iter(kept)
            try:
                for note in rest:
                    kind = type(note)
                    if kind is tuple:
                        note[0](*note[1:])
                    elif kind is int:
                        state.admitted = None
                        stamp(BEGIN, note)
                    elif note:
                        hand_out(note)
            except Exception:
                log.events = before + sum(map(self._events, kept)) - len(pending)
                kept.clear()
                raise
            except BaseException:  # out of a signal's handler: who comes next writes what is left
                kept[:] = list(rest)
                raise
            kept.clear()

        return settle

    # ---------------------------------------------------------------- what is noted

    def _fill(self) -> Callable[[Any, int, int], None]:
        log, entries, grow = self._log, self._state.entries, self._grow
        append, frombytes, pack = log.words.append, log.words.frombytes, _FILL1.pack
        block_size, granule, number, plain = self._block_size, self._granule, self._number, self._plain

        def fill(request: Any, start: int, stop: int) -> None:
            entry = entries[request.request_id]
            if plain and entry.chain == start == stop - 1 == entry.filled:
                # One more block of generated tokens: nearly all of decoding.
                frombytes(pack(entry.number << 4 | FILL1, number(request.block_hashes[start])))
                entry.chain = entry.filled = stop
                log.events += 1
                return
            if stop <= start:
                return
            if entry.filled != start:
                raise RuntimeError(f"block {start} of a request cached after block {entry.filled}")
            entry.filled = stop
            log.events += stop - start
            known = stop * block_size // granule
            if known > entry.chain:
                grow(entry, request, known)
            append(entry.number << 4 | FILL)
            append(stop - start)

        return fill

    def _lookup(self, request: Any, asked: int, hit: int) -> None:
        state, rid = self._state, request.request_id
        entry = state.entries[rid]
        self._log.words.extend((entry.number << 4 | LOOKUP, asked, hit))
        entry.filled = 0
        state.admitted = entry
        state.looked.append(rid)

    def _hit(self, blocks: list[int]) -> None:
        self._log.words.append(len(blocks) << 4 | HIT)
        self._log.words.fromlist(blocks)
        self._log.events += len(blocks)
        assert self._state.admitted is not None
        self._state.admitted.filled = len(blocks)

    def _end(self, output: Any, free: int, running: int, waiting: int) -> None:
        state = self._state
        scheduled, ids = output.num_scheduled_tokens, output.scheduled_cached_reqs.req_ids
        owners = self._owners(output) if state.pending else ()
        if (
            # The same requests, each with one token as before, and none came or went: nor did the queues change.
            ids == state.ids and len(ids) == len(scheduled) == output.total_num_scheduled_tokens
            and not state.gone and not state.looked and running == state.running and waiting == state.waiting
        ):  # fmt: skip
            self._sched(0, (), owners, scheduled, free)
        else:
            flags, named = self._difference(scheduled)
            if running != state.running or waiting != state.waiting:
                flags |= SCHED_COUNTS
                state.running, state.waiting = running, waiting
            self._sched(flags, named, owners, scheduled, free)
            state.last = scheduled
            state.ids = None if state.special or self._full_sets else list(scheduled)
        if output.total_num_scheduled_tokens:
            state.step += 1
            state.steps.append(output)

    def _finish(self, request: Any, now: int) -> None:
        state = self._state
        entry = state.entries.get(request.request_id)
        if entry is None:
            return
        stop = request.num_tokens // self._granule
        if stop > entry.chain:
            self._grow(entry, request, stop)
        reason = request.get_finished_reason()
        if reason is not self._reason[0]:  # its name is slow Python
            name = "other" if reason is None else str(reason).lower()
            self._reason = reason, _REASONS.get(name, _REASONS["other"])
        if now:
            state.time = now
            self._tell_time(now)
        self._log.words.extend((entry.number << 4 | FINISH, self._reason[1], request.num_output_tokens))
        state.gone.append(request.request_id)

    def _free(self, rid: str, held: int) -> None:
        entry = self._state.entries.pop(rid, None)
        if held and entry is not None:
            self._log.words.extend((entry.number << 4 | FREE, held))
            self._log.events += held

    def _preempt(self, rid: str, computed: int, held: int) -> None:
        state = self._state
        self._log.words.extend((state.entries[rid].number << 4 | PREEMPT, max(0, computed), held))
        self._log.events += held
        state.gone.append(rid)

    # ---------------------------------------------------------------- the end of a call

    def _sched(
        self, flags: int, named: Sequence[str], owners: Sequence[int], scheduled: dict[str, int], free: int
    ) -> None:
        """Append SCHED; see the schema."""
        state, words = self._state, self._log.words
        append = words.append
        count, owned = len(named), len(owners)
        base = 0
        wide = False
        if owned and max(owners) > 0xFFFF:
            base = min(owners)
            wide = max(owners) - base > 0xFFFF
            if wide:
                flags |= SCHED_WIDE
        if count > 0xFFF or owned > 0xFFF:
            words.extend(((flags | SCHED_BIG) << 4 | SCHED, count, owned))
        else:
            append((owned << 16 | count << 4 | flags) << 4 | SCHED)
        append(free)
        if flags & SCHED_COUNTS:
            append(state.running)
            append(state.waiting)
        if count:
            requests, entries = self._requests, state.entries
            for rid in named:
                tokens = scheduled[rid]
                computed = requests[rid].num_computed_tokens - tokens
                append(entries[rid].number)
                append(tokens)
                append(computed if computed > 0 else 0)
        if wide:
            words.extend(owners)
        elif owned:
            append(base)
            offsets = array("H", [owner - base for owner in owners] if base else owners)
            if owned & 1:
                offsets.append(0)
            words.frombytes(offsets.tobytes())

    def _difference(self, scheduled: dict[str, int]) -> tuple[int, list[str]]:
        """What the reader cannot guess of the scheduled set: flags and the ids to name."""
        state = self._state
        named: list[str] = []
        if state.special:
            expected = dict.fromkeys(state.last, 1)
            for rid in state.gone:
                expected.pop(rid, None)
            named = [rid for rid in state.special if rid in scheduled and rid in expected]
            for rid in named:
                expected[rid] = scheduled[rid]
        else:  # each had one token
            expected = state.last.copy()
            for rid in state.gone:
                expected.pop(rid, None)
        state.gone.clear()
        if state.looked:
            for rid in state.looked:
                if rid in scheduled and rid not in expected:
                    expected[rid] = scheduled[rid]
                    named.append(rid)
            state.looked.clear()
        flags = 0
        if self._full_sets or expected != scheduled:
            flags, named = SCHED_FULL, list(scheduled)
        state.special = [rid for rid in named if scheduled[rid] != 1]
        return flags, named

    def _owners(self, output: Any) -> Sequence[int]:
        """The owners of the running queue's allocations, in order: the engine lists the new blocks by request."""
        state = self._state
        pending, entries = state.pending, state.entries
        cached = output.scheduled_cached_reqs
        new = cached.new_block_ids
        ids = list(compress(cached.req_ids, new))
        if len(ids) == len(pending) and [groups[0][0] for groups in new if groups and groups[0]] == pending:
            owners = [entries[rid].number for rid in ids]
        else:
            # Resumed requests are listed too, with all their blocks: the first new block decides.
            owners = []
            for rid, groups in zip(ids, compress(new, new), strict=True):
                if len(owners) < len(pending) and groups[0] and groups[0][0] == pending[len(owners)]:
                    owners.append(entries[rid].number)
            if len(owners) != len(pending):
                owners = self._search_owners()
        self._log.events += len(pending)
        pending.clear()
        return owners

    def tell_owners(self) -> None:
        """Encode the notes, and say now whose the allocations so far in this call are."""
        self.settle()
        pending = self._state.pending
        if pending:
            self._log.ext("OWN", *self._search_owners())
            self._log.events += len(pending)
            pending.clear()

    def _search_owners(self) -> list[int]:
        """The owners of the pending allocations by looking through the block tables: slow, and always right.

        Requests admitted in this call are left out: what they hold of these blocks they hit after the owner filled it.
        """
        state = self._state
        admitted = set(state.looked)
        holder: dict[int, int] = {}
        for rid, table in (self._tables or {}).items():
            entry = state.entries.get(rid)
            if entry is not None and rid not in admitted:
                for block in table:
                    holder[block.block_id] = entry.number
        owners = [holder.get(block, NO_REQUEST) for block in state.pending]
        if NO_REQUEST in owners:
            self._inexact("unattributed-blocks")
        return owners
