"""The hooks on a vLLM V1 scheduler for requests and lookups, and what all hooks share.

Every hook calls the engine's own function exactly once, outside any ``try``, and returns what it returned; what the
recorder does around it can fail only the recording. The hooks are set on the *instance*, so that pools and schedulers
of other engines in the process stay as they are, and are bound closures with the engine's own signatures: a generic
``*args`` wrapper is a visible cost on the block-level calls.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from kvtrace_tracer import header as headers
from kvtrace_tracer import steps
from kvtrace_tracer.identity import EngineChain, OwnChain, tenant
from kvtrace_tracer.log import Log
from kvtrace_tracer.notes import Notes
from kvtrace_tracer.state import ADMITTING, LOOK_STEPS, MAX_DELTA, OUTSIDE, Entry, State
from kvtrace_tracer.steps import OUTPUT
from kvtrace_traces.schema import EXT_OPS, INEXACT, NO_REQUEST, OPS, REQUEST_NO_READ

CHAIN, KEY = OPS["CHAIN"].code, OPS["KEY"].code
_REQUEST = struct.Struct("<qdIIiIQII")  # the fixed part of EXT REQ; see schema.EXT_OPS
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
        self._patched: list[tuple[Any, str, Any]] = []
        exact = headers.follows_tables(header)
        self.tables = self.manager.coordinator.single_type_managers[0].req_to_blocks if exact else None
        self.at_once = not exact  # the hooks on blocks then write at once, and so do the others
        self.notes = Notes(self)
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
        self.log.events += len(state.pending) + self.notes.forget()
        for kept in (state.entries, state.steps, state.pending, state.looked, state.gone, state.special):
            kept.clear()
        state.last, state.ids, state.phase, state.admitted = {}, None, OUTSIDE, None

    def inexact(self, name: str) -> None:
        """Say in the log that the trace is inexact from here on. (Among the notes that are being encoded, at once.)"""
        if name not in self._inexact:
            self._inexact.add(name)
            self.log.ext("INEXACT", _INEXACT[name])

    def commit_between_steps(self) -> None:
        """Commit what happens while the engine idles (an abort, a reset): the next step may be long in coming."""
        if self.state.phase == OUTSIDE:
            try:
                self.notes.settle()
                self.log.commit()
            except Exception as error:
                self.log.fail(error)

    def look(self) -> None:
        """Start a frame if one is due. Right after a commit, and not after every one."""
        self.state.look = self.state.step + LOOK_STEPS
        if self.log.frame_is_due():
            self.frame()

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
            self.tell_time(now)
            delta = 0
        state.time = now
        self.log.words.append(delta << 4 | op)

    def tell_time(self, now: int) -> None:
        """Append TIME."""
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
        scheduler, log, state, notes = self.scheduler, self.log, self.state, self.notes

        def make_add(original: Any) -> Any:
            def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
                result = original(request, *args, **kwargs)
                if not log.closed:
                    try:
                        notes.settle()
                        state.ids = None
                        self._arrive(request)
                    except Exception as error:
                        log.fail(error)
                return result

            return add_request

        def make_finish(original: Any) -> Any:
            entries, note, finish = state.entries, notes.kept.append, notes.finish

            def _free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    if request.request_id in entries:
                        between = state.phase == OUTSIDE  # an abort
                        note((finish, request, time.monotonic_ns() if between else 0))
                        if between or self.at_once:
                            notes.settle()
                except Exception as error:
                    log.fail(error)
                return original(request, *args, **kwargs)

            return _free_request

        def make_shutdown(original: Any) -> Any:
            def shutdown(*args: Any, **kwargs: Any) -> Any:
                try:
                    notes.settle()
                except Exception as error:
                    log.fail(error)
                log.close()
                return original(*args, **kwargs)

            return shutdown

        def make_lookup(original: Any) -> Any:
            counted, note, lookup = self.lookups_counted, notes.kept.append, notes.lookup

            def get_computed_blocks(request: Any) -> Any:
                found = original(request)
                if log.closed:  # this hook may still be there where someone else has wrapped it
                    return found
                try:
                    # What was found was looked for.
                    hit = found[1] + 1 if found[1] or counted(request) else 0
                    note((lookup, request, request.num_tokens, hit))
                    state.phase = ADMITTING
                    if self.at_once:
                        notes.settle()
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

    def skip(self, output: Any, now: int) -> None:
        """An output out of turn: the steps before it will get none. (A call that scheduled nothing is no step.)"""
        steps = self.state.steps
        skipped = next((i for i, step in enumerate(steps) if step is output), None)
        if skipped is not None:
            self.log.ext("SKIP", skipped)
            del steps[: skipped + 1]
            self.stamp(OUTPUT, now)


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
