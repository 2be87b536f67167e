"""Parts of the operations of a scheduler call; their layout is that of docs/format.md."""

from __future__ import annotations

from array import array

from kvtrace_traces.schema import EXT_OPS, OPS, SCHED_BIG, SCHED_COUNTS, SCHED_WIDE
from kvtrace_traces.walk import size_at

_BEGIN, _SCHED, _OWN = OPS["BEGIN"].code, OPS["SCHED"].code, EXT_OPS["OWN"].code


def sched_parts(words: array[int], at: int) -> tuple[int, int, int, int]:
    """Of the SCHED at `at`: flags, entries, and where its free blocks and its entries stand."""
    operand = words[at] >> 4
    flags, entries, free = operand & 15, operand >> 4 & 0xFFF, at + 1
    if flags & SCHED_BIG:
        entries, free = words[at + 1], at + 3
    return flags, entries, free, free + (3 if flags & SCHED_COUNTS else 1)


def owners_from(words: array[int], at: int) -> list[int]:
    """Owners of the allocations from the one at `at` on that name none, the first one last."""
    found: list[int] = []
    while at < len(words):
        op, n = words[at] & 15, size_at(words, at)
        if n < 1 or op == _BEGIN:
            break
        if op == 15 and words[at] >> 4 & 255 == _OWN:
            found += words[at + 1 : at + n]
        elif op == _SCHED:
            operand = words[at] >> 4
            flags, entries, _, first = sched_parts(words, at)
            many = words[at + 2] if flags & SCHED_BIG else operand >> 16
            first += 3 * entries
            if flags & SCHED_WIDE:
                found += words[first : first + many]
            elif many:
                pairs = words[first + 1 : first + 1 + (many + 1) // 2]
                offsets = [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
                found += [words[first] + offset for offset in offsets[:many]]
            break
        at += n
    found.reverse()
    return found
