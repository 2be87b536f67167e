"""BurstGPT's traces (Wang et al., 2024): a CSV of ``Timestamp`` (s), ``Model``, ``Request tokens``,
``Response tokens``, ``Total tokens``, ``Log Type``, newer ones with ``Session ID`` and ``Elapsed time``.

They tell when requests came and how long they were, and nothing of which had the same prefix. A request's type is its
log type, its parent the one before it in its session.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvtrace_traces.importers import importer, lengths
from kvtrace_traces.importers.batches import Piece
from kvtrace_traces.importers.source import Source

_NAMES = (
    ("Timestamp",), ("Request tokens",), ("Response tokens",), ("Log Type",), ("Session ID", "SessionID"),
)  # fmt: skip


@importer(
    "burstgpt", "BurstGPT CSV: times and lengths, reuse unknown",
    granule=lambda source: source.options.block_size or lengths.ANY_BLOCK_TOKENS, reuse=False,
)  # fmt: skip
def read(source: Source) -> Iterator[Piece]:
    """One request a line."""
    return lengths.read(source, _NAMES, typed=True)
