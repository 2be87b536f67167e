"""The ten calls through which a driver reaches its policy, chosen by the type of the policy's tag.

Compiled, each call is the policy's own function, inlined. The state arrays travel as eight plain
arguments: inside a tuple they are reference-counted in the loop, which halves the speed of LRU (171
against 77 million references a second, star arguments). Uncompiled (NUMBA_DISABLE_JIT), the same names
dispatch in Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba.extending import overload

from kvtrace_replay.policies.registry import LEADING, MAX_STATE, OTHERWISE, policy_of
from kvtrace_traces.compile import njit

_STATE = tuple(f"s{i}" for i in range(MAX_STATE))


def _implementation(tag: Any, part: str) -> Callable[..., Any]:
    """A function with the hook's full signature that hands the policy as much state as it has."""
    entry = policy_of(tag.instance_class)
    function = entry.functions.get(part)
    arguments = ", ".join(("tag", *LEADING[part], *_STATE))
    passed = ", ".join((*LEADING[part], *_STATE[: entry.n_state]))
    # Written out, since star arguments would make a tuple (see above).
    body = f"return function({passed})" if function else f"return {OTHERWISE[part]}"
    scope: dict[str, Any] = {"function": njit(cache=False)(function) if function else None}
    exec(f"def {part}({arguments}):\n    {body}\n", scope)
    implementation: Any = scope[part]
    # Numba compares it, annotations included, with the hook's.
    implementation.__signature__ = inspect.signature(globals()[part])
    return implementation


def _in_python(part: str, tag: Any, *args: Any) -> Any:
    entry = policy_of(type(tag))
    function = entry.functions.get(part)
    if function is None:
        return OTHERWISE[part]
    return function(*args[: len(LEADING[part]) + entry.n_state])


def insert(
    tag: Any, key: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("insert", tag, key, now, s0, s1, s2, s3, s4, s5, s6, s7)


def hit(
    tag: Any, key: Any, pinned: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("hit", tag, key, pinned, now, s0, s1, s2, s3, s4, s5, s6, s7)


def evict(
    tag: Any, key: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("evict", tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)


def pin(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("pin", tag, key, s0, s1, s2, s3, s4, s5, s6, s7)


def unpin(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("unpin", tag, key, s0, s1, s2, s3, s4, s5, s6, s7)


def begin(
    tag: Any, request: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("begin", tag, request, now, s0, s1, s2, s3, s4, s5, s6, s7)


def expire(
    tag: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("expire", tag, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)


def admit(
    tag: Any, key: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("admit", tag, key, now, pins, s0, s1, s2, s3, s4, s5, s6, s7)


def remove(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("remove", tag, key, s0, s1, s2, s3, s4, s5, s6, s7)


def soon(
    tag: Any, key: Any, near: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _in_python("soon", tag, key, near, pins, s0, s1, s2, s3, s4, s5, s6, s7)


@overload(insert)
def _insert(
    tag: Any, key: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "insert")


@overload(hit)
def _hit(
    tag: Any, key: Any, pinned: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "hit")


@overload(evict)
def _evict(
    tag: Any, key: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "evict")


@overload(pin)
def _pin(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "pin")


@overload(unpin)
def _unpin(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "unpin")


@overload(begin)
def _begin(
    tag: Any, request: Any, now: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "begin")


@overload(expire)
def _expire(
    tag: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "expire")


@overload(admit)
def _admit(
    tag: Any, key: Any, now: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "admit")


@overload(remove)
def _remove(
    tag: Any, key: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "remove")


@overload(soon)
def _soon(
    tag: Any, key: Any, near: Any, pins: Any,
    s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any,
) -> Any:  # fmt: skip
    return _implementation(tag, "soon")
