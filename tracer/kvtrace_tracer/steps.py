"""The hooks that every scheduler step passes: `schedule`, `get_grammar_bitmask` and `update_from_output`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.state import MAX_DELTA, OUTSIDE, RUNNING, UPDATING
from kvtrace_traces.schema import OPS

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

OUTPUT = OPS["OUTPUT"].code


def install(hooks: Hooks) -> None:
    """Put the hooks on the scheduler of ``hooks``."""
    hooks.patch(hooks.scheduler, "schedule", lambda original: _schedule(hooks, original))
    hooks.patch(hooks.scheduler, "get_grammar_bitmask", lambda original: _get_grammar_bitmask(hooks, original))
    hooks.patch(hooks.scheduler, "update_from_output", lambda original: _update_from_output(hooks, original))


def _schedule(hooks: Hooks, original: Any) -> Any:
    scheduler, log, state, free, clock = hooks.scheduler, hooks.log, hooks.state, hooks.free, time.monotonic_ns
    notes, settle, end = hooks.notes.kept, hooks.notes.settle, hooks.notes.end
    note = notes.append
    queued = _length(scheduler.waiting)
    # Beside it: requests set aside (0.18 to 0.31), or those that hold blocks while they wait (0.32).
    set_aside = _length(getattr(scheduler, "kv_holding_waiting", getattr(scheduler, "skipped_waiting", ())))
    at_once = hooks.at_once

    def schedule(*args: Any, **kwargs: Any) -> Any:
        if log.closed:
            return original(*args, **kwargs)
        try:
            if notes:
                settle()
            note(clock())
            if at_once:
                settle()
            state.phase = RUNNING
        except Exception as error:
            log.fail(error)
        output = original(*args, **kwargs)
        state.phase = OUTSIDE
        if not log.closed:
            try:
                note((end, output, free.num_free_blocks, len(scheduler.running), queued() + set_aside()))
                if at_once:
                    settle()
            except Exception as error:
                log.fail(error)
        return output

    return schedule


def _get_grammar_bitmask(hooks: Hooks, original: Any) -> Any:
    """The engine asks for it between handing a step to its workers and waiting for them: nobody waits for us here."""
    log, state, notes, settle = hooks.log, hooks.state, hooks.notes.kept, hooks.notes.settle
    words, write = log.words, log.write

    def get_grammar_bitmask(*args: Any, **kwargs: Any) -> Any:
        if notes:
            try:
                settle()
                if state.phase == OUTSIDE:  # some old engines ask within the call
                    write(words)
                    log.committed = log.events
            except Exception as error:
                log.fail(error)
        return original(*args, **kwargs)

    return get_grammar_bitmask


def _update_from_output(hooks: Hooks, original: Any) -> Any:
    log, state, steps, notes, settle = hooks.log, hooks.state, hooks.state.steps, hooks.notes.kept, hooks.notes.settle
    clock, stamp, words, append, write = time.monotonic_ns, hooks.stamp, log.words, log.words.append, log.write

    def update_from_output(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if log.closed:
            return original(scheduler_output, *args, **kwargs)
        try:
            if notes:
                settle()
            if steps and steps[0] is scheduler_output:
                now = clock()
                delta = now - state.time
                if 0 <= delta < MAX_DELTA:
                    state.time = now
                    append(delta << 4 | OUTPUT)
                else:
                    stamp(OUTPUT, now)
                del steps[0]
            else:
                hooks.skip(scheduler_output, clock())
            state.phase = UPDATING
        except Exception as error:
            log.fail(error)
        result = original(scheduler_output, *args, **kwargs)
        state.phase = OUTSIDE
        if not log.closed:
            try:
                if notes:
                    settle()
                write(words)  # as Log.commit
                log.committed = log.events
                if state.step >= state.look:
                    hooks.look()
            except Exception as error:
                log.fail(error)
        return result

    return update_from_output


def _length(queue: Any) -> Callable[[], int]:
    """The length of one of vLLM's request queues, without its own ``__len__``, which is slow Python over a deque."""
    return partial(deque.__len__, queue) if isinstance(queue, deque) else partial(len, queue)
