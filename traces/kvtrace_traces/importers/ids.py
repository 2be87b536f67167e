"""Plain ids: one a line, each a reference to one block, as classic cache traces are written.

An id is a whole number from 0 to 2^64-1, or any other text, of which a 64-bit hash is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from hashlib import blake2b

from kvtrace_traces.importers import Source, importer
from kvtrace_traces.importers.requests import MAX_ID, Record

CHUNK = 1 << 16


@importer("ids", "plain ids, one a line: each is a request of one block", lambda source: source.block_size or 1)
def read(source: Source) -> Iterator[Record]:
    """Yield records of many ids, each a request of its own, and bad lines one by one."""
    lines = source.lines()
    while chunk := list(itertools.islice(lines, CHUNK)):
        try:
            ids = [int(line) for _, line in chunk]
            if min(ids) >= 0 and max(ids) <= MAX_ID:
                yield Record(chunk[0][0], ids, single=True)
                continue
        except ValueError:
            pass
        for number, line in chunk:
            yield _one(number, line.strip())


def _one(number: int, text: bytes) -> Record:
    try:
        text.decode()
    except UnicodeDecodeError:
        return Record(number, (), bad="it is not UTF-8")
    if text.lstrip(b"+-").isdigit():
        value = int(text)
        if not 0 <= value <= MAX_ID:
            return Record(number, (), bad=f"{value} is not between 0 and 2^64-1")
        return Record(number, [value], single=True)
    return Record(number, [int.from_bytes(blake2b(text, digest_size=8).digest(), "little")], single=True)
