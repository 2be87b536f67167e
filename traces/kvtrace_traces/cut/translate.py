"""Rewrites operations for a cut: requests get new numbers, identities new names, and what is not wanted goes. Compiled.

Two ways: a *stretch* keeps every operation between two scheduler calls; *chosen* requests keep what is told of them
(arrivals, chains, lookups, steps, preemptions, ends) and nothing of the blocks, whose story the other requests share.
"""

# ruff: noqa: I001, SIM109 -- long lists of constants; chains of `or` compile to less
# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"
from __future__ import annotations

import numpy as np

from kvtrace_traces.compile import njit
from kvtrace_traces.cut.identities import keyed
from kvtrace_traces.played import time_of
from kvtrace_traces.schema import (
    EXT_OPS, LIVE_BEGUN, LIVE_RUNNING, LIVE_SCHEDULED, NO_REQUEST, SCHED_BIG, SCHED_COUNTS, SCHED_FULL, SCHED_WIDE,
)  # fmt: skip
from kvtrace_traces.survey import (
    ALLOC, ALLOCN, BEGIN, CHAIN, FILL, FILL1, FINISH, FREE, HIT, KEY, KEY_WORDS, LOOKUP, OUTPUT, PREEMPT, REQ_WORDS,
    SCHED, X_ABOUT, X_ALLOC, X_EVICT, X_FILL, X_FREE, X_HIT, X_IDS, X_KEPT, X_KNOWN, X_LIVE, X_LOAD, X_LOST, X_MOVE,
    X_OWN, X_REQ, X_RESET, X_SKIP, X_START, X_STORE, X_TIME, X_WHEN, op_words, sched_parts,
)  # fmt: skip

X_TYPE, X_INEXACT = EXT_OPS["TYPE"].code, EXT_OPS["INEXACT"].code
EXT = 15
MOST_DELTA = np.int64(1) << np.int64(28)
ID_DIGITS = 12
# Scalars of a translation; the last ones are of chosen requests alone.
T_FIRST, T_STEP, T_EVENTS, T_REQUESTS, T_CHOSEN, T_REKEY, T_TIME, T_LATE, T_SCHEDS, T_DUE_AT, T_DUE_N, T_SCALARS = (
    range(12)
)


@njit
def renumber(numbers, first, request):
    """The new number of a request, -1 where it is not in the cut. ``numbers``: int64, ascending, the old numbers of
    those below ``first`` that are; from ``first`` on all are."""
    if request >= first:
        return len(numbers) + request - first
    i = np.searchsorted(numbers, request)
    if i < len(numbers) and numbers[i] == request:
        return np.int64(i)
    return np.int64(-1)


@njit
def _whose(numbers, first, word):
    """A request that may be none, as a word."""
    new = renumber(numbers, first, np.int64(word)) if word != np.uint32(NO_REQUEST) else np.int64(-1)
    return np.uint32(NO_REQUEST) if new < 0 else np.uint32(new)


@njit
def _identity(words, at, out, to, rekeyed, key, spare_zero=False):
    """Copy the identity at ``words[at]``; with ``spare_zero`` 0 stays 0, which is for none."""
    value = np.uint64(words[at]) | np.uint64(words[at + 1]) << np.uint64(32)
    if rekeyed and (value != 0 or not spare_zero):
        value = keyed(key, value)
    out[to] = np.uint32(value & np.uint64(0xFFFFFFFF))
    out[to + 1] = np.uint32(value >> np.uint64(32))


@njit
def _ext(code, words):
    return np.uint32(EXT | (code | words << 8) << 4)


