"""Fields of a record, read with care: every function raises :class:`ValueError` with the reason where one is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any

from kvtrace_traces.importers.batches import MAX_ID, MAX_TOKENS, UNKNOWN, Bad, Record
from kvtrace_traces.importers.columns import MOST_NS
from kvtrace_traces.importers.json_lines import parse
from kvtrace_traces.importers.source import LOOK_BYTES, Lines, Source
from kvtrace_traces.schema import MAX_BLOCK_TOKENS

UNITS = {0: "nanoseconds", 3: "microseconds", 6: "milliseconds", 9: "seconds"}
_EXACT = Context(prec=60)
_SHOWN = 60  # characters of a wrong value in a message
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?\s*(Z|[+-]\d\d:?\d\d)?")


def shown(value: Any) -> str:
    """A wrong value, for a message: one line, not too long."""
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def lines_of(lines: Lines, number: int, line: bytes, record: Callable[[dict[str, Any]], Record]) -> Record | Bad:
    """What ``record`` makes of the JSON object in ``line``; a :class:`Bad` with the reason where that fails."""
    try:
        return record(object_of(line))
    except ValueError as error:
        return Bad(lines.file, number, str(error))


def object_of(line: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    row = parse(line)
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def ids_of(row: Mapping[str, Any], field: str) -> Sequence[int]:
    """A list of whole numbers from 0 to 2^64-1."""
    if field not in row:
        raise ValueError(f"it has no {field}")
    return checked_ids(row[field], field)


def checked_ids(ids: Any, field: str) -> Sequence[int]:
    """``ids``, if it is a list of whole numbers from 0 to 2^64-1."""
    if not isinstance(ids, list):
        raise ValueError(f"{field} is not a list")
    for value in ids:
        if type(value) is not int or not 0 <= value <= MAX_ID:
            raise ValueError(f"{field} holds {shown(value)}, which is no whole number from 0 to 2^64-1")
    return ids


def tokens_of(row: Mapping[str, Any], field: str, absent: int | None = None) -> int:
    """A number of tokens; ``absent``: what stands for none."""
    if field not in row and absent is None:
        raise ValueError(f"it has no {field}")
    value = row.get(field, absent)
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{field} is {shown(value)}, not a number of tokens")
    return value


def time_of(row: Mapping[str, Any], field: str, unit: int) -> int:
    """A time in nanoseconds, rounded half to even; UNKNOWN where the row has none."""
    if field not in row:
        return UNKNOWN
    return nanoseconds(row[field], field, unit)


def nanoseconds(stamp: Any, field: str, unit: int) -> int:
    """A number of ``10^unit`` nanoseconds (Decimal for exactness) as nanoseconds, rounded half to even."""
    name = UNITS[unit]
    if isinstance(stamp, bool) or not isinstance(stamp, (int, float, Decimal)):
        raise ValueError(f"{field} is {shown(stamp)}, not a number of {name}")
    try:
        exact = Decimal(stamp)
        if not exact.is_finite():
            raise ValueError(f"{field} is {shown(stamp)}, not a number of {name}")
        if exact < 0 or exact > MOST_NS:
            raise InvalidOperation
        value = int(_EXACT.scaleb(exact, unit).to_integral_value(ROUND_HALF_EVEN, _EXACT))
    except ArithmeticError:
        value = MOST_NS + 1
    if value > MOST_NS:
        most = MOST_NS // 10**unit
        raise ValueError(f"{field} is {shown(stamp)}: it must lie between 0 and {most:,} {name}")
    return value


def date_ns(text: str, field: str) -> int:
    """A date and time like ``2023-11-16 18:17:03.9799600`` (UTC unless it says otherwise) in ns since 1970."""
    match = _DATE.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute, second, fraction, zone = match.groups()
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=UTC)
        value = int(moment.timestamp()) * 10**9 + int((fraction or "0").ljust(9, "0"))
        if zone and zone != "Z":
            offset = int(zone[1:3]) * 60 + int(zone[-2:])
            value -= (1 if zone[0] == "+" else -1) * offset * 60 * 10**9
    except ValueError:
        raise ValueError(f"{field} is {shown(text)}, not a date and time") from None
    if not 0 <= value <= MOST_NS:
        raise ValueError(f"{field} is {shown(text)}: it must lie between 1970 and 2262")
    return value


def name_of(row: Mapping[str, Any], *fields: str) -> str:
    """The first of ``fields`` that is there, as text."""
    for field in fields:
        if field in row:
            return str(row[field])
    return ""


def block_size_of(source: Source, field: str, default: int) -> int:
    """The block size that the first record of a source states in ``field``, if it does; else ``default``."""
    for _, _, line in source.lines(LOOK_BYTES):
        try:
            row = object_of(line)
        except ValueError:
            continue
        value = row.get(field)
        if type(value) is int and 0 < value <= MAX_BLOCK_TOKENS:
            return value
        break
    return default


def checked_block_size(source: Source, row: Mapping[str, Any], field: str) -> None:
    """Refuse a record of another block size than the source's, unless the user chose that."""
    if source.options.block_size is None and field in row and row[field] != source.granule:
        raise ValueError(
            f"{field} is {shown(row[field])} where the file began with {source.granule}: "
            "one trace has one block size (--block-size N takes all as N)"
        )
