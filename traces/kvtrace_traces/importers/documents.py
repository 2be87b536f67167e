"""JSON documents out of files that hold one, one a line, or a list of them, without holding a whole list in memory."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from kvtrace_traces.errors import KvtraceError
from kvtrace_traces.importers.batches import Bad
from kvtrace_traces.importers.json_lines import parse
from kvtrace_traces.importers.source import Source

_SPACE = " \t\r\n"


class Document(NamedTuple):
    """A JSON value, and where it began."""

    file: Path
    line: int
    value: Any


def documents(source: Source) -> Iterator[Document | Bad]:
    """Every document of a source. A file is a list of documents where it begins with ``[``; a document by itself where
    it ends in one that spans several lines or is the only line; else it has one a line. Decimal numbers are exact."""
    for file in source.files:
        start = _start(source, file)
        if start == "[":
            yield from _of_list(source, file)
        elif start:
            yield from _of_lines(source, file)


def _start(source: Source, file: Path) -> str:
    for piece in source.pieces(file, 1 << 16):
        text = piece.removeprefix(codecs.BOM_UTF8).lstrip()
        if text:
            return chr(text[0])
    return ""


def _of_lines(source: Source, file: Path) -> Iterator[Document | Bad]:
    """A document a line; or, where the first line is not one, a single document."""
    whole = Source(source.path, [file], source.options, source.progress)
    lines = whole.lines()
    first = next(lines, None)
    if first is None:
        return
    _, number, line = first
    try:
        yield Document(file, number, parse(line))
    except ValueError as error:
        second = next(lines, None)
        if second is None or _reads(second[2]):
            yield Bad(file, number, str(error))
            if second is not None:
                lines = itertools.chain([second], lines)
        else:
            rest = b"\n".join([line, second[2], *(text for _, _, text in lines)])
            try:
                yield Document(file, number, parse(rest))
            except ValueError as wrong:
                yield Bad(file, number, str(wrong))
            return
    for _, number, line in lines:
        try:
            yield Document(file, number, parse(line))
        except ValueError as error:
            yield Bad(file, number, str(error))


def _again(
    first: tuple[Path, int, bytes], rest: Iterator[tuple[Path, int, bytes]]
) -> Iterator[tuple[Path, int, bytes]]:
    yield first
    yield from rest


def _reads(line: bytes) -> bool:
    try:
        return isinstance(parse(line), dict)
    except ValueError:
        return False


def _of_list(source: Source, file: Path) -> Iterator[Document | Bad]:
    """The values of a list, one after another. What is wrong in a list cannot be passed over: where the next value
    begins is not known then, so that the rest is one bad record."""
    decoder = json.JSONDecoder(parse_float=Decimal)
    text, line, ended = "", 1, False
    pieces = _text(source, file)
    text = next(pieces, "").lstrip("\ufeff")
    at = _past(text, 0) + 1  # behind the bracket
    line += text.count("\n", 0, at)
    expected = "first"
    while True:
        at, skipped = _past(text, at), at
        line += text.count("\n", skipped, at)
        ready = at < len(text)
        if ready and expected != "value" and text[at] == "]":
            if text[at + 1 :].strip(_SPACE) or "".join(pieces).strip(_SPACE):
                yield Bad(file, line, "something follows the list")
            return
        if ready and expected == "comma":
            if text[at] != ",":
                yield Bad(file, line, "it is not JSON: a comma is missing in the list")
                return
            at, expected = at + 1, "value"
            continue
        if ready:
            try:
                value, end = decoder.raw_decode(text, at)
                # A number that ends with the text may go on in the next piece.
                if end < len(text) or ended:
                    yield Document(file, line, value)
                    line += text.count("\n", at, end)
                    at, expected = end, "comma"
                    if at > 1 << 20:
                        text, at = text[at:], 0
                    continue
            except (ValueError, ArithmeticError, RecursionError):
                if ended:
                    yield Bad(file, line, "it is not JSON, or the file ends within it")
                    return
        if ended:
            yield Bad(file, line, "the list does not end: the file is cut short")
            return
        more = _at_least(pieces, len(text) - at)
        ended = not more
        text, at = text[at:] + more, 0


def _past(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _at_least(pieces: Iterator[str], size: int) -> str:
    """Pieces of at least ``size`` characters together, so that a long value is tried a few times only."""
    found: list[str] = []
    got = 0
    for piece in pieces:
        found.append(piece)
        got += len(piece)
        if got >= size:
            break
    return "".join(found)


def _text(source: Source, file: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in source.pieces(file, 1 << 20):
            yield decoder.decode(piece)
        yield decoder.decode(b"", True)
    except UnicodeDecodeError:
        raise KvtraceError(f"{file} is not UTF-8") from None
