"""Thrift's compact protocol, as far as Parquet's structures need it (thrift-compact-protocol.md of Apache Thrift)."""

from __future__ import annotations

from typing import Any

I32, I64, BINARY, LIST_I32, LIST_BINARY, LIST_STRUCT, STRUCT = range(7)
_TYPES = {I32: 5, I64: 6, BINARY: 8, LIST_I32: 9, LIST_BINARY: 9, LIST_STRUCT: 9, STRUCT: 12}
_ELEMENTS = {LIST_I32: 5, LIST_BINARY: 8, LIST_STRUCT: 12}


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def struct(*fields: tuple[int, int, Any]) -> bytes:
    """A structure of (id, type, value), by ascending id; None is left out. Structures within it come as bytes."""
    out, before = bytearray(), 0
    for number, kind, value in fields:
        if value is None:
            continue
        assert before < number < before + 16
        out.append(number - before << 4 | _TYPES[kind])
        out += _value(kind, value)
        before = number
    return bytes(out) + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in (I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)  # zigzag
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == STRUCT:
        return bytes(value)
    element = {LIST_I32: I32, LIST_BINARY: BINARY, LIST_STRUCT: STRUCT}[kind]
    head = bytes([len(value) << 4 | _ELEMENTS[kind]]) if len(value) < 15 else bytes([0xF0 | _ELEMENTS[kind]])
    return head + (b"" if len(value) < 15 else varint(len(value))) + b"".join(_value(element, one) for one in value)
