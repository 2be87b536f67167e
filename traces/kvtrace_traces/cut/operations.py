"""The state that a log begins with, as operations: START, LIVE, KNOWN, KEPT and QUEUE of the schema."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_traces.schema import (
    EXT_OPS,
    KNOWN_GIVES,
    LIVE_BEGUN,
    LIVE_RUNNING,
    LIVE_SCHEDULED,
    LIVE_TABLE,
)
from kvtrace_traces.snapshot import Live

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
COMMIT_WORDS = 1 << 22
KNOWN_AT_ONCE, KEPT_AT_ONCE, QUEUED_AT_ONCE = 100_000, 100_000, 500_000  # an operation takes 2^20 words at most


def words_of(*values: Any) -> U32:
    """Words of an operation."""
    return np.array([int(value) & 0xFFFFFFFF for value in values], np.uint32)


def extended(name: str, words: U32) -> U32:
    """The operation of EXT with these words."""
    return np.concatenate([words_of(15 | (EXT_OPS[name].code | len(words) << 8) << 4), words])


def live_words(live: Iterable[Live]) -> list[U32]:
    """LIVE of each request, in this order, and KNOWN of those of which it is known."""
    operations, known = [], []
    for one in live:
        flags = (
            LIVE_RUNNING * one.running | LIVE_SCHEDULED * one.scheduled | LIVE_BEGUN * one.begun
            | LIVE_TABLE * (one.table is not None)
        )  # fmt: skip
        cached = 0 if one.cached is None else one.cached + 1
        told = (one.request, flags, one.computed, cached, one.preemptions, one.filled, *(one.table or ()))
        operations.append(extended("LIVE", words_of(*told)))
        if one.tokens is not None:
            known.append((one.request, one.tokens, one.under_way, KNOWN_GIVES * one.gives, one.lost))
    rows = np.array(known, np.uint32).reshape(-1, 5)
    parts = (rows[begin : begin + KNOWN_AT_ONCE] for begin in range(0, len(rows), KNOWN_AT_ONCE))
    return operations + [extended("KNOWN", part.ravel()) for part in parts]


def kept_words(cached: Any, identities: U64, parents: U64) -> list[U32]:
    """KEPT of blocks in the order in which they were filled, what each holds and what the one before it holds, 0 for
    none."""
    words = np.empty((len(cached), 5), np.uint32)
    words[:, 0] = cached
    words[:, 1:3] = np.ascontiguousarray(identities).view(np.uint32).reshape(-1, 2)
    words[:, 3:5] = np.ascontiguousarray(parents).view(np.uint32).reshape(-1, 2)
    return [extended("KEPT", words[i : i + KEPT_AT_ONCE].ravel()) for i in range(0, len(cached), KEPT_AT_ONCE)]


def queue_words(queue: Any) -> list[U32]:
    """QUEUE of the free queue, from its front."""
    found = np.asarray(queue, np.uint32)
    return [extended("QUEUE", found[i : i + QUEUED_AT_ONCE]) for i in range(0, len(found), QUEUED_AT_ONCE)]


def in_commits(operations: Iterable[U32]) -> Iterator[U32]:
    """Operations joined to as few commits as they fit into."""
    waiting: list[U32] = []
    size = 0
    for words in operations:
        if waiting and size + len(words) > COMMIT_WORDS:
            yield np.concatenate(waiting)
            waiting, size = [], 0
        waiting.append(words)
        size += len(words)
    if waiting:
        yield np.concatenate(waiting)
