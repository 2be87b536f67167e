"""`remove`: takes a block out of a tier, not as a victim but because it moved to another tier or must not be in
this one any more.

A policy says how by a function `remove(key, *state)`, compiled like its others: the resident, unpinned `key` is
gone; nothing remembers it as evicted. A policy without one can stand in every tier that blocks leave by eviction
only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba.extending import overload

from kvtrace_replay.policies.fifo import COUNT, HEAD, RETURNED, Flags
from kvtrace_replay.policies.registry import MAX_STATE, Policy, policies, policy_of
from kvtrace_replay.structures.bitset import clear_bit
from kvtrace_replay.structures.heap import heap_push
from kvtrace_replay.structures.lists import unlink
from kvtrace_traces.compile import njit

_STATE = tuple(f"s{i}" for i in range(MAX_STATE))


def _from_lru(key: int, links: Any) -> None:
    unlink(links, key)


def _from_opt(key: int, after: Any, owner: Any, priority: Any, words: Any, starts: Any) -> None:
    clear_bit(words, starts, priority[key])


def _from_fifo(key: int, queue: Any, now_at: Any, aside: Flags, number: Any, heap: Any) -> None:
    """Looks for `key` from the old end on: time in proportion to the queue."""
    left = 0
    for i in range(now_at[RETURNED]):
        if heap[i] & 0xFFFFFFFF != key:
            left = heap_push(heap, left, heap[i])
    if left < now_at[RETURNED]:
        now_at[RETURNED] = left
        return
    last = now_at[COUNT] - 1
    at = now_at[HEAD]
    found = False
    for _ in range(last):
        found = found or queue[at] == key
        following = at + 1 if at + 1 < queue.size else 0
        if found:
            queue[at] = queue[following]
        at = following
    now_at[COUNT] = last


_KNOWN: dict[str, Callable[..., None]] = {
    "kvtrace_replay.policies.lru": _from_lru,
    "kvtrace_replay.policies.opt": _from_opt,
    "kvtrace_replay.policies.fifo": _from_fifo,
}


def removal_of(entry: Policy) -> Callable[..., None] | None:
    """The policy's `remove`, or None."""
    own = entry.functions.get("remove")
    return _KNOWN.get(type(entry.tag).__module__) if own is None else own


def removable() -> list[str]:
    """The names of the policies that have it."""
    return [entry.name for entry in policies() if removal_of(entry) is not None]


def remove(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    entry = policy_of(type(tag))
    function = removal_of(entry)
    if function is not None:
        function(key, *(s0, s1, s2, s3, s4, s5, s6, s7)[: entry.n_state])


@overload(remove)
def _remove(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    entry = policy_of(tag.instance_class)
    function = removal_of(entry)
    scope: dict[str, Any] = {"function": njit(cache=False)(function) if function else None}
    body = f"function({', '.join(('key', *_STATE[: entry.n_state]))})" if function else "pass"
    exec(f"def remove({', '.join(('tag', 'key', *_STATE))}):\n    {body}\n", scope)
    implementation: Any = scope["remove"]
    # Numba compares it, annotations included, with the hook's.
    implementation.__signature__ = inspect.signature(remove)
    return implementation