@njit
def _sched(words, at, out, to, numbers, first, chosen):
    """SCHED with new numbers; owners as offsets where they still are, and left out with ``chosen``."""
    flags = np.int64(words[at] >> np.uint32(4)) & 15
    entries, owners, free, entry, owner = sched_parts(words, at)
    head = to
    n = np.int64(0)
    low, high = np.int64(0xFFFFFFFF), np.int64(-1)
    wide = flags & SCHED_WIDE
    many = np.int64(0) if chosen else owners
    for i in range(many):
        if wide:
            told = words[owner + i]
        else:
            pair = words[owner + 1 + i // 2]
            told = words[owner] + (pair >> np.uint32(16) if i & 1 else pair & np.uint32(0xFFFF))
        new = np.int64(_whose(numbers, first, told))
        low, high = min(low, new), max(high, new)
    for i in range(entries):
        if renumber(numbers, first, np.int64(words[entry + 3 * i])) >= 0:
            n += 1
    narrow = many > 0 and high - low <= 0xFFFF
    told_flags = flags & (SCHED_COUNTS | SCHED_FULL)
    if many and not narrow:
        told_flags |= SCHED_WIDE
    if n > 0xFFF or many > 0xFFF:
        out[to] = np.uint32(SCHED | (told_flags | SCHED_BIG) << 4)
        out[to + 1], out[to + 2] = n, many
        to += 3
    else:
        out[to] = np.uint32(SCHED | (told_flags | n << 4 | many << 16) << 4)
        to += 1
    for i in range(free, entry):
        out[to] = words[i]
        to += 1
    for i in range(entries):
        new = renumber(numbers, first, np.int64(words[entry + 3 * i]))
        if new >= 0:
            out[to], out[to + 1], out[to + 2] = new, words[entry + 3 * i + 1], words[entry + 3 * i + 2]
            to += 3
    if narrow:
        out[to] = low
        to += 1
        for i in range((many + 1) // 2):
            out[to + i] = 0
    for i in range(many):
        if wide:
            told = words[owner + i]
        else:
            pair = words[owner + 1 + i // 2]
            told = words[owner] + (pair >> np.uint32(16) if i & 1 else pair & np.uint32(0xFFFF))
        new = _whose(numbers, first, told)
        if narrow:
            out[to + i // 2] |= np.uint32((np.int64(new) - low) << (16 * (i & 1)))
        else:
            out[to + i] = new
    if narrow:
        return to + (many + 1) // 2 - head
    return to + many - head


@njit
def _request(words, at, n, out, to, scalars, numbers, first, key, names):
    """REQ; a rekeyed one loses its name for its place in ``names`` (int32, by new number) or its number."""
    new = renumber(numbers, first, scalars[T_REQUESTS])
    scalars[T_REQUESTS] += 1
    if new < 0:
        return np.int64(0)
    for i in range(n):
        out[to + i] = words[at + i]
    if not scalars[T_REKEY]:
        return n
    _identity(words, at + 9, out, to + 9, True, key, True)
    if words[at + REQ_WORDS] == 0:
        return n
    number = np.int64(names[new]) if new < len(names) else new
    size = 1 + REQ_WORDS + ID_DIGITS // 4
    out[to] = _ext(X_REQ, size - 1)
    out[to + REQ_WORDS] = ID_DIGITS
    for i in range(ID_DIGITS // 4):
        out[to + 1 + REQ_WORDS + i] = 0
    for i in range(ID_DIGITS):
        place = ID_DIGITS - 1 - i
        digit = 48 + number % 10
        number //= 10
        out[to + 1 + REQ_WORDS + place // 4] |= np.uint32(digit << (8 * (place % 4)))
    return np.int64(size)


@njit
def _key(words, at, out, to, scalars, numbers, first):
    """KEY in the middle of a stretch, which repeats what is known."""
    entries, held = np.int64(words[at] >> np.uint32(4)), np.int64(words[at + KEY_WORDS])
    requests = renumber(numbers, first, np.int64(words[at + 4]))
    for i in range(1, 1 + KEY_WORDS):
        out[to + i] = words[at + i]
    out[to] = np.uint32(KEY | entries << 4)
    out[to + 3] = np.uint32(np.int64(words[at + 3]) - scalars[T_STEP])
    out[to + 4] = requests
    out[to + 5] = np.uint32(scalars[T_EVENTS] & 0xFFFFFFFF)
    out[to + 6] = np.uint32(scalars[T_EVENTS] >> 32)
    head, to = to, to + 1 + KEY_WORDS
    base = at + 1 + KEY_WORDS
    for i in range(entries):
        out[to] = _whose(numbers, first, words[base + 3 * i])
        out[to + 1], out[to + 2] = words[base + 3 * i + 1], words[base + 3 * i + 2]
        to += 3
    base += 3 * entries
    n = 0
    for i in range(held):
        new = renumber(numbers, first, np.int64(words[base + 4 * i]))
        if new >= 0:
            out[to] = new
            for j in range(1, 4):
                out[to + j] = words[base + 4 * i + j]
            to += 4
            n += 1
    out[head + KEY_WORDS] = n
    return to - head


@njit
def stretch(words, begin, end, out, scalars, numbers, first, key, names):
    """Rewrite ``words[begin:end]`` into ``out`` (uint32, twice as long and 64 more). Returns the words written."""
    at, to = begin, np.int64(0)
    rekeyed = scalars[T_REKEY] != 0
    while at < end:
        n = op_words(words, at, end)
        op = words[at] & np.uint32(15)
        operand = np.int64(words[at] >> np.uint32(4))
        if op == SCHED:
            to += _sched(words, at, out, to, numbers, first, False)
        elif op == KEY:
            to += _key(words, at, out, to, scalars, numbers, first)
        elif op == EXT:
            to += _extended(words, at, n, out, to, scalars, numbers, first, key, names)
        elif op == BEGIN or op == OUTPUT or op == ALLOC or op == ALLOCN or op == HIT:
            for i in range(n):
                out[to + i] = words[at + i]
            to += n
            if op == ALLOC:
                scalars[T_EVENTS] += 1
            elif op == ALLOCN or op == HIT:
                scalars[T_EVENTS] += operand
        else:
            new = renumber(numbers, first, operand)
            if new >= 0:
                out[to] = op | np.uint32(new << 4)
                for i in range(1, n):
                    out[to + i] = words[at + i]
                if op == FILL1:
                    _identity(words, at + 1, out, to + 1, rekeyed, key)
                    scalars[T_EVENTS] += 1
                elif op == CHAIN:
                    for i in range(2, n, 2):
                        _identity(words, at + i, out, to + i, rekeyed, key)
                elif op == FILL or op == FREE:
                    scalars[T_EVENTS] += np.int64(words[at + 1])
                elif op == PREEMPT:
                    scalars[T_EVENTS] += np.int64(words[at + 2])
                to += n
        at += n
    return to


@njit
def _extended(words, at, n, out, to, scalars, numbers, first, key, names):
    code = np.int64(words[at] >> np.uint32(4)) & 255
    rekeyed = scalars[T_REKEY] != 0
    if code == X_REQ:
        return _request(words, at, n, out, to, scalars, numbers, first, key, names)
    for i in range(n):
        out[to + i] = words[at + i]
    if code == X_OWN:
        for i in range(1, n):
            out[to + i] = _whose(numbers, first, words[at + i])
    elif code == X_RESET:
        scalars[T_EVENTS] += 1
    elif code == X_EVICT:
        scalars[T_EVENTS] += n - 1
    elif code == X_ALLOC or code == X_HIT or code == X_FREE or code == X_FILL:
        out[to + 1] = _whose(numbers, first, words[at + 1])
        if code == X_FILL:
            for i in range(4, n, 3):
                _identity(words, at + i, out, to + i, rekeyed, key)
            scalars[T_EVENTS] += (n - 3) // 3
        else:
            scalars[T_EVENTS] += n - 3
    elif code == X_STORE or code == X_LOAD:
        out[to + 1] = _whose(numbers, first, words[at + 1])
        scalars[T_EVENTS] += n - 7
    elif code == X_MOVE:
        out[to + 2] = _whose(numbers, first, words[at + 2])
        scalars[T_EVENTS] += n - 8
    elif code == X_LOST or code == X_LIVE or code == X_ABOUT:
        new = renumber(numbers, first, np.int64(words[at + 1]))
        if new < 0:
            return np.int64(0)
        out[to + 1] = new
        if code == X_ABOUT:
            out[to + 4] = _whose(numbers, first, words[at + 4])
    elif code == X_KNOWN:
        for i in range(1, n, 5):
            out[to + i] = _whose(numbers, first, words[at + i])
    elif code == X_KEPT:
        for i in range(1, n, 5):
            _identity(words, at + i + 1, out, to + i + 1, rekeyed, key)
            _identity(words, at + i + 3, out, to + i + 3, rekeyed, key, True)
    elif code == X_IDS:
        for i in range(1, n, 2):
            _identity(words, at + i, out, to + i, rekeyed, key)
        scalars[T_REQUESTS] += (n - 1) // 2
    elif code == X_WHEN:
        out[to + 1] = np.uint32(renumber(numbers, first, np.int64(words[at + 1])))
    return n


@njit
def choose(words, begin, end, out, scalars, numbers, key, names, made, due):
    """Rewrite ``words[begin:end]`` for the requests of ``numbers`` (int64, ascending) alone.

    ``made``: what ``follow`` tells of each call (bit 1: a chosen request is in its step). ``due``: uint8 ring of the
    steps without output, whether each is kept; it has room for all steps to come. Returns the words written.
    """
    first = np.int64(1) << np.int64(62)  # none is in for being late
    at, to = begin, np.int64(0)
    rekeyed = scalars[T_REKEY] != 0
    while at < end:
        n = op_words(words, at, end)
        op = words[at] & np.uint32(15)
        operand = np.int64(words[at] >> np.uint32(4))
        if op == BEGIN:
            scalars[T_TIME] += operand
            to += _stamp(out, to, scalars, BEGIN)
        elif op == OUTPUT:
            scalars[T_TIME] += operand
            if scalars[T_DUE_N] > 0 and _pop(scalars, due):
                to += _stamp(out, to, scalars, OUTPUT)
        elif op == SCHED:
            to += _sched(words, at, out, to, numbers, first, True)
            kind = made[scalars[T_SCHEDS]]
            scalars[T_SCHEDS] += 1
            if kind & 1:
                due[(scalars[T_DUE_AT] + scalars[T_DUE_N]) % len(due)] = kind >> 1
                scalars[T_DUE_N] += 1
        elif op == EXT:
            to += _chosen(words, at, n, out, to, scalars, numbers, key, names, due)
        elif op == CHAIN or op == FILL1 or op == LOOKUP or op == FINISH or op == PREEMPT:
            new = renumber(numbers, first, operand)
            if new >= 0:
                if (op == FINISH or op == PREEMPT) and scalars[T_LATE] != scalars[T_TIME]:
                    to += _tell_time(out, to, scalars)
                if op == FILL1:
                    out[to], out[to + 1] = np.uint32(CHAIN | new << 4), 1
                    _identity(words, at + 1, out, to + 2, rekeyed, key)
                    to += 4
                elif op == PREEMPT:
                    out[to] = _ext(X_LOST, 3)
                    out[to + 1], out[to + 2], out[to + 3] = new, words[at + 1], words[at + 2]
                    to += 4
                else:
                    out[to] = op | np.uint32(new << 4)
                    for i in range(1, n):
                        out[to + i] = words[at + i]
                    if op == CHAIN:
                        for i in range(2, n, 2):
                            _identity(words, at + i, out, to + i, rekeyed, key)
                    to += n
        at += n
    return to


@njit
def _pop(scalars, due):
    kept = due[scalars[T_DUE_AT]]
    scalars[T_DUE_AT] = (scalars[T_DUE_AT] + 1) % len(due)
    scalars[T_DUE_N] -= 1
    return kept != 0


@njit
def _stamp(out, to, scalars, op):
    """``op`` at the present time, of which ``T_LATE`` was the last one told."""
    delta = scalars[T_TIME] - scalars[T_LATE]
    if 0 <= delta < MOST_DELTA:
        scalars[T_LATE] = scalars[T_TIME]
        out[to] = np.uint32(op | delta << 4)
        return np.int64(1)
    n = _tell_time(out, to, scalars)
    out[to + n] = np.uint32(op)
    return n + 1


@njit
def _tell_time(out, to, scalars):
    scalars[T_LATE] = scalars[T_TIME]
    out[to] = _ext(X_TIME, 2)
    out[to + 1] = np.uint32(scalars[T_TIME] & 0xFFFFFFFF)
    out[to + 2] = np.uint32(scalars[T_TIME] >> 32)
    return np.int64(3)


@njit
def _chosen(words, at, n, out, to, scalars, numbers, key, names, due):
    code = np.int64(words[at] >> np.uint32(4)) & 255
    first = np.int64(1) << np.int64(62)
    rekeyed = scalars[T_REKEY] != 0
    if code == X_REQ:
        return _request(words, at, n, out, to, scalars, numbers, first, key, names)
    if code == X_TIME:
        scalars[T_TIME] = time_of(words, at + 1)
        scalars[T_LATE] = scalars[T_TIME]
    elif code == X_SKIP:
        kept = 0
        for _ in range(min(np.int64(words[at + 1]), scalars[T_DUE_N])):
            kept += _pop(scalars, due)
        if not kept:
            return np.int64(0)
        out[to], out[to + 1] = words[at], kept
        return n
    elif code == X_IDS:
        size = np.int64(0)
        for i in range((n - 1) // 2):
            if renumber(numbers, first, scalars[T_REQUESTS] + i) >= 0:
                _identity(words, at + 1 + 2 * i, out, to + 1 + size, rekeyed, key)
                size += 2
        scalars[T_REQUESTS] += (n - 1) // 2
        if not size:
            return np.int64(0)
        out[to] = _ext(X_IDS, size)
        return 1 + size
    elif code == X_WHEN:
        return _when(words, at, n, out, to, numbers)
    elif code == X_LIVE:
        new = renumber(numbers, first, np.int64(words[at + 1]))
        if new < 0:
            return np.int64(0)
        for i in range(7):
            out[to + i] = words[at + i]
        out[to], out[to + 1], out[to + 6] = _ext(X_LIVE, 6), new, 0
        out[to + 2] &= np.uint32(LIVE_RUNNING | LIVE_SCHEDULED | LIVE_BEGUN)
        return np.int64(7)
    elif code == X_LOST or code == X_ABOUT:
        new = renumber(numbers, first, np.int64(words[at + 1]))
        if new < 0:
            return np.int64(0)
        for i in range(n):
            out[to + i] = words[at + i]
        out[to + 1] = new
        if code == X_ABOUT:
            out[to + 4] = _whose(numbers, first, words[at + 4])
        return n
    elif code != X_TYPE and code != X_INEXACT and code != X_START:
        return np.int64(0)  # of blocks, or not known
    for i in range(n):
        out[to + i] = words[at + i]
    return n


@njit
def _when(words, at, n, out, to, numbers):
    """WHEN: the chosen requests of each run keep its time; those of one operation have numbers without a gap."""
    request = np.int64(words[at + 1])
    begin = np.searchsorted(numbers, request)
    size = np.int64(1)
    for i in range((n - 2) // 3):
        request += np.int64(words[at + 2 + 3 * i])
        stop = np.searchsorted(numbers, request)
        if stop > begin:
            if size == 1:
                out[to + 1] = begin
            out[to + 1 + size] = stop - begin
            out[to + 2 + size], out[to + 3 + size] = words[at + 3 + 3 * i], words[at + 4 + 3 * i]
            size += 3
        begin = stop
    if size == 1:
        return np.int64(0)
    out[to] = _ext(X_WHEN, size)
    return 1 + size


@njit
def late_outputs(words, starts, stops, commit, at, time, due, times):
    """Times (int64) at which the ``due`` oldest outputs arrive behind ``words[at]`` in ``commit``, -1 for those that
    never will; returns how many are told of."""
    n_told = 0
    while commit < len(starts) and n_told < due:
        at = max(at, starts[commit])
        while at < stops[commit] and n_told < due:
            n = op_words(words, at, stops[commit])
            op = words[at] & np.uint32(15)
            operand = np.int64(words[at] >> np.uint32(4))
            if op == BEGIN or op == OUTPUT:
                time += operand
                if op == OUTPUT:
                    times[n_told] = time
                    n_told += 1
            elif op == EXT and operand & 255 == X_TIME:
                time = time_of(words, at + 1)
            elif op == EXT and operand & 255 == X_SKIP:
                for _ in range(min(np.int64(words[at + 1]), due - n_told)):
                    times[n_told] = -1
                    n_told += 1
            at += n
        commit += 1
        at = 0
    return n_told
