"""Capacities as people write them: `1000`, `10k`, `50%`, `65536tok`, `8GiB`, `inf`, always floored to
whole blocks."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np

from kvtrace_replay.workload.model import Workload
from kvtrace_traces.errors import UsageError

INFINITE = math.inf
MOST_BLOCKS = 2**53 - 1  # a float tells them apart
_FORMS = "write blocks (1000, 10k, 2M), a share (50%), tokens (65536tok), memory (8GiB, 500MB) or inf"
_AMOUNTS = "write blocks (1000, 10k), tokens (65536tok) or memory (8GiB, 500MB)"
_NUMBER = re.compile(r"([+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)\s*([a-z%]*)", re.IGNORECASE)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_BYTES = {"b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_BYTES |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def parse_capacity(text: str | int | float, workload: Workload, semantics: str = "prefix") -> int | float:
    """A cache size in usable blocks.

    Args:
        text: one of the forms above; k = 1000. `%` is a share of the workload's distinct blocks. Tokens
            and bytes are converted with the workload's own block size and bytes per block. A number
            counts blocks.
        workload: what the share, the tokens and the bytes refer to.
        semantics: under `object`, distinct blocks are counted by content id where the import has them.

    Returns blocks as an int >= 1, or `math.inf`. Raises UsageError on anything else, naming the fix.
    """
    shown = repr(text)
    if isinstance(text, (int, float, np.integer, np.floating)) and not isinstance(text, bool):
        if math.isinf(text) and text > 0:
            return INFINITE
        if math.isnan(text) or text < 0:
            raise UsageError(f"capacity {shown} is not a size: {_FORMS}")
        if int(text) != text:
            raise UsageError(f"capacity {shown} is not a whole number of blocks: {_FORMS}")
        return _at_least_one(int(text), shown)
    if not isinstance(text, str):
        raise UsageError(f"capacity {shown} is not a size: {_FORMS}")
    word = text.strip().lower()
    if word in ("inf", "infinite", "infinity"):
        return INFINITE
    number, unit = _split(word, shown)
    if unit == "%":
        per = Fraction(distinct_blocks(workload, semantics), 100)
    else:
        per = _blocks_per(unit, shown, workload.block_size, workload.bytes_per_block)
    return _at_least_one(math.floor(number * per), shown)


def parse_amount(value: str | int, block_size: int, bytes_per_block: int | None, what: str) -> int:
    """A number of blocks: an int, or a text in blocks (`1000`, `10k`), tokens or bytes, floored.

    `what` names the option in the UsageError that is raised for anything else, or for less than one block.
    """
    shown = f"{value!r} for {what}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return _at_least_one(int(value), shown, _AMOUNTS)
    number, unit = _split(str(value).strip().lower(), shown, _AMOUNTS)
    per = _blocks_per(unit, shown, block_size, bytes_per_block, _AMOUNTS)
    return _at_least_one(math.floor(number * per), shown, _AMOUNTS)


def _split(word: str, shown: str, forms: str = _FORMS) -> tuple[Fraction, str]:
    match = _NUMBER.fullmatch(word)
    if match is None:
        raise UsageError(f"capacity {shown} is not a size: {forms}")
    number = Fraction(match[1].replace("_", ""))  # exact: 0.29 * 100 blocks is 29, not 28
    if number < 0:
        raise UsageError(f"capacity {shown} is negative: {forms}")
    return number, match[2]


def _blocks_per(unit: str, shown: str, block_size: int, bytes_per_block: int | None, forms: str = _FORMS) -> Fraction:
    if unit in _COUNTS:
        return Fraction(_COUNTS[unit])
    for suffix in ("tokens", "token", "toks", "tok"):
        if unit.endswith(suffix) and unit.removesuffix(suffix) in _COUNTS:
            return Fraction(_COUNTS[unit.removesuffix(suffix)], block_size)
    if unit in _BYTES:
        if not bytes_per_block:
            raise UsageError(
                f"capacity {shown} is in bytes, but this trace does not know the bytes of a block: "
                "give it in blocks, tokens (65536tok) or as a share (50%)"
            )
        return Fraction(_BYTES[unit], bytes_per_block)
    raise UsageError(f"capacity {shown} has the unknown unit {unit!r}: {forms}")


def distinct_blocks(workload: Workload, semantics: str) -> int:
    """How many distinct blocks the stream of `semantics` refers to."""
    if semantics == "object" and workload.raw is not None:
        return int(workload.raw.max()) + 1 if workload.raw.size else 0
    return workload.n_identities


def _at_least_one(blocks: int, shown: str, forms: str = _FORMS) -> int:
    if blocks < 1:
        raise UsageError(f"capacity {shown} comes to 0 blocks: give 1 block or more ({forms})")
    if blocks > MOST_BLOCKS:
        raise UsageError(f"capacity {shown} is too large: at most {MOST_BLOCKS:,} blocks, or inf")
    return blocks
