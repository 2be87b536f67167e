"""Steps through the operations of a commit without decoding them. Standard library only."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from kvtrace_traces.schema import EXT_OPS, OPS, SCHED_BIG, SCHED_COUNTS, SCHED_WIDE

_SIZES = {
    "ALLOC": 1, "OUTPUT": 1, "BEGIN": 1, "FILL": 2, "FREE": 2, "FILL1": 3, "LOOKUP": 3, "PREEMPT": 3, "FINISH": 3,
}  # fmt: skip
_FIXED = {OPS[name].code: size for name, size in _SIZES.items()}
_KEY_WORDS = 10
#: Words of an EXT operation that stand before its blocks, and words for each block.
_NAMED = {
    EXT_OPS[name].code: layout
    for name, layout in {
        "EVICT": (0, 1), "ALLOCX": (2, 1), "HITX": (2, 1), "FREEX": (2, 1), "FILLX": (2, 3), "STORE": (6, 1),
        "LOAD": (6, 1), "MOVE": (7, 1),
    }.items()
}  # fmt: skip


def words_of(body: bytes) -> array[int]:
    """The 32-bit words of a commit's body. (A log is little-endian, as is every machine that vLLM runs on.)"""
    words = array("I")
    words.frombytes(body)
    return words


def operations(words: array[int]) -> Iterator[tuple[int, int]]:
    """Yield ``(at, n)``: offset and words of each operation. Raises :class:`ValueError` where there is none."""
    at = 0
    while at < len(words):
        n = size_at(words, at)
        if n < 1 or at + n > len(words):
            raise ValueError(f"no operation at word {at}")
        yield at, n
        at += n


def size_at(words: array[int], at: int) -> int:
    """Words of the operation at ``at``, its own included; 0 where it is none."""
    code, operand = words[at] & 15, words[at] >> 4
    if code in _FIXED:
        return _FIXED[code]
    if code in (OPS["HIT"].code, OPS["ALLOCN"].code):
        return 1 + operand
    if code == OPS["EXT"].code:
        return 1 + (operand >> 8)
    if code == OPS["CHAIN"].code:
        return 2 + 2 * words[at + 1]
    if code == OPS["KEY"].code:
        return 1 + _KEY_WORDS + 3 * operand + 4 * words[at + _KEY_WORDS]
    if code != OPS["SCHED"].code:
        return 0
    entries, owners, n = operand >> 4 & 0xFFF, operand >> 16, 2
    if operand & SCHED_BIG:
        entries, owners, n = words[at + 1], words[at + 2], 4
    if operand & SCHED_COUNTS:
        n += 2
    n += 3 * entries
    if owners:
        n += owners if operand & SCHED_WIDE else 1 + (owners + 1) // 2
    return n


def block_events(body: bytes) -> int:
    """Block events that a commit of operations states, those a reader derives not counted."""
    words = words_of(body)
    return sum(_events_at(words, at, n) for at, n in operations(words))


def _events_at(words: array[int], at: int, n: int) -> int:
    code, operand = words[at] & 15, words[at] >> 4
    if code in (OPS["ALLOC"].code, OPS["FILL1"].code):
        return 1
    if code in (OPS["ALLOCN"].code, OPS["HIT"].code):
        return operand
    if code in (OPS["FILL"].code, OPS["FREE"].code):
        return words[at + 1]
    if code == OPS["PREEMPT"].code:
        return words[at + 2]
    if code != OPS["EXT"].code:
        return 0
    if operand & 255 == EXT_OPS["RESET"].code:
        return 1
    fixed, stride = _NAMED.get(operand & 255, (n, 1))
    return max(0, n - 1 - fixed) // stride
