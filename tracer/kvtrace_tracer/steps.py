"""The hooks that every scheduler step passes: `schedule` and `update_from_output`.

Most steps of a busy server are as the one before but for the blocks that fill and are handed out, and what is paid in
each of them is mostly memory that the engine has driven from the caches since: the common case is written out in
one place, touches few objects, and compares with C's loops. Anything else goes to :class:`~kvtrace_tracer.hooks.Hooks`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from kvtrace_tracer.state import OUTSIDE, RUNNING, UPDATING
from kvtrace_traces.schema import OPS

if TYPE_CHECKING:
    from kvtrace_tracer.hooks import Hooks

BEGIN, SCHED, OUTPUT = OPS["BEGIN"].code, OPS["SCHED"].code, OPS["OUTPUT"].code
MAX_DELTA = 1 << 28


def install(hooks: Hooks) -> None:
    """Put the hooks on the scheduler of ``hooks``."""
    hooks.patch(hooks.scheduler, "schedule", lambda original: _schedule(hooks, original))
    hooks.patch(hooks.scheduler, "update_from_output", lambda original: _update_from_output(hooks, original))


def _schedule(hooks: Hooks, original: Any) -> Any:
    scheduler, log, state = hooks.scheduler, hooks.log, hooks.state
    clock, stamp, after_schedule, end_call = time.monotonic_ns, hooks.stamp, hooks.after_schedule, hooks.end_call
    gone, looked, pending, steps, entries = state.gone, state.looked, state.pending, state.steps, state.entries
    append = log.words.append
    queued = _length(scheduler.waiting)
    # Beside it: requests set aside (0.18 to 0.31), or those that hold blocks while they wait (0.32).
    set_aside = _length(getattr(scheduler, "kv_holding_waiting", getattr(scheduler, "skipped_waiting", ())))
    free = hooks.free

    def schedule(*args: Any, **kwargs: Any) -> Any:
        if log.closed:
            return original(*args, **kwargs)
        now = clock()
        delta = now - state.time
        if 0 <= delta < MAX_DELTA:
            state.time = now
            append(delta << 4 | BEGIN)
        else:
            stamp(BEGIN, now)
        state.phase = RUNNING
        output = original(*args, **kwargs)
        if log.closed:
            return output
        try:
            cached = output.scheduled_cached_reqs
            ids = cached.req_ids
            count = len(ids)
            if (
                # The same requests, each with one token as before, and none came or went: nor did the queues change.
                ids == state.ids and count == len(output.num_scheduled_tokens) == output.total_num_scheduled_tokens
                and not gone and not looked and len(scheduler.running) == state.running
            ):  # fmt: skip
                if pending:
                    # Each request that runs on asks once, and the engine lists the new blocks by request.
                    owners = [entries[rid].number for rid in compress(ids, cached.new_block_ids)]
                    owned = len(owners)
                    if owned == len(pending) == 1:
                        append(SCHED | 1 << 20)
                        append(free.num_free_blocks)
                        append(owners[0])
                        append(0)
                        pending.clear()
                        log.events += 1
                    elif owned == len(pending):
                        end_call(0, (), owners, output.num_scheduled_tokens)
                        pending.clear()
                        log.events += owned
                    else:
                        end_call(0, (), hooks.owners(output), output.num_scheduled_tokens)
                else:
                    append(SCHED)
                    append(free.num_free_blocks)
                state.phase = OUTSIDE
            else:
                after_schedule(output, len(scheduler.running), queued() + set_aside())
                count = output.total_num_scheduled_tokens
            if count:
                state.step += 1
                steps.append(output)
        except Exception as error:
            log.fail(error)
        return output

    return schedule


def _update_from_output(hooks: Hooks, original: Any) -> Any:
    log, state, steps = hooks.log, hooks.state, hooks.state.steps
    clock, stamp, words, append, write = time.monotonic_ns, hooks.stamp, log.words, log.words.append, log.write

    def update_from_output(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if log.closed:
            return original(scheduler_output, *args, **kwargs)
        state.phase = UPDATING
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
            try:
                hooks.skip(scheduler_output, clock())
            except Exception as error:
                log.fail(error)
        result = original(scheduler_output, *args, **kwargs)
        state.phase = OUTSIDE
        if not log.closed:
            try:
                commits = write(words)  # as Log.commit
                log.committed = log.events
                if not commits & 31:
                    log.look()
                if log.key_due:
                    hooks.frame()
            except Exception as error:
                log.fail(error)
        return result

    return update_from_output


def _length(queue: Any) -> Callable[[], int]:
    """The length of one of vLLM's request queues, without its own ``__len__``, which is slow Python over a deque."""
    return partial(deque.__len__, queue) if isinstance(queue, deque) else partial(len, queue)
