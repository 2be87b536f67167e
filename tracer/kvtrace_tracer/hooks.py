"""The hooks on a vLLM V1 scheduler: requests, steps, lookups, and when to commit.

Every hook calls the engine's own function exactly once, outside any ``try``, and returns what it returned; what the
recorder does around it can fail only the recording. The hooks are set on the *instance*, so that pools and schedulers
of other engines in the process stay as they are, and are bound closures with the engine's own signatures: a generic
``*args`` wrapper is a visible cost on the block-level calls.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

from kvtrace_tracer import header as headers
from kvtrace_tracer import steps
from kvtrace_tracer.identity import EngineChain, OwnChain, tenant
from kvtrace_tracer.log import Log
from kvtrace_tracer.state import ADMITTING, OUTSIDE, Entry, State
from kvtrace_tracer.steps import MAX_DELTA, OUTPUT, SCHED
from kvtrace_traces.schema import (
    EXT_OPS,
    FINISH_REASONS,
    INEXACT,
    NO_REQUEST,
    OPS,
    REQUEST_NO_READ,
    SCHED_BIG,
    SCHED_COUNTS,
    SCHED_FULL,
    SCHED_WIDE,
)

LOOKUP, FINISH, CHAIN, KEY = OPS["LOOKUP"].code, OPS["FINISH"].code, OPS["CHAIN"].code, OPS["KEY"].code
_REQUEST = struct.Struct("<qdIIiIQII")  # the fixed part of EXT REQ; see schema.EXT_OPS
_REASONS = {name: code for code, name in enumerate(FINISH_REASONS)}
_INEXACT = {name: code for code, name in enumerate(INEXACT)}


class Hooks:
    """The hooks on one ``scheduler``; :meth:`remove` takes them off again."""

    def __init__(
        self,
        scheduler: Any,
        log: Log,
        header: dict[str, Any],
        chain: EngineChain | OwnChain,
        keyed: Callable[[bytes], bytes],
    ) -> None:
        self.scheduler = scheduler
        self.manager = scheduler.kv_cache_manager
        self.free = self.manager.block_pool.free_block_queue
        self.log = log
        self.chain = chain
        self.keyed = keyed
        self.state = State(header["clock_monotonic_ns"])
        self.block_size: int = header["block_size"]
        self.block_bytes: int | None = header["bytes_per_block"]
        self.clock_ns: int = header["clock_monotonic_ns"]
        self.full_sets = "speculative-decoding" in header["inexact"]
        self.priority = str(header["scheduler"]["policy"]) == "priority"
        self.lookups_counted = _lookup_predicate(self.manager)
        self._inexact = set(header["inexact"])
        self._reason: tuple[Any, int] = (None, _REASONS["other"])  # the last one met, with its code
        self._patched: list[tuple[Any, str, Any]] = []
        exact = headers.follows_tables(header)
        self.tables = self.manager.coordinator.single_type_managers[0].req_to_blocks if exact else None
        try:
            steps.install(self)
            self._install()
            if exact:
                from kvtrace_tracer.blocks import install
            else:
                from kvtrace_tracer.blocks_explicit import install
            install(self)
            if header["offload"] is not None:
                from kvtrace_tracer import offload

                offload.install(self)
            self.frame()
        except BaseException:
            self.remove()
            raise

    def patch(self, target: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        """Replace ``target.name``, if there is one, by ``make(original)`` on this instance."""
        original = getattr(target, name, None)
        if original is None:
            return
        hook = make(original)
        setattr(target, name, hook)
        self._patched.append((target, name, hook))

    def remove(self) -> None:
        """Give the engine its own functions back, but for those that someone else has wrapped since: they find nothing
        to record."""
        for target, name, hook in reversed(self._patched):
            if target.__dict__.get(name) is hook:
                delattr(target, name)
        self._patched.clear()
        state = self.state
        self.log.events += len(state.pending)
        for kept in (state.entries, state.steps, state.pending, state.looked, state.gone, state.special):
            kept.clear()
        state.last, state.ids, state.phase, state.admitted = {}, None, OUTSIDE, None

    def inexact(self, name: str) -> None:
        """Say in the log that the trace is inexact from here on."""
        if name not in self._inexact:
            self._inexact.add(name)
            self.log.ext("INEXACT", _INEXACT[name])

    def commit_between_steps(self) -> None:
        """Commit what happens while the engine idles (an abort, a reset): the next step may be long in coming."""
        if self.state.phase == OUTSIDE:
            try:
                self.log.commit()
            except Exception as error:
                self.log.fail(error)

    # ---------------------------------------------------------------- what closures append

    def grow(self, entry: Entry, request: Any, stop: int) -> None:
        """Log the chain of ``request`` up to ``stop`` granules."""
        start = entry.chain
        if stop > start:
            words = self.log.words
            words.append(entry.number << 4 | CHAIN)
            words.append(stop - start)
            words.frombytes(self.chain.entries(request, start, stop, entry.link))
            entry.chain = stop

    def stamp(self, op: int, now: int) -> None:
        """Append ``op`` (BEGIN or OUTPUT), whose operand is the time since the last one, at ``now`` by the clock."""
        state = self.state
        delta = now - state.time
        if not 0 <= delta < MAX_DELTA:
            self._tell_time(now)
            delta = 0
        state.time = now
        self.log.words.append(delta << 4 | op)

    def _tell_time(self, now: int) -> None:
        now -= self.clock_ns
        self.log.ext("TIME", now & 0xFFFFFFFF, now >> 32)

    def frame(self) -> None:
        """Start a frame: all that later operations are relative to. See ``KEY`` in the schema."""
        state, words = self.state, self.log.words
        self.log.begin_frame()
        requests = self.scheduler.requests
        events = self.log.events
        words.append(len(state.last) << 4 | KEY)
        now = state.time - self.clock_ns
        words.extend((now & 0xFFFFFFFF, now >> 32, state.step, state.requests, events & 0xFFFFFFFF, events >> 32))
        held: list[int] = []
        tables = self.tables or {}
        for rid, entry in state.entries.items():
            blocks = len(tables.get(rid, ()))
            if blocks or entry.chain != entry.prompt:
                held += (entry.number, blocks, entry.filled, entry.chain)
        words.extend((state.running, state.waiting, len(state.steps), len(held) // 4))
        for rid, tokens in state.last.items():
            # One that has gone since is in the set no more; its number would put it back.
            known = None if rid in state.gone else state.entries.get(rid)
            request = requests.get(rid)
            number = NO_REQUEST if known is None else known.number
            words.extend((number, tokens, max(0, request.num_computed_tokens - tokens) if request else 0))
        words.extend(held)

    # ---------------------------------------------------------------- requests and steps

    def _install(self) -> None:
        scheduler, log, state = self.scheduler, self.log, self.state

        def make_add(original: Any) -> Any:
            def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
                result = original(request, *args, **kwargs)
                if not log.closed:
                    state.ids = None
                    try:
                        self._arrive(request)
                    except Exception as error:
                        log.fail(error)
                return result

            return add_request

        def make_finish(original: Any) -> Any:
            def _free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    self._finish(request)
                except Exception as error:
                    log.fail(error)
                return original(request, *args, **kwargs)

            return _free_request

        def make_shutdown(original: Any) -> Any:
            def shutdown(*args: Any, **kwargs: Any) -> Any:
                log.close()
                return original(*args, **kwargs)

            return shutdown

        def make_lookup(original: Any) -> Any:
            counted, entries, append, looked = self.lookups_counted, state.entries, log.words.append, state.looked

            def get_computed_blocks(request: Any) -> Any:
                found = original(request)
                try:
                    rid = request.request_id
                    entry = entries[rid]
                    append(entry.number << 4 | LOOKUP)
                    append(request.num_tokens)
                    # What was found was looked for.
                    append(found[1] + 1 if found[1] or counted(request) else 0)
                    entry.filled = 0
                    state.admitted = entry
                    state.phase = ADMITTING
                    looked.append(rid)
                except Exception as error:
                    log.fail(error)
                return found

            return get_computed_blocks

        self.patch(scheduler, "add_request", make_add)
        self.patch(scheduler, "_free_request", make_finish)
        self.patch(scheduler, "shutdown", make_shutdown)
        self.patch(self.manager, "get_computed_blocks", make_lookup)

    def _arrive(self, request: Any) -> None:
        state, rid = self.state, request.request_id
        if rid not in self.scheduler.requests:
            return  # the end of a streaming session comes as a request, and is none
        if rid in state.entries or getattr(request, "resumable", False):
            self.inexact("streaming-session")
            if rid in state.entries:
                return
        entry = state.entries[rid] = Entry(state.requests)
        state.requests += 1
        name = rid.encode("utf-8", "replace")[:4096].decode("utf-8", "ignore").encode()
        name_bytes = len(name)
        name += b"\0" * (-len(name) % 4)
        lora = getattr(request, "lora_request", None)
        owner = tenant(self.keyed, getattr(lora, "lora_name", None), getattr(request, "cache_salt", None))
        fixed = _REQUEST.pack(
            time.monotonic_ns() - self.clock_ns,
            request.arrival_time,
            request.num_prompt_tokens,
            min(int(request.max_tokens), 0x7FFFFFFF),
            max(-(1 << 31), min(int(getattr(request, "priority", 0)), (1 << 31) - 1)),
            REQUEST_NO_READ if getattr(request, "skip_reading_prefix_cache", False) else 0,
            int.from_bytes(owner, "little"),
            0,
            name_bytes,
        )
        self.log.ext("REQ")
        words = self.log.words
        words[-1] = 15 | (EXT_OPS["REQ"].code | (len(fixed) + len(name)) // 4 << 8) << 4
        words.frombytes(fixed)
        words.frombytes(name)
        if getattr(request, "prompt_embeds", None) is not None and isinstance(self.chain, OwnChain):
            self.inexact("prompt-embeddings")
        self.grow(entry, request, request.num_prompt_tokens // self.chain.granule)
        entry.prompt = entry.chain

    def _finish(self, request: Any) -> None:
        state = self.state
        entry = state.entries.get(request.request_id)
        if entry is None:
            return
        stop = request.num_tokens // self.chain.granule
        if stop > entry.chain:
            self.grow(entry, request, stop)
        reason = request.get_finished_reason()
        if reason is not self._reason[0]:  # its name is slow Python
            name = "other" if reason is None else str(reason).lower()
            self._reason = reason, _REASONS.get(name, _REASONS["other"])
        if state.phase == OUTSIDE:  # an abort between steps
            state.time = time.monotonic_ns()
            self._tell_time(state.time)
        append = self.log.words.append
        append(entry.number << 4 | FINISH)
        append(self._reason[1])
        append(request.num_output_tokens)
        state.gone.append(request.request_id)

    def skip(self, output: Any, now: int) -> None:
        """An output out of turn: the steps before it will get none. (A call that scheduled nothing is no step.)"""
        steps = self.state.steps
        skipped = next((i for i, step in enumerate(steps) if step is output), None)
        if skipped is not None:
            self.log.ext("SKIP", skipped)
            del steps[: skipped + 1]
            self.stamp(OUTPUT, now)

    def after_schedule(self, output: Any, running: int, waiting: int) -> None:
        state = self.state
        scheduled = output.num_scheduled_tokens
        owners = self.owners(output) if state.pending else ()
        flags, named = self._difference(scheduled)
        if running != state.running or waiting != state.waiting:
            flags |= SCHED_COUNTS
            state.running, state.waiting = running, waiting
        self.end_call(flags, named, owners, scheduled)
        state.last = scheduled
        state.ids = None if state.special or self.full_sets else list(scheduled)
        state.phase = OUTSIDE
        state.admitted = None

    def end_call(self, flags: int, named: Sequence[str], owners: Sequence[int], scheduled: dict[str, int]) -> None:
        """Append SCHED; see the schema."""
        state, words = self.state, self.log.words
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
        append(self.free.num_free_blocks)
        if flags & SCHED_COUNTS:
            append(state.running)
            append(state.waiting)
        if count:
            requests, entries = self.scheduler.requests, state.entries
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
        state = self.state
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
        if self.full_sets or expected != scheduled:
            flags, named = SCHED_FULL, list(scheduled)
        state.special = [rid for rid in named if scheduled[rid] != 1]
        return flags, named

    def owners(self, output: Any) -> list[int]:
        """The owners of the running queue's allocations, in order: the engine lists the new blocks by request."""
        state = self.state
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
                owners = self.search_owners()
        self.log.events += len(pending)
        pending.clear()
        return owners

    def search_owners(self) -> list[int]:
        """The owners of the pending allocations by looking through the block tables: slow, and always right.

        Requests admitted in this call are left out: what they hold of these blocks they hit after the owner filled it.
        """
        state = self.state
        admitted = set(state.looked)
        holder: dict[int, int] = {}
        for rid, table in (self.tables or {}).items():
            entry = state.entries.get(rid)
            if entry is not None and rid not in admitted:
                for block in table:
                    holder[block.block_id] = entry.number
        owners = [holder.get(block, NO_REQUEST) for block in state.pending]
        if NO_REQUEST in owners:
            self.inexact("unattributed-blocks")
        return owners


def _lookup_predicate(manager: Any) -> Callable[[Any], bool]:
    """Whether a lookup of a request reads the prefix cache, which is when vLLM counts it."""
    own = getattr(manager, "prefix_cache_lookup_enabled", None)
    if own is not None:
        return own
    if not manager.enable_caching:
        return lambda request: False

    def enabled(request: Any) -> bool:
        skip = getattr(request, "skip_reading_prefix_cache", None)
        if skip is None:  # up to 0.11: prompt log-probabilities need the whole prefill
            skip = getattr(request.sampling_params, "prompt_logprobs", None) is not None
        return not skip

    return enabled
